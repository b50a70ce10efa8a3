"""Controllers: what acts around optimizer steps."""

from lorajax.control.adalora import AdaLoRAState, adalora, budget_schedule
from lorajax.control.compact import compact
from lorajax.control.controller import Controller, identity

__all__ = ["AdaLoRAState", "Controller", "adalora", "budget_schedule", "compact", "identity"]
