"""KnOTS: one SVD of all updates gives them a common basis, and their coordinates are merged (arXiv 2410.19735)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lorajax.compose.gathered import Pair, Part
from lorajax.compose.method import Method, Stream, nested
from lorajax.compose.svd import decompose
from lorajax.compose.ties import TIES

PLAIN = TIES()
SIDES = ("out", "in")


class Aligned(NamedTuple):
    """z: (members, in, k), the coordinates of each update. basis: (out, k), orthonormal."""

    z: np.ndarray
    basis: np.ndarray


@dataclass(frozen=True)
class KnOTS(Method):
    """``[dW_1 ; dW_2 ...] = P S Q^T``, ``Z_t = (P S)_t``, ``dW = merge(Z_1, Z_2, ...) Q^T`` (arXiv 2410.19735): every
    ``dW_t = Z_t Q^T`` exactly, and `then` sees coordinates in one basis.

    then: what merges the coordinates (TIES, as in the paper's best; DARE or Sum as well). side: which side's basis is
    common, ``out`` as in the paper, or ``in`` (the released `concat_across_output`). tolerance: singular values at most
    this are dropped (the released code's 1e-5, also in float64).
    Its SVD is of a core of the summed ranks: no (in, out) is formed, and the result has factors of that rank. The
    released code gives every task the first one's weight; here each has its own.
    """

    then: Method = PLAIN
    side: str = "out"
    tolerance: float = 1e-5

    def compose(self, part: Part, survey: Any) -> Pair:
        """Factors of the summed ranks."""
        z, basis = self.aligned(part)
        merged = self.then.compose(part._replace(taus=z), survey)
        assert not isinstance(merged, Pair)
        return Pair(merged, basis.T) if self.side == "out" else Pair(basis, merged.T)

    def survey(self, stream: Stream, count: int) -> Any:
        """That of `then`, over the coordinates."""
        def coordinates() -> Iterator[Part]:
            return (part._replace(taus=self.aligned(part).z) for part in stream())

        return self.then.survey(coordinates, count)

    def aligned(self, part: Part) -> Aligned:
        """The common basis of one matrix and each update's coordinates in it."""
        pairs = part.pairs if self.side == "out" else tuple(Pair(p.b.T, p.a.T) for p in part.pairs)
        # a_t = Q_t R_t, so the stacked updates are blockdiag(Q_t) [R_t b_t]: their SVD is that of a (sum r, out) core.
        qs, rs = zip(*[np.linalg.qr(np.float64(p.a)) for p in pairs], strict=True)
        core = np.concatenate([r @ p.b for r, p in zip(rs, pairs, strict=True)])
        u, s, v = decompose(Pair(np.eye(len(core)), core))
        keep = max(1, int(np.sum(s > self.tolerance)))
        blocks = np.split((u * s)[:, :keep], np.cumsum([len(r) for r in rs])[:-1])
        z = np.stack([q @ block for q, block in zip(qs, blocks, strict=True)])
        return Aligned(z.astype(np.float32), v[:, :keep].astype(np.float32))

    @property
    def draws(self) -> bool:
        """Where `then` does."""
        return self.then.draws

    def check(self, count: int) -> None:
        """Raises ValueError for an unknown side, and a `then` that reads factors."""
        if self.side not in SIDES:
            raise ValueError(f"side={self.side!r} is unknown; there are {', '.join(SIDES)}")
        nested(self.then, count)
