"""From LoRA with a start that was taken off again, and from MiCA, to LoRA without one: what other tools can read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from lorajax.core.adapt import Adapt, Frozen
from lorajax.variants.lora import LoRA, LoRAAdapter
from lorajax.variants.mica import MiCA


def plain_lora(adapted: Adapt, trainable: Mapping[str, Any], frozen: Frozen, params: Any,
               ) -> tuple[Adapt, dict[str, Any], Frozen]:
    """The same function as adapters of the original base `params`: (Adapt, trainable, frozen).

    ``s (A B - A0 B0)`` is a LoRA of rank 2 r, ``[A | A0] [B ; -B0]``, with alpha doubled, or times sqrt(2) under
    rsLoRA, so that s stays (arXiv 2404.02948's conversion). MiCA keeps its rank. Whatever else is adapted or trained in
    full stays as it is, so does DoRA around such a start. A rank above min(in, out) is right here, though `LoRA.check`
    refuses to start with one.
    """
    chosen, trained, kept = dict(adapted.chosen), dict(trainable), {**frozen.aux, **frozen.shared}
    for path, choice in adapted.plan.items():
        if isinstance(choice, MiCA):
            lora = LoRA(rank=choice.rank, alpha=choice.alpha, dropout=choice.dropout)
            trained[path] = LoRAAdapter(trainable[path].A, kept.pop(path).B)
        elif isinstance(choice, LoRA) and choice.initial.subtracts:
            alpha = choice.alpha * (math.sqrt(2.0) if choice.rslora else 2.0)
            lora = replace(choice, rank=2 * choice.rank, alpha=alpha, initializer="kaiming", fold=False)
            a, b, (_, _, a0, b0) = trainable[path].A, trainable[path].B, kept.pop(path)
            trained[path] = LoRAAdapter(jnp.concatenate([a, a0], -1), jnp.concatenate([b, -b0], -2))
        else:
            continue
        chosen[path] = chosen[path]._replace(choice=lora)
    converted = replace(adapted, chosen=chosen)
    return converted, trained, converted.frozen(params, kept)
