"""One A for all tasks, a B for each: by SVD of finished adapters, or shared from the start of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.compose.compressed import Compressed, built, distances, without_wholes
from lorajax.compose.gathered import Pair, Trained, gather, weighted
from lorajax.compose.svd import decompose
from lorajax.core.adapt import Adapt, Frozen


def share_a(adapters: Sequence[Trained], rank: int, *, weights: Any = None) -> Compressed:
    """``[w_1 dW_1 | w_2 dW_2 ...] = A [w_1 B_1 | w_2 B_2 ...]`` truncated to `rank`: the orthonormal A that
    explains most of all tasks, and ``B_t = A^T dW_t``, the best B for it (Eckart and Young on the stacked updates;
    arXiv 2407.00066 compresses jointly on both sides). Exact once rank reaches the sum of the ranks. Stores
    ``r in + n r out`` numbers a matrix. weights: 1 over each task's norm makes a loud task count like the others. From
    factors alone.

    Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} is below 1: give at least rank=1")
    found, n = gather(adapters), len(adapters)
    without_wholes(found, "one A")
    ones: list[dict[str, list[Pair]]] = [{} for _ in adapters]
    for part in found.parts(weighted(weights, n)):
        a = np.concatenate([pair.a for pair in part.pairs], 1)
        blocks = [np.float32(w) * pair.b for w, pair in zip(part.weights, part.pairs, strict=True)]
        side = np.zeros((a.shape[1], sum(b.shape[1] for b in blocks)), np.float32)
        tops = np.cumsum([0, *[len(b) for b in blocks]])
        for i, b in enumerate(blocks):
            side[tops[i]:tops[i + 1], i * b.shape[1]:(i + 1) * b.shape[1]] = b
        u = decompose(Pair(a, side)).u[:, :rank].astype(np.float32)
        for t, pair in zip(part.members, part.pairs, strict=True):
            ones[t].setdefault(part.path, []).append(Pair(u, (u.T @ pair.a) @ pair.b))
    made = [built(found, pairs) for pairs in ones]
    common: dict[str, jax.Array] = {}
    for one in made:  # one array, not equal ones
        for path, adapter in one.trainable.items():
            one.trainable[path] = adapter._replace(A=common.setdefault(path, adapter.A))
    stored = {"A": common, "B": [{path: x.B for path, x in one.trainable.items()} for one in made]}
    return Compressed(tuple(made), stored, distances(adapters, made))


class TaskArrays(NamedTuple):
    """What n tasks train. common: like `trainable`, with the arrays of the shared labels; own: the others, (n, ...).
    Each has None where the other has an array."""

    common: dict[str, Any]
    own: dict[str, Any]


def start_shared(adapt: Adapt, key: jax.Array, params: Any, tasks: int, *, labels: Sequence[str] = ("a",),
                 stats: Any = None) -> tuple[TaskArrays, Frozen]:
    """`adapt.init` for several tasks that share the arrays with these labels (A) and train the others (B, magnitudes,
    heads) apart, all from one start. ``of_task(arrays, t)`` is a task's trainable; gradients reach the shared ones.
    """
    known = set(jax.tree.leaves(adapt.labels))
    if not set(labels) <= known:
        raise ValueError(f"labels={tuple(labels)} are not all trained here; there are {', '.join(sorted(known))}")
    if tasks < 1:
        raise ValueError(f"tasks={tasks} is below 1")
    trainable, frozen = adapt.init(key, params, stats)
    shared = jax.tree.map(lambda label: label in labels, adapt.labels)
    common = jax.tree.map(lambda x, on: x if on else None, trainable, shared)
    own = jax.tree.map(lambda x, on: None if on else jnp.broadcast_to(x, (tasks, *x.shape)), trainable, shared)
    return TaskArrays(common, own), frozen


def of_task(arrays: TaskArrays, task: Any) -> dict[str, Any]:
    """The trainable of one task; `task` may be traced."""
    own = jax.tree.map(lambda x: x[task], arrays.own)
    return jax.tree.map(lambda x, y: y if x is None else x, arrays.common, own, is_leaf=lambda x: x is None)
