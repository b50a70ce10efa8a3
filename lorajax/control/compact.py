"""After pruning: smaller AdaLoRA adapters with the same output."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from lorajax.core.adapt import Adapt, adapt
from lorajax.core.variant import Full, Variant
from lorajax.variants.adalora import AdaLoRA, AdaLoRAAdapter


def compact(adapted: Adapt, trainable: dict[str, Any]) -> tuple[Adapt, dict[str, Any]]:
    """Drops every triplet with E = 0: a new Adapt with a rank per site, and its trainable partition.

    The frozen partition serves both. The scale stays tied to the initial rank (`AdaLoRA.init_rank`). A site without a
    triplet left loses its adapter; the layers of a stacked site keep one common rank, the largest, filled up with
    triplets whose E is 0. Needs concrete arrays: call it outside of jit. ValueError if nothing at all is left.
    """
    rules: list[tuple[str, Variant | Full]] = []
    small: dict[str, Any] = {}
    for path, variant in adapted.plan.items():
        if not isinstance(variant, AdaLoRA):
            rules.append((re.escape(path), variant))
            small[path] = trainable[path]
        elif rank := int((trainable[path].E != 0).sum(-1).max()):
            rules.append((re.escape(path), replace(variant, rank=rank, init_rank=variant.init_rank or variant.rank)))
            small[path] = _first(trainable[path], rank)
    if not rules:
        raise ValueError("every E is 0: nothing is left to compact. An adapter that has not trained yet starts so")
    return adapt(adapted.sites, rules, adapted.dtype), small


def _first(adapter: AdaLoRAAdapter, rank: int) -> AdaLoRAAdapter:
    """The `rank` first triplets of each matrix, in their order, those with E = 0 counted last."""
    order = jnp.argsort(adapter.E == 0, axis=-1, stable=True)[..., :rank]
    take = jnp.take_along_axis
    return AdaLoRAAdapter(take(adapter.A, jnp.expand_dims(order, -2), -1), take(adapter.E, order, -1),
                          take(adapter.B, jnp.expand_dims(order, -1), -2))
