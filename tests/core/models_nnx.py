"""Flax NNX models of the table: split into a graph, the parameters and the rest, and merged inside the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .case import Built, Weight, case, fill, normal

Q, O = Weight((0,), (1, 2)), Weight((0, 1), (2,))
X = normal(5, 7, 8)


def nnx_model(make: Callable[[nnx.Rngs], nnx.Module], *args: Any) -> Built:
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    return Built(lambda params, *a: nnx.merge(graph, params, rest, copy=True)(*a), fill(params), args)


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.tanh(self.up(x)))


MLP = {"up/kernel": Weight(), "down/kernel": Weight()}
STACK = {"layers/up/kernel": Weight((1,), (2,), (0,)), "layers/down/kernel": Weight((1,), (2,), (0,))}


@case(MLP)
def nnx_linear() -> Built:
    return nnx_model(Mlp, X)


class Einsums(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.split = nnx.Einsum("btd,dhe->bthe", (8, 2, 6), (2, 6), rngs=rngs)
        self.join = nnx.Einsum("bthe,hed->btd", (2, 6, 8), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.join(jnp.tanh(self.split(x)))


@case({"split/kernel": Q, "join/kernel": O})
def nnx_einsum() -> Built:
    return nnx_model(Einsums, X)


@case({"query/kernel": Q, "key/kernel": Q, "value/kernel": Q, "out/kernel": O})
def nnx_attention() -> Built:
    return nnx_model(lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs), X)


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), feature_group_count=2, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed.attend(self.conv(self.embed(tokens)))


@case({"embed/embedding": Weight(op="lookup", uses=2), "conv/kernel": Weight((0, 1), (2,), op="conv")})
def nnx_tied() -> Built:
    return nnx_model(Tied, jnp.arange(10).reshape(2, 5) % 7)


class Loop(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Mlp(rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


@case({f"layers/{i}/{path}": row for i in range(2) for path, row in MLP.items()})
def nnx_loop() -> Built:
    return nnx_model(Loop, X)


class Remat(Loop):
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = nnx.remat(Mlp.__call__)(layer, x)
        return x


@case({f"layers/{i}/{path}": row for i in range(2) for path, row in MLP.items()})
def nnx_remat() -> Built:
    """nnx.remat returns the parameters among its outputs."""
    return nnx_model(Remat, X)


class Scanned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=4)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> Mlp:
            return Mlp(rngs)

        self.layers = make(rngs)

    def step(self, layer: Mlp, x: jax.Array) -> jax.Array:
        return layer(x)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: jax.Array, layer: Mlp) -> jax.Array:
            return self.step(layer, x)

        return run(x, self.layers)


@case(STACK)
def nnx_scan() -> Built:
    return nnx_model(Scanned, X)


class ScannedRemat(Scanned):
    def step(self, layer: Mlp, x: jax.Array) -> jax.Array:
        return nnx.remat(Mlp.__call__)(layer, x)


@case(STACK)
def nnx_scan_remat() -> Built:
    return nnx_model(ScannedRemat, X)


class Vmapped(Scanned):
    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0))(self.layers, jnp.stack([x, -x, 2 * x, x * x]))


@case(STACK)
def nnx_vmap() -> Built:
    return nnx_model(Vmapped, X)
