"""SoRA's proximal step and its sparsifying schedule (Ding et al., arXiv 2311.11696; see `variants.sora`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.control.controller import Controller
from lorajax.variants.sora import SoRA


class SoRAState(NamedTuple):
    """step: () int32, updates done. threshold: () float32, xi of the last one. left: site path -> (stack...,) int32,
    gates that are not 0."""

    step: jax.Array
    threshold: jax.Array
    left: dict[str, jax.Array]


def sora(adapt: Any, *, total_steps: int, learning_rate: float | Callable[[Any], Any] = 1.0,
         threshold: float | Sequence[float] = 1.0, times_lr: bool = True, prox: str = "soft", levels: int = 1,
         max_threshold: float = 0.0, spacing: str = "linear", first: float = 0.5) -> Controller:
    """The controller for the SoRA sites of `adapt`; other sites pass through.

    threshold: the paper's lambda; the step shrinks every gate by xi = learning rate * lambda.
    times_lr: False makes xi = lambda itself, constant, as the released default file has it (there 1e-3, or 3e-4 in the
    script for STS-B). learning_rate: the run's, a number or a schedule of the step.
    prox: ``soft``, the paper's soft threshold; ``official``, the released code's three edits one after another, which
    also zero what lies between xi and 2 xi.
    levels, max_threshold, spacing: the sparsifying schedule; lambda rises from `threshold` to `max_threshold` in
    `levels` values, see `spaced`; `threshold` may also be the list of them. The first holds for the share `first` of
    the run, the others for equal parts of the rest. (The paper retrains for each value; the released loop does so with
    the learning rate that its first training left at 0.)

    Raises ValueError for settings that cannot be met.
    """
    paths = [path for path, variant in adapt.plan.items() if isinstance(variant, SoRA)]
    if not paths:
        found = sorted({type(variant).__name__ for variant in adapt.plan.values()})
        raise ValueError(f"the SoRA controller found no SoRA site; the rules made {', '.join(found) or 'none'}: give "
                         f"at least one path SoRA(...), or use control.identity()")
    if prox not in PROX:
        raise ValueError(f"prox={prox!r} is unknown; there are {', '.join(PROX)}")
    values = [threshold] if isinstance(threshold, int | float) else [float(x) for x in threshold]
    if isinstance(threshold, int | float) and levels > 1:
        values = [float(x) for x in spaced(threshold, max_threshold, levels, spacing)]
    if not values or min(values) < 0 or not 0 <= first <= 1:
        raise ValueError(f"threshold={threshold} and first={first}: thresholds are at least one number, none negative, "
                         f"and first is a share of the run in 0..1")
    parts = max(len(values) - 1, 1)
    starts = [0, *(round(total_steps * (first + (1 - first) * i / parts)) for i in range(parts))][:len(values)]
    thresholds, begins = jnp.asarray(values, jnp.float32), jnp.asarray(starts)

    def left(trainable: Any) -> dict[str, jax.Array]:
        return {path: jnp.sum(trainable[path].g != 0, axis=-1, dtype=jnp.int32) for path in paths}

    def update(grads: Any, old: Any, new: Any, state: SoRAState) -> tuple[Any, SoRAState]:
        xi = thresholds[jnp.sum(begins <= state.step) - 1]
        if times_lr:
            rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
            xi = xi * jnp.asarray(rate, jnp.float32)
        shrunk = {path: new[path]._replace(g=PROX[prox](new[path].g.astype(jnp.float32), xi).astype(new[path].g.dtype))
                  for path in paths}
        return {**new, **shrunk}, SoRAState(state.step + 1, xi, left(shrunk))

    return Controller(
        init=lambda trainable: SoRAState(jnp.int32(0), jnp.float32(0), left(trainable)),
        masks=lambda state: None,
        update=update,
        settled=min(starts[-1] + 1, total_steps) if len(starts) > 1 else 0,
        report=lambda state: {"ranks_kept": sum(int(n.sum()) for n in state.left.values()),
                              "threshold": float(state.threshold)},
    )


def soft(v: jax.Array, xi: float | jax.Array) -> jax.Array:
    """sign(v) max(|v| - xi, 0)."""
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - xi, 0.0)


def official(v: jax.Array, xi: float | jax.Array) -> jax.Array:
    """The released code's order: what it has shrunk below xi it then zeroes, so that nothing ends within (-xi, xi)."""
    v = jnp.where(v > xi, v - xi, v)
    v = jnp.where(v < -xi, v + xi, v)
    return jnp.where(jnp.abs(v) < xi, 0.0, v)


PROX = {"soft": soft, "official": official}


def spaced(low: float, high: float, count: int, spacing: str = "linear") -> np.ndarray:
    """`count` thresholds from `low` to `high`: `linear`; `log_linear`, whose exponentials are evenly spaced;
    `exp_linear`, whose logarithms are (so low > 0). The names are the released code's."""
    if not 0 <= low < high:
        raise ValueError(f"threshold={low} and max_threshold={high}: a schedule of levels={count} rises from the first "
                         f"to the second")
    if spacing == "linear":
        return np.linspace(low, high, count)
    if spacing == "log_linear":
        return np.log(np.linspace(np.exp(low), np.exp(high), count))
    if spacing == "exp_linear":
        if low == 0:
            raise ValueError("threshold=0 has no logarithm, and spacing='exp_linear' spaces logarithms: start above 0")
        return np.exp(np.linspace(np.log(low), np.log(high), count))
    raise ValueError(f"spacing={spacing!r} is unknown; there are linear, log_linear, exp_linear")
