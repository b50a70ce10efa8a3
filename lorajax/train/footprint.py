"""The memory of a training step before anything is compiled: bytes of its arrays, from one abstract trace.

What K runs of one program hold together is linear in K: the base once; for each run its adapters, optimizer and
controller states, a gradient, and what the passes have alive at their fullest (`core/liveness.py`). An estimate;
`step_bytes` is XLA's own count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from lorajax.core.liveness import fullest, size, total
from lorajax.train.pack import Parts
from lorajax.train.step import init_state


class Footprint(NamedTuple):
    """Bytes that all runs of a program share, and bytes of each."""

    shared: int
    own: int

    def of(self, runs: int) -> int:
        """Bytes of `runs` side by side."""
        return self.shared + runs * self.own

    def runs(self, limit: float, most: int) -> int:
        """How many fit below `limit` bytes: 1 to `most` (one run is always tried)."""
        return max(1, min(most, int((limit - self.shared) // max(self.own, 1))))


class Activations(NamedTuple):
    """Bytes of what a step has alive at its fullest, by the power of the length that they grow with: of each row alone,
    of each token, of each pair of tokens."""

    row: float
    token: float
    pair: float

    def of(self, rows: int, length: int) -> int:
        return round(rows * (self.row + length * (self.token + length * self.pair)))


def footprint(parts: Parts, params: Any, batch: Any, activations: Activations | None = None) -> Footprint:
    """Of one run's step on one (micro-)batch, whose arrays have the examples as their leading axis.

    activations: of `kept`, found before, also on a batch of another size; None to find them.
    """
    trainable, frozen, state = _state(parts, params)
    found = activations or kept(parts, params, batch)
    # The state; its successor, of which XLA reuses most (donation); the best so far, adapters and controller.
    best = total((state.trainable, state.control))
    gradient = sum(4 * x.size for x in jax.tree.leaves(trainable))
    return Footprint(total((frozen.base, frozen.shared)),
                     total((state, frozen.aux)) + best + 2 * gradient + found.of(*_size(batch)))


def kept(parts: Parts, params: Any, batch: Any, tokens: bool = False) -> Activations:
    """From one abstract trace: what a step has alive at its fullest (`liveness.fullest`), on a batch with a prime
    number of times its rows, one that divides no dimension of a weight; so each array's size says whether it grows with
    them. tokens: the second axis, of those that have one, are tokens; their number is made such a prime too, below what
    it is (0 tokens known where there is none)."""
    trainable, frozen, state = _state(parts, params)
    dims = {n for x in jax.tree.leaves((params, trainable, frozen.aux)) for n in x.shape if n}
    free = [n for n in range(5, 1024) if all(n % k for k in range(2, n)) and all(d % n for d in dims)]
    (rows, length), p = _size(batch), free[-1]
    q = max((n for n in free[:-1] if n <= length), default=1) if tokens else 1
    key = jax.random.key(0)

    def grown(x: Any) -> Any:
        second = (q, *x.shape[2:]) if q > 1 and len(x.shape) > 1 else x.shape[1:]
        return jax.ShapeDtypeStruct((p * x.shape[0], *second), x.dtype)

    def gradient(control: Any, trainable: Any, frozen: Any, batch: Any) -> Any:
        masks = parts.controller.masks(control)
        loss = lambda t: parts.loss(parts.adapt.bind(t, frozen, key=key, masks=masks), batch, key)[0]  # noqa: E731
        return jax.grad(loss)(trainable)

    found = fullest(jax.make_jaxpr(gradient)(state.control, trainable, frozen, jax.tree.map(grown, batch)))
    powers = [0.0, 0.0, 0.0]
    for x in found:
        if x.size % p == 0 and rows:
            power = 0 if q == 1 else 2 if x.size % q**2 == 0 else int(x.size % q == 0)
            powers[power] += size(x) / (p * rows * q**power)
    return Activations(*powers)


def _state(parts: Parts, params: Any) -> Any:
    key = jax.random.key(0)
    trainable, frozen = jax.eval_shape(parts.adapt.init, key, params)
    state = jax.eval_shape(lambda k, t: init_state(k, t, parts.tx, parts.controller), key, trainable)
    return trainable, frozen, state


def _size(batch: Any) -> tuple[int, int]:
    """Rows, and the second axis of an array that has one."""
    found = max((x.shape for x in jax.tree.leaves(batch)), key=len)
    return found[0], found[1] if len(found) > 1 else 1


def step_bytes(jitted: Any, *args: Any) -> int:
    """Bytes that a compiled program needs on its device: arguments, results and room in between. 0 where the backend
    does not say. A program that ran before on arrays like `args` is not compiled again."""
    return bytes_of(jitted.lower(*args).compile())


def bytes_of(compiled: Any) -> int:
    """`step_bytes` of a program that is compiled already."""
    found = compiled.memory_analysis()
    if found is None:
        return 0
    return int(found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
               + found.temp_size_in_bytes)


def device_bytes() -> int | None:
    """Memory of the first device that programs may use, None where it does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")
