"""One optimizer step as one jitted program: micro-batches, clipping, optimizer, controller, and the guard against NaN.

The order is: gradients (mean over real examples) -> clip by global norm -> `tx.update` -> apply -> `controller.update`.
The base is an argument of the program, never a constant inside it; the state's buffers are donated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lorajax.control.controller import Controller, identity
from lorajax.train.elementwise import elementwise

Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, Mapping[str, jax.Array]]]
"""(bound params, batch, key) -> (mean loss over the batch's real examples, scalar means to report)."""

SMALL = 1 << 20
"""Arrays of at most so many elements are reduced together."""
MOST = 16
"""So many of the new values: the optimizer makes one of up to five arrays, and a kernel of XLA's reads about 96."""
RESERVED = frozenset({"loss", "penalty", "grad_norm", "finite", "weight"})


class TrainState(NamedTuple):
    """Everything that a checkpoint holds: arrays only.

    step: () int32, optimizer steps taken. trainable: `adapt.init`'s first result. opt_state: `tx.init(trainable)`.
    control: the controller's state, () without one. key: the run's PRNG key, constant; step n uses `fold_in(key, n)`.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    control: Any
    key: jax.Array


class Gradients(NamedTuple):
    """loss, penalty, weight: () float32, `weight` the number of real examples; aux: the loss function's own scalars;
    grads: the structure of `trainable`, float32 at least, of the sum, before clipping. masks: of the controller."""

    loss: jax.Array
    penalty: jax.Array
    weight: jax.Array
    aux: dict[str, jax.Array]
    grads: Any
    masks: Any = None


def init_state(
    key: jax.Array, trainable: Any, tx: optax.GradientTransformation, controller: Controller | None = None
) -> TrainState:
    """The state before the first step.

    Every array is a copy, so that donation can never delete a buffer that the caller (or the base) still holds.
    `key` is a typed key (`jax.random.key`); a raw uint32 key raises TypeError.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"key is a {key.dtype}{list(key.shape)} array; make a typed one with jax.random.key(seed)")
    control = (controller or identity()).init(trainable)
    state = TrainState(jnp.int32(0), trainable, tx.init(trainable), control, key)
    return jax.tree.map(_own, state)


