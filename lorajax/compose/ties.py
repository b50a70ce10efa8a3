"""TIES: trim, elect sign, merge what agrees (Yadav et al., arXiv 2306.01708)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lorajax.compose import trim
from lorajax.compose.gathered import Part
from lorajax.compose.method import Method, Stream, share

SCOPES = ("model", "matrix")


class Elected(NamedTuple):
    """thresholds: (adapters,), of the trim. majority: the sign of entries that no sum decides."""

    thresholds: np.ndarray
    majority: float


@dataclass(frozen=True)
class TIES(Method):
    """``dW = lam mean{w_t tau_t : sign(w_t tau_t) = gamma}`` entry by entry, ``gamma = sign(sum_t w_t tau_t)``, over
    the trimmed updates tau_t (arXiv 2306.01708, algorithm 1).

    density: k, the share of entries by magnitude that each task keeps (20 %). scope: of the trim and of the sign that
    entries with gamma = 0 get (that of the majority of entries): the whole ``model``, as in the paper and its code,
    or each ``matrix``, as in PEFT. lam: the scale, 1 where it is not tuned.
    The released code's trim keeps one entry more than k %; this one keeps k %. Weights are ours: 1 in the paper.
    Forms the dense update of one matrix at a time; scope ``model`` makes three passes before.
    """

    density: float = 0.2
    scope: str = "model"
    lam: float = 1.0

    reads_taus: ClassVar[bool] = True

    def compose(self, part: Part, survey: Any) -> np.ndarray:
        """(in, out)."""
        taus = part.deltas()
        if survey is None:
            taus = _weighted(part, trim.kept(taus, trim.of_matrix(taus, self.density)))
            majority = float(np.sign(np.sum(np.sign(np.sum(taus, 0)))))
        else:
            taus = _weighted(part, trim.kept(taus, survey.thresholds[list(part.members)]))
            majority = survey.majority
        return self.lam * merged(taus, majority)

    def survey(self, stream: Stream, count: int) -> Elected | None:
        """Thresholds and majority of the whole model; None with scope ``matrix``."""
        if self.scope == "matrix":
            return None
        thresholds, votes = trim.of_model(stream, count, self.density), 0.0
        for part in stream():
            taus = _weighted(part, trim.kept(part.deltas(), thresholds[list(part.members)]))
            votes += float(np.sum(np.sign(np.sum(taus, 0))))
        return Elected(thresholds, float(np.sign(votes)))

    def check(self, count: int) -> None:
        """Raises ValueError for a density outside [0, 1] and an unknown scope."""
        share("density", self.density)
        scoped(self.scope)


def scoped(scope: str) -> None:
    """Raises ValueError for an unknown scope."""
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; there are {', '.join(SCOPES)}")


def merged(taus: np.ndarray, majority: float) -> np.ndarray:
    """The mean over the tasks whose sign is the elected one; 0 where there is none."""
    gamma = np.sign(np.sum(taus, 0))
    gamma = np.where(gamma == 0, np.float32(majority), gamma)
    agrees = (np.sign(taus) == gamma) & (taus != 0)
    return np.sum(taus * agrees, 0) / np.maximum(np.sum(agrees, 0), 1).astype(taus.dtype)


def _weighted(part: Part, taus: np.ndarray) -> np.ndarray:
    return part.weights[:, None, None] * taus
