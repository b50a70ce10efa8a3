"""A bank: many adapters of one base as one bound tree, whose factors have one more dimension; see `mixed`.

    bank = lj.bank(adapt, trainable, frozen)                 # every array of trainable has a leading adapter dimension
    logits = lj.mixed(model.apply)(bank, index, ids)         # row i runs with adapter index[i], -1: none
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core import compat
from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.bound import RANK, Bound, Factor, Many, Term, is_bound
from lorajax.core.sites import by_path
from lorajax.core.variant import Full

NONE = {"a": 0.0, "b": 0.0, "g": 1.0, "e": 0.0, "o": 0.0, "rate": 0.0}
"""Parts of a term that may differ by adapter -> what a row without adapter reads: an update of 0, a weight times 1."""
LACKING = {**NONE, "e": 1.0, "o": 1.0}
"""What an adapter has in a part that it lacks and others have."""


class Whole(NamedTuple):
    """A leaf that each adapter trains in full (a head, a bias). each: (adapters, ...). base: of no adapter."""

    each: jax.Array
    base: jax.Array


def bank(adapt: Adapt, trainable: Mapping[str, Any], frozen: Frozen, *, params: Any = None,
         key: jax.Array | None = None, masks: Mapping[str, Any] | None = None) -> Any:
    """K adapters of one `Adapt` as the tree that `mixed(fn)` takes in place of params.

    trainable: as `adapt.init` returns it, every array with a leading dimension K:
    ``jax.vmap(lambda key: adapt.init(key, params)[0])(keys)``, or adapters put together with ``jax.tree.map(stack)``.
    frozen: of any one of them; arrays of `frozen.aux` that differ by adapter have a leading K too. params: the base,
    for what a row without adapter reads where `Full` trains a leaf. key, masks: as in `Adapt.bind`; dropout draws per
    row, and what acts once per matrix (rank, unit and module dropout) once per adapter; masks are common to all.

    Build it outside of a jitted step that serves: norms (DoRA) are then computed once and the base is not copied.
    Inside of one that trains it is differentiable in `trainable`.

    Raises ValueError for a variant without factors (LoHa, LoKr) or one that rewrites its weight, naming the way out.
    """
    base = {} if params is None else by_path(params)[0]
    for path, choice in adapt.plan.items():
        if isinstance(choice, Full):
            if path not in base:
                raise ValueError(f"{path} is trained in full, and rows without adapter need the base's: give params, "
                                 f"the tree that sites() traced")
            continue
        if not choice.factored:
            raise ValueError(f"{path}: {type(choice).__name__} has no low-rank factors, so a row of a mixed batch "
                             f"would need a weight of its own: make it plain LoRA (lorajax.compose.as_lora), or run "
                             f"each adapter alone")
        if choice.rewrites_weight:
            raise ValueError(f"{path}: {type(choice).__name__} starts from another weight than the base, and a mixed "
                             f"batch has one base: set fold=False")
    counts = {x.shape[0] for x in jax.tree.leaves(trainable)}
    if len(counts) != 1:
        raise ValueError(f"every array of trainable needs the same leading dimension, the number of adapters; there "
                         f"are {sorted(counts)}")
    (k,) = counts
    aux_axes = jax.tree.map(lambda x, one: 0 if x.ndim > len(one.shape) else None, frozen.aux, adapt.shapes[1].aux)
    keys = None if key is None else jax.random.split(key, k)

    def terms(trainable: Any, aux: Any, key: Any) -> dict[str, Any]:
        bound = by_path(adapt.bind(trainable, frozen._replace(aux=aux), key=key, masks=masks), is_leaf=is_bound)[0]
        return {path: bound[path] if isinstance(choice, Full) else tuple(t._replace(bare=None)
                                                                         for t in bound[path].terms)
                for path, choice in adapt.plan.items()}

    def one(tree: Any, axes: Any) -> Any:
        return jax.tree.map(lambda axis, x: x if axis is None else jax.ShapeDtypeStruct(x.shape[1:], x.dtype), axes,
                            tree, is_leaf=lambda x: x is None)

    every = jax.tree.map(lambda _: 0, trainable)
    shapes = one(trainable, every), one(frozen.aux, aux_axes), None if keys is None else keys[0]
    varies = _varies(terms, shapes)
    axes = jax.tree.map(lambda on: 0 if on else None, varies)
    found = jax.vmap(terms, (0, aux_axes, None if key is None else 0), axes)(trainable, frozen.aux, keys)
    leaves: dict[str, Any] = dict(frozen.base)
    for path, choice in adapt.plan.items():
        if isinstance(choice, Full):
            leaves[path] = Whole(found[path], base[path])
        else:
            stack = adapt.sites[path].stack_axes
            each = tuple(_many(term, on, stack) for term, on in zip(found[path], varies[path], strict=True))
            leaves[path] = Bound(frozen.base[path], each, path)
    return jax.tree.unflatten(adapt.sites.tree, [leaves[path] for path in adapt.sites.leaves])


def _varies(fn: Callable[..., Any], args: Any) -> Any:
    """Like fn's result: whether each array depends on an array of `args`. What does not stays one for all adapters."""
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    inner = compat.open_jaxpr(jaxpr)
    on = set(inner.invars)
    for eqn in inner.eqns:
        if any(not isinstance(v, compat.Literal) and v in on for v in eqn.invars):
            on.update(eqn.outvars)
    return jax.tree.unflatten(jax.tree.structure(shapes),
                              [not isinstance(v, compat.Literal) and v in on for v in inner.outvars])


