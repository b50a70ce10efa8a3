"""Flax Linen models of the table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from .case import Built, Weight, case, fill, normal

CONV = Weight((0, 1, 2), (3,), op="conv")
Q, O = Weight((0,), (1, 2)), Weight((0, 1), (2,))
X = normal(5, 7, 8)


def linen(model: nn.Module, *args: Any, **static: Any) -> Built:
    """`model.apply` with every variable a parameter."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **static))
    return Built(lambda params, *a: model.apply(params, *a, **static), fill(shapes), args)


@case({"params/layers_0/kernel": Weight(), "params/layers_2/kernel": Weight()})
def linen_dense() -> Built:
    return linen(nn.Sequential([nn.Dense(12), jnp.tanh, nn.Dense(8)]), X)


@case({"params/layers_0/kernel": Q, "params/layers_2/kernel": O})
def linen_dense_general() -> Built:
    return linen(nn.Sequential([nn.DenseGeneral((2, 6)), jnp.tanh, nn.DenseGeneral(8, axis=(-2, -1))]), X)


@case({"params/kernel": Weight((1,), (2,), (0,))})
def linen_dense_general_batch() -> Built:
    return linen(nn.DenseGeneral(6, axis=-1, batch_dims=(0,)), X)


@case({"params/embedding": Weight(op="lookup")})
def linen_embed() -> Built:
    return linen(nn.Embed(11, 8), jnp.arange(10).reshape(2, 5) % 7)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(11, 8)
        return embed.attend(nn.LayerNorm()(jnp.tanh(nn.Dense(8)(embed(tokens)))))


@case({"params/Embed_0/embedding": Weight(op="lookup", uses=2), "params/Dense_0/kernel": Weight()})
def linen_tied() -> Built:
    return linen(Tied(), jnp.arange(10).reshape(2, 5) % 7)


@case({f"params/layers_{i}/kernel": CONV for i in (0, 2, 4)})
def linen_conv() -> Built:
    return linen(nn.Sequential([
        nn.Conv(12, (3, 3), strides=(2, 1), padding="VALID"), jnp.tanh,
        nn.Conv(10, (3, 2), kernel_dilation=(2, 1), padding=((1, 2), (0, 1))), jnp.tanh,
        nn.Conv(8, (2, 3), input_dilation=(1, 2), padding=((0, 1), (1, 1))),
    ]), normal(2, 9, 7, 4))


@case({"params/kernel": CONV})
def linen_conv_1x1() -> Built:
    return linen(nn.Conv(12, (1, 1)), normal(2, 9, 7, 4))


@case({"params/layers_0/kernel": Weight((0, 1), (2,), op="conv")})
def linen_conv_causal() -> Built:
    return linen(nn.Sequential([nn.Conv(12, (3,), padding="CAUSAL"), jnp.tanh]), X)


@case({f"params/layers_{i}/kernel": CONV for i in (0, 2)})
def linen_conv_grouped() -> Built:
    """Four groups, then a depthwise convolution."""
    return linen(nn.Sequential([nn.Conv(16, (3, 3), feature_group_count=4), jnp.tanh,
                                nn.Conv(32, (3, 3), feature_group_count=16, padding="VALID")]), normal(2, 9, 7, 8))


@case({"params/layers_0/kernel": CONV, "params/layers_2/kernel": Weight((0, 1, 3), (2,), op="conv")})
def linen_conv_transpose() -> Built:
    return linen(nn.Sequential([nn.ConvTranspose(12, (3, 3), strides=(2, 2)), jnp.tanh,
                                nn.ConvTranspose(10, (2, 3), transpose_kernel=True)]), normal(2, 5, 3, 4))


@case({"params/query/kernel": Q, "params/key/kernel": Q, "params/value/kernel": Q, "params/out/kernel": O})
def linen_attention() -> Built:
    mask = jnp.tril(jnp.ones((1, 1, 7, 7), bool))
    return linen(nn.MultiHeadDotProductAttention(2), X, X, mask=mask)


