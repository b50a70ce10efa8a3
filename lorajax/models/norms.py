"""LayerNorm and RMSNorm over the last axis, with float32 statistics whatever the dtype of their input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.settings import Execution


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias, (..., size) -> (..., size) in `run.dtype`."""

    run: Execution
    size: int
    eps: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, dtype, lead = (self.size,), self.run.param_dtype, (1,) * (x.ndim - 1)
        scale = self.param("scale", nn.initializers.ones, shape, dtype).astype(jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * scale.reshape(*lead, -1)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape, dtype).astype(jnp.float32)
            y = y + bias.reshape(*lead, -1)
        return y.astype(self.run.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale), (..., size) -> (..., size) in `run.dtype` (arXiv:1910.07467).

    offset: 0, or 1 where the checkpoint stores the scale minus one (Gemma).
    """

    run: Execution
    size: int
    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, (self.size,), self.run.param_dtype).astype(jnp.float32) + self.offset
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (y * scale.reshape(*(1,) * (x.ndim - 1), -1)).astype(self.run.dtype)
