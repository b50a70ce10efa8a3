"""Controllers: what acts around optimizer steps, and the table of names by which configs call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lorajax.control.adalora import AdaLoRAState, adalora, budget_schedule
from lorajax.control.compact import compact
from lorajax.control.controller import Controller, identity

NAMES: Mapping[str, Callable[..., Controller]] = MappingProxyType({
    "identity": lambda adapt, *, total_steps: identity(),
    "adalora": adalora,
})
"""Name -> ``(adapt, *, total_steps, **settings) -> Controller``."""

__all__ = ["NAMES", "AdaLoRAState", "Controller", "adalora", "budget_schedule", "compact", "identity"]
