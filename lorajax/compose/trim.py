"""The k largest entries of an update by magnitude, of one matrix or of the whole model at once.

A whole model's k-th value is found exactly in two passes over its matrices, by counting: the bits of a non-negative
float32 order like the number, so one histogram over the upper 16 bits names the bin, one over the lower 16 the value.
"""

from __future__ import annotations

import numpy as np

from lorajax.compose.method import Stream

HALF = 1 << 16


def kept(taus: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """taus (members, in, out) where |tau| >= its threshold (members,), else 0."""
    return np.where(np.abs(taus) >= thresholds[:, None, None], taus, np.float32(0))


def of_matrix(taus: np.ndarray, density: float) -> np.ndarray:
    """(members,): the int(density n)-th largest magnitude of each; infinity for the 0-th."""
    flat = np.abs(taus.reshape(len(taus), -1))
    k = int(density * flat.shape[1])
    return np.full(len(flat), np.inf) if k == 0 else np.partition(flat, flat.shape[1] - k, 1)[:, flat.shape[1] - k]


def of_model(stream: Stream, count: int, density: float) -> np.ndarray:
    """(count,): the same over all matrices of each adapter."""
    upper, lower = np.zeros((count, HALF), np.int64), np.zeros((count, HALF), np.int64)
    for part in stream():
        for i, bits in zip(part.members, _bits(part.deltas()), strict=True):
            upper[i] += np.bincount(bits >> 16, minlength=HALF)
    k = (density * upper.sum(1)).astype(np.int64)
    bins, above = _from_top(upper, k)
    for part in stream():
        for i, bits in zip(part.members, _bits(part.deltas()), strict=True):
            lower[i] += np.bincount(bits[bits >> 16 == bins[i]] & (HALF - 1), minlength=HALF)
    rest, _ = _from_top(lower, k - above)
    values = (bins << 16 | rest).astype(np.uint32).view(np.float32)
    return np.where(k == 0, np.float32(np.inf), values)


def _bits(taus: np.ndarray) -> np.ndarray:
    """(members, entries): the magnitudes' bits."""
    return np.abs(taus.astype(np.float32)).reshape(len(taus), -1).view(np.uint32)


def _from_top(counts: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bin of the k-th from the top, how many lie above that bin) for each row."""
    reach = np.cumsum(counts[:, ::-1], axis=1)
    found = np.argmax(reach >= np.maximum(k, 1)[:, None], axis=1)
    bins, rows = counts.shape[1] - 1 - found, np.arange(len(k))
    return bins, reach[rows, found] - counts[rows, bins]
