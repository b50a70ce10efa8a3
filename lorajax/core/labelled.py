"""Arrays with a label per dimension, so that a product needs no orders of dimensions: what both have is contracted."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lorajax.core import compat
from lorajax.core.bound import Factor

FREE = 1000
"""The label of x's first dimension that the weight does not have."""


class Labelled(NamedTuple):
    """An array with a label per dimension: the weight's dimensions 0, 1, ..., RANK; x's free ones FREE, FREE + 1."""

    array: jax.Array
    labels: tuple[int, ...]


def meet(left: Labelled, right: Labelled, keep: set[int], mesh: Any, spec: dict[int, Any], **how) -> Labelled:
    """Contracts the labels that both have and `keep` has not; result in `dot_general`'s own order.

    Rows and tokens of x are one dimension of the product: a gradient that sums over two, under a vmap over runs, XLA's
    GPU compiler would take from a copy of x in another layout.
    """
    left, right = (_sum_out(t, {x for x in t.labels if x not in o.labels and x not in keep})
                   for t, o in ((left, right), (right, left)))
    shared = [x for x in left.labels if x in right.labels]
    batch, gone = [x for x in shared if x in keep], [x for x in shared if x not in keep]
    numbers = (([left.labels.index(x) for x in gone], [right.labels.index(x) for x in gone]),
               ([left.labels.index(x) for x in batch], [right.labels.index(x) for x in batch]))
    labels = (*batch, *[x for x in left.labels if x not in shared], *[x for x in right.labels if x not in shared])
    if mesh is not None:
        how["out_sharding"] = compat.named(mesh, [spec.get(x) for x in labels])
        return Labelled(lax.dot_general(left.array, right.array, numbers, **how), labels)
    sizes = dict(zip((*left.labels, *right.labels), (*left.array.shape, *right.array.shape), strict=True))
    left, right = (_one_free(t, shared) for t in (left, right))
    numbers = (([left.labels.index(x) for x in gone], [right.labels.index(x) for x in gone]),
               ([left.labels.index(x) for x in batch], [right.labels.index(x) for x in batch]))
    y = lax.dot_general(left.array, right.array, numbers, **how)
    return Labelled(y.reshape([sizes[x] for x in labels]), labels)


def _one_free(t: Labelled, shared: list[int]) -> Labelled:
    """Neighbours among x's own dimensions as one, under the first one's label."""
    shape, labels, joined = list[int](), list[int](), False
    for label, n in zip(t.labels, t.array.shape, strict=True):
        free = label >= FREE and label not in shared
        if free and joined:
            shape[-1] *= n
        else:
            shape, labels = [*shape, n], [*labels, label]
        joined = free
    return Labelled(t.array.reshape(shape), tuple(labels))


def _sum_out(t: Labelled, gone: set[int]) -> Labelled:
    axes = tuple(i for i, x in enumerate(t.labels) if x in gone)
    return Labelled(jnp.sum(t.array, axes), tuple(x for x in t.labels if x not in gone)) if axes else t


def times(x: Labelled, f: Factor) -> Labelled:
    """x scaled along f's dimensions; those that x does not have are added in front."""
    scaled = Factor(*x).times(f)
    return Labelled(scaled.array, scaled.dims)


def rows_of(seen: jax.Array, rows: list[int], path: str) -> jax.Array:
    """A weight for each of the rows: `seen`'s own, or, where they run along its leading dimensions only, whether any
    part of it counts."""
    if math.prod(rows) != seen.size and tuple(rows) == seen.shape[:len(rows)]:
        seen = jnp.max(seen, tuple(range(len(rows), seen.ndim)))
    if math.prod(rows) != seen.size:
        raise ValueError(f"{path}: its inputs have rows {tuple(rows)}, which a mask of shape {seen.shape} does not fit")
    return seen.reshape(-1).astype(jnp.float32)
