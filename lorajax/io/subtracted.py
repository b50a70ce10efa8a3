"""What PEFT has no form of its own for, as one plain LoRA on the same base: starts that are taken off again, MiCA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lorajax.core.variant import Variant
from lorajax.io.tensors import AdapterError
from lorajax.variants.dora import DoRA
from lorajax.variants.lora import INITIALIZERS, LoRA, LoRAAdapter
from lorajax.variants.mica import MiCA

REDONE = {"pissa": INITIALIZERS["pissa"](), "olora": INITIALIZERS["olora"]()}
"""Starts that PEFT's loader does again, by a decomposition of the base."""


def joined(variant: Variant, adapter: Any, convert: bool = True) -> tuple[Variant, Any, bool]:
    """(variant, adapter, whether its arrays differ): ``A B - A0 B0 = [A | A0] [B ; -B0]``, at the same scale, also
    inside DoRA; MiCA is a LoRA whose B did not train. Any other adapter is returned as it is.

    convert: False leaves the starts as they are that PEFT does again, and raises AdapterError for the others.
    """
    inner = variant.inner
    if isinstance(variant, MiCA):
        plain = LoRA(rank=variant.rank, alpha=variant.alpha, dropout=variant.dropout)
        return plain, LoRAAdapter(adapter.A, adapter.B), False
    if not isinstance(inner, LoRA) or not inner.initial.subtracts:
        return variant, adapter, False
    if not convert:
        if redone(variant) is None:
            raise AdapterError(f"PEFT cannot do the start {inner.initial} again: leave convert=True")
        return variant, adapter, False
    a, b, a0, b0 = (np.asarray(getattr(adapter, name)) for name in ("A", "B", "A0", "B0"))
    rank = inner.rank + a0.shape[-1]
    scale = float(inner.scale) * (rank**0.5 if inner.rslora else rank)
    alpha = round(scale) if abs(scale - round(scale)) < 1e-9 * abs(scale) else scale
    plain = replace(inner, rank=rank, alpha=alpha, initializer="kaiming", fold=False)
    both = {"A": np.concatenate([a, a0], -1), "B": np.concatenate([b, -b0], -2)}
    return replace(variant, of=plain) if isinstance(variant, DoRA) else plain, adapter._replace(**both), True


def redone(variant: Variant) -> str | None:
    """PEFT's name for the start, if its loader does it again."""
    start = variant.inner.initial if isinstance(variant.inner, LoRA) else None
    return next((name for name, one in REDONE.items() if one == start), None)
