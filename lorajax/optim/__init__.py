"""Optimizers for adapters: optax transformations over the labels that the leaf tables give."""

from lorajax.optim.freeze_ranks import freeze_ranks
from lorajax.optim.lora_fa import lora_fa, lora_fa_projected, project_b
from lorajax.optim.lora_plus import groups, lora_plus
from lorajax.optim.recipe import adamw, warmup_schedule

__all__ = [
    "adamw", "freeze_ranks", "groups", "lora_fa", "lora_fa_projected", "lora_plus", "project_b", "warmup_schedule",
]
