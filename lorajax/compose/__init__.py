"""Many adapters of one base: composed, compressed, measured against each other."""

from lorajax.compose.plain import Plain, as_lora

__all__ = ["Plain", "as_lora"]
