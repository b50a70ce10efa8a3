"""Strict numerics for every test: no silent dtype or rank promotion, exact matmuls, eight CPU devices.

Warnings are errors (`filterwarnings` in pyproject.toml). The settings must be made before JAX starts its backend.
"""

import importlib.metadata
import os

os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",  # most programs here run once: compiling is what costs
    # Half again; later versions have no such option.
    *(["--xla_cpu_use_fusion_emitters=false"] if importlib.metadata.version("jax").startswith("0.10.") else []),
])  # fmt: skip
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # `JAX_PLATFORMS=cuda pytest -m gpu` runs the GPU tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
