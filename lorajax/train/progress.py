"""Where a run stands: a bar with ETA and throughput on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm


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
        self._start = self._drawn = clock()

    def update(self, steps: int = 1, *, examples: float = 0, **shown: Any) -> None:
        """`steps` more are done, over `examples` examples. shown: scalars to print (loss=...).

        JAX scalars are read, and so waited for, only when something is printed.
        """
        self.done += steps
        self._examples += float(examples)
        now = self._clock()
        if now - self._drawn >= self._every or self.done >= self.total:
            self._draw(now, shown)

    @property
    def elapsed(self) -> float:
        """Seconds since this process began."""
        return self._clock() - self._start

    def write(self, text: str) -> None:
        """One line of text, above the bar if there is one."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            tqdm.write(text, file=self._stream)

    def close(self) -> None:
        """Leaves the bar as it stands."""
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
        words = [f"{name} {float(value):.4g}" for name, value in shown.items()]
        words.append(f"{self.examples_per_second:.1f} examples/s")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(words), refresh=False)
            self._bar.update(self.done - self._bar.n)
            return
        left = elapsed / max(self.done - self._first, 1) * (self.total - self.done)
        share = 100 * self.done // max(self.total, 1)
        eta = tqdm.format_interval(left)
        self.write(f"step {self.done}/{self.total} ({share}%), {', '.join(words)}, {eta} left")
