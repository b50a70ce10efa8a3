"""Whether steps were finite, read now and then: between, the device runs ahead of the host and waits for nothing.

A step that was not finite changes nothing, and neither do those behind it, if each is told whether the one before was
(`good` of `make_step`). So it does no harm to notice late: the state is still the one before the step that failed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HELD = 16
"""Calls whose batches are held until they are known to be finite, at most."""


class Call(NamedTuple):
    """One call of a step: the optimizer steps taken before it, its batch, what it reported."""

    begun: int
    batch: Any
    metrics: Any

    def last(self) -> dict[str, Any]:
        """What the last step of the call reported, as NumPy scalars, by name; 'finite' left out."""
        there = jax.device_get({name: x for name, x in sorted(self.metrics.items()) if name != "finite"})
        return {name: np.ravel(x)[-1] for name, x in there.items()}


class Watch:
    """The calls since the last look. steps_per_call, sharding: of the metrics.

    good: for the next call, whether all went well so far; on the device, never waited for.
    """

    def __init__(self, steps_per_call: int = 1, sharding: Any = None):
        shape = (steps_per_call,) if steps_per_call > 1 else ()
        self.good = jax.jit(lambda: jnp.ones(shape, bool), out_shardings=sharding)()
        self._calls: list[Call] = []

    def add(self, begun: int, batch: Any, metrics: Any) -> bool:
        """Takes a call; True when it is time to look."""
        self._calls.append(Call(begun, batch, metrics))
        self.good = metrics["finite"]
        return len(self._calls) >= HELD

    def look(self, behind: int = 0) -> tuple[list[Call], Call | None]:
        """(the calls since the last look that were finite, the first that was not). Waits for the last of them, but for
        the newest `behind`, which are left for the next look: the device has these to do meanwhile."""
        cut = max(len(self._calls) - behind, 0)
        calls, self._calls = self._calls[:cut], self._calls[cut:]
        if not calls or np.all(np.asarray(calls[-1].metrics["finite"])):
            return calls, None
        first = next(i for i, call in enumerate(calls) if not np.all(np.asarray(call.metrics["finite"])))
        return calls[:first], calls[first]
