"""A model with a table, a stack of layers, a convolution and a head, and trained adapters of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lorajax as lj
from lorajax.compose import Adapter
from lorajax.variants import LoRA

RNG = np.random.default_rng(3)
PARAMS = {name: jnp.asarray(RNG.normal(size=shape) * 0.5, jnp.float32) for name, shape in {
    "table": (11, 6), "stack": (2, 6, 6), "conv": (3, 6, 7), "bias": (7,), "head": (7, 4)}.items()}
TOKENS = jnp.asarray(RNG.integers(0, 11, (3, 5)), jnp.int32)


def model(p: Any, tokens: jax.Array) -> jax.Array:
    x = p["table"][tokens]
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]
    x = lax.conv_general_dilated(x, p["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return jnp.tanh(x + p["bias"][None, None]).mean(1) @ p["head"]


SITES = lj.sites(model, PARAMS, TOKENS)
EVERYWHERE = "table|stack|conv|head"


def trained(seed: int, rules: Any, params: Any = PARAMS) -> Adapter:
    """An adapter with noise in every trained array."""
    rules = [(EVERYWHERE, rules)] if not isinstance(rules, list) else rules
    adapt = lj.adapt(lj.sites(model, params, TOKENS), rules)
    start, frozen = adapt.init(jax.random.key(seed), params)
    rng = np.random.default_rng(seed)
    noise = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), start)
    return Adapter(adapt, noise, frozen)


def updates(one: Any, params: Any = PARAMS) -> dict[str, np.ndarray]:
    """path -> what the adapter adds to the ORIGINAL base, in the weight's own shape."""
    merged = one.adapt.merge(one.trainable, one.frozen)
    return {path: np.asarray(merged[path], np.float64) - np.asarray(params[path], np.float64) for path in params}


def matrices(path: str, update: np.ndarray) -> np.ndarray:
    """(stack, in, out) of an update in the weight's shape."""
    return update.reshape(-1, 6, 6) if path == "stack" else update.reshape(1, -1, update.shape[-1])


ONE = trained(1, LoRA(rank=2, alpha=3.0))
TWO = trained(2, LoRA(rank=3, alpha=5.0, rslora=True))
