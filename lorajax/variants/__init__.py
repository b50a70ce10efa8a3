"""The methods: one file each, and the table of names by which configs and saved adapters call them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorajax.core.variant import Variant
from lorajax.variants.adalora import AdaLoRA
from lorajax.variants.dora import DoRA
from lorajax.variants.lora import LoRA

NAMES: Mapping[str, type[Variant]] = MappingProxyType({
    "lora": LoRA,
    "adalora": AdaLoRA,
    "dora": DoRA,
})
"""Name -> variant class. A new variant gets a row here, its file, a row of the conformance table, and a config."""

__all__ = ["NAMES", "AdaLoRA", "DoRA", "LoRA"]
