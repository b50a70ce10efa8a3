"""Who gets a slot when: requests wait in a queue, enter as slots become free, and all that run advance together.

Tokens in, tokens out. `submit` and `cancel` may be called from any thread; `turn` and `run` by one. The engine's thread
calls a request's `emit` for every token and its `done` once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import jax
import numpy as np

from lorajax.serve.residents import Residents
from lorajax.serve.slots import Rows, empty, programs

log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """The queue is full."""


class Stopped(RuntimeError):
    """No new request is taken."""


@dataclass(eq=False)
class Request:
    """One text to go on with.

    prompt: token ids, at least one. adapter: its name for `Residents`, None for the base. max_new: tokens at most.
    temperature, top_p, seed: as in `lorajax.serve.slots.Rows`. emit: token -> whether the text is to end behind it.
    done: gets "stop" (`emit` said so, or the model's end token, which `emit` sees too), "length", "cancelled", or the
    exception that ended it. It must not raise.
    """

    prompt: Sequence[int]
    adapter: Hashable | None
    max_new: int
    emit: Callable[[int], bool]
    done: Callable[[str | Exception], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    cancelled: bool = field(default=False, init=False)
    drawn: int = field(default=0, init=False)


@dataclass
class Counts:
    """What was done so far. rows: of all decoding steps together, so rows / (steps slots) is how full they were.
    seconds: spent in turns that had something to do."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0

    def since(self, before: Counts) -> Counts:
        """What was done after `before`, a copy of earlier."""
        return Counts(*[now - then for now, then in zip(astuple(self), astuple(before), strict=True)])

    def line(self, slots: int) -> str:
        """Throughput, and how full the slots were."""
        return (f"{self.tokens} tokens in {self.seconds:.1f} busy s: {self.tokens / max(self.seconds, 1e-9):.1f} "
                f"tokens/s, slots {100 * self.rows / max(self.steps * slots, 1):.0f} % full")


class Engine:
    """net: a decoder (`lorajax.models.decoder.CausalLM`); residents: its parameters with adapters, at least as many
    places as `slots`. length: tokens of prompt and answer at most. buckets: padded lengths of prompts, a program each.
    queue: requests that may wait. end: the token that ends a text, or None.

    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(self, net: Any, residents: Residents, *, slots: int = 8, length: int = 512,
                 buckets: Sequence[int] = (), queue: int = 64, end: int | None = None):
        if min(slots, queue) < 1 or length < 2:
            raise ValueError(f"slots={slots}, queue={queue}, length={length}: at least 1, 1 and 2")
        if residents.places < slots:
            raise ValueError(f"{slots} slots may need as many adapters at once, and the device holds "
                             f"{residents.places}: raise places, or lower slots")
        self.buckets = sorted(set(buckets or _powers(length)))
        if self.buckets[0] < 1 or self.buckets[-1] != length:
            raise ValueError(f"buckets={self.buckets}: the longest has to be length={length}, and all at least 1")
        self.net, self.residents, self.length, self.queue, self.end = net, residents, length, queue, end
        self.slots, self.counts = slots, Counts()
        self._prefill, self._decode = programs(net)
        self._layers, self._rows = empty(net, slots, length), Rows.empty(slots)
        self._running: list[Request | None] = [None] * slots
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        residents.wake = self._wake

    # From any thread

    def submit(self, request: Request) -> None:
        """Queues it. Raises ValueError for a text that cannot fit, Busy, and Stopped; TypeError for an adapter's name
        that cannot be hashed."""
        size, _ = len(request.prompt), hash(request.adapter)
        if size < 1 or request.max_new < 1 or size + request.max_new > self.length:
            raise ValueError(f"{size} tokens of prompt and max_tokens={request.max_new}: there has to be one of each, "
                             f"and this model's slots hold {self.length} together")
        with self._changed:
            if self._stopping:
                raise Stopped("this server is stopping: it finishes what runs and takes nothing new")
            if len(self._waiting) >= self.queue:
                raise Busy(f"{self.queue} requests are waiting: try again later")
            self._waiting.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Its slot is free at the next turn; nothing happens if it is done already."""
        request.cancelled = True
        self._wake()

    def stop(self) -> None:
        """Takes nothing new; `run` returns when all that wait and run are done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """(requests that run, requests that wait)."""
        return sum(x is not None for x in self._running), len(self._waiting)

    @property
    def compiled(self) -> dict[str, int]:
        """How many programs there are: `prefill` one for each bucket in use, `decode` and `write` one each."""
        each = {"prefill": self._prefill, "decode": self._decode, "write": self.residents.write}
        return {name: function._cache_size() for name, function in each.items()}  # type: ignore[attr-defined]

    # From the engine's thread

    def run(self) -> None:
        """Turns until `stop`."""
        while True:
            if not self.turn():
                with self._changed:
                    if self._stopping and not self._waiting:
                        return
                    if not any(x.cancelled or self.residents.ready(x.adapter) for x in self._waiting):
                        self._changed.wait()

    def warm(self) -> None:
        """Compiles every program."""
        self.residents.warm()
        for size in self.buckets:
            self._fill(0, -1, np.zeros(size, np.int32), 0)
        self._step()

    def turn(self) -> bool:
        """Admits what can run, advances all by a token, delivers. False if nothing ran."""
        began = time.perf_counter()
        for slot, request in enumerate(self._running):
            if request is not None and request.cancelled:
                self._end(slot, "cancelled")
        try:
            self._admit()
            if not any(self._running):
                return False
            tokens = self._step()
        except Exception as error:  # the cache is gone with it
            log.exception("a turn failed, and with it what ran")
            for slot, request in enumerate(self._running):
                if request is not None:
                    self._end(slot, RuntimeError(f"{type(error).__name__}: {error}"))
            self._layers = empty(self.net, self.slots, self.length)
            return True
        self.counts.steps += 1
        for slot, request in enumerate(self._running):
            if request is not None:
                self._deliver(slot, request, int(tokens[slot]))
        self.counts.seconds += time.perf_counter() - began
        return True

    def _admit(self) -> None:
        with self._changed:
            waiting = list(self._waiting)
        for request in waiting:
            if request.cancelled:
                self._leave(request, "cancelled")
            elif request in self._waiting and self.residents.ready(request.adapter) and None in self._running:
                try:
                    place = self.residents.take(request.adapter)
                except Exception as error:  # what kept it from being read is the same for all that wait for it
                    for other in waiting:
                        if other.adapter == request.adapter:
                            self._leave(other, error)
                    continue
                with self._changed:
                    self._waiting.remove(request)
                self._start(self._running.index(None), request, place)
        self.residents.forget({request.adapter for request in waiting if not request.cancelled})

    def _leave(self, request: Request, reason: str | Exception) -> None:
        with self._changed:
            if request not in self._waiting:
                return
            self._waiting.remove(request)
        request.done(reason)

    def _start(self, slot: int, request: Request, place: int) -> None:
        *before, last = request.prompt
        size = next(size for size in self.buckets if size >= len(before))
        ids = np.zeros(size, np.int32)
        ids[: len(before)] = before
        values = (last, len(before), place, request.seed, 0, request.temperature, request.top_p)
        for row, value in zip(self._rows, values, strict=True):
            row[slot] = value
        self._running[slot] = request
        self._fill(slot, place, ids, len(before))
        self.counts.prompts += 1
        self.counts.prompt_tokens += len(request.prompt)

    def _deliver(self, slot: int, request: Request, token: int) -> None:
        request.drawn += 1
        self.counts.rows += 1
        self.counts.tokens += 1
        try:
            stop = request.emit(token)
        except Exception as error:
            self._end(slot, error)
            return
        if stop or token == self.end or request.drawn >= request.max_new:
            self._end(slot, "stop" if stop or token == self.end else "length")
            return
        self._rows.token[slot] = token
        self._rows.used[slot] += 1
        self._rows.drawn[slot] += 1

    def _end(self, slot: int, reason: str | Exception) -> None:
        request = self._running[slot]
        assert request is not None
        self._running[slot] = None
        for row, nothing in zip(self._rows, Rows.empty(1), strict=True):
            row[slot] = nothing[0]
        self.residents.give_back(request.adapter)
        request.done(reason)

    def _fill(self, slot: int, place: int, ids: np.ndarray, count: int) -> None:
        self._layers = self._prefill(self.residents.bank, self._layers, np.int32(slot), np.int32(place), ids,
                                     np.int32(count))

    def _step(self) -> np.ndarray:
        # JAX may read a numpy argument after the call has returned, and these change.
        rows = Rows(*[row.copy() for row in self._rows])
        tokens, self._layers = self._decode(self.residents.bank, self._layers, rows)
        return np.asarray(jax.device_get(tokens))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()


def _powers(length: int) -> list[int]:
    """32, 128, 512, ... and `length`."""
    return [size for size in (32 * 4**i for i in range(12)) if size < length] + [length]
