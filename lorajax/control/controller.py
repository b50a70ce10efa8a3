"""What acts around optimizer steps: rank budgets, rank sampling, proximal maps. A named tuple of functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.adapt import adapt as make_adapt


class Restart(NamedTuple):
    """What happens between steps, every so often: the adapter is merged and starts anew (ReLoRA).

    every: steps. restart: train state -> train state, pure and jittable, after the steps every, 2 every, ... but not
      after the last.
    rebase: (frozen, control state) -> the frozen partition that the following steps use; `frozen` is the one that
      `adapt.init` gave, which never changes, and what is merged into it is part of the control state.
    whole: (trainable, frozen, control state) -> (plan, trainable) that say the same without the control state, for
      export.
    """

    every: int
    restart: Callable[[Any], Any]
    rebase: Callable[[Any, Any], Any]
    whole: Callable[[Any, Any, Any], tuple[Any, Any]]


class Controller(NamedTuple):
    """Pure functions called around each optimizer step, all of them jittable with static shapes.

    init: trainable -> state, an ordinary pytree of arrays with its own step counter; it belongs in the checkpoint.
    masks: state -> multipliers for `bind` during the coming step (site path -> a mask, see `core.masks`), or None.
    update: (grads, old, new, state) -> (new, state), after the optimizer step. grads are those the optimizer was given
      (after clipping), old and new the trainable partition before and after the step.
    settled: the first step whose adapter has its final form: no earlier one counts as the best of a run.
    views: state -> name -> masks for `bind`, further forms of the adapter that a run evaluates (DyLoRA's ranks).
    report: state -> numbers for the run's log and summary (ranks kept). Not jitted.
    restart: what happens between steps, or None.
    """

    init: Callable[[Any], Any]
    masks: Callable[[Any], dict[str, Any] | None]
    update: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    settled: int = 0
    views: Callable[[Any], dict[str, Any]] = lambda state: {}
    report: Callable[[Any], dict[str, int | float]] = lambda state: {}
    restart: Restart | None = None


def identity() -> Controller:
    """The controller that does nothing; its state is an empty tuple."""
    return Controller(init=lambda trainable: (), masks=lambda state: None,
                      update=lambda grads, old, new, state: (new, state))


def exported(controller: Controller, adapt: Adapt, params: Any, trainable: Any, frozen: Frozen,
             state: Any) -> tuple[Adapt, dict[str, Any], Frozen]:
    """(adapt, trainable, frozen) that say all that training made of `params`, to be saved: those given, or where the
    controller restarts its `Restart.whole`. frozen: as `adapt.init` gave it; state: the controller's."""
    if controller.restart is None:
        return adapt, trainable, frozen
    plan, arrays = controller.restart.whole(trainable, frozen, state)
    whole = make_adapt(adapt.sites, [(re.escape(path), choice) for path, choice in plan.items()])
    return whole, arrays, whole.frozen(params, {})
