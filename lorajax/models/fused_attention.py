"""The fused attention kernel in shapes alone, to plan where there is no such kernel: it is traced and never run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

# Named as JAX names cuDNN's, by which `keeps_products` knows them.
_forward, _backward = Primitive("dot_product_attention_fwd_shape"), Primitive("dot_product_attention_bwd_shape")
_forward.multiple_results = _backward.multiple_results = True


@_forward.def_abstract_eval
def _(q: Any, k: Any, v: Any) -> Any:
    batch, tokens, heads, _ = q.shape
    return [q, q.update(shape=(batch, heads, tokens), dtype=jnp.dtype(jnp.float32), weak_type=False)]


@_backward.def_abstract_eval
def _(q: Any, k: Any, v: Any, *_: Any) -> Any:
    return [q, k, v]


def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array, **_: Any) -> jax.Array:
    """q (B, T, N, H), k and v (B, S, K, H) -> (B, T, N, H), for `Execution.attention`; masks and biases have no part.

    Kept for the backward pass, as by cuDNN's kernel: these four and the softmax's normaliser (B, N, T), float32.
    """
    return _fused(q, k, v)


@jax.custom_vjp
def _fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _forward.bind(q, k, v)[0]


def _kept(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    out, normaliser = _forward.bind(q, k, v)
    return out, (q, k, v, normaliser, out)


def _gradients(kept: Any, by: jax.Array) -> Any:
    return tuple(_backward.bind(*kept, by))


_fused.defvjp(_kept, _gradients)
