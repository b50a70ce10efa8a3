"""Adapters of many tasks in fewer numbers, and what that costs: storage against error (and score)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lorajax.compose.composed import Composed, compose, planned
from lorajax.compose.gathered import Adapter, Gathered, Pair, Trained, gather, stacked, weighted
from lorajax.compose.method import Method
from lorajax.compose.svd import join, norm
from lorajax.core.adapt import Frozen
from lorajax.core.sites import table
from lorajax.variants.lora import LoRAAdapter


class Compressed(NamedTuple):
    """adapters: one for each task, ready to bind; they may share arrays. stored: a tree of all arrays that have to be
    kept for all of them, each once. errors: of each task, the distance of its update from the original's over the whole
    model, relative to that."""

    adapters: tuple[Trained, ...]
    stored: Any
    errors: tuple[float, ...]

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return sum(x.size for x in jax.tree.leaves(self.stored))


def separate(adapters: Sequence[Trained]) -> Compressed:
    """Nothing shared: the adapters as they are."""
    stored = [(one.trainable, one.adapt.kept(one.frozen)) for one in adapters]
    return Compressed(tuple(adapters), stored, (0.0,) * len(adapters))


def together(adapters: Sequence[Trained], method: Method, *, weights: Any = None, rank: int | None = None,
             key: jax.Array | None = None) -> Compressed:
    """One adapter for all tasks, composed by `method`."""
    made: Composed = compose(adapters, method, weights=weights, rank=rank, key=key, measure=False)
    return Compressed((made,) * len(adapters), made.trainable, distances(adapters, [made] * len(adapters)))


def storage(rows: Mapping[str, Compressed], score: Callable[[Sequence[Trained]], Sequence[float]] | None = None) -> str:
    """A table of ways to store the same tasks: parameters, part of the first row's, mean and worst error, and, with
    `score` (the adapters of all tasks -> a number for each), the mean and worst score."""
    lines: list[tuple[str, ...]] = [("stored as", "parameters", "part", "error", "worst")]
    lines[0] += ("score", "worst") if score else ()
    first = next(iter(rows.values())).parameters
    for name, row in rows.items():
        line = (name, f"{row.parameters:,}", f"{row.parameters / first:.3f}", f"{np.mean(row.errors):.4f}",
                f"{np.max(row.errors):.4f}")
        found = score(row.adapters) if score else []
        lines.append((*line, *((f"{np.mean(found):.4f}", f"{np.min(found):.4f}") if score else ())))
    return table(lines)


def distances(adapters: Sequence[Trained], made: Sequence[Trained]) -> tuple[float, ...]:
    """Of each task, ``||dW' - dW||_F / ||dW||_F`` over the whole model, from factors alone."""
    found, n = gather([*adapters, *made]), len(adapters)
    wrong, size = np.zeros(n), np.zeros(n)
    for part in found.parts(weighted(None, 2 * n)):
        at = dict(zip(part.members, part.pairs, strict=True))
        for t in range(n):
            both = [(at[i], w) for i, w in ((t + n, 1.0), (t, -1.0)) if i in at]
            wrong[t] += norm(join([pair for pair, _ in both], [w for _, w in both])) ** 2 if both else 0.0
            size[t] += norm(at[t]) ** 2 if t in at else 0.0
    return tuple(np.sqrt(wrong / np.maximum(size, np.finfo(np.float32).tiny)).tolist())


def built(found: Gathered, pairs: Mapping[str, Sequence[Pair]]) -> Adapter:
    """The adapter with these updates, path -> one for each matrix."""
    made = {path: LoRAAdapter(*stacked(found.sites[path], rows)) for path, rows in pairs.items()}
    return Adapter(planned(found, made, {}), made, Frozen(dict(found.base), {}, {}))


def without_wholes(found: Gathered, what: str) -> None:
    """Raises ValueError where a weight trained in full is in no adapter's base: it has no low rank to share."""
    absent = [path for path in found.sites.leaves if path not in found.base]
    if absent:
        raise ValueError(f"every adapter trained {absent[0]} in full, which {what} cannot share: give adapters without "
                         f"it (heads stay per task), and keep it beside them")
