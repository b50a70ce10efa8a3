"""A common adapter and a small one per task on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lorajax.compose.compressed import Compressed, built, distances, without_wholes
from lorajax.compose.gathered import Adapter, Pair, Trained, gather, weighted
from lorajax.compose.svd import compress, join


class Hierarchy(NamedTuple):
    """common, specific: adapters; a task's update is the sum of the common one and its own:
    ``specific[t].adapt.bind(..., onto=common.adapt.bind(...))``. whole: each task's sum as one adapter, with errors and
    what is stored."""

    common: Adapter
    specific: tuple[Adapter, ...]
    whole: Compressed


def hierarchy(adapters: Sequence[Trained], common: int, specific: int, *, rounds: int = 5) -> Hierarchy:
    """``dW_t = C + S_t``, C of rank `common` and every S_t of rank `specific`, by alternating best approximations:
    ``C = svd_c(mean_t (dW_t - S_t))``, ``S_t = svd_s(dW_t - C)``; each lowers the sum of squared errors (Eckart and
    Young). rounds: how often; the first is the SVD of the mean. A site that not all tasks adapt has no common part.

    Raises ValueError for ranks or rounds below 1.
    """
    if min(common, specific, rounds) < 1:
        raise ValueError(f"common={common}, specific={specific} and rounds={rounds} must be at least 1")
    found, n = gather(adapters), len(adapters)
    without_wholes(found, "a hierarchy")
    shared: dict[str, list[Pair]] = {}
    own: list[dict[str, list[Pair]]] = [{} for _ in adapters]
    for part in found.parts(weighted(None, n)):
        c, rest = None, [compress(pair, specific) for pair in part.pairs]
        if len(part.members) == n:
            rest = [Pair(pair.a[:, :1] * 0, pair.b[:1] * 0) for pair in part.pairs]
            for _ in range(rounds):
                left = [join((pair, s), (1.0, -1.0)) for pair, s in zip(part.pairs, rest, strict=True)]
                c = compress(join(left, np.full(n, 1 / n, np.float32)), common)
                rest = [compress(join((pair, c), (1.0, -1.0)), specific) for pair in part.pairs]
            assert c is not None
            shared.setdefault(part.path, []).append(c)
        for t, s in zip(part.members, rest, strict=True):
            own[t].setdefault(part.path, []).append(s)
    one, each = built(found, shared), tuple(built(found, pairs) for pairs in own)
    sums = [built(found, {path: [join((c, s)) for c, s in zip(shared[path], rows, strict=True)] if path in shared
                          else rows for path, rows in pairs.items()}) for pairs in own]
    stored = (one.trainable, [x.trainable for x in each])
    return Hierarchy(one, each, Compressed(tuple(sums), stored, distances(adapters, sums)))
