"""Adapters merged into a base and taken out again: the base is never changed, and nothing goes in twice.

    merged = merge(params, one)              # merged.params are plain arrays
    merged = merge(merged, two, weights=0.5)
    merged = unmerge(merged, one)            # exact: computed from the base again, bit for bit what it was
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.compose.composed import corrected_once, prepared
from lorajax.compose.compressed import distances
from lorajax.compose.gathered import Gathered, Pair, Trained, gather, weighted
from lorajax.compose.method import Method
from lorajax.compose.sums import Sum
from lorajax.compose.svd import join
from lorajax.compose.wholes import Whole, wholes
from lorajax.core.fingerprint import fingerprint
from lorajax.core.layout import leaf
from lorajax.core.packed import unpacked
from lorajax.core.sites import by_path
from lorajax.core.variant import Full

EXACTLY = Sum()
PRESENT = 0.5
"""From this share of an update on, weights that differ from a base by it are said to contain it."""
SAME = 1e-4
"""Up to this part of an update, another one is the same in another form: as plain LoRA, composed of one, ..."""


class Entry(NamedTuple):
    """What one call of `merge` put in. prints: fingerprints of the adapters."""

    prints: tuple[str, ...]
    adapters: tuple[Trained, ...]
    method: Method
    weights: np.ndarray
    key: jax.Array | None
    full: Whole


class Merged(NamedTuple):
    """params: plain arrays in the base's dtypes, unpacked where the base is quantised. base: the params as given,
    the same arrays. entries: what is in them, in order."""

    params: Any
    base: Any
    entries: tuple[Entry, ...]


def merge(base: Any, adapters: Trained | Sequence[Trained], method: Method = EXACTLY, *, weights: Any = None,
          key: jax.Array | None = None, full: Whole = None) -> Merged:
    """`base` with adapters added, summed in float32 and rounded once to each weight's dtype. A method that forms dense
    updates is merged as it is, without the truncation to a rank that `compose` needs.

    base: a tree of params, or what an earlier `merge` returned. weights, key, full: as in `compose`; one number will do
    for one adapter. Raises ValueError for an adapter of another base (by fingerprint), and says so where the params
    contain the adapter already.
    """
    many = _several(adapters)
    old = base if isinstance(base, Merged) else Merged(base, base, ())
    prints = tuple(identity(one) for one in many)
    for i, name in enumerate(prints):
        if name in prints[:i] or any(name in entry.prints for entry in old.entries):
            raise ValueError(f"adapters[{i}] ({name}) is in these weights already: unmerge it first, and give its "
                             f"weight once")
    if not old.entries:
        _refuse_contained(old.base, many)
    w = weighted(None if weights is None else np.atleast_1d(weights), len(many))
    made = _remade(old.base, (*old.entries, Entry(prints, many, method, w, key, full)))
    inside = [one for entry in old.entries for one in entry.adapters
              if not all(isinstance(choice, Full) for choice in one.adapt.plan.values())]
    for i, one in enumerate(many):
        if inside and (nearest := min(distances(inside, [one] * len(inside)))) < SAME:
            raise ValueError(f"adapters[{i}] has the update of one that is in these weights already (they differ by "
                             f"{nearest:.1e} of it): unmerge that first, and give its weight once")
    return made


def unmerge(merged: Merged, adapters: Trained | Sequence[Trained] | None = None) -> Merged:
    """Without these adapters (None: without any), computed from the base: exact in every dtype.

    Raises ValueError for one that is not in it, and for some of those that one `merge` put in together.
    """
    if adapters is None:
        return Merged(merged.base, merged.base, ())
    out = {identity(one) for one in _several(adapters)}
    inside = {name for entry in merged.entries for name in entry.prints}
    if out - inside:
        raise ValueError(f"{sorted(out - inside)[0]} is not in these weights; they hold {sorted(inside) or 'none'}")
    for entry in merged.entries:
        if out & set(entry.prints) and set(entry.prints) - out:
            raise ValueError(f"{type(entry.method).__name__} merged {len(entry.prints)} adapters together: unmerge all "
                             f"of them, and merge again those that stay")
    return _remade(merged.base, tuple(entry for entry in merged.entries if not out & set(entry.prints)))


def identity(one: Trained) -> str:
    """Fingerprint of an adapter's own arrays, whatever its base."""
    return fingerprint({"trainable": one.trainable, "kept": one.adapt.kept(one.frozen)})


