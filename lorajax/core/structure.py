"""Layout operations on a bound weight: the same operation on the weight, and a renaming of its factors.

Each rule takes (equation, node, other operands) and returns the new node, or raises `Decline` with the reason, upon
which the interpreter merges this one operand into a dense weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorajax.core import compat
from lorajax.core.bound import RANK, Bound, Factor, Term
from lorajax.core.packed import moved


class Decline(Exception):
    """A rule cannot keep the weight factored here; the text says why."""


def transpose(eqn, node: Bound) -> Bound:
    perm = eqn.params["permutation"]
    return node.map(moved(eqn, node.w)[0], lambda f: rename(f, {old: new for new, old in enumerate(perm)}))


def squeeze(eqn, node: Bound) -> Bound:
    return node.map(moved(eqn, node.w)[0], lambda f: drop(f, eqn.params["dimensions"]))


def drop(f: Factor, gone: Sequence[int]) -> Factor:
    """The factor after dimensions of size 1 of the weight were squeezed out."""
    f = Factor(lax.squeeze(f.array, [i for i, d in enumerate(f.dims) if d in gone]),
               tuple(d for d in f.dims if d not in gone))
    return rename(f, {d: d - sum(x < d for x in gone) for d in f.dims})


def rename(f: Factor, names: dict[int, int]) -> Factor:
    return Factor(f.stored, tuple(d if d == RANK else names[d] for d in f.dims), f.shape, f.many, f.at)


def expand(eqn, node: Bound) -> Bound:
    shape, into = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    stretched = [i for i, j in enumerate(into) if node.shape[i] != shape[j]]
    names = dict(enumerate(into))

    def change(f: Factor) -> Factor:
        array = lax.squeeze(f.array, [i for i, d in enumerate(f.dims) if d in stretched])
        return rename(Factor(array, tuple(d for d in f.dims if d not in stretched)), names)

    return node.map(moved(eqn, node.w)[0], change)


def groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """How a row-major reshape maps dimensions: the finest (old dims, new dims) groups of equal product."""
    out, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        size_l, size_r = int(np.prod([old[k] for k in left])), int(np.prod([new[k] for k in right]))
        while size_l != size_r:
            if size_l < size_r:
                left.append(i + len(left))
                size_l *= old[left[-1]]
            else:
                right.append(j + len(right))
                size_r *= new[right[-1]]
        i, j = i + len(left), j + len(right)
        out.append((tuple(left), tuple(right)))
    return out


def reshape(eqn, node: Bound) -> Bound:
    if eqn.params.get("dimensions") is not None:
        raise Decline("reshape with a permutation")
    old, new = node.shape, eqn.params["new_sizes"]

    def change(f: Factor) -> Factor:
        for left, _ in plan:
            wide = [d for d in left if old[d] > 1]
            if any(d in f.dims for d in wide) and not all(d in f.dims for d in wide):
                raise Decline(f"reshape {old} -> {new} merges a dimension that a factor spans with one it does not")
        rank = [f.size(RANK)] if RANK in f.dims else []
        order = sorted(d for d in f.dims if d != RANK and old[d] > 1) + [RANK] * len(rank)
        array = lax.transpose(lax.squeeze(f.array, [i for i, d in enumerate(f.dims) if d != RANK and old[d] == 1]),
                              _ranks([d for d in f.dims if d == RANK or old[d] > 1], order))
        names = [d for left, right in plan for d in right if any(e in f.dims and old[e] > 1 for e in left)]
        return Factor(lax.reshape(array, [new[d] for d in names] + rank), (*names, *[RANK] * len(rank)))

    plan = groups(old, new)
    return node.map(moved(eqn, node.w)[0], change)


def _ranks(have: Sequence[int], want: Sequence[int]) -> list[int]:
    return [list(have).index(d) for d in want]


def slice_(eqn, node: Bound) -> Bound:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * node.ndim

    def change(f: Factor) -> Factor:
        for axis, d in enumerate(f.dims):
            if d != RANK and (start[d], limit[d], strides[d]) != (0, node.shape[d], 1):
                f = Factor(lax.slice_in_dim(f.array, start[d], limit[d], strides[d], axis), f.dims)
        return f

    return node.map(moved(eqn, node.w)[0], change)


def dynamic_slice(eqn, node: Bound, *starts) -> Bound:
    sizes = eqn.params["slice_sizes"]

    def change(f: Factor) -> Factor:
        for axis, d in enumerate(f.dims):
            if d != RANK and sizes[d] != node.shape[d]:
                f = Factor(lax.dynamic_slice_in_dim(f.array, starts[d], sizes[d], axis), f.dims)
        return f

    return node.map(moved(eqn, node.w, *starts)[0], change)


def split(eqn, node: Bound) -> list[Bound]:
    sizes, axis = eqn.params["sizes"], eqn.params["axis"]
    offsets = np.cumsum((0, *sizes))

    def part(f: Factor, k: int) -> Factor:
        if axis not in f.dims:
            return f
        bounds = int(offsets[k]), int(offsets[k + 1])
        return Factor(lax.slice_in_dim(f.array, *bounds, axis=f.dims.index(axis)), f.dims)

    return [node.map(w, functools.partial(part, k=k)) for k, w in enumerate(moved(eqn, node.w))]


def rev(eqn, node: Bound) -> Bound:
    return node.map(moved(eqn, node.w)[0], lambda f: Factor(
        lax.rev(f.array, [i for i, d in enumerate(f.dims) if d in eqn.params["dimensions"]]), f.dims))


def convert(eqn, node: Bound) -> Bound:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Decline(f"conversion to {dtype}")
    def cast(f: Factor | None) -> Factor | None:
        return f and f.astype(dtype)

    terms = tuple(t._replace(a=cast(t.a), b=cast(t.b), bare=cast(t.bare)) for t in node.terms)
    return Bound(moved(eqn, node.w)[0], terms, node.path)


def everywhere(eqn, node: Bound) -> Bound:
    """The same operation on the weight and on each factor (copies, casts of the mesh type)."""
    return node.map(moved(eqn, node.w)[0], lambda f: Factor(compat.bind(eqn, [f.array])[0], f.dims))


def weight_only(eqn, node: Bound) -> Bound:
    """A constraint on the weight's placement; factors are left to the compiler."""
    return node.map(moved(eqn, node.w)[0], lambda f: f)


