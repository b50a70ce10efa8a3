"""From batches to what a jitted step takes: micro-batches, several steps in one call, and a thread that works ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from lorajax.data.batches import Batch, Batches

T = TypeVar("T")


def calls(batches: Batches, *, accumulate: int = 1, steps_per_call: int = 1) -> Callable[[int], Batch]:
    """``step -> batch`` for the call that takes optimizer steps step .. step + steps_per_call - 1: a pure function.

    Leaves are (steps_per_call, accumulate, B / accumulate, ...); an axis of 1 is left out. Batches that share a call
    are padded to the longest of them. Raises ValueError if `accumulate` does not divide the rows of a batch.
    """
    rows = len(batches.rows(0, 0))
    if rows % accumulate:
        raise ValueError(f"accumulate={accumulate} does not divide a batch of {rows} examples")

    def call(step: int) -> Batch:
        group = [batches.batch(*batches.position(s)) for s in range(step, step + steps_per_call)]
        stacked = stack(group, batches.tokens.pad_id) if steps_per_call > 1 else group[0]
        lead = (steps_per_call,) if steps_per_call > 1 else ()
        if accumulate == 1:
            return stacked
        shape = (*lead, accumulate, rows // accumulate)
        return {name: x.reshape(*shape, *x.shape[len(lead) + 1 :]) for name, x in stacked.items()}

    return call


def stack(group: Sequence[Batch], pad_id: int) -> Batch:
    """One batch with a new leading axis; (B, L) arrays are padded to the longest L."""
    longest = max(batch["input_ids"].shape[1] for batch in group)

    def padded(name: str, x: np.ndarray) -> np.ndarray:
        if x.ndim < 2 or x.shape[1] == longest:
            return x
        value = pad_id if name == "input_ids" else 0
        return np.pad(x, ((0, 0), (0, longest - x.shape[1])), constant_values=value)

    return {name: np.stack([padded(name, batch[name]) for batch in group]) for name in group[0]}


def ahead(make: Callable[[int], T], steps: Iterable[int], depth: int = 2) -> Iterator[tuple[int, T]]:
    """Yields (step, make(step)) in order, with up to `depth` of them made in a thread before they are asked for."""
    todo = iter(steps)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting = deque((step, pool.submit(make, step)) for _, step in zip(range(depth), todo, strict=False))
        while waiting:
            step, made = waiting.popleft()
            yield step, made.result()
            for step in todo:
                waiting.append((step, pool.submit(make, step)))
                break
