"""Plain JAX functions of the table: contractions, layout, convolutions, lookups, straight to the primitives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .case import Built, Weight, case, normal

X = normal(5, 8)
XT = normal(5, 7, 8)
W = {"w": Weight()}
CONV = Weight((0, 1, 2), (3,), op="conv")


def one(fn: Any, w: jax.Array, *args: Any) -> Built:
    """A function of a single weight called `w`."""
    return Built(lambda params, *a: fn(params["w"], *a), {"w": w}, args)


def d(*shape: int) -> jax.Array:
    return normal(*shape, scale=0.4)


@case({"w": Weight(), "v": Weight()})
def raw_einsum() -> Built:
    """Transposed operands and a three-operand einsum."""

    def fn(p: Any, x: jax.Array) -> Any:
        h = jnp.einsum("io,bti->obt", p["w"], x)
        return h, jnp.einsum("obt,oi,bti->bt", jnp.cos(h), p["v"], x)

    return Built(fn, {"w": d(8, 12), "v": d(12, 8)}, (XT,))


@case({"w": Weight((1,), (0,))})
def raw_transposed() -> Built:
    return one(lambda w, x: x @ w.T, d(12, 8), X)


@case(W)
def raw_weight_on_the_left() -> Built:
    return one(lambda w, x: lax.dot_general(w, x, (((0,), (2,)), ((), ()))), d(8, 12), XT)


@case(W)
def raw_both_sides() -> Built:
    """One weight contracted on its input side, then on its output side (a tied auto-encoder)."""
    return one(lambda w, x: jnp.tanh(x @ w) @ w.T, d(8, 12), X)


@case(W)
def raw_both_dims() -> Built:
    """Both dimensions contracted: a bilinear form, as two products and as one."""
    def fn(w: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        return jnp.einsum("bi,io,bo->b", x, w, y), jnp.einsum("io,bio->b", w, x[..., None] * y[:, None])

    return one(fn, d(12, 8), normal(5, 12), X)


@case(W)
def raw_reshaped() -> Built:
    """(D, 40) -> (D, 8, 5) by reshape, and the heads transposed."""
    return one(lambda w, x: jnp.einsum("btd,dhk->bthk", x, w.reshape(8, 8, 5)), d(8, 40), XT)


@case(W)
def raw_fused_heads() -> Built:
    """Key and value in one kernel: (D, 40) -> (D, 2, 4, 5), then picked and transposed."""

    def fn(w: jax.Array, x: jax.Array) -> Any:
        kv = w.reshape(8, 2, 4, 5)
        return jnp.einsum("btd,dhk->bhtk", x, kv[:, 0]), jnp.einsum("btd,hdk->bthk", x, kv[:, 1].swapaxes(0, 1))

    return one(fn, d(8, 40), XT)


@case({"w": Weight((0, 1), (2,))})
def raw_merged_dims() -> Built:
    """(h, k, D) -> (h k, D)."""
    return one(lambda w, x: x @ w.reshape(8, 10), d(2, 4, 10), X)


@case(W)
def raw_split() -> Built:
    def fn(w: jax.Array, x: jax.Array) -> Any:
        q, k, v = jnp.split(w, (6, 10), axis=1)
        return x @ q, jnp.tanh(x @ k), x @ v

    return one(fn, d(8, 22), X)


@case(W)
def raw_slice() -> Built:
    return one(lambda w, x: (x @ w[:, :10], x[:, :3] @ w[1:4, 10:], x @ w[:, ::2]), d(8, 22), X)


@case(W)
def raw_dynamic_slice() -> Built:
    return one(lambda w, x, i: x @ lax.dynamic_slice_in_dim(w, i, 10, 1), d(8, 22), X, jnp.int32(3))


@case(W)
def raw_new_axis() -> Built:
    return one(lambda w, x: jnp.matmul(x, w[None]), d(8, 12), XT)


@case(W)
def raw_broadcast() -> Built:
    return one(lambda w, x: jnp.einsum("bti,bio->bto", x, jnp.broadcast_to(w, (5, 8, 12))), d(8, 12), XT)


@case({"w": Weight((0,), (1, 2))})
def raw_partial_contraction() -> Built:
    return one(lambda w, x: jnp.einsum("bi,ijk->bjk", x, w), d(8, 4, 6), X)


@case({"w": Weight((1,), (2,), (0,))})
def raw_batched() -> Built:
    """Batched product: one matrix per head."""
    return one(lambda w, x: jnp.einsum("bthi,hio->btho", x, w), d(4, 8, 12), normal(5, 7, 4, 8))


SIZES = {"a": 4, "b": 5, "c": 6, "d": 8, "x": 7, "y": 2}


def contraction(rng: np.random.Generator) -> tuple[str, str, str, Weight]:
    """A random einsum (weight, data, result) whose weight has dimensions of each kind, in any order."""
    kinds = ["in", "out", *rng.choice(["in", "out", "stack"], rng.integers(0, 3)).tolist()]
    rng.shuffle(kinds)
    letters = {kind: "".join("abcd"[i] for i, k in enumerate(kinds) if k == kind) for kind in ("in", "out", "stack")}
    axes = {kind: tuple(i for i, k in enumerate(kinds) if k == kind) for kind in letters}
    data, result = ("".join(rng.permutation(list(letters[kind] + letters["stack"] + "xy"))) for kind in ("in", "out"))
    return "abcd"[:len(kinds)], data, result, Weight(axes["in"], axes["out"], axes["stack"])


CONTRACTIONS = [contraction(np.random.default_rng(seed)) for seed in range(10)]


@case({f"w{i}": weight for i, (_, _, _, weight) in enumerate(CONTRACTIONS)})
def raw_random_contractions() -> Built:
    """Ten weights with in, out and stack dimensions in any order, on either side of the product."""

    def product(i: int, w: jax.Array, data: jax.Array) -> jax.Array:
        left, right, result, _ = CONTRACTIONS[i]
        if i % 2:
            return jnp.einsum(f"{left},{right}->{result}", w, data)
        return jnp.einsum(f"{right},{left}->{result}", data, w)

    def array(letters: str, seed: int) -> jax.Array:
        return normal(*[SIZES[letter] for letter in letters], seed=seed, scale=0.5)

    params = {f"w{i}": array(w, i) for i, (w, _, _, _) in enumerate(CONTRACTIONS)}
    data = [array(x, 50 + i) for i, (_, x, _, _) in enumerate(CONTRACTIONS)]
    return Built(lambda p, xs: [product(i, p[f"w{i}"], x) for i, x in enumerate(xs)], params, (data,))


@case(W)
def raw_scaled() -> Built:
    """Times a number, static or traced; negated; divided."""
    def fn(w: jax.Array, x: jax.Array, n: jax.Array) -> Any:
        s = n.astype(jnp.float32)
        return x @ (w * 0.5), x @ (s * w), x @ -w, x @ (w / s)

    return one(fn, d(8, 13), X, jnp.int32(-3))


@case(W)
def raw_reversed() -> Built:
    return one(lambda w, x: (x @ w[::-1], x @ jnp.flip(w, 1), x @ jnp.squeeze(w[:, None])), d(8, 12), X)


@case(W)
def raw_stop_gradient() -> Built:
    return one(lambda w, x: (jnp.sin(x @ lax.stop_gradient(w)), x @ w), d(8, 12), X)


@case(W)
def raw_bf16_base() -> Built:
    """The base itself in bf16, the adapter in float32."""
    built = one(lambda w, x: x @ w, d(8, 12).astype(jnp.bfloat16), X.astype(jnp.bfloat16))
    return built._replace(exact=lambda p, x: x.astype(jnp.float32) @ p["w"].astype(jnp.float32))


@case(W)
def raw_cast() -> Built:
    """bf16 weights, float32 accumulation."""
    def fn(w, x):
        return jnp.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    built = one(fn, d(8, 12), X)
    return built._replace(exact=lambda p, x: x @ p["w"])


@case({"w": Weight((1, 2, 3), (0,), op="conv")})
def raw_conv_nchw() -> Built:
    return one(lambda w, x: lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")),
               d(12, 4, 3, 3), normal(2, 4, 7, 5))


@case({"w": Weight((1, 2, 3), (0,), op="conv")})
def raw_conv_nchw_grouped() -> Built:
    return one(lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW"),
                                                     feature_group_count=2, rhs_dilation=(2, 1)),
               d(12, 4, 3, 3), normal(2, 8, 7, 5))


@case({"w": CONV})
def raw_conv_transpose() -> Built:
    return one(lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME"), d(3, 3, 4, 12), normal(2, 5, 7, 4))


@case({"w": Weight((0, 1), (2,), op="conv")}, fallback="conv_general_dilated")
def raw_conv_batch_groups() -> Built:
    return one(lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
                                                     batch_group_count=2), d(3, 4, 12), normal(6, 7, 4))


@case({"w": Weight(op="lookup")})
def raw_lookup_modes() -> Built:
    """jnp.take with every mode, some indices out of range or negative, and plain indexing."""

    def fn(w: jax.Array, i: jax.Array) -> Any:
        modes = [jnp.take(w, i, axis=0, mode=mode) for mode in ("fill", "wrap", "clip")]
        filled = w.at[i].get(mode="fill", fill_value=7)
        return [jnp.where(jnp.isnan(y), 2.0, y) for y in modes], w[jnp.abs(i) % 11], filled

    return one(fn, d(11, 8), jnp.array([[0, 5, -1], [14, 10, -13]]))


@case({"w": Weight((1,), (0,), op="lookup")})
def raw_lookup_axis_1() -> Built:
    return one(lambda w, i: jnp.take(w, i, axis=1), d(8, 11), jnp.array([[0, 5, 3], [1, 10, 10]]))


@case({"w": Weight((1,), (2,), (0,))})
def raw_gathered_experts() -> Built:
    """Each row picks its expert by an array of indices."""
    return one(lambda w, x, i: jnp.einsum("bi,bio->bo", x, w[i]), d(4, 8, 12), X, jnp.array([3, 0, 0, 1, 3]))


@case({"w": Weight((1,), (2,), (0,))})
def raw_ragged_dot() -> Built:
    """Rows sorted by expert; one expert has no rows."""
    return one(lambda w, x, sizes: lax.ragged_dot(x, w, sizes), d(4, 8, 12), normal(10, 8), jnp.array([3, 0, 5, 2]))
