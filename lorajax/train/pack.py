"""Runs that share a traced program train together: stacked states, one frozen base, one jitted step.

A pack is K runs of one program. What differs between them is an array with a leading axis of K: adapters, optimizer and
controller states, keys, batches, and any hyperparameter that only enters as a number (learning rate, alpha, weight
decay, dropout). The base has no such axis, so K runs read each weight once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorajax.control.controller import Controller
from lorajax.core.adapt import Frozen
from lorajax.train.step import Loss, TrainState, make_update, repeated


class Parts(NamedTuple):
    """What makes one run's step: see `lorajax.train.step.make_step`."""

    loss: Loss
    adapt: Any
    tx: optax.GradientTransformation
    controller: Controller


Make = Callable[[Mapping[str, jax.Array]], Parts]
"""One run's numbers, name -> () array, to its parts. Called inside the trace, so that the numbers may be traced."""


class Pack(NamedTuple):
    """K runs side by side. state, own, values: each array has a leading axis of K. common: what all runs read.

    common, own: the frozen partition in two. The base is common, and so is what sites share (VeRA's projections) where
    every run drew the same; the frozen arrays of the adapters are each run's own.
    """

    state: TrainState
    common: Frozen
    own: Frozen
    values: dict[str, jax.Array]


def pack(members: Sequence[tuple[TrainState, Frozen, Mapping[str, float]]]) -> Pack:
    """Stacks runs that were made one by one.

    Each member is its state, its frozen partition and its numbers. Raises ValueError where members cannot share a
    program: other arrays or shapes, or an adapter that rewrote the base.
    """
    states, frozen, values = zip(*members, strict=True)
    base = frozen[0].base
    for other in frozen[1:]:
        if other.base.keys() != base.keys() or any(other.base[path] is not base[path] for path in base):
            raise ValueError("the runs of a pack share one frozen base, and these do not hold the same arrays: hand "
                             "every adapt.init the same params, and pack no variant that rewrites weights (fold=True)")
    shapes = [jax.tree.map(jnp.shape, (state, f.aux)) for state, f in zip(states, frozen, strict=True)]
    if any(shape != shapes[0] for shape in shapes[1:]):
        raise ValueError("the runs of a pack need adapters of the same shapes: pad smaller ranks with `widen`")
    numbers = {name: jnp.asarray([float(v[name]) for v in values], jnp.float32) for name in values[0]}
    alike = all(jax.tree.all(jax.tree.map(np.array_equal, f.shared, frozen[0].shared)) for f in frozen)
    own = _stack([Frozen({}, f.aux, {} if alike else f.shared) for f in frozen])
    return Pack(_stack(states), Frozen(base, {}, frozen[0].shared if alike else {}), own, numbers)


def unpack(tree: Any, index: int) -> Any:
    """One run's part of anything that has the leading axis."""
    return jax.tree.map(lambda x: x[index], tree)


def make_packed_step(
    make: Make, *, clip: float | None = 1.0, accumulate: int = 1, steps_per_call: int = 1, shardings: Any = None
) -> Callable[[Pack, Any, Any], tuple[Pack, dict[str, jax.Array]]]:
    """A jitted ``(pack, batches, active) -> (pack, metrics)`` of `make_step`'s arithmetic for every run at once.

    batches: as for `make_step`, with one more leading axis of K. active: (K,) bool; a run that is not active keeps its
    state bit for bit. metrics: those of `make_step`, each with the leading axis. A run whose step is not finite stands
    still and touches no other. shardings: (of the state, of the metrics) on a mesh, along whose axis `trial` the runs
    lie.
    """

    def member(state: TrainState, common: Frozen, own: Frozen, values: Any, batch: Any, active: jax.Array) -> Any:
        loss, adapt, tx, controller = make(values)
        one = make_update(loss, adapt, tx, controller, clip=clip, accumulate=accumulate,
                          together=not jax.tree.leaves(shardings))
        run = one if steps_per_call == 1 else repeated(one, steps_per_call)
        after, metrics = run(state, _whole(common, own), batch)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, state), metrics

    together = jax.vmap(member, in_axes=(0, None, 0, 0, 0, 0), spmd_axis_name=shardings and "trial")

    def step(state: Any, rest: Any, batches: Any, active: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        common, own, values = rest
        return together(state, common, own, values, batches, active)

    jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)

    def run(pack: Pack, batches: Any, active: Any) -> tuple[Pack, dict[str, jax.Array]]:
        state, metrics = jitted(pack.state, pack[1:], batches, active)
        return pack._replace(state=state), metrics

    run.jitted = jitted  # type: ignore[attr-defined]  # (state, the rest of the pack, batches, active), to lower
    return run


def make_packed_eval(predict: Callable[[Any, Any], Any], make: Make, sharding: Any = None) -> Callable[..., Any]:
    """A jitted ``(pack, batch, masks=None) -> predictions``, (K, ...): every run on the same batch, without dropout.
    sharding: of the predictions, on a mesh with an axis `trial`."""

    def member(trainable: Any, common: Frozen, own: Frozen, values: Any, batch: Any, masks: Any) -> Any:
        return predict(make(values).adapt.bind(trainable, _whole(common, own), masks=masks), batch)

    each = jax.vmap(member, in_axes=(0, None, 0, 0, None, 0), spmd_axis_name=sharding and "trial")
    together = jax.jit(each, out_shardings=sharding)

    def evaluate(pack: Pack, batch: Any, masks: Any = None) -> Any:
        return together(pack.state.trainable, pack.common, pack.own, pack.values, batch, masks)

    evaluate.jitted = together  # type: ignore[attr-defined]  # (trainable, common, own, values, batch, masks), to lower
    return evaluate


def widen(adapter: Any, leaves: Mapping[str, Any], rank: int) -> Any:
    """`adapter` with zeros up to `rank` along every rank axis. Zeros in A and B get no gradient and stay zeros, so a
    run at a lower rank is the same run inside a wider array; only for updates that are a product of such factors."""

    def wide(name: str, x: Any) -> Any:
        axes = leaves[name].axes
        if x is None or "rank" not in axes:
            return x
        lead = x.ndim - len(axes)
        more = [rank - n if axis == "rank" else 0 for axis, n in zip(axes, x.shape[lead:], strict=True)]
        return jnp.pad(x, [(0, n) for n in (*[0] * lead, *more)])

    return adapter._replace(**{name: wide(name, x) for name, x in adapter._asdict().items()})


def _whole(common: Frozen, own: Frozen) -> Frozen:
    return Frozen(common.base, own.aux, common.shared or own.shared)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
