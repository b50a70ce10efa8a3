"""Optimizers for adapters, optax transformations over the labels of the leaf tables, and their table of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import optax

from lorajax.optim.eight_bit import eight_bit
from lorajax.optim.freeze_ranks import freeze_ranks
from lorajax.optim.lora_fa import lora_fa, lora_fa_projected, project_b
from lorajax.optim.lora_plus import groups, lora_plus
from lorajax.optim.lora_pro import lora_pro
from lorajax.optim.lora_rite import lora_rite
from lorajax.optim.offload import offloaded
from lorajax.optim.recipe import adamw, restart_schedule, warmup_schedule
from lorajax.optim.riemannian import riemannian
from lorajax.optim.sora import sora
from lorajax.variants import LoRA


def _lora_plus(learning_rate: Any, *, adapt: Any, **settings: Any) -> optax.GradientTransformation:
    tables = [path for path, site in adapt.sites.items() if site.op == "lookup" and path in adapt.plan]
    return lora_plus(learning_rate, labels=adapt.labels, embeddings=tables, **settings)


def _lora_fa(learning_rate: Any, *, adapt: Any, **settings: Any) -> optax.GradientTransformation:
    return lora_fa(adamw(learning_rate, **settings), adapt.labels)


def _lora_fa_projected(learning_rate: Any, *, adapt: Any, **settings: Any) -> optax.GradientTransformation:
    scales = {path: variant.scale for path, variant in adapt.plan.items() if isinstance(variant, LoRA)}
    if not scales:
        found = sorted({type(variant).__name__ for variant in adapt.plan.values()})
        raise ValueError(f"lora_fa_projected found no LoRA site, so there is no gradient to project; the rules made "
                         f"{', '.join(found) or 'none'}: give at least one path LoRA(...), or use 'adamw'")
    return lora_fa_projected(learning_rate, adapt.labels, scales, **settings)


NAMES: Mapping[str, Callable[..., optax.GradientTransformation]] = MappingProxyType({
    "adamw": lambda learning_rate, *, adapt, **settings: adamw(learning_rate, **settings),
    "adamw_8bit": lambda learning_rate, *, adapt, **settings: eight_bit(adamw(learning_rate, **settings)),
    "adamw_paged": lambda learning_rate, *, adapt, **settings: offloaded(adamw(learning_rate, **settings)),
    "lora_plus": _lora_plus,
    "lora_fa": _lora_fa,
    "lora_fa_projected": _lora_fa_projected,
    "riemannian": riemannian,
    "lora_pro": lora_pro,
    "lora_rite": lora_rite,
    "sora": sora,
})
"""Name -> ``(learning_rate, *, adapt, weight_decay, **settings)``: an optimizer that includes its learning rate."""

__all__ = [
    "NAMES", "adamw", "eight_bit", "freeze_ranks", "groups", "lora_fa", "lora_fa_projected", "lora_plus", "lora_pro",
    "lora_rite", "offloaded", "project_b", "restart_schedule", "riemannian", "sora", "warmup_schedule",
]
