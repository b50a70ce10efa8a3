"""From LoRA with a start that was taken off again, and from MiCA, to LoRA without one: what other tools can read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.variant import Variant
from lorajax.variants.dora import DoRA
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
            lora = lora_of(choice)
            trained[path] = LoRAAdapter(trainable[path].A, kept.pop(path).B)
        elif isinstance(choice, LoRA) and choice.initial.subtracts:
            (a, b, _, _), (_, _, a0, b0) = trainable[path], kept.pop(path)
            lora, trained[path] = joined(choice, a, b, a0, b0)
        else:
            continue
        chosen[path] = chosen[path]._replace(choice=lora)
    converted = replace(adapted, chosen=chosen)
    return converted, trained, converted.frozen(params, kept)


def joined(lora: LoRA, a: jax.Array, b: jax.Array, a0: jax.Array, b0: jax.Array) -> tuple[LoRA, LoRAAdapter]:
    """``s (A B - A0 B0)`` as one LoRA: [A | A0] (in, r + r0), [B ; -B0] (r + r0, out), alpha such that s stays."""
    rank = a.shape[-1] + a0.shape[-1]
    alpha = lora.scale * (math.sqrt(rank) if lora.rslora else rank)
    plain = replace(lora, rank=rank, alpha=alpha, initializer="kaiming", fold=False)
    return plain, LoRAAdapter(jnp.concatenate([a, a0], -1), jnp.concatenate([b, -b0], -2))


def lora_of(mica: MiCA) -> LoRA:
    """The LoRA whose B did not train."""
    return LoRA(rank=mica.rank, alpha=mica.alpha, dropout=mica.dropout)


def restated(variant: Variant, adapter: Any) -> tuple[Variant, Any, bool]:
    """(variant, adapter, whether its arrays differ): ``A B - A0 B0 = [A | A0] [B ; -B0]``, at the same scale, also
    inside DoRA; MiCA is a LoRA whose B did not train. Any other adapter is returned as it is."""
    inner = variant.inner
    if isinstance(variant, MiCA):
        return lora_of(variant), LoRAAdapter(adapter.A, adapter.B), False
    if not isinstance(inner, LoRA) or not inner.initial.subtracts:
        return variant, adapter, False
    lora, both = joined(inner, adapter.A, adapter.B, adapter.A0, adapter.B0)
    alpha = float(lora.alpha)  # a whole number stays one in the file
    lora = replace(lora, alpha=round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha)
    return replace(variant, of=lora) if isinstance(variant, DoRA) else lora, adapter._replace(A=both.A, B=both.B), True
