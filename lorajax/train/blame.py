"""Why a step was not finite: run once, after the fact, on the unchanged state and the batch that broke it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from lorajax.control.controller import Controller
from lorajax.train.step import Loss, TrainState, make_gradients

_PACKAGE = Path(__file__).parents[1]
_MACHINERY = tuple(f"{folder}/" for folder in (Path(jax.__file__).parent, _PACKAGE / "core", _PACKAGE / "train"))


class Blame(NamedTuple):
    """cause: 'adapter', 'base', 'batch', 'loss', 'penalty', 'gradient' or 'update', the first that is not finite in
    that order. where: paths of the arrays in question (leaves of the adapters as `<site>.<field>`). origin: for 'loss'
    and 'gradient', what first made a NaN in the model, with its source line, '' if unknown. `str` is one sentence.
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


def _bad(tree: Any) -> tuple[str, ...]:
    """Paths of the floating leaves that hold a NaN or an infinity."""
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    return tuple(
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, x in named
        if jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(x)))
    )


def _origin(fn: Callable[..., Any], *args: Any) -> str:
    """The first primitive of `fn` that returns a NaN, and its line; '' where checkify cannot follow `fn`."""
    try:
        error, _ = jax.jit(checkify.checkify(fn, errors=checkify.nan_checks))(*args)
        found = error.get_exception()
    except Exception:  # a diagnosis must never replace the failure it explains
        return ""
    if found is None:
        return ""
    traced = getattr(found, "traceback_info", None)  # jaxlib's own traceback object, of the traced equation
    unroll = getattr(traced, "as_python_traceback", None)
    frames = traceback.extract_tb(unroll()) if unroll else []
    lines = [f" at {f.filename}:{f.lineno} in {f.name}" for f in frames if not f.filename.startswith(_MACHINERY)]
    return str(error.get()).strip().rstrip(".") + "".join(lines[-1:])
