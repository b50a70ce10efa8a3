"""Where a run stands: a bar with ETA and throughput on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

import numpy as np
from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Counts optimizer steps. Use as a context manager, or call `close`.

    total: steps of the whole run; done: steps already taken by an earlier process. every: seconds between lines when
    `stream` is not a terminal; a terminal is redrawn ten times a second. clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        every: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = total
        self.done = done
        self.examples_per_second = 0.0
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._bar = None
        self._every = every
        if self._stream.isatty():
            self._every = 0.1
            self._bar = tqdm(
                total=total, initial=done, file=self._stream, unit="step", dynamic_ncols=True, mininterval=0
            )
        self._first = done
        self._examples = 0.0
        self._aside: dict[str, float] = {}
        self._end = 0.0
        self._start = self._drawn = clock()

    def update(self, steps: int = 1, *, examples: float = 0, **shown: Any) -> None:
        """`steps` more are done, over `examples` examples. shown: scalars to print (loss=...).

        JAX scalars are read, and so waited for, only when something is printed; of several values the last is shown.
        """
        self.done += steps
        self._examples += float(examples)
        now = self._clock()
        if now - self._drawn >= self._every or self.done >= self.total:
            self._draw(now, shown)

    def fed(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, and how long each was waited for, as `data`."""
        waiting = iter(batches)
        while True:
            with self.aside("data"):
                try:
                    batch = next(waiting)
                except StopIteration:
                    return
            yield batch

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Inside, no step is taken: `what` is done instead."""
        began = self._clock()
        try:
            yield
        finally:
            self._aside[what] = self._aside.get(what, 0.0) + self._clock() - began

    def shares(self) -> dict[str, float]:
        """Name -> share of the time from this process' beginning to `close`, for all that was done aside. That of
        `data` is the most that the device can have stood idle for want of a batch."""
        whole = max((self._end or self._clock()) - self._start, 1e-9)
        return {what: seconds / whole for what, seconds in self._aside.items()}

    @property
    def elapsed(self) -> float:
        """Seconds since this process began, to `close`."""
        return (self._end or self._clock()) - self._start

    def write(self, text: str) -> None:
        """One line of text, above the bar if there is one."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            tqdm.write(text, file=self._stream)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._end = self._end or self._clock()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self, now: float, shown: dict[str, Any]) -> None:
        elapsed = max(now - self._start, 1e-9)
        self.examples_per_second = self._examples / elapsed
        self._drawn = now
        words = [f"{name} {float(np.ravel(value)[-1]):.4g}" for name, value in shown.items()]
        words.append(f"{self.examples_per_second:.1f} examples/s")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(words), refresh=False)
            self._bar.update(self.done - self._bar.n)
            return
        left = elapsed / max(self.done - self._first, 1) * (self.total - self.done)
        share = 100 * self.done // max(self.total, 1)
        eta = tqdm.format_interval(left)
        self.write(f"step {self.done}/{self.total} ({share}%), {', '.join(words)}, {eta} left")
