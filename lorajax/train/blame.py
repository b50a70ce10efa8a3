"""Why a step was not finite: run once, after the fact, on the unchanged state and the batch that broke it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.control.controller import Controller
from lorajax.core import compat
from lorajax.train.step import Loss, TrainState, make_gradients


class Blame(NamedTuple):
    """cause: 'adapter', 'base', 'batch', 'loss', 'penalty', 'gradient' or 'update', the first that is not finite in
    that order. where: paths of the arrays in question (leaves of the adapters as `<site>.<field>`). origin: for 'loss'
    and 'gradient', the operation that made the first infinity and the first NaN, with its module and source line.
    `str` is one sentence.
    """

    cause: str
    where: tuple[str, ...]
    origin: str = ""

    def __str__(self) -> str:
        what = {
            "adapter": "trainable values are not finite already before the step",
            "base": "frozen base weights are not finite",
            "batch": "the batch holds values that are not finite",
            "loss": "the loss is not finite although weights and batch are: an activation is",
            "penalty": "the penalty is not finite although the adapters are",
            "gradient": "the loss is finite, gradients are not",
            "update": "loss and gradients are finite, the optimizer's or controller's result is not",
        }[self.cause]
        names = ", ".join(self.where[:5]) + (f" and {len(self.where) - 5} more" if len(self.where) > 5 else "")
        return what + (f": {names}" if names else "") + (f" [{self.origin}]" if self.origin else "")


def blame(
    loss: Loss,
    adapt: Any,
    state: TrainState,
    frozen: Any,
    batch: Any,
    controller: Controller | None = None,
    *,
    accumulate: int = 1,
) -> Blame:
    """Repeats the failed step's gradients (same keys, same masks) and names what is not finite.

    state: what the failed step returned, that is the state before it. batch: the batch given to that step (with
    `steps_per_call`, its slice at the first step whose `finite` is False).
    """
    for cause, tree in (("adapter", state.trainable), ("base", frozen), ("batch", batch)):
        if bad := _bad(tree):
            return Blame(cause, bad)
    gradients = make_gradients(loss, adapt, controller, accumulate=accumulate)
    found = jax.jit(gradients)(state, frozen, batch)
    bad = _bad(found.grads)
    if not jnp.isfinite(found.loss):
        return Blame("loss", _bad(found.aux), _origin(lambda *args: gradients(*args).loss, state, frozen, batch))
    if not jnp.isfinite(found.penalty):
        return Blame("penalty", bad)
    if bad:
        return Blame("gradient", bad, _origin(lambda *args: gradients(*args).grads, state, frozen, batch))
    return Blame("update", ())


def diagnosis(
    loss: Loss,
    adapt: Any,
    state: TrainState,
    frozen: Any,
    batch: Any,
    metrics: Mapping[str, Any],
    controller: Controller | None = None,
    *,
    accumulate: int = 1,
    steps_per_call: int = 1,
) -> str:
    """What a run says that ends here: the step, `blame`, and what may help. metrics: of the call that failed."""
    if steps_per_call > 1:
        batch = jax.tree.map(lambda x: x[int(jnp.argmin(metrics["finite"]))], batch)
    why = blame(loss, adapt, state, frozen, batch, controller, accumulate=accumulate)
    return (f"error: step {int(state.step) + 1} is not finite: {why}. The state before it is kept as a checkpoint. "
            f"A smaller --config.lr, a longer --config.warmup or --config.compute_dtype=float32 may help")


def _bad(tree: Any) -> tuple[str, ...]:
    """Paths of the floating leaves that hold a NaN or an infinity."""
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    return tuple(
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, x in named
        if jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(x)))
    )


def _origin(fn: Callable[..., Any], *args: Any) -> str:
    """Where the first infinity and the first NaN of `fn` arise; '' where the program cannot be followed.

    A constant -inf, as in an attention mask, is no finding: only what an operation makes of finite operands is.
    """
    jaxpr = jax.make_jaxpr(fn)(*args)
    origins = []
    for test in (jnp.isinf, jnp.isnan):
        try:
            _run(jaxpr, jax.tree.leaves(args), test)
        except _Found as found:
            origins.append(str(found))
        except Exception:  # a diagnosis must never replace the failure it explains
            continue
    return "; ".join(origins)


class _Found(Exception):
    """The equation that `_run` looks for."""


def _run(jaxpr: Any, values: Sequence[Any], test: Callable[[Any], jax.Array], when: str = "") -> list[Any]:
    """Evaluates a jaxpr equation by equation, into calls and scans, until `test` holds for an output and no input."""
    inner = compat.open_jaxpr(jaxpr)
    env = dict(zip([*inner.constvars, *inner.invars], [*compat.constants(jaxpr), *values], strict=True))
    uses = Counter(v for eqn in inner.eqns for v in eqn.invars if not isinstance(v, compat.Literal))
    uses.update(v for v in inner.outvars if not isinstance(v, compat.Literal))

    def read(var: Any) -> Any:
        if isinstance(var, compat.Literal):
            return var.val
        uses[var] -= 1
        return env[var] if uses[var] else env.pop(var)  # frees what nobody reads again

    for eqn in inner.eqns:
        operands = [read(var) for var in eqn.invars]
        with compat.scope(eqn, compat.name_stack()):
            results = compat.bind(eqn, operands)
            if any(map(partial(_holds, test), results)) and not any(map(partial(_holds, test), operands)):
                _enter(eqn, operands, test, when)
                what = {jnp.isnan: "NaN", jnp.isinf: "infinity"}[test]
                raise _Found(f"first {what}: {eqn.primitive} in {compat.name_stack()}{when}, {compat.where(eqn)}")
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in inner.outvars]


def _enter(eqn: Any, operands: Sequence[Any], test: Callable[[Any], jax.Array], when: str) -> None:
    """Looks inside an equation that calls a jaxpr on its own operands, or scans one over them."""
    inside = compat.subjaxprs(eqn)
    if eqn.primitive.name == "scan":
        fixed, carries = compat.scan_counts(eqn)
        consts, carry, stacked = operands[:fixed], operands[fixed : fixed + carries], operands[fixed + carries :]
        order = range(eqn.params["length"])
        for i in reversed(order) if eqn.params["reverse"] else order:
            rows = [x[i] for x in stacked]
            carry = _run(inside[0], [*consts, *carry, *rows], test, f"{when}[{i}]")[:carries]
    elif inside and len(compat.open_jaxpr(inside[0]).invars) == len(operands):
        _run(inside[0], operands, test, when)


def _holds(test: Callable[[Any], jax.Array], x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating) and bool(jnp.any(test(x)))
