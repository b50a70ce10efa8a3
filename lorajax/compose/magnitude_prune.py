"""Magnitude pruning before the sum: TIES's trim alone, without election (the baseline of arXiv 2311.03099)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lorajax.compose import trim
from lorajax.compose.gathered import Part
from lorajax.compose.method import Method, Stream, share
from lorajax.compose.ties import scoped


@dataclass(frozen=True)
class MagnitudePrune(Method):
    """``dW = sum_t w_t trim(tau_t)`` (the baseline of arXiv 2311.03099): the largest entries by
    magnitude stay as they are, without rescaling.

    density: the share of entries that stays. scope: of the trim, the whole ``model`` or each ``matrix`` (PEFT).
    """

    density: float = 0.2
    scope: str = "model"

    reads_taus: ClassVar[bool] = True

    def compose(self, part: Part, survey: Any) -> np.ndarray:
        """(in, out)."""
        taus = part.deltas()
        at = trim.of_matrix(taus, self.density) if survey is None else survey[list(part.members)]
        return np.tensordot(part.weights, trim.kept(taus, at), 1)

    def survey(self, stream: Stream, count: int) -> np.ndarray | None:
        """The thresholds of the whole model; None with scope ``matrix``."""
        return None if self.scope == "matrix" else trim.of_model(stream, count, self.density)

    def check(self, count: int) -> None:
        """Raises ValueError for a density outside [0, 1] and an unknown scope."""
        share("density", self.density)
        scoped(self.scope)