def _several(adapters: Any) -> tuple[Trained, ...]:
    return (adapters,) if hasattr(adapters, "adapt") else tuple(adapters)


def _remade(base: Any, entries: tuple[Entry, ...]) -> Merged:
    leaves, tree = by_path(base)
    sums: dict[str, list[jax.Array]] = {}
    whole: dict[str, jax.Array] = {}
    if len(entries) > 1:
        pairs = [(one, w) for entry in entries for one, w in zip(entry.adapters, entry.weights, strict=True)]
        corrected_once([one for one, _ in pairs], [w for _, w in pairs], EXACTLY)
    for entry in entries:
        found, w, survey = prepared(entry.adapters, entry.method, entry.weights, entry.key, base)
        for path in found.paths:
            updates = [entry.method.compose(part, survey) for part in found.parts(w, entry.key, [path])]
            dense = np.stack([x.delta if isinstance(x, Pair) else x for x in updates]).astype(np.float32)
            sums.setdefault(path, []).append(_leaf(found, path, dense))
        for path, adapter in wholes(found, entry.adapters, w, entry.full)[0].items():
            if path in whole:
                raise ValueError(f"{path} was trained in full by adapters of two merges: say full='drop' for one")
            whole[path] = adapter.w
    if not entries:
        return Merged(base, base, ())
    new = {path: unpacked(w) for path, w in leaves.items()}
    for path in sums.keys() | whole.keys():
        w = jnp.asarray(whole.get(path, new[path]), jnp.float32)
        new[path] = sum(sums.get(path, []), w).astype(leaves[path].dtype)
    return Merged(jax.tree.unflatten(tree, list(new.values())), base, entries)


def _leaf(found: Gathered, path: str, deltas: np.ndarray) -> jax.Array:
    """Updates of every matrix in the weight's shape."""
    site = found.sites[path]
    return leaf(site, jnp.asarray(deltas.reshape(*site.stack_shape, site.n_in, site.n_out)))


def _refuse_contained(base: Any, adapters: tuple[Trained, ...]) -> None:
    """Where params differ from an adapter's base: are they that base with the adapter in it?"""
    leaves, _ = by_path(base)
    for i, one in enumerate(adapters):
        found = gather([one])
        known = {path: w for path, w in found.base.items() if path in leaves and leaves[path] is not w}
        differ = [path for path, w in known.items() if fingerprint({path: w}) != fingerprint({path: leaves[path]})]
        adapted = [path for path in differ if path in found.paths and leaves[path].shape == found.base[path].shape]
        if adapted and (times := _times(found, leaves, adapted)) > PRESENT:
            raise ValueError(f"these weights contain adapters[{i}] already ({times:.2f} times its update, at "
                             f"{len(adapted)} of its {len(found.paths)} sites): merge it into the base it was trained "
                             f"on, or go on with the weights as they are")


def _times(found: Gathered, leaves: dict[str, Any], paths: list[str]) -> float:
    """<W - base, dW> / <dW, dW>: how often the update is in the weights."""
    along, size = 0.0, 0.0
    for path in paths:
        deltas = np.stack([join(part.pairs).delta for part in found.parts(weighted(None, 1), None, [path])])
        update = np.asarray(_leaf(found, path, deltas), np.float64)
        change = np.asarray(unpacked(leaves[path]), np.float64) - np.asarray(unpacked(found.base[path]), np.float64)
        along, size = along + float(np.sum(change * update)), size + float(np.sum(update * update))
    return along / size if size else 0.0
