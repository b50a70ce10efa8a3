"""Masked ranks do not move: the mask acts on the finished update, behind momentum and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def freeze_ranks(plan: Mapping[str, Any], masks: Mapping[str, jax.Array] | None = None,
                 ) -> optax.GradientTransformationExtraArgs:
    """Zeroes the update of every rank whose mask is 0, in every leaf that has a `rank` axis. Put it last in a chain.

    Masking the gradient alone is not enough: Adam moves a parameter without gradient by its momentum, and decoupled
    weight decay moves it in any case.

    plan: site path -> variant (`adapt.plan`); its leaf tables say where the rank axis is.
    masks: site path -> (stack..., rank), any multipliers: 0 freezes, all else leaves the update as it is. They may be
    given here, or anew at each step: ``tx.update(grads, state, params, masks=controller.masks(state))``. Paths without
    a mask are not touched.
    """

    def update(updates: dict[str, Any], state: Any, params: Any = None, *,
               masks: Mapping[str, jax.Array] | None = masks, **_: Any) -> tuple[Any, Any]:
        if not masks:
            return updates, state
        if missing := sorted(set(masks) - set(updates)):
            raise ValueError(f"masks names {missing}, which are not trained; the trained paths are {sorted(updates)}")
        frozen = {path: _freeze(updates[path], plan[path].leaves, mask) for path, mask in masks.items()}
        return {**updates, **frozen}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _freeze(adapter: Any, leaves: Mapping[str, Any], mask: jax.Array) -> Any:
    """`adapter` with zeros at the masked ranks; leaves are (stack..., *axes), mask (stack..., rank)."""
    new = {}
    for name, leaf in leaves.items():
        x = getattr(adapter, name)
        if x is None or "rank" not in leaf.axes:
            continue
        stack = mask.ndim - 1
        shape = list(mask.shape[:-1]) + [mask.shape[-1] if axis == "rank" else 1 for axis in leaf.axes]
        if x.ndim != stack + len(leaf.axes):
            raise ValueError(f"a mask of shape {mask.shape} does not fit {name} of shape {x.shape}: it needs the stack "
                             f"axes of the site and then the rank")
        on = jnp.broadcast_to(mask.reshape(shape) != 0, x.shape)
        new[name] = jnp.where(on, x, jnp.zeros_like(x))
    return adapter._replace(**new)
