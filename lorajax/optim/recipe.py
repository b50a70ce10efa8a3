"""AdamW with warm-up and decay from plain arguments, and which leaves weight decay leaves alone."""

from __future__ import annotations

import difflib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

NO_DECAY = r"(?i).*norm.*|(.*/)?(bias|scale)"
"""Site paths (fullmatch) of biases and of whatever lies in a normalisation layer."""


def warmup_schedule(peak: float, total_steps: int, warmup: float = 0.0, decay: str = "linear") -> optax.Schedule:
    """From 0 to `peak` in `warmup` steps, then `linear` or `cosine` to 0, or `constant`.

    warmup: steps, or below 1 the share of the run. Step 0 of a warm-up has learning rate 0, as in Hugging Face's.
    """
    steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    if not 0 <= steps < max(total_steps, 1):
        raise ValueError(f"warmup={warmup} is {steps} steps of a run of {total_steps}: it must be shorter than the run")
    rest = total_steps - steps
    tails = {"linear": optax.linear_schedule(peak, 0.0, rest), "cosine": optax.cosine_decay_schedule(peak, rest),
             "constant": optax.constant_schedule(peak)}
    if decay not in tails:
        near = difflib.get_close_matches(decay, tails, n=1)
        raise ValueError(f"decay={decay!r} is unknown; there are {', '.join(tails)}"
                         + (f"; did you mean {near[0]!r}?" if near else ""))
    if steps == 0:
        return tails[decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, steps), tails[decay]], [steps])


def restart_schedule(peak: float, total_steps: int, every: int, warmup: float = 0.0, restart_warmup: float = 0.02,
                     minimum: float = 0.1) -> optax.Schedule:
    """ReLoRA's learning rate (arXiv 2307.05695, section 3; the released code's ``cosine_restarts``): one cosine from
    `peak` to ``minimum * peak`` over the whole run, and after every restart a climb from 0 to where that cosine is.

    every: steps between restarts. warmup, restart_warmup: steps, or below 1 the share of the run. As in the released
    code the climb after the n-th restart ends at the cosine's value for step n * every, warm-up not subtracted.
    """
    first, again = (round(w * total_steps) if w < 1 else int(w) for w in (warmup, restart_warmup))
    if not 0 <= first < max(total_steps, 1):
        raise ValueError(f"warmup={warmup} is {first} steps of a run of {total_steps}: it must be shorter than the run")
    if not 0 <= again < every:
        raise ValueError(f"restart_warmup={restart_warmup} is {again} steps, but there is a restart every {every}: it "
                         f"must be shorter")
    rest = max(total_steps - first, 1)

    def schedule(step: jax.Array) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        number = jnp.floor(t / every)
        cosine = lambda x: minimum + (1.0 - minimum) * 0.5 * (1.0 + jnp.cos(jnp.pi * x / rest))  # noqa: E731
        inside = t - number * every
        climb = inside / max(again, 1) * cosine(number * every)
        return peak * jnp.where(t < first, t / max(first, 1), jnp.where(inside < again, climb, cosine(t - first)))

    return schedule


def adamw(learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0, b1: float = 0.9, b2: float = 0.999,
          eps: float = 1e-8, no_decay: str = NO_DECAY) -> optax.GradientTransformation:
    """AdamW over a trainable partition, one learning rate; leaves at paths matching `no_decay` are not decayed."""
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay,
                       mask=lambda params: decayed(params, no_decay))


def decayed(trainable: dict[str, Any], no_decay: str = NO_DECAY) -> dict[str, Any]:
    """Like `trainable`, True where weight decay acts: everywhere but at the site paths that fullmatch `no_decay`."""
    on = {path: re.fullmatch(no_decay, path) is None for path in trainable}
    return {path: jax.tree.map(lambda _, path=path: on[path], adapter) for path, adapter in trainable.items()}