@case({f"params/cell/{gate}/kernel": Weight() for gate in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")})
def linen_lstm() -> Built:
    return linen(nn.RNN(nn.LSTMCell(13, name="cell")), X)


@case({f"params/cell/{gate}/kernel": Weight() for gate in ("ir", "iz", "in", "hr", "hz", "hn")})
def linen_gru() -> Built:
    return linen(nn.RNN(nn.GRUCell(12, name="cell")), X)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(12, (3, 3))(x))
        return nn.Dense(10)(jnp.tanh(x).mean((1, 2)))


@case({"Conv_0/kernel": CONV, "Dense_0/kernel": Weight()})
def linen_batchnorm() -> Built:
    """Mutable collections: the new batch statistics are outputs as well."""
    model, x = Normed(), normal(4, 6, 5, 4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes["batch_stats"])

    def fn(params: Any, stats: Any, x: jax.Array) -> Any:
        return model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

    return Built(fn, fill(shapes["params"]), (stats, x))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(8)(nn.Dropout(0.5, deterministic=not train)(jnp.tanh(nn.Dense(12)(x))))


@case({"params/Dense_0/kernel": Weight(), "params/Dense_1/kernel": Weight()})
def linen_dropout() -> Built:
    """A random key among the arguments and a static flag beside it."""
    model = Dropped()
    params = fill(jax.eval_shape(lambda: model.init(jax.random.key(0), X, False)))
    return Built(lambda p, key, x: model.apply(p, x, True, rngs={"dropout": key}), params, (jax.random.key(3), X))


class Block(nn.Module):
    """Pre-norm MLP with a DenseGeneral in the middle: a (carry, None) -> (carry, None) scan body."""

    dtype: Any = None
    boxed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        init = nn.initializers.normal()
        if self.boxed:
            init = nn.with_partitioning(init, ("embed", "mlp"))
        h = nn.LayerNorm()(x)  # float32 always: flax promotes inside, which strict promotion refuses
        h = jnp.tanh(nn.Dense(12, dtype=self.dtype, kernel_init=init, name="up")(h))
        h = nn.DenseGeneral((2, 6), dtype=self.dtype, name="heads")(h)
        return x + nn.DenseGeneral(8, axis=(-2, -1), dtype=self.dtype, name="down")(h).astype(x.dtype), None


class Stack(nn.Module):
    """Four blocks: scanned over parameter axis `axis`, or a loop if None; rematerialised if asked."""

    axis: int | None = 0
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block: Any = Block
        if self.remat:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            block = nn.remat(block, policy=policy, prevent_cse=self.axis is None)
        if self.axis is None:
            for i in range(2):
                x, _ = block(self.dtype, name=f"block_{i}")(x)
            return x
        scanned = nn.scan(block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=4)
        return scanned(self.dtype, name="blocks")(x, None)[0]


def blocks(prefix: str, axis: int | None = None) -> dict[str, Weight]:
    if axis == 0:
        rows = {"up": Weight((1,), (2,), (0,)), "heads": Weight((1,), (2, 3), (0,)), "down": Weight((1, 2), (3,), (0,))}
    elif axis == 1:
        rows = {"up": Weight((0,), (2,), (1,)), "heads": Weight((0,), (2, 3), (1,)), "down": Weight((0, 2), (3,), (1,))}
    else:
        rows = {"up": Weight(), "heads": Q, "down": O}
    return {f"params/{prefix}/{name}/kernel": row for name, row in rows.items()}


@case(blocks("blocks", 0))
def linen_scan() -> Built:
    return linen(Stack(0), X)


@case(blocks("blocks", 1))
def linen_scan_axis_1() -> Built:
    return linen(Stack(1), X)


@case(blocks("block_0") | blocks("block_1"))
def linen_remat() -> Built:
    return linen(Stack(None, remat=True), X)


@case(blocks("blocks", 0))
def linen_scan_remat() -> Built:
    return linen(Stack(0, remat=True), X)


@case(blocks("blocks", 1))
def linen_scan_axis_1_remat() -> Built:
    return linen(Stack(1, remat=True), X)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = nn.Dense(4, name="router")(x)
        experts = nn.vmap(Mlp, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, axis_size=4)
        y = experts(name="experts")(jnp.broadcast_to(x[None], (4, *x.shape)))
        return jnp.einsum("ebtd,bte->btd", y, nn.softmax(gate))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(8, name="down")(jnp.tanh(nn.Dense(12, name="up")(x)))


@case({"params/router/kernel": Weight(), "params/experts/up/kernel": Weight((1,), (2,), (0,)),
       "params/experts/down/kernel": Weight((1,), (2,), (0,))})
def linen_vmap_experts() -> Built:
    return linen(Experts(), X)


@case({"params/up/kernel": Weight(), "params/heads/kernel": Q, "params/down/kernel": O})
def linen_partitioned() -> Built:
    """Boxes of nn.with_partitioning around a weight."""
    return linen(Block(boxed=True), X)


def half_precision(model: nn.Module, exact: nn.Module) -> Built:
    built = linen(model, X)
    return built._replace(exact=lambda params, x: exact.apply(params, x))


@case(blocks("block_0") | blocks("block_1"))
def linen_bf16() -> Built:
    """bf16 compute over float32 parameters."""
    return half_precision(Stack(None, dtype=jnp.bfloat16), Stack(None))


@case(blocks("blocks", 0))
def linen_bf16_scan_remat() -> Built:
    return half_precision(Stack(0, True, jnp.bfloat16), Stack(0, True))


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.WeightNorm(nn.Dense(12))(x)


@case({"params/Dense_0/kernel": Weight()}, fallback="", places=None)
def linen_weightnorm() -> Built:
    return linen(Normalised(), X)


class Custom(nn.Module):
    """A module of nobody's library: its own parameters, one four-dimensional."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = self.param("qkv", nn.initializers.normal(), (8, 3 + 1, 2, 6))
        q, k, v, g = jnp.einsum("btd,dshe->sbthe", x, qkv)
        a = nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
        y = jnp.einsum("bhts,bshe->bthe", a, v * nn.sigmoid(g))
        return jnp.einsum("bthe,hed->btd", y, self.param("out", nn.initializers.normal(), (2, 6, 8)))


@case({"params/qkv": Weight((0,), (1, 2, 3)), "params/out": O})
def linen_custom_module() -> Built:
    return linen(Custom(), X)
