"""What the layers of several models share: how they are stacked, the feed-forward block, the mixture of experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.settings import ACTIVATIONS, Execution


def rematerialised(layer: type[nn.Module], run: Execution) -> type[nn.Module]:
    """`layer`, with its activations recomputed in the backward pass as `run.remat` says."""
    if run.remat == "none":
        return layer
    return nn.remat(layer, policy=run.remat_policy, prevent_cse=not run.scan_layers)


def scanned(layer: type[nn.Module], run: Execution, length: int, in_axes: Any) -> Any:
    """`length` equal layers as one module with stacked parameters; `in_axes` are those of the call after the carry."""
    return nn.scan(
        rematerialised(layer, run),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
    )


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) if `gated`: (B, T, features) -> (B, T, features)."""

    run: Execution
    features: int
    inner: int
    activation: str
    gated: bool = False
    bias: bool = True
    init_std: float = 0.02
    dropout: float = 0.0
    deterministic: bool = True

    def setup(self) -> None:
        init = nn.initializers.normal(self.init_std)

        def dense(features: int) -> nn.Dense:
            types = {"dtype": self.run.dtype, "param_dtype": self.run.param_dtype}
            return nn.Dense(features, use_bias=self.bias, kernel_init=init, **types)

        self.up, self.down = dense(self.inner), dense(self.features)
        if self.gated:
            self.gate = dense(self.inner)
        self.drop = nn.Dropout(self.dropout, deterministic=self.deterministic)

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        inner = act(self.gate(x)) * self.up(x) if self.gated else act(self.up(x))
        return self.down(self.drop(inner))


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
            inner = act(jnp.einsum("nd,edf->nef", tokens, self.gate())) * jnp.einsum("nd,edf->nef", tokens, self.up())
            every = jnp.einsum("nef,efd->ned", inner, self.down())
            share = (jax.nn.one_hot(experts, self.count, dtype=x.dtype) * weights[:, :, None]).sum(1)
            return jnp.einsum("ned,ne->nd", every, share).reshape(x.shape)
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