def _many(term: Term, varies: Term, stack: tuple[int, ...]) -> Term:
    """A term whose arrays that vary have the adapters in front; they move behind the stack, which a scan slices."""
    if term.key is not None and term.key.stored.ndim > len(term.key.dims):
        term = term._replace(key=Factor(term.key.stored[0], term.key.dims))  # folded with the row, see `mixed`

    def of(name: str, f: Factor, on: Any) -> Factor:
        if not on.stored:
            return f
        shape = f.shape or f.stored.shape[1:]
        at = next((i for i, d in enumerate(f.dims) if d not in stack), len(f.dims))
        array = jnp.moveaxis(f.stored.reshape(f.stored.shape[0], *shape), 0, at)
        return Factor(array, f.dims, many=Many(at, NONE.get(name, 0.0)))

    parts: dict[str, Any] = {name: of(name, f, getattr(varies, name)) for name, f in term._asdict().items()
                             if isinstance(f, Factor) and name != "key"}
    return term._replace(**parts)


def join(banks: Sequence[Any]) -> Any:
    """Banks of one base as one: the adapters of the first, then those of the next, ... Different ranks, variants,
    scales and targets; ranks are padded with zeros.

    Raises ValueError for different bases, and for variants that weigh their rank components per token.
    """
    first, tree = by_path(banks[0], is_leaf=is_leaf)
    others = [by_path(bank, is_leaf=is_leaf)[0] for bank in banks]
    counts = [count(bank) for bank in banks]
    leaves = {path: _joined(path, [leaves[path] for leaves in others], counts) for path in first}
    return jax.tree.unflatten(tree, list(leaves.values()))


def _joined(path: str, found: list[Any], counts: list[int]) -> Any:
    if any(isinstance(x, Whole) for x in found):
        if any(is_bound(x) for x in found):
            raise ValueError(f"{path}: some adapters train it in full and others adapt it: make these one or the other")
        base = next(x.base if isinstance(x, Whole) else x for x in found)
        each = [x.each if isinstance(x, Whole) else jnp.broadcast_to(x, (k, *x.shape))
                for x, k in zip(found, counts, strict=True)]
        return Whole(jnp.concatenate(each), base)
    weights = [x.w if is_bound(x) else x for x in found]
    for w in weights[1:]:
        if w is not weights[0] and not _equal(w, weights[0]):
            raise ValueError(f"{path}: the adapters are bound to different weights; a mixed batch has one base. Make "
                             f"every bank from one params, and adapters that rewrite it with fold=False")
    terms = [x.terms if is_bound(x) else () for x in found]
    if not any(terms):
        return weights[0]
    length = max(map(len, terms))
    padded = [[*t, *[Term()] * (length - len(t))] for t in terms]
    return Bound(weights[0], tuple(_beside(path, [t[i] for t in padded], counts) for i in range(length)), path)


