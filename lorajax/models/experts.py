"""A mixture of experts in place of a feed-forward block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.settings import ACTIVATIONS, Execution


class Experts(nn.Module):
    """Gated feed-forward experts, `chosen` of `count` per token, weighted by their renormalised softmax (Mixtral,
    arXiv:2401.04088): (B, T, features) -> (B, T, features).

    Kernels are stacked: `gate`, `up` (count, features, inner), `down` (count, inner, features); `router` is (features,
    count). dense: every expert sees every token (count / chosen times the work, no sorting); otherwise the tokens are
    sorted by expert and each expert's run is one part of a `ragged_dot`. No token is ever dropped.
    """

    run: Execution
    features: int
    inner: int
    activation: str
    count: int
    chosen: int
    dense: bool = False
    init_std: float = 0.02

    def setup(self) -> None:
        init = nn.initializers.normal(self.init_std)
        types = {"dtype": self.run.dtype, "param_dtype": self.run.param_dtype}
        self.router = nn.Dense(self.count, use_bias=False, kernel_init=init, **types)
        shapes = {"gate": (self.features, self.inner), "up": (self.features, self.inner)}
        for name, shape in (shapes | {"down": (self.inner, self.features)}).items():
            setattr(self, name, _Kernels(self.run, (self.count, *shape), self.init_std))

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens, act = x.reshape(-1, self.features), ACTIVATIONS[self.activation]
        weights = jax.nn.softmax(self.router(tokens).astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(weights, self.chosen)
        weights = (weights / weights.sum(-1, keepdims=True)).astype(x.dtype)
        if self.dense:
            each = jnp.broadcast_to(tokens, (self.count, *tokens.shape))  # so that an expert is one matrix to adapt
            inner = act(jnp.matmul(each, self.gate())) * jnp.matmul(each, self.up())
            every = jnp.matmul(inner, self.down())
            share = (jax.nn.one_hot(experts, self.count, dtype=x.dtype) * weights[:, :, None]).sum(1)
            return jnp.einsum("end,ne->nd", every, share).reshape(x.shape)
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=self.count).astype(jnp.int32)
        rows = tokens[order // self.chosen]
        inner = act(jax.lax.ragged_dot(rows, self.gate(), sizes)) * jax.lax.ragged_dot(rows, self.up(), sizes)
        out = jax.lax.ragged_dot(inner, self.down(), sizes) * weights.reshape(-1)[order][:, None]
        return jnp.zeros_like(tokens).at[order // self.chosen].add(out).reshape(x.shape)


class _Kernels(nn.Module):
    """One stacked parameter `kernel`, in the computation dtype."""

    run: Execution
    shape: tuple[int, ...]
    init_std: float

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(self.init_std)
        return self.param("kernel", init, self.shape, self.run.param_dtype).astype(self.run.dtype)
