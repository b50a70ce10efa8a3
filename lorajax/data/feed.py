"""From batches to what a jitted step takes: micro-batches, several steps in one call, and a thread that works ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from lorajax.data.batches import Batch, Position

T = TypeVar("T")


class Source(Protocol):
    """Batches by position: of tokens (`lorajax.data.batches`) or of images (`lorajax.data.images`)."""

    def rows(self, epoch: int, index: int) -> np.ndarray: ...
    def batch(self, epoch: int, index: int) -> Batch: ...
    def position(self, step: int) -> Position: ...
    def stack(self, group: Sequence[Batch]) -> Batch: ...


def calls(batches: Source, *, accumulate: int = 1, steps_per_call: int = 1) -> Callable[[int], Batch]:
    """``step -> batch`` for the call that takes optimizer steps step .. step + steps_per_call - 1: a pure function.

    Leaves are (steps_per_call, accumulate, B / accumulate, ...); an axis of 1 is left out. Batches that share a call
    are padded to the longest of them. Raises ValueError if `accumulate` does not divide the rows of a batch.
    """
    rows = len(batches.rows(0, 0))
    if rows % accumulate:
        raise ValueError(f"accumulate={accumulate} does not divide a batch of {rows} examples")

    def call(step: int) -> Batch:
        group = [batches.batch(*batches.position(s)) for s in range(step, step + steps_per_call)]
        stacked = batches.stack(group) if steps_per_call > 1 else group[0]
        lead = (steps_per_call,) if steps_per_call > 1 else ()
        if accumulate == 1:
            return stacked
        shape = (*lead, accumulate, rows // accumulate)
        return {name: x.reshape(*shape, *x.shape[len(lead) + 1 :]) for name, x in stacked.items()}

    return call


def widths(batches: Any, steps: Iterable[int], steps_per_call: int = 1) -> dict[int, int]:
    """Padded length -> the first of the calls that begin at `steps` whose batches have it, in that order: the shapes of
    a run before any batch is made. batches: `lorajax.data.Batches`."""
    found: dict[int, int] = {}
    for step in steps:
        call = range(step, step + steps_per_call)
        found.setdefault(max(batches.padded(*batches.position(s)) for s in call), step)
        if len(found) == len(batches.lengths):
            break
    return found


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
