"""The model of the benchmarks: identical pre-norm encoder layers in Flax Linen, stacked in one of three styles."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import lorajax as lj

Style = Literal["unrolled", "scanned", "jitted"]
KERNEL = r".*kernel"  # the rule: an adapter on each of the six kernels of a layer


class Layer(nn.Module):
    heads: int
    ffn: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(self.ffn, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class Encoder(NamedTuple):
    loss: Callable[[Any, jax.Array], jax.Array]  # (params, x) -> scalar
    params: Any
    x: jax.Array


def encoder(style: Style, layers: int, width: int, ffn: int, heads: int, batch: int, tokens: int) -> Encoder:
    layer = Layer(heads, ffn)
    x = jax.random.normal(jax.random.key(0), (batch, tokens, width))
    stacked = jax.jit(jax.vmap(lambda key: layer.init(key, x)["params"]))(jax.random.split(jax.random.key(1), layers))

    def one(params: Any, x: jax.Array) -> jax.Array:
        y = layer.apply({"params": params}, x)
        assert isinstance(y, jax.Array)
        return y

    def unrolled(params: Any, x: jax.Array) -> jax.Array:
        step = jax.jit(one) if style == "jitted" else one
        for i in range(layers):
            x = step(params[f"layer_{i}"], x)
        return jnp.square(x).mean()

    def scanned(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(jax.lax.scan(lambda x, p: (one(p, x), None), x, params["layers"])[0]).mean()

    if style == "scanned":
        return Encoder(scanned, {"layers": stacked}, x)
    return Encoder(unrolled, {f"layer_{i}": jax.tree.map(lambda p, i=i: p[i], stacked) for i in range(layers)}, x)


class Adapted(NamedTuple):
    lifted: Callable[[Any, Any, jax.Array], jax.Array]  # (trainable, frozen, x) -> scalar; never forms W + AB
    merged: Callable[[Any, Any, jax.Array], jax.Array]  # the same through W + AB
    trainable: Any
    frozen: Any


def adapted(model: Encoder, rank: int, wrap: Callable[[lj.Variant], lj.Variant] = lambda lora: lora) -> Adapted:
    adapt = lj.adapt(lj.sites(model.loss, model.params, model.x), [(KERNEL, wrap(lj.LoRA(rank=rank)))])
    trainable, frozen = adapt.init(jax.random.key(2), model.params)
    run = lj.lift(model.loss, strict=True)
    return Adapted(
        lambda trainable, frozen, x: run(adapt.bind(trainable, frozen), x),
        lambda trainable, frozen, x: model.loss(adapt.merge(trainable, frozen), x),
        trainable,
        frozen,
    )
