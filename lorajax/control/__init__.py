"""Controllers: what acts around optimizer steps, and the table of names by which configs call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lorajax.control.adalora import AdaLoRAState, adalora, budget_schedule
from lorajax.control.compact import compact, truncate
from lorajax.control.controller import Controller, Restart, exported, identity
from lorajax.control.dylora import dylora, rank_masks
from lorajax.control.importance import (
    effective_rank,
    energy_rank,
    importance,
    smoothed_sensitivity,
    spectra,
    stable_rank,
)
from lorajax.control.increlora import IncreLoRAState, increlora
from lorajax.control.ranks import allocate, with_ranks
from lorajax.control.reduce import ReduceState, reduce
from lorajax.control.relora import ReLoRAState, relora
from lorajax.control.sora import sora
from lorajax.control.sparse import prune, sparse

NAMES: Mapping[str, Callable[..., Controller]] = MappingProxyType({
    "identity": lambda adapt, *, total_steps: identity(),
    "adalora": adalora,
    "dylora": dylora,
    "increlora": increlora,
    "relora": relora,
    "reduce": reduce,
    "sora": sora,
    "sparse": sparse,
})
"""Name -> ``(adapt, *, total_steps, **settings) -> Controller``. One that has a parameter `learning_rate` or `seed` is
told the run's."""

__all__ = [
    "NAMES", "AdaLoRAState", "Controller", "IncreLoRAState", "ReLoRAState", "ReduceState", "Restart", "adalora",
    "allocate", "budget_schedule", "compact", "dylora", "effective_rank", "energy_rank", "exported", "identity",
    "importance", "increlora", "prune", "rank_masks", "reduce", "relora", "smoothed_sensitivity", "sora", "sparse",
    "spectra", "stable_rank", "truncate", "with_ranks",
]
