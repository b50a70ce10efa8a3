"""DARE: drop most entries of every update at random and rescale the rest (Yu et al., arXiv 2311.03099)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from lorajax.compose.gathered import Pair, Part
from lorajax.compose.method import Method, Stream, nested
from lorajax.compose.sums import Sum

LINEAR = Sum()


@dataclass(frozen=True)
class DARE(Method):
    """``tau~ = m tau / (1 - p)``, ``m ~ Bernoulli(1 - p)`` entry by entry (arXiv 2311.03099), then `then`.

    p: drop rate (0.9 is the paper's usual). then: what merges the sparse updates: `Sum` (the paper's DARE with task
    arithmetic), or `TIES`, which trims what is left. Needs a key: each matrix and adapter draws from its own.
    Forms the dense update of one matrix at a time.
    """

    p: float = 0.9
    then: Method = LINEAR

    reads_taus: ClassVar[bool] = True

    def compose(self, part: Part, survey: Any) -> Pair | np.ndarray:
        """(in, out)."""
        return self.then.compose(self.dropped(part), survey)

    def survey(self, stream: Stream, count: int) -> Any:
        """That of `then`, on the dropped updates."""
        return self.then.survey(lambda: map(self.dropped, stream()), count)

    def dropped(self, part: Part) -> Part:
        """The matrix with the entries that this key drops."""
        taus = part.deltas()
        assert part.key is not None
        masks = np.stack([stays(jax.random.fold_in(part.key, i), 1 - self.p, taus[0]) for i in part.members])
        return part._replace(taus=np.where(masks, taus / np.float32(1 - self.p), np.float32(0)))

    @property
    def draws(self) -> bool:
        """Yes."""
        return True

    def check(self, count: int) -> None:
        """Raises ValueError for a rate outside [0, 1), and a `then` that reads factors."""
        if not 0 <= self.p < 1:
            raise ValueError(f"p={self.p} is not a drop rate in [0, 1)")
        nested(self.then, count)


def stays(key: jax.Array, p: float, like: np.ndarray) -> np.ndarray:
    """True with probability p, in the shape of `like`."""
    return np.asarray(jax.random.bernoulli(key, p, like.shape))