def _equal(one: Any, other: Any) -> bool:
    """Whether two weights are the same, as far as that can be known: traced ones by their shape alone."""
    trees: list[Any] = [jax.tree.structure(x) for x in (one, other)]  # several arrays where it is packed
    if one.shape != other.shape or one.dtype != other.dtype or trees[0] != trees[1]:
        return False
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    if any(isinstance(x, jax.core.Tracer) for pair in pairs for x in pair):
        return True
    return all(bool(jnp.array_equal(x, y)) for x, y in pairs)


def _beside(path: str, terms: list[Term], counts: list[int]) -> Term:
    """One term for the adapters of all."""
    if any(t.gate is not None or t.router is not None for t in terms):
        raise ValueError(f"{path}: an adapter weighs its rank components per token, and others beside it do not have "
                         f"its router: give it a bank of its own")
    keys = [t.key for t in terms if t.key is not None]
    scales = {t.s.value for t in terms if t.s is not None and t.a is not None}
    if len(scales) > 1 or (scales and any(t.s is None and t.a is not None for t in terms)):
        terms = [_scaled(t) for t in terms]
    parts: dict[str, Any] = {}
    for name in NONE:
        have = [getattr(t, name) for t in terms]
        if any(f is not None for f in have):
            dims = [set(f.dims) for f in have if f is not None]
            if set().union(*dims) != max(dims, key=len):
                raise ValueError(f"{path}: some adapters scale the inputs of this weight and others its outputs: give "
                                 f"them banks of their own")
            parts[name] = _concatenated(name, have, counts)
    s = next((t.s for t in terms if t.s is not None), None)
    return Term(**parts, s=s, key=keys[0] if keys else None)


def _scaled(term: Term) -> Term:
    """The term with its number s in e."""
    if term.s is None or term.a is None:
        return term._replace(s=None)
    e = term.e or Factor(jnp.ones(term.a.size(RANK), jnp.float32), (RANK,))
    return term._replace(s=None, e=Factor(e.stored * term.s.value, e.dims, e.shape, e.many))


def _concatenated(name: str, have: list[Factor | None], counts: list[int]) -> Factor:
    there = [f for f in have if f is not None]
    if len(there) == len(have) and all(f.stored is there[0].stored and f.many is None for f in there):
        return there[0]
    dims = there[0].dims + tuple(sorted({d for f in there for d in f.dims} - set(there[0].dims)))
    sizes = [max(f.size(d) for f in there if d in f.dims) for d in dims]
    made = []
    for f, k in zip(have, counts, strict=True):
        if f is None:
            made.append(jnp.full((k, *sizes), LACKING[name], there[0].stored.dtype))
            continue
        array = _front(f, k).spread((FRONT, *dims))
        padding = [(0, n - m if d == RANK else 0) for d, n, m in zip(dims, sizes, array.shape[1:], strict=True)]
        array = jnp.pad(array, [(0, 0), *padding]).astype(there[0].stored.dtype)
        made.append(jnp.broadcast_to(array, (k, *sizes)))
    at = next((f.many.axis for f in there if f.many is not None), 0)
    return Factor(jnp.moveaxis(jnp.concatenate(made), 0, at), dims, many=Many(at, NONE[name]))


FRONT = -2
"""The name of the dimension of adapters, where it is one like the others."""


def _front(f: Factor, k: int) -> Factor:
    """The factor of k adapters, with these as its first dimension."""
    array = f.stored if f.shape is None else f.stored.reshape(f.shape)
    array = jnp.broadcast_to(array, (k, *array.shape)) if f.many is None else jnp.moveaxis(array, f.many.axis, 0)
    return Factor(array, (FRONT, *f.dims))


def count(bank: Any) -> int:
    """How many adapters a bank has. ValueError for a tree that is none."""
    for leaf in jax.tree.leaves(bank, is_leaf=is_leaf):
        if isinstance(leaf, Whole):
            return leaf.each.shape[0]
        for f in leaf.factors() if is_bound(leaf) else ():
            if f.many is not None:
                return f.stored.shape[f.many.axis]
    raise ValueError("this tree is no bank, nothing in it has a dimension of adapters: make one by lorajax.bank(adapt, "
                     "trainable, frozen), where every array of trainable has that dimension in front")


def is_leaf(x: Any) -> bool:
    return is_bound(x) or isinstance(x, Whole)
