"""Many adapters of one base: composed, compressed, measured against each other.

`compose(adapters, method)` makes one adapter of several; `merge(params, adapters, method)` puts them into weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lorajax.compose.arrow import arrow
from lorajax.compose.composed import Composed, blended, compose
from lorajax.compose.compressed import Compressed, separate, storage, together
from lorajax.compose.dare import DARE
from lorajax.compose.gathered import Adapter, Pair, Part, Trained
from lorajax.compose.hierarchy import Hierarchy, hierarchy
from lorajax.compose.interference import Interference, interference
from lorajax.compose.interpolate import interpolate
from lorajax.compose.knots import KnOTS
from lorajax.compose.lorahub import Learned, LoraHub, learn
from lorajax.compose.magnitude_prune import MagnitudePrune
from lorajax.compose.matching import matching, taught
from lorajax.compose.merging import Merged, merge, unmerge
from lorajax.compose.method import Method
from lorajax.compose.orthogonal import Orthogonal
from lorajax.compose.peft_forms import FORMS, PEFTForm
from lorajax.compose.plain import Plain, as_lora
from lorajax.compose.shared import TaskArrays, of_task, share_a, start_shared
from lorajax.compose.sums import Sum, TaskArithmetic
from lorajax.compose.svd import compress
from lorajax.compose.ties import TIES
from lorajax.compose.xlora import XLoRA, by_likeness, centroid

NAMES: Mapping[str, Callable[..., Method]] = MappingProxyType({
    "sum": Sum,
    "task_arithmetic": TaskArithmetic,
    "ties": TIES,
    "dare": DARE,
    "magnitude_prune": MagnitudePrune,
    "knots": KnOTS,
    "lorahub": LoraHub,
    "orthogonal": Orthogonal,
    **FORMS,
})
"""Name -> method. A new one gets a row here and its file."""

__all__ = ["DARE", "FORMS", "NAMES", "TIES", "Adapter", "Composed", "Compressed", "Hierarchy", "Interference", "KnOTS",
           "Learned", "LoraHub", "MagnitudePrune", "Merged", "Method", "Orthogonal", "PEFTForm", "Pair", "Part",
           "Plain", "Sum", "TaskArithmetic", "TaskArrays", "Trained", "XLoRA", "arrow", "as_lora", "blended",
           "by_likeness", "centroid", "compose", "compress", "hierarchy", "interference", "interpolate", "learn",
           "matching", "merge", "of_task", "separate", "share_a", "start_shared", "storage", "taught", "together",
           "unmerge"]
