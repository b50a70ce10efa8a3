"""lorajax: low-rank adaptation as a functional parameter transform, for any JAX function."""

from lorajax import quant
from lorajax.calibrate import calibrate
from lorajax.core.adapt import Adapt, Frozen, adapt
from lorajax.core.bank import bank, join
from lorajax.core.bound import Bound
from lorajax.core.lift import MaterialisedWeight, StrictLiftError, lift
from lorajax.core.mixed import mixed
from lorajax.core.rules import PRESETS, RuleError
from lorajax.core.sites import Site, Sites, sites
from lorajax.core.variant import Factors, Full, FullAdapter, Leaf, Variant
from lorajax.variants.adalora import AdaLoRA
from lorajax.variants.lora import LoRA

__version__ = "0.1.0"

__all__ = ["PRESETS", "AdaLoRA", "Adapt", "Bound", "Factors", "Frozen", "Full", "FullAdapter", "Leaf", "LoRA",
           "MaterialisedWeight", "RuleError", "Site", "Sites", "StrictLiftError", "Variant", "adapt", "bank",
           "calibrate", "join", "lift", "mixed", "quant", "sites"]
