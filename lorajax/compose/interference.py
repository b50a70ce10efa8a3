"""How much adapters of one base get in each other's way, site by site, before they are composed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lorajax.compose.gathered import Gathered, Trained, gather, weighted
from lorajax.compose.svd import decompose, spanned
from lorajax.core.sites import table


class Interference(NamedTuple):
    """Each: path -> (adapters, adapters) symmetric, the mean over the matrices of the site, NaN where one of the two
    has none.

    overlap_in, overlap_out: ``||U_i^T U_j||_F^2 / min(r_i, r_j)`` of the input (output) spaces of two updates, U an
    orthonormal basis: 0 for orthogonal spaces, 1 where one contains the other (arXiv 2106.09685, section 7.2's phi).
    cosine: of the updates as vectors. conflict: the share of entries with opposite signs, among those where neither is
    0 (arXiv 2306.01708): 0.5 for unrelated updates.
    """

    overlap_in: dict[str, np.ndarray]
    overlap_out: dict[str, np.ndarray]
    cosine: dict[str, np.ndarray]
    conflict: dict[str, np.ndarray]

    def mean(self) -> dict[str, np.ndarray]:
        """Measure -> (adapters, adapters), the mean over sites where both are."""
        return {name: _mean(list(rows.values())) for name, rows in self._asdict().items()}

    def __str__(self) -> str:
        means = self.mean()
        n = len(next(iter(means.values())))
        rows = [("adapters", *means)]
        rows += [(f"{i}, {j}", *[f"{m[i, j]:.3f}" for m in means.values()]) for i in range(n) for j in range(i + 1, n)]
        return table(rows)


def interference(adapters: Sequence[Trained]) -> Interference:
    """Of every two of the adapters. Forms the dense updates of one matrix at a time, for the signs."""
    return measured(gather(adapters))


def measured(found: Gathered) -> Interference:
    """The same of what is gathered."""
    n = len(found.plains)
    each: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in Interference._fields}
    for part in found.parts(weighted(None, n)):
        bases = [decompose(pair) for pair in part.pairs]
        rows = {"overlap_in": _overlap([spanned(x.u, x.s) for x in bases]),
                "overlap_out": _overlap([spanned(x.v, x.s) for x in bases])}
        rows |= dict(zip(("cosine", "conflict"), _compared(part.deltas()), strict=True))
        at = np.ix_(part.members, part.members)
        for name, row in rows.items():
            full = np.full((n, n), np.nan)
            full[at] = row
            each[name].setdefault(part.path, []).append(full)
    return Interference(**{name: {path: _mean(found) for path, found in rows.items()} for name, rows in each.items()})


def _overlap(bases: list[np.ndarray]) -> np.ndarray:
    def one(u: np.ndarray, v: np.ndarray) -> float:
        small = min(u.shape[1], v.shape[1])
        return float(np.sum(np.square(u.T @ v))) / small if small else np.nan

    return np.array([[one(u, v) for v in bases] for u in bases])


def _compared(taus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, share of opposite signs), both (members, members)."""
    flat = taus.reshape(len(taus), -1)
    products, signs = np.float64(flat @ flat.T), np.sign(flat)
    norms = np.sqrt(np.diag(products))
    both, same = np.abs(signs) @ np.abs(signs).T, signs @ signs.T  # same: those alike less those opposite
    with np.errstate(invalid="ignore"):
        return products / (norms[:, None] * norms[None, :]), (both - same) / (2 * both)


def _mean(rows: list[np.ndarray]) -> np.ndarray:
    """Entry by entry over the rows that have it."""
    stack = np.stack(rows)
    there = ~np.isnan(stack)
    total = np.sum(np.where(there, stack, 0.0), 0)
    return np.where(there.any(0), total / np.maximum(there.sum(0), 1), np.nan)
