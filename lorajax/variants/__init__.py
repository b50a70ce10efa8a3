"""The methods: one file each, and the table of names by which configs and saved adapters call them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorajax.core.variant import Variant
from lorajax.variants.adalora import AdaLoRA
from lorajax.variants.delora import DeLoRA
from lorajax.variants.dora import DoRA
from lorajax.variants.gralora import GraLoRA
from lorajax.variants.hira import HiRA
from lorajax.variants.hydralora import HydraLoRA
from lorajax.variants.ia3 import IA3
from lorajax.variants.increlora import IncreLoRA
from lorajax.variants.kasa import KaSA
from lorajax.variants.loha import LoHa
from lorajax.variants.lokr import LoKr
from lorajax.variants.lora import INITIALIZERS, LoRA
from lorajax.variants.lora_xs import LoRAXS
from lorajax.variants.mica import MiCA
from lorajax.variants.miss import MiSS
from lorajax.variants.molora import MoLoRA
from lorajax.variants.oft import OFT
from lorajax.variants.randlora import RandLoRA
from lorajax.variants.share_lora import ShareLoRA
from lorajax.variants.shira import SHiRA
from lorajax.variants.sora import SoRA
from lorajax.variants.trainable_tokens import TrainableTokens
from lorajax.variants.vb_lora import VBLoRA
from lorajax.variants.vera import VeRA

NAMES: Mapping[str, type[Variant]] = MappingProxyType({
    "lora": LoRA,
    "adalora": AdaLoRA,
    "increlora": IncreLoRA,
    "dora": DoRA,
    "loha": LoHa,
    "lokr": LoKr,
    "hira": HiRA,
    "gralora": GraLoRA,
    "miss": MiSS,
    "delora": DeLoRA,
    "ia3": IA3,
    "shira": SHiRA,
    "kasa": KaSA,
    "sora": SoRA,
    "vera": VeRA,
    "mica": MiCA,
    "randlora": RandLoRA,
    "lora_xs": LoRAXS,
    "vb_lora": VBLoRA,
    "share_lora": ShareLoRA,
    "hydralora": HydraLoRA,
    "molora": MoLoRA,
    "oft": OFT,
    "trainable_tokens": TrainableTokens,
})
"""Name -> variant class. A new variant gets a row here, its file, a row of the conformance table, and a config."""

__all__ = [
    "IA3",
    "INITIALIZERS",
    "NAMES",
    "OFT",
    "AdaLoRA",
    "DeLoRA",
    "DoRA",
    "GraLoRA",
    "HiRA",
    "HydraLoRA",
    "IncreLoRA",
    "KaSA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAXS",
    "MiCA",
    "MiSS",
    "MoLoRA",
    "RandLoRA",
    "SHiRA",
    "ShareLoRA",
    "SoRA",
    "TrainableTokens",
    "VBLoRA",
    "VeRA",
]
