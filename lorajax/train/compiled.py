"""Programs that are compiled once stay compiled for the next run: other seeds, resumed runs."""

from __future__ import annotations

import os

import jax

from lorajax.io.assets import cache_folder


def compile_cache() -> None:
    """Turns JAX's persistent cache on, below `cache_folder()` unless JAX_COMPILATION_CACHE_DIR names a place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
