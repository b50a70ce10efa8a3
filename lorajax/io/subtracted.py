"""What PEFT has no form of its own for, as one plain LoRA on the same base: starts that are taken off again, MiCA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorajax.core.variant import Variant
from lorajax.io.tensors import AdapterError
from lorajax.variants import plain
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
        return plain.lora_of(variant), LoRAAdapter(adapter.A, adapter.B), False
    if not isinstance(inner, LoRA) or not inner.initial.subtracts:
        return variant, adapter, False
    if not convert:
        if redone(variant) is None:
            raise AdapterError(f"PEFT cannot do the start {inner.initial} again: leave convert=True")
        return variant, adapter, False
    lora, both = plain.joined(inner, adapter.A, adapter.B, adapter.A0, adapter.B0)
    alpha = float(lora.alpha)  # a whole number stays one in the file
    lora = replace(lora, alpha=round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha)
    joined = replace(variant, of=lora) if isinstance(variant, DoRA) else lora
    return joined, adapter._replace(A=both.A, B=both.B), True


def redone(variant: Variant) -> str | None:
    """PEFT's name for the start, if its loader does it again."""
    start = variant.inner.initial if isinstance(variant.inner, LoRA) else None
    return next((name for name, one in REDONE.items() if one == start), None)
