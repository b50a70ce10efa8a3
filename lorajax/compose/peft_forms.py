"""PEFT's `add_weighted_adapter`, form by form, for parity (its `tuners/lora/model.py`, `utils/merge_utils.py`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lorajax.compose import trim
from lorajax.compose.dare import stays
from lorajax.compose.gathered import Pair, Part
from lorajax.compose.method import Method, share

KINDS = ("linear", "ties", "magnitude_prune", "dare_linear", "dare_ties")
MAJORITIES = ("total", "frequency")


@dataclass(frozen=True)
class PEFTForm(Method):
    """``A = f(sign(w_t s_t) sqrt|w_t s_t|, A_t)``, ``B = f(sqrt|w_t s_t|, B_t)``: f is applied to A and to B apart, so
    the product has cross terms A_i B_j, and depends on which factors stand for an update: it is NOT a function of the
    updates. Here for comparison with PEFT; `Sum`, `TIES`, `DARE` and `MagnitudePrune` are the methods of the papers.

    kind: f: ``linear`` (weighted sum), ``ties``, ``magnitude_prune``, ``dare_linear``, ``dare_ties``.
    density: of the pruning, of each tensor (dare: probability to stay). majority: of ties, ``total`` (the sign of the
    unweighted trimmed sum) or ``frequency`` (of the sum of signs); 0 counts as +. The mean divides weighted entries by
    how many agree.
    svd: on the dense updates, with weights w_t, in place of the factors: PEFT's kinds that end in ``_svd``; give
    `compose` the rank (PEFT: the largest of the inputs').
    The factors need LoRA of one rank. PEFT's `cat` and `svd` are `Sum`, the latter with a rank.
    """

    kind: str = "linear"
    density: float = 0.5
    majority: str = "total"
    svd: bool = False

    reads_taus = property(lambda self: self.svd)

    def compose(self, part: Part, survey: Any) -> Pair | np.ndarray:
        """Factors of the inputs' rank, or with `svd` dense."""
        if self.svd:
            return self._combined(part.deltas(), part.weights, part, 0)
        ranks = {pair.a.shape[-1] for pair in part.pairs}
        if len(ranks) > 1:
            raise ValueError(f"{part.path}: the adapters have ranks {sorted(ranks)}, and {self.kind!r} of PEFT adds "
                             f"their A and B apart: use Sum(), or PEFTForm({self.kind!r}, svd=True) with a rank")
        signed = part.weights * np.asarray([pair.s for pair in part.pairs], np.float32)
        root = np.sqrt(np.abs(signed))
        a = np.stack([pair.a for pair in part.pairs])
        b = np.stack([pair.b / np.float32(pair.s) for pair in part.pairs])
        return Pair(self._combined(a, np.where(signed >= 0, root, -root), part, 0), self._combined(b, root, part, 1))

    def _combined(self, x: np.ndarray, weights: np.ndarray, part: Part, draw: int) -> np.ndarray:
        if self.kind in ("ties", "magnitude_prune"):
            x = trim.kept(x, trim.of_matrix(x, self.density)) if self.density < 1 else x
        elif self.kind != "linear":
            assert part.key is not None
            keys = [jax.random.fold_in(jax.random.fold_in(part.key, i), draw) for i in part.members]
            x = np.where([stays(k, self.density, x[0]) for k in keys], x / np.float32(self.density), np.float32(0))
        weighed = weights[:, None, None] * x
        if "ties" not in self.kind:
            return np.sum(weighed, 0)
        elected = np.where(np.sum(x if self.majority == "total" else np.sign(x), 0) >= 0, 1.0, -1.0)
        agrees = np.sign(x) == elected
        return np.sum(weighed * agrees, 0) / np.maximum(np.sum(agrees, 0), 1).astype(x.dtype)

    @property
    def draws(self) -> bool:
        """The dare kinds."""
        return self.kind.startswith("dare")

    def check(self, count: int) -> None:
        """Raises ValueError for an unknown kind or majority, and a density outside [0, 1]."""
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is unknown; there are {', '.join(KINDS)}. PEFT's 'cat' and 'svd' are "
                             f"Sum(), the latter with compose(rank=...)")
        if self.majority not in MAJORITIES:
            raise ValueError(f"majority={self.majority!r} is unknown; there are {', '.join(MAJORITIES)}")
        share("density", self.density, zero=not self.draws)


FORMS: dict[str, Callable[..., PEFTForm]] = {
    "peft_" + kind + ("_svd" if svd else ""): functools.partial(PEFTForm, kind, svd=svd)
    for kind in KINDS for svd in (False, True) if (kind, svd) != ("linear", True)
}
"""PEFT's names, after ``peft_``."""


def balanced(pair: Pair) -> Pair:
    """The update with LoRA's scale split evenly, sqrt(s) A and sqrt(s) B."""
    root = math.sqrt(abs(pair.s))
    return Pair(np.float32(root) * pair.a, pair.b / np.float32(root))
