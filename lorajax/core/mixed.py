"""`mixed(f)` is `f` on a batch whose rows have different adapters, forward and backward, in one program.

Rows are vmapped, so JAX tracks what belongs to which row whatever the model does with it; the base product stays one
product for the batch, and a row's factors are gathered where they are multiplied: a scanned model gathers those of one
layer at a time. No (adapters, in, out) and no (rows, in, out) array exists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.core import compat
from lorajax.core.bank import Whole, count, is_leaf
from lorajax.core.bound import Bound, Factor, Term, is_bound
from lorajax.core.lift import lift


def mixed(fn: Callable[..., Any], *, strict: bool = False, in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    """`fn(params, *args)` as ``mixed(bank, index, *args)``: row i of the arguments runs with adapter ``index[i]``.

    index: (rows,) integers, traced or not, so one program serves every assignment; -1 is the base alone. One that is
    out of range reads no adapter either; where its value is known, it is a ValueError. Several adapters in a row:
    index (rows, s), and `spans=` (rows, tokens) says by 0 to s - 1 which of the s a token reads, anything else is the
    base. That costs s times the low-rank products, and every adapted weight has to read the row's tokens.
    in_axes, out_axes: where the rows are in each positional argument and in the result, as in `jax.vmap` (None: the
    same for all rows). With in_axes=0 every array has the rows first, also in keyword arguments; what has none (a
    table, a scalar) is passed through if it is no array of at least one dimension, and closed over otherwise. A scalar
    PRNG key is folded with the row's number. fn sees one row at a time, as a batch of 1.
    strict: as in `lift`. An operation that needs a merged weight is an error here, it would be one per row.
    """
    run = lift(fn, strict=strict)

    @functools.wraps(fn)
    def call(bank: Any, index: Any, *args: Any, spans: Any = None, **kwargs: Any) -> Any:
        k, index = count(bank), jnp.asarray(index)
        if index.ndim != (1 if spans is None else 2) or not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"index has shape {index.shape} and dtype {index.dtype}: give one integer for each row, "
                             f"-1 for the base; or (rows, s) integers, and spans=(rows, tokens)")
        if spans is not None and np.shape(spans)[:1] != index.shape[:1]:
            raise ValueError(f"spans has shape {np.shape(spans)}, and index names {index.shape[0]} rows")
        if not isinstance(index, jax.core.Tracer) and index.size:
            with jax.ensure_compile_time_eval():  # of an index that a jitted function closes over
                low, high = int(index.min()), int(index.max())
            if low < -1 or high >= k:
                raise ValueError(f"index holds {low} to {high}, and the bank has {k} adapters: they are 0 to {k - 1}, "
                                 f"and -1 is the base")
        axes = [*_axes(in_axes, args), *_axes(0, kwargs)]
        given, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda x: x is None)
        mapped = [x is not None and axis is not None and np.ndim(x) > 0 for x, axis in zip(given, axes, strict=True)]
        for x, axis, on in zip(given, axes, mapped, strict=True):
            if on and x.shape[axis] != index.shape[0]:
                raise ValueError(f"an argument of shape {x.shape} has {x.shape[axis]} rows in dimension {axis}, and "
                                 f"index names {index.shape[0]}: say where the rows are by in_axes, and close over "
                                 f"what has none")
        at = jnp.where(index < 0, k, index)

        def row(at: jax.Array, span: Any, number: jax.Array, *values: jax.Array) -> Any:
            params = jax.tree.map(lambda x: _picked(x, at, span, number, k), bank, is_leaf=is_leaf)
            arrays, filled = iter(values), []
            for x, axis, on in zip(given, axes, mapped, strict=True):
                x = jnp.expand_dims(next(arrays), axis) if on and axis is not None else x
                filled.append(jax.random.fold_in(x, number) if _is_key(x) else x)
            args, kwargs = jax.tree.unflatten(tree, filled)
            result = run(params, *args, **kwargs)
            leaves, structure = jax.tree.flatten(result, is_leaf=lambda x: x is None)
            each = zip(leaves, _axes(out_axes, result), strict=True)
            return jax.tree.unflatten(structure, [x if x is None or axis is None or jnp.ndim(x) == 0 else
                                                  jnp.squeeze(x, axis) for x, axis in each])

        rows = [(x, axis) for x, axis, on in zip(given, axes, mapped, strict=True) if on]
        over = jax.vmap(row, (0, None if spans is None else 0, 0, *[axis for _, axis in rows]), out_axes)
        own = (at, spans, jnp.arange(index.shape[0]))
        if rows:
            own = compat.beside(rows[0][0], rows[0][1] or 0, own)
        return over(*own, *[x for x, _ in rows])

    del call.__wrapped__  # its arguments are one more than fn's: `jax.jit` counts them
    return call


def _axes(prefix: Any, tree: Any) -> list[int | None]:
    """The axis of each leaf of a tree, None counted as one, from a prefix of it."""
    found: list[int | None] = []

    def under(axis: int | None, part: Any) -> None:
        found.extend([axis] * len(jax.tree.leaves(part, is_leaf=lambda x: x is None)))

    jax.tree.map(under, prefix, tree, is_leaf=lambda x: x is None)
    return found


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and x.ndim == 0 and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _picked(leaf: Any, at: jax.Array, span: Any, number: jax.Array, k: int) -> Any:
    """A leaf of the bank as row `number` reads it, with adapter `at`; k is none. With `span`: with several."""
    if isinstance(leaf, Whole):
        if span is not None:
            raise ValueError("the adapters train a leaf in full, and spans give a row several adapters: leave the leaf "
                             "out of the rules, or give rows one adapter each")
        return jnp.where(at < k, compat.pick(leaf.each, at, 0, fill_value=0), leaf.base.astype(leaf.each.dtype))
    if not is_bound(leaf):
        return leaf
    if span is None:
        return Bound(leaf.w, tuple(_of_row(t, at, number, None) for t in leaf.terms), leaf.path)
    return Bound(leaf.w, tuple(_of_row(t, at[i], number, span == i) for t in leaf.terms for i in range(at.shape[0])),
                 leaf.path)


def _of_row(term: Term, at: jax.Array, number: jax.Array, only: Any) -> Term:
    """The term of adapter `at`, dropout folded with the row's number."""
    picked: dict[str, Any] = {name: Factor(f.stored, f.dims, f.shape, f.many, at) for name, f in term._asdict().items()
                              if isinstance(f, Factor) and f.many is not None}
    if term.key is not None:
        keys = term.key.stored.reshape(-1)
        mine = jax.vmap(jax.random.fold_in, (0, None))(keys, number).reshape(term.key.stored.shape)
        picked["key"] = Factor(mine, term.key.dims)
    return term._replace(**picked, only=only)
