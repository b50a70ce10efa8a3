"""Masks over an adapter: multipliers in the forward pass, where gradient passes, and what the optimizer may move.

A mask of one site is one of
  - an array (stack..., rank), which multiplies every trained array along its rank axis (AdaLoRA, DyLoRA, rank sweeps);
  - a NamedTuple of the adapter's own type with an array, of that leaf's shape, or None for each leaf (sparse LoRA);
  - `Mask(on, trains, moves)`, several of these, where what acts and what trains differ (frozen DyLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lorajax.core.variant import Leaf


class Mask(NamedTuple):
    """on: what multiplies. trains: no gradient passes where it is 0, None for `on` itself. moves: no update may act
    where it is 0, None for `trains`."""

    on: Any
    trains: Any = None
    moves: Any = None


def apply(mask: Any, leaves: Mapping[str, Leaf], adapter: Any) -> Any:
    """`adapter`, with its frozen arrays in place, times the mask; gradients pass only where the mask trains."""
    on, trains, _ = mask if isinstance(mask, Mask) else Mask(mask)
    masked = {}
    for name, m in spread(on, leaves, adapter).items():
        masked[name] = getattr(adapter, name) * m.astype(getattr(adapter, name).dtype)
    for name, m in ({} if trains is None else spread(trains, leaves, adapter)).items():
        x = masked.get(name, getattr(adapter, name))
        masked[name] = jnp.where(jnp.broadcast_to(m.astype(bool), x.shape), x, lax.stop_gradient(x))
    return adapter._replace(**masked)


def keep(mask: Any, leaves: Mapping[str, Leaf], new: Any, old: Any) -> Any:
    """`new` where the mask lets it move (is not 0), `old` elsewhere. Both are adapters, of values or of updates; slots
    that are None stay None."""
    moves = next(m for m in reversed(mask) if m is not None) if isinstance(mask, Mask) else mask
    kept = {}
    for name, m in spread(moves, leaves, new).items():
        x = getattr(new, name)
        kept[name] = jnp.where(jnp.broadcast_to(m.astype(bool), x.shape), x, getattr(old, name))
    return new._replace(**kept)


def spread(mask: Any, leaves: Mapping[str, Leaf], adapter: Any) -> dict[str, jax.Array]:
    """field -> multipliers that broadcast over that array of (stack..., *axes), for the arrays that `mask` touches.

    Raises ValueError for a mask of another type or shape than the adapter's.
    """
    there = {name: x for name, x in adapter._asdict().items() if x is not None}
    if hasattr(mask, "_fields"):
        if type(mask) is not type(adapter):
            raise ValueError(f"a mask of type {type(mask).__name__} for a {type(adapter).__name__}: give one of the "
                             f"adapter's own type, or an array (stack..., rank)")
        each = {name: m for name, m in mask._asdict().items() if m is not None and name in there}
        for name, m in each.items():
            if m.shape != there[name].shape:
                raise ValueError(f"a mask of shape {m.shape} does not fit {name} of shape {there[name].shape}: "
                                 f"a mask of one leaf has that leaf's shape")
        return each
    ranked = {name: x for name, x in there.items() if "rank" in leaves[name].axes and leaves[name].trainable}
    if not ranked:
        raise ValueError(f"a rank mask for a {type(adapter).__name__}, which trains nothing that has a rank axis: "
                         f"give a mask of the adapter's own type, or none")
    return {name: _along_rank(mask, leaves[name], name, x) for name, x in ranked.items()}


def _along_rank(mask: jax.Array, leaf: Leaf, name: str, x: jax.Array) -> jax.Array:
    stack = x.ndim - len(leaf.axes)
    at = stack + leaf.axes.index("rank")
    if mask.shape != (*x.shape[:stack], x.shape[at]):
        raise ValueError(f"a mask of shape {mask.shape} does not fit {name} of shape {x.shape}: it needs the stack "
                         f"axes of the site and then the rank, {(*x.shape[:stack], x.shape[at])}")
    return mask.reshape([*x.shape[:stack], *[x.shape[at] if axis == "rank" else 1 for axis in leaf.axes]])
