"""What PEFT has no form of its own for, as one plain LoRA on the same base: starts that are taken off again, MiCA."""

from __future__ import annotations

from typing import Any

from lorajax.core.variant import Variant
from lorajax.io.tensors import AdapterError
from lorajax.variants.lora import INITIALIZERS, LoRA
from lorajax.variants.plain import restated

REDONE = {"pissa": INITIALIZERS["pissa"](), "olora": INITIALIZERS["olora"]()}
"""Starts that PEFT's loader does again, by a decomposition of the base."""


def joined(variant: Variant, adapter: Any, convert: bool = True) -> tuple[Variant, Any, bool]:
    """`restated`. convert: False leaves the starts as they are that PEFT does again, and raises AdapterError for the
    others."""
    inner = variant.inner
    if convert or not isinstance(inner, LoRA) or not inner.initial.subtracts:
        return restated(variant, adapter)
    if redone(variant) is None:
        raise AdapterError(f"PEFT cannot do the start {inner.initial} again: leave convert=True")
    return variant, adapter, False


def redone(variant: Variant) -> str | None:
    """PEFT's name for the start, if its loader does it again."""
    start = variant.inner.initial if isinstance(variant.inner, LoRA) else None
    return next((name for name, one in REDONE.items() if one == start), None)
