"""silu(x W1') * (x W2') of two adapted weights: their updates are added where both products are read, by one kernel.

A product with an adapted weight is y + h b, with h = x a; to add h b in a product of its own writes and reads an array
as large as y again. The gate of a feed-forward block reads two such arrays, its widest, and an adapted product reads
what it returns. Here y, h and b reach one kernel, which also makes the next product's h; the backward pass is one more,
which adds the next update's part of the cotangent as it reads that, and makes dy b^T of both. Written in Pallas for
Triton.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorajax.core.gated import COLUMNS, ROWS, Waiting

TILES, WARPS, STAGES = 8, 2, 3
"""A program takes TILES tiles of ROWS x COLUMNS, those of its neighbours in between, so that they read side by side."""


def gated(gate: Waiting, up: Waiting, a: jax.Array | None, kernels: str) -> tuple[jax.Array, jax.Array | None]:
    """z = silu(gate) * up (..., out), and z a (..., s) for the a (out, s) that reads it next, None without.

    Sums, activation and products in float32, results rounded once to the dtype of y.
    """
    lead, dtype = gate.y.shape[:-1], gate.y.dtype
    rank = 0 if a is None else a.shape[1]
    flat: dict[str, jax.Array] = {}
    for side, x in (("g", gate), ("u", up)):
        flat |= {f"y{side}": x.y.reshape(-1, x.y.shape[-1]), f"h{side}": _wide(x.h.reshape(-1, x.h.shape[-1]), 1),
                 f"b{side}": _wide(x.b, 0)}  # fmt: skip
        flat |= {} if x.g is None else {f"c{side}": x.g.astype(jnp.float32)}
    flat |= {} if a is None else {"a": _wide(a.astype(dtype), 1)}
    found = _gated(flat, kernels == "interpret")
    h = found["h"][:, :rank].reshape(*lead, rank) if a is not None else None
    return found["z"].reshape(*lead, -1), h


shared = jax.jit(gated, static_argnums=3)
"""The same as a function that equal layers share."""


def _wide(x: jax.Array, axis: int) -> jax.Array:
    """x with as many rank components as Triton's products want: a power of two from 16 on."""
    n = x.shape[axis]
    more = max(16, 1 << (n - 1).bit_length()) - n
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(2)]) if more else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gated(x: dict[str, jax.Array], interpret: bool) -> dict[str, jax.Array]:
    made = _call(_forward_tile, x, ["z", *(["h"] if "a" in x else [])], interpret)
    return made | ({"h": jnp.sum(made["h"], 0).astype(x["yg"].dtype)} if "a" in x else {})


def _kept(x: dict[str, jax.Array], interpret: bool) -> Any:
    made = _gated(x, interpret)
    return made, (x, made["z"])


def _gradients(interpret: bool, kept: Any, by: dict[str, jax.Array]) -> Any:
    x, z = kept
    towards = {"dz": by["z"]} | ({"dh": by["h"]} if "a" in x else {})
    scales = [f"dc{side}" for side in "gu" if f"c{side}" in x]
    made = _call(_backward_tile, x | towards, ["dg", "du", "tg", "tu", *scales], interpret)
    dtype, out = z.dtype, dict[str, jax.Array]()
    for side in "gu":
        dy = made[f"d{side}"]
        out |= {f"y{side}": dy, f"h{side}": jnp.sum(made[f"t{side}"], 0).astype(dtype),
                f"b{side}": lax.dot_general(x[f"h{side}"], dy, (((0,), (0,)), ((), ())))}  # fmt: skip
        if f"c{side}" in x:
            out[f"c{side}"] = jnp.sum(made[f"dc{side}"], 0)
    if "a" in x:
        out["a"] = lax.dot_general(z, by["h"], (((0,), (0,)), ((), ())))
    return (out,)


_gated.defvjp(_kept, _gradients)


