"""Each update without what lies in the spaces of those before it, then their sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lorajax.compose.gathered import Pair, Part
from lorajax.compose.method import Method
from lorajax.compose.svd import decompose, join, norm, spanned

SIDES = ("in", "out", "both")


@dataclass(frozen=True)
class Orthogonal(Method):
    """``dW = sum_t w_t P_t dW_t`` with ``P_t = I - Q_<t Q_<t^T``, Q_<t an orthonormal basis of the input spaces of the
    updates before t: block Gram-Schmidt in the order given, the projection of gradient projection memory (arXiv
    2103.09762) applied to finished adapters. The first stays as it is; what a later one shares with it is
    lost (`Composed.errors` says how much).

    side: which space, ``in`` (the paper's: the inputs that the earlier tasks read stay untouched), ``out``, or
    ``both``, one projection on each side.
    """

    side: str = "in"

    def compose(self, part: Part, survey: Any) -> Pair:
        """Factors of the summed ranks."""
        ins: list[np.ndarray] = []
        outs: list[np.ndarray] = []
        kept = []
        for pair in part.pairs:
            a = _without(pair.a, ins) if self.side in ("in", "both") else pair.a
            b = _without(pair.b.T, outs).T if self.side in ("out", "both") else pair.b
            found, size = decompose(Pair(a, b)), norm(pair)
            ins.append(spanned(found.u, found.s, size))
            outs.append(spanned(found.v, found.s, size))
            kept.append(Pair(a, b))
        return join(kept, part.weights)

    def check(self, count: int) -> None:
        """Raises ValueError for an unknown side."""
        if self.side not in SIDES:
            raise ValueError(f"side={self.side!r} is unknown; there are {', '.join(SIDES)}")


def _without(x: np.ndarray, bases: list[np.ndarray]) -> np.ndarray:
    for q in bases:
        x = x - q @ (q.T @ x)
    return x.astype(np.float32)
