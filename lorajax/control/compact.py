"""Smaller adapters with the same output: without what pruning or gates zeroed, or cut at a rank."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.control.dylora import rank_masks
from lorajax.core.adapt import Adapt, adapt
from lorajax.core.variant import Full, Variant
from lorajax.variants.adalora import AdaLoRA, AdaLoRAAdapter
from lorajax.variants.dora import DoRA
from lorajax.variants.increlora import IncreLoRA
from lorajax.variants.lora import LoRA, LoRAAdapter
from lorajax.variants.sora import SoRA


def compact(adapted: Adapt, trainable: dict[str, Any]) -> tuple[Adapt, dict[str, Any]]:
    """Drops every component whose E (AdaLoRA) or gate (SoRA) is 0: a new Adapt with a rank per site, and its trainable
    partition.

    The frozen partition serves both. The scale stays that of the initial rank: `AdaLoRA.init_rank`, and in what SoRA
    becomes, plain LoRA with ``A diag(g)`` for A, an alpha that is lower in proportion to the rank. IncreLoRA becomes
    AdaLoRA of the rank that it grew to, or the largest of a stack, the layers' own scales in E. A site without a
    component left loses its adapter (AdaLoRA inside DoRA keeps one, since the magnitude stays); the layers of a stacked
    site keep one common rank, the largest, filled up with components that are 0. Needs concrete arrays: call it outside
    of jit. ValueError if nothing at all is left.
    """

    def smaller(path: str, variant: Any, adapter: Any) -> tuple[Any, Any] | None:
        if isinstance(variant, IncreLoRA):
            return _grown(variant, adapter)
        inner = variant.inner if isinstance(variant, DoRA) else variant
        if not isinstance(inner, AdaLoRA) and not isinstance(variant, SoRA):
            return variant, adapter
        weights = adapter.E if isinstance(inner, AdaLoRA) else adapter.g
        rank = max(int((weights != 0).sum(-1).max()), int(isinstance(variant, DoRA)))
        if not rank:
            return None
        a, kept, b = _first(adapter.A, weights, adapter.B, rank)
        if isinstance(inner, AdaLoRA):
            inner = replace(inner, rank=rank, init_rank=inner.init_rank or inner.rank)
            shrunk = replace(variant, of=inner) if isinstance(variant, DoRA) else inner
            return shrunk, adapter._replace(A=a, E=kept, B=b)
        plain = LoRA(rank=rank, alpha=variant.alpha * rank / variant.rank, dropout=variant.dropout)
        return plain, LoRAAdapter(a * kept[..., None, :], b)

    return _rebuilt(adapted, trainable, smaller)


def truncate(adapted: Adapt, trainable: dict[str, Any], rank: int) -> tuple[Adapt, dict[str, Any]]:
    """A trained DyLoRA cut to plain LoRA of `rank`: a new Adapt and its trainable partition, for the same frozen one.

    alpha stays as it is: the scale of a LoRA of that rank is what DyLoRA trained with, so that the output is that under
    ``rank_masks(adapted, rank)``. ValueError for a rank outside 1..R.
    """
    cut = rank_masks(adapted, rank)

    def smaller(path: str, variant: Any, adapter: Any) -> tuple[Any, Any]:
        if path not in cut:
            return variant, adapter
        plain = replace(variant, rank=rank, initializer="kaiming", fold=False)  # how it began no longer matters
        return plain, LoRAAdapter(adapter.A[..., :rank], adapter.B[..., :rank, :])

    return _rebuilt(adapted, trainable, smaller)


def _rebuilt(adapted: Adapt, trainable: dict[str, Any],
             smaller: Callable[[str, Any, Any], tuple[Any, Any] | None]) -> tuple[Adapt, dict[str, Any]]:
    """`adapted` and `trainable` with every (variant, adapter) replaced; None takes a site out."""
    rules: list[tuple[str, Variant | Full]] = []
    small: dict[str, Any] = {}
    for path, variant in adapted.plan.items():
        if found := smaller(path, variant, trainable[path]):
            rules.append((re.escape(path), found[0]))
            small[path] = found[1]
    if not rules:
        raise ValueError("every E or gate is 0: nothing is left to compact. AdaLoRA that has not trained yet starts so")
    return adapt(adapted.sites, rules, adapted.dtype), small


def _grown(variant: IncreLoRA, adapter: Any) -> tuple[AdaLoRA, AdaLoRAAdapter]:
    ranks = variant.initial + jnp.round(adapter.n)[..., None]
    rank = int(ranks.max())
    active = jax.lax.broadcasted_iota(ranks.dtype, adapter.E.shape, adapter.E.ndim - 1) < ranks
    e = jnp.where(active, adapter.E * (rank + 1e-5) / (ranks + 1e-5), 0.0)[..., :rank]
    fixed = AdaLoRA(rank=rank, alpha=variant.alpha, orth=variant.orth, dropout=variant.dropout)
    return fixed, AdaLoRAAdapter(adapter.A[..., :rank], e, adapter.B[..., :rank, :])


def _first(a: jax.Array, e: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `rank` first components of each matrix, in their order, those with e = 0 counted last."""
    order = jnp.argsort(e == 0, axis=-1, stable=True)[..., :rank]
    take = jnp.take_along_axis
    return (take(a, jnp.expand_dims(order, -2), -1), take(e, order, -1), take(b, jnp.expand_dims(order, -1), -2))