def make_step(
    loss: Loss,
    adapt: Any,
    tx: optax.GradientTransformation,
    controller: Controller | None = None,
    *,
    clip: float | None = 1.0,
    accumulate: int = 1,
    steps_per_call: int = 1,
    shardings: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted ``(state, frozen, batch, good=True) -> (state, metrics)``; `state` is donated.

    loss: see `Loss`. Its key drives the model's own dropout and differs from the key of the adapters' dropout.
    adapt: what `lorajax.adapt` returns (`bind` and `penalty` are used). controller: see `lorajax.control`, or None.
    tx: any optax transformation; one that takes `masks` (`lorajax.optim.freeze_ranks`) gets the controller's.
    clip: largest global norm of the gradient, None for no clipping.
    accumulate: n > 1 gives every batch leaf a leading axis of n micro-batches. A micro-batch counts by the sum of its
      `batch["weight"]` (1 each where there is no such leaf), so n micro-batches give the gradient of the one big batch.
      The controller's masks are drawn once per optimizer step and the penalty is added once.
    steps_per_call: n > 1 scans n optimizer steps in one call: batch leaves get one more leading axis of n, outside
      that of `accumulate`, and so does every metric.
    shardings: (of the state, of the metrics), on a mesh, so that they stay where they are; None as it comes.

    metrics: loss (without penalty), penalty, grad_norm (before clipping), weight (real examples), finite (bool) and the
    loss function's own scalars. A step whose loss, gradient norm or new values are not finite changes nothing: the
    state keeps its last good values and its step number, and so it does for the rest of that call; `blame` says why.
    good: `finite` of the call before, which need not have been looked at: unless all of it is True, this call does
    nothing either (`lorajax.train.watch`).
    """
    if steps_per_call < 1:
        raise ValueError(f"steps_per_call={steps_per_call} must be at least 1")
    one = make_update(loss, adapt, tx, controller, clip=clip, accumulate=accumulate,
                      together=True, shardings=shardings and shardings[0])
    run = one if steps_per_call == 1 else repeated(one, steps_per_call)
    return jax.jit(run, donate_argnums=0, out_shardings=shardings)


def make_update(
    loss: Loss,
    adapt: Any,
    tx: optax.GradientTransformation,
    controller: Controller | None = None,
    *,
    clip: float | None = 1.0,
    accumulate: int = 1,
    together: bool = False,
    shardings: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """One step of `make_step`, not jitted, for a program of one's own. together: the norm of the gradients, and whether
    the new values are finite, are reductions of small arrays laid end to end, in place of four kernels for each array;
    without a mesh the update is one kernel for many of them (`_keep`).
    shardings: of the state, on a mesh: arrays that are split are laid on one another, where shape and sharding are the
    same."""
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be at least 1")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be positive; None turns clipping off")
    controller = controller or identity()
    gradients = make_gradients(loss, adapt, controller, accumulate=accumulate)
    tx = optax.with_extra_args_support(tx)

    def one(state: TrainState, frozen: Any, batch: Any, good: Any = True) -> tuple[TrainState, dict[str, jax.Array]]:
        where = shardings and jax.tree.leaves(jax.tree.broadcast(shardings, state).trainable)
        collect = partial(_joined, where=where) if together else lambda tree, most=None: jax.tree.leaves(tree)
        found = gradients(state, frozen, batch)
        masks = {} if found.masks is None else {"masks": found.masks}
        norm = optax.tree.norm(collect(found.grads))
        scale = jnp.float32(1.0) if clip is None else jnp.where(norm < clip, 1.0, clip / norm)

        def update(opt_state: Any, trainable: Any, control: Any) -> tuple[Any, Any, Any]:
            grads = jax.tree.map(lambda g, p: (g * scale.astype(g.dtype)).astype(p.dtype), found.grads, trainable)
            with jax.numpy_dtype_promotion("standard"):  # optax raises Python floats to powers of int32 counters
                updates, opt_state = tx.update(grads, opt_state, trainable, **masks)
            new, control = controller.update(grads, trainable, optax.apply_updates(trainable, updates), control)
            return new, opt_state, control

        # Whether the new values are finite is known when all of them have been made. They are made twice, once to be
        # looked at and once to be kept: XLA would write some in between, and read them again.
        old, shared = (state.opt_state, state.trainable, state.control), jax.jit(update)
        twice = together and elementwise(jax.make_jaxpr(shared)(*old))
        new, opt_state, control = shared(*old) if twice else update(*old)
        checked = shared(*lax.optimization_barrier(old))[0] if twice else new
        total = found.loss + found.penalty
        values = collect(checked, most=MOST if twice else None)
        finite = jnp.isfinite(total) & jnp.isfinite(norm) & _all_finite(values) & jnp.all(good)
        after = _keep(finite, TrainState(state.step + 1, new, opt_state, control, state.key), state,
                      together and shardings is None)  # fmt: skip
        metrics = {"loss": found.loss, "penalty": found.penalty, "grad_norm": norm, "weight": found.weight}
        return after, {**found.aux, **metrics, "finite": finite}

    return one


def repeated(one: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """`one` scanned over a leading axis of `steps` batches; a step that is not finite ends the scan's effect."""

    def many(state: TrainState, frozen: Any, batches: Any, good: Any = True) -> tuple[TrainState, dict[str, jax.Array]]:
        def body(carry: Any, batch: Any) -> Any:
            state, metrics = one(carry[0], frozen, batch, carry[1])
            return (state, metrics["finite"]), metrics

        (state, _), metrics = lax.scan(body, (state, jnp.all(good)), batches, length=steps)
        return state, metrics

    return many


def make_gradients(
    loss: Loss, adapt: Any, controller: Controller | None = None, *, accumulate: int = 1
) -> Callable[[TrainState, Any, Any], Gradients]:
    """The first half of a step, not jitted: ``(state, frozen, batch) -> Gradients``."""
    draw = (controller or identity()).masks

    def gradients(state: TrainState, frozen: Any, batch: Any) -> Gradients:
        masks = draw(state.control)
        step_key = jax.random.fold_in(state.key, state.step)

        def micro(part: Any, index: jax.Array) -> tuple[Any, Any]:
            adapter_key, model_key = jax.random.split(jax.random.fold_in(step_key, index))

            def objective(trainable: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
                value, aux = loss(adapt.bind(trainable, frozen, key=adapter_key, masks=masks), part, model_key)
                return _wide(value), {name: _wide(x) for name, x in aux.items()}

            (value, aux), grads = jax.value_and_grad(objective, has_aux=True)(state.trainable)
            if clash := RESERVED & aux.keys():
                raise ValueError(f"the loss reports {sorted(clash)}, names that the step itself reports: rename them")
            return (value, aux, jax.tree.map(_wide, grads)), _weight(part)

        if accumulate == 1:
            (value, aux, grads), weight = micro(batch, jnp.int32(0))
        else:
            (value, aux, grads), weight = _weighted_mean(micro, batch, accumulate)
        penalty, pull = jax.value_and_grad(lambda t: _wide(adapt.penalty(t)))(state.trainable)
        grads = jax.tree.map(lambda g, p: g + p.astype(g.dtype), grads, pull)
        return Gradients(value, penalty, weight, aux, grads, masks)

    return gradients


def make_eval(predict: Callable[[Any, Any], Any], adapt: Any, sharding: Any = None) -> Callable[..., Any]:
    """A jitted ``(trainable, frozen, batch, masks=None) -> predict(bound, batch)``, without adapter dropout.
    sharding: of the predictions, on a mesh."""

    def evaluate(trainable: Any, frozen: Any, batch: Any, masks: Any = None) -> Any:
        return predict(adapt.bind(trainable, frozen, key=None, masks=masks), batch)

    return jax.jit(evaluate, out_shardings=sharding)


def _weighted_mean(micro: Callable[[Any, jax.Array], tuple[Any, jax.Array]], batch: Any, n: int) -> tuple[Any, Any]:
    """Mean of `micro`'s results over the leading axis of `batch`, each weighted by its real examples."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if leaf.ndim == 0 or leaf.shape[0] != n:
            raise ValueError(f"accumulate={n}, but batch{jax.tree_util.keystr(path)} has shape {leaf.shape}: "
                             f"every leaf needs a leading axis of {n} micro-batches")
    shapes, _ = jax.eval_shape(micro, jax.tree.map(lambda x: x[0], batch), jnp.int32(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(carry: Any, part: Any) -> Any:
        total, seen = carry
        values, weight = micro(*part)
        # A micro-batch of nothing but padding may be 0/0; it must not count.
        total = jax.tree.map(lambda t, v: t + jnp.where(weight > 0, v * weight.astype(v.dtype), 0), total, values)
        return (total, seen + weight), None

    (total, seen), _ = lax.scan(body, (zeros, jnp.float32(0.0)), (batch, jnp.arange(n, dtype=jnp.int32)))
    return jax.tree.map(lambda t: t / seen.astype(t.dtype), total), seen


def _weight(batch: Any) -> jax.Array:
    """() float32: how many real examples the batch's mean runs over."""
    if isinstance(batch, Mapping) and "weight" in batch:
        return jnp.sum(batch["weight"].astype(jnp.float32))
    return jnp.float32(1.0)


def _wide(x: Any) -> jax.Array:
    """x in float32, or in its own dtype where that is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def _own(x: Any) -> jax.Array:
    """A copy with a buffer of its own and no weak type."""
    return jnp.copy(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.array(x, dtype=x.dtype, copy=True)


def _joined(tree: Any, where: Sequence[Any] | None = None, most: int | None = None) -> list[jax.Array]:
    """The leaves, small ones of one type end to end in one array, or in several of at most `most` leaves. where: their
    shardings: those that are split are stacked instead, with others of their shape that are split alike."""
    leaves, ends = [], dict[Any, list[jax.Array]]()
    for x, at in zip(found := jax.tree.leaves(tree), where or [None] * len(found), strict=True):
        if x.size > SMALL:
            leaves.append(x)
        elif at is None or at.is_fully_replicated:
            ends.setdefault(x.dtype, []).append(x.ravel())
        else:
            ends.setdefault((x.dtype, x.shape, at), []).append(x[None])
    return leaves + [jnp.concatenate(group[i:i + (most or len(group))]) for group in ends.values()
                     for i in range(0, len(group), most or len(group))]  # fmt: skip


def _all_finite(tree: Any) -> jax.Array:
    """() bool: no floating leaf holds NaN or an infinity."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats])) if floats else jnp.bool_(True)


def _keep(good: jax.Array, new: Any, old: Any, together: bool = False) -> Any:
    """`new` where `good`, else `old`. Raises TypeError naming the leaf whose shape or dtype a step would change.

    together: `good` is an array for small leaves, one for each shape: of operations that read one array XLA's GPU
    compiler makes one kernel, also of the optimizer's before them, and of those that share a scalar it does not.
    """
    shaped = dict[Any, jax.Array]()

    def like(x: jax.Array) -> jax.Array:
        if not together or x.ndim == 0 or x.size > SMALL:
            return good
        if x.shape not in shaped:
            shaped[x.shape] = lax.optimization_barrier(jnp.broadcast_to(good, x.shape))
        return shaped[x.shape]

    def pick(path: Any, after: Any, before: Any) -> Any:
        if after.shape != before.shape or after.dtype != before.dtype:
            raise TypeError(
                f"a step turns state{jax.tree_util.keystr(path)} from {before.dtype}{list(before.shape)} into "
                f"{after.dtype}{list(after.shape)}: the optimizer and the controller must keep shape and dtype"
            )
        if getattr(jax.typeof(after), "memory_space", None) == jax.memory.Space.Host:  # nothing is computed there
            after, before = (jax.device_put(x, jax.memory.Space.Device) for x in (after, before))
            return jax.device_put(jnp.where(good, after, before), jax.memory.Space.Host)
        return jnp.where(like(after), after, before)

    return jax.tree_util.tree_map_with_path(pick, new, old)
