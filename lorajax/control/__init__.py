"""Controllers: what acts around optimizer steps, and the table of names by which configs call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lorajax.control.adalora import AdaLoRAState, adalora, budget_schedule
from lorajax.control.compact import compact
from lorajax.control.controller import Controller, identity
from lorajax.control.importance import (
    effective_rank,
    energy_rank,
    importance,
    smoothed_sensitivity,
    spectra,
    stable_rank,
)
from lorajax.control.ranks import allocate, with_ranks

NAMES: Mapping[str, Callable[..., Controller]] = MappingProxyType({
    "identity": lambda adapt, *, total_steps: identity(),
    "adalora": adalora,
})
"""Name -> ``(adapt, *, total_steps, **settings) -> Controller``."""

__all__ = [
    "NAMES", "AdaLoRAState", "Controller", "adalora", "allocate", "budget_schedule", "compact", "effective_rank",
    "energy_rank", "identity", "importance", "smoothed_sensitivity", "spectra", "stable_rank", "with_ranks",
]