def _call(tile: Any, x: dict[str, jax.Array], results: list[str], interpret: bool) -> dict[str, jax.Array]:
    """`tile` for all rows and columns. By their names y, z, d are (rows, columns), h and dh (rows, rank), b (rank,
    columns), a (columns, rank), c (columns,); of the results t and h, which sum over columns, and dc, which sums over
    rows, are made in float32 parts, along dimension 0."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (rows, columns), dtype = x["yg"].shape, x["yg"].dtype
    grid = (-(-columns // (COLUMNS * TILES)), rows // ROWS)

    def block(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        """What program (j, i) sees: its rows, of all columns."""
        if len(shape) == 3:
            return pl.BlockSpec((None, ROWS, shape[2]), lambda j, i: (j, i, 0))
        if name in ("dcg", "dcu"):
            return pl.BlockSpec((None, columns), lambda j, i: (i, 0))
        if name[0] in "abc":
            return pl.BlockSpec(shape, lambda j, i: (0,) * len(shape))
        return pl.BlockSpec((ROWS, shape[1]), lambda j, i: (i, 0))

    def result(name: str) -> jax.ShapeDtypeStruct:
        if name in ("dcg", "dcu"):
            return jax.ShapeDtypeStruct((grid[1], columns), jnp.float32)
        if name in ("h", "tg", "tu"):
            rank = x["a"].shape[1] if name == "h" else x[f"b{name[1]}"].shape[0]
            return jax.ShapeDtypeStruct((grid[0], rows, rank), jnp.float32)
        return jax.ShapeDtypeStruct((rows, columns), dtype)

    def kernel(*refs: Any) -> None:
        first = pl.program_id(0)
        tiles = (columns // COLUMNS - first + grid[0] - 1) // grid[0]
        tile(dict(zip([*x, *results], refs, strict=True)), tiles,
             lambda n: pl.ds((first + n * grid[0]) * COLUMNS, COLUMNS))

    shapes = [result(name) for name in results]
    made = pl.pallas_call(
        kernel, grid=grid, in_specs=[block(name, array.shape) for name, array in x.items()], out_shape=shapes,
        out_specs=[block(name, like.shape) for name, like in zip(results, shapes, strict=True)],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES), name="gated" + tile.__name__,
        interpret=interpret,
    )(*x.values())  # fmt: skip
    return dict(zip(results, made, strict=True))


def _forward_tile(r: dict[str, Any], tiles: Any, columns: Any) -> None:
    """r: the arrays by name. tiles: how many; columns: which ones, of a tile."""
    hidden = {side: r[f"h{side}"][...] for side in "gu"}

    def step(n: Any, h: Any) -> Any:
        at = columns(n)
        (g, u), *_ = _sums(r, at, hidden)
        z = (g * _sigmoid(g) * u).astype(r["z"].dtype)
        r["z"][:, at] = z
        return h + _dot(z, r["a"][at, :], 1, 0) if "a" in r else h

    first = jnp.zeros((ROWS, r["a"].shape[1]), jnp.float32) if "a" in r else 0
    h = lax.fori_loop(0, tiles, step, first)
    if "a" in r:
        r["h"][...] = h


def _backward_tile(r: dict[str, Any], tiles: Any, columns: Any) -> None:
    hidden = {side: r[f"h{side}"][...] for side in "gu"}
    dh = r["dh"][...] if "a" in r else None

    def step(n: Any, t: Any) -> Any:
        at = columns(n)
        (g, u), plain, b, c = _sums(r, at, hidden)
        dz = r["dz"][:, at].astype(jnp.float32)
        if dh is not None:
            dz = dz + _dot(dh, r["a"][at, :], 1, 1)
        s = _sigmoid(g)
        towards = {"g": dz * u * (s + g * s * (1 - s)), "u": dz * (g * s)}
        for side, d in towards.items():
            if side in c:
                r[f"dc{side}"][at] = jnp.sum(d * plain[side], 0)
                d = d * c[side]
            d = d.astype(r["dg"].dtype)
            r[f"d{side}"][:, at] = d
            t[side] = t[side] + _dot(d, b[side], 1, 1)
        return t

    t = {side: jnp.zeros((ROWS, r[f"b{side}"].shape[0]), jnp.float32) for side in "gu"}
    for side, total in lax.fori_loop(0, tiles, step, t).items():
        r[f"t{side}"][...] = total


def _sums(r: dict[str, Any], at: Any, hidden: dict[str, jax.Array]) -> tuple[Any, ...]:
    """Gate and up in float32; both before their scales; b and scale of each."""
    b = {side: r[f"b{side}"][:, at] for side in "gu"}
    c = {side: r[f"c{side}"][at][None, :] for side in "gu" if f"c{side}" in r}
    plain = {side: r[f"y{side}"][:, at].astype(jnp.float32) + _dot(hidden[side], b[side], 1, 0) for side in "gu"}
    return [x * c[side] if side in c else x for side, x in plain.items()], plain, b, c


def _sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + e^-x) in two of a GPU's own instructions: a division by Triton is ten."""
    half = lax.rsqrt(1 + jnp.exp2(-math.log2(math.e) * x))
    return half * half


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    return lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)
