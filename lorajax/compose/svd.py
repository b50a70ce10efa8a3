"""Fewer ranks: the best approximation of a sum of updates, without forming (in, out).

With ``a = Q_a R_a`` and ``b^T = Q_b R_b``, a b has the singular values of the (r, r) core ``R_a R_b^T``
(``U S V^T = svd(R_a R_b^T)``), and its singular vectors are ``Q_a U`` and ``Q_b V``: O((in + out) r^2). Truncation to
the largest k is the best rank-k approximation in Frobenius norm (Eckart and Young 1936).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lorajax.compose.gathered import Pair, library

EXACT = 1e-6
"""Singular values below this part of the largest are float32 rounding."""


class Decomposed(NamedTuple):
    """u: (in, k), s: (k,), descending, v: (out, k); u and v have orthonormal columns."""

    u: Any
    s: Any
    v: Any

    @property
    def needed(self) -> int:
        """How many singular values are more than rounding; at least 1."""
        return max(1, int(np.sum(self.s > EXACT * self.s.max(initial=0.0))))

    def pair(self, rank: int) -> Pair:
        """The best approximation of that rank, balanced: a = u sqrt(s), b = sqrt(s) v^T."""
        root = library(self.s).sqrt(self.s[:rank])[None, :]
        return Pair((self.u[:, :rank] * root).astype(np.float32), (self.v[:, :rank] * root).T.astype(np.float32))

    def lost(self, rank: int) -> float:
        """Frobenius norm of what that rank leaves out."""
        return float(np.linalg.norm(self.s[rank:]))


def decompose(pair: Pair) -> Decomposed:
    """The SVD of a b, k = min(in, r, out), from its factors alone; of NumPy arrays in float64, of JAX's (traceable) in
    their dtype."""
    xp = library(pair.a, pair.b)
    a, b = (pair.a, pair.b) if xp is not np else (pair.a.astype(np.float64), pair.b.astype(np.float64))
    q_a, r_a = xp.linalg.qr(a)
    q_b, r_b = xp.linalg.qr(b.T)
    u, s, vt = xp.linalg.svd(r_a @ r_b.T, full_matrices=False)
    return Decomposed(q_a @ u, s, q_b @ vt.T)


def decompose_dense(delta: np.ndarray) -> Decomposed:
    """The SVD of (in, out), for updates that have no factors."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return Decomposed(u, s, vt.T)


def spanned(u: np.ndarray, s: np.ndarray, size: float | None = None) -> np.ndarray:
    """The columns of u that are more than rounding of numbers of that size (None: of the largest of s)."""
    return u[:, s > max(EXACT * float(s.max() if size is None else size), float(np.finfo(np.float32).tiny))]


def compress(pair: Pair, rank: int) -> Pair:
    """The best update of `rank` (or of less, where the sides or the factors are smaller)."""
    return decompose(pair).pair(rank)


def norm(pair: Pair) -> float:
    """Frobenius norm of a b: ``||a b||^2 = tr(a^T a b b^T)``, in float64, so that a difference cancels to 1e-8."""
    a, b = np.asarray(pair.a, np.float64), np.asarray(pair.b, np.float64)
    return float(np.sqrt(max(0.0, np.sum((a.T @ a) * (b @ b.T)))))


def join(pairs: Sequence[Pair], weights: Any = None) -> Pair:
    """``sum_t w_t a_t b_t`` exactly: a = [a_1 | a_2 ...], b = [w_1 b_1 ; w_2 b_2 ...]."""
    bs = [pair.b if weights is None else weights[t] * pair.b for t, pair in enumerate(pairs)]
    return Pair(library(*[p.a for p in pairs]).concatenate([p.a for p in pairs], 1), library(*bs).concatenate(bs, 0))
