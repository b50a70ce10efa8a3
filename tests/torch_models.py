"""Tiny random models of `transformers`, for the tests marked `peft`: built, run on the CPU, and read by our models."""

from typing import Any

import jax
import numpy as np
import pytest

from lorajax.models import model_from_hf, params_from_hf


def build(auto: str, model_type: str, seed: int = 0, **settings: Any) -> Any:
    """`AutoModel...` class of `transformers` from a configuration, every parameter and buffer drawn with spread."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: peft)")
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = 0.1 if weight.ndim == 1 else 0.5 / weight.shape[-1] ** 0.5
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") and model_type != "gemma" else 0.0
            weight.copy_(torch.randn(weight.shape) * spread + centre)
    return model


def ours(theirs: Any, tmp_path: Any, **overrides: Any) -> tuple[Any, Any]:
    """Our model and its parameters, by way of the folder that `transformers` writes."""
    from lorajax.io.hf import open_checkpoint

    theirs.save_pretrained(tmp_path)
    config, tensors = open_checkpoint(tmp_path)
    model = model_from_hf(config, **overrides)
    loaded = params_from_hf(model.config, tensors)
    assert loaded.fresh == ()
    return model, loaded.variables


def run(theirs: Any, **inputs: Any) -> np.ndarray:
    """Logits of the torch model as NumPy."""
    import torch

    with torch.no_grad():
        tensors = {name: torch.tensor(np.asarray(x)) for name, x in inputs.items()}
        tensors = {name: x.long() if x.dtype == torch.int32 else x for name, x in tensors.items()}
        return theirs(**tensors).logits.numpy()


def apply(model: Any, variables: Any, *inputs: Any, **named: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda v: model.apply(v, *inputs, **named))(variables))