def reshard(eqn, node: Bound) -> Bound:
    target = eqn.params["dst_sharding"]

    def change(f: Factor) -> Factor:
        spec = [*target.spec, *[None] * (node.ndim - len(target.spec))]
        entries = [None if d == RANK else spec[d] for d in f.dims]
        return Factor(jax.sharding.reshard(f.array, compat.named(target.mesh, entries)), f.dims)

    return node.map(moved(eqn, node.w)[0], change)


def all_gather(eqn, node: Bound) -> Bound:
    """Gathering a weight that a mesh axis shards (FSDP): a factor that runs along the dimension is gathered as well."""
    dim = eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        raise Decline("all_gather that adds a dimension")

    def change(f: Factor) -> Factor:
        if dim not in f.dims:
            return f
        order = (*sorted(d for d in f.dims if d != RANK), *[RANK] * (RANK in f.dims))
        array = lax.transpose(f.array, _ranks(f.dims, order))
        params = dict(eqn.params, all_gather_dimension=order.index(dim))
        return Factor(eqn.primitive.bind(array, **params), order)

    return node.map(moved(eqn, node.w)[0], change)


def reduce_sum(eqn, node: Bound) -> Bound:
    """Summing the weight over dimensions that at most one factor of each term spans: sum that factor."""
    axes = set(eqn.params["axes"])
    terms = []
    for t in map(Term.folded, node.terms):
        both = t.a and t.b and axes.intersection(t.a.dims).intersection(t.b.dims)
        if t.gate is not None or t.key is not None or t.g is not None or t.only is not None or both:
            raise Decline("a sum over a dimension that both factors, a scale, a dropout or a router span")
        neither = [d for d in axes if t.a and t.b and d not in t.a.dims and d not in t.b.dims]
        repeats = int(np.prod([node.shape[d] for d in neither]))
        parts = [f and Factor(jnp.sum(f.array, [i for i, d in enumerate(f.dims) if d in axes]),
                              tuple(d for d in f.dims if d not in axes)) for f in (t.a, t.b)]
        parts[1] = parts[1] and Factor(parts[1].array * repeats, parts[1].dims)
        terms.append(Term(parts[0], parts[1], s=t.s))
    renamed = Bound(node.w, tuple(terms), node.path).map(node.w, lambda f: rename(
        f, {d: d - sum(x < d for x in axes) for d in f.dims}))
    return Bound(moved(eqn, node.w)[0], renamed.terms, node.path)


def negate(eqn, node: Bound) -> Bound:
    return scaled(node, moved(eqn, node.w)[0], lambda x: lax.neg(x))


def scaled(node: Bound, w: Any, times: Callable[[Any], Any]) -> Bound:
    """A scalar multiple: of the weight, `w`, and of one factor of each term; scales `g` are relative to the weight."""
    def changed(f: Factor | None) -> Factor | None:
        return f and Factor(times(f.array), f.dims)

    return Bound(w, tuple(t._replace(b=changed(t.b), bare=changed(t.bare)) for t in node.terms), node.path)


def multiply(eqn, left, right) -> Bound:
    node, other = (left, right) if isinstance(left, Bound) else (right, left)
    if isinstance(other, Bound) or np.ndim(other) != 0:
        raise Decline("multiplied by an array, not by a number")
    return scaled(node, moved(eqn, node.w, other)[0], lambda x: x * jnp.asarray(other, x.dtype))


def divide(eqn, left, right) -> Bound:
    if not isinstance(left, Bound) or isinstance(right, Bound) or np.ndim(right) != 0:
        raise Decline("divided by an array, not by a number")
    return scaled(left, moved(eqn, left.w, right)[0], lambda x: x / jnp.asarray(right, x.dtype))


RULES: dict[str, Callable[..., Bound | list[Bound]]] = {
    "transpose": transpose, "squeeze": squeeze, "broadcast_in_dim": expand, "reshape": reshape, "slice": slice_,
    "dynamic_slice": dynamic_slice, "split": split, "rev": rev, "convert_element_type": convert, "copy": everywhere,
    "copy_p": everywhere, "stop_gradient": everywhere, "pvary": everywhere, "pcast": everywhere,
    "mesh_cast": everywhere, "sharding_constraint": weight_only, "reshard": reshard,
    "all_gather": all_gather, "all_gather_invariant": all_gather, "reduce_sum": reduce_sum, "neg": negate,
    "mul": multiply, "div": divide,
}
