"""Masked ranks do not move: the mask acts on the finished update, behind momentum and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorajax.core.masks import keep


def freeze_ranks(plan: Mapping[str, Any], masks: Mapping[str, Any] | None = None,
                 ) -> optax.GradientTransformationExtraArgs:
    """Zeroes the update of everything whose mask is 0. Put it last in a chain.

    Masking the gradient alone is not enough: Adam moves a parameter without gradient by its momentum, and decoupled
    weight decay moves it in any case.

    plan: site path -> variant (`adapt.plan`); its leaf tables say where the rank axis is.
    masks: site path -> mask (`core.masks`: by rank, by leaf, or `Mask`, of which `moves` counts here), any
    multipliers: 0 freezes, all else leaves the update as it is. They may be given here, or anew at each step:
    ``tx.update(grads, state, params, masks=controller.masks(state))``. Paths without a mask are not touched.
    """

    def update(updates: dict[str, Any], state: Any, params: Any = None, *,
               masks: Mapping[str, Any] | None = masks, **_: Any) -> tuple[Any, Any]:
        if not masks:
            return updates, state
        if missing := sorted(set(masks) - set(updates)):
            raise ValueError(f"masks names {missing}, which are not trained; the trained paths are {sorted(updates)}")
        frozen = {path: keep(mask, plan[path].leaves, updates[path], jax.tree.map(jnp.zeros_like, updates[path]))
                  for path, mask in masks.items()}
        return {**updates, **frozen}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
