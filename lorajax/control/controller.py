"""What acts around optimizer steps: rank budgets, rank sampling, proximal maps. A named tuple of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Controller(NamedTuple):
    """Pure functions called around each optimizer step, all of them jittable with static shapes.

    init: trainable -> state, an ordinary pytree of arrays with its own step counter; it belongs in the checkpoint.
    masks: state -> multipliers for `bind` during the coming step (site path -> (stack..., rank)), or None for none.
    update: (grads, old, new, state) -> (new, state), after the optimizer step. grads are those the optimizer was given
      (after clipping), old and new the trainable partition before and after the step.
    """

    init: Callable[[Any], Any]
    masks: Callable[[Any], dict[str, jax.Array] | None]
    update: Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def identity() -> Controller:
    """The controller that does nothing; its state is an empty tuple."""
    return Controller(init=lambda trainable: (), masks=lambda state: None,
                      update=lambda grads, old, new, state: (new, state))
