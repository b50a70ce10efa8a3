"""One adapter trained to answer like many: distillation on unlabelled inputs (Hinton et al., arXiv 1503.02531).

    batches = taught(forward, [one, two], inputs)               # inputs: (task, arguments) pairs, no labels
    step = make_step(matching(lj.lift(model.apply)), adapt, tx) # any loop; the student's start may be a `compose`d one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.compose.gathered import Trained


def taught(forward: Callable[..., jax.Array], teachers: Sequence[Trained],
           inputs: Iterable[tuple[int, tuple[Any, ...]]]) -> Iterator[dict[str, Any]]:
    """Each batch with what its task's teacher answers: {'inputs': arguments, 'target': outputs, 'task': number}.

    forward: a lifted function of (bound params, *arguments). Raises ValueError for a task without a teacher.
    """
    answer = [jax.jit(lambda trainable, frozen, *x, adapt=one.adapt: forward(adapt.bind(trainable, frozen), *x))
              for one in teachers]
    for task, arguments in inputs:
        if not 0 <= task < len(teachers):
            raise ValueError(f"task {task} has no teacher: there are {len(teachers)}, numbered from 0")
        one = teachers[task]
        yield {"inputs": arguments, "target": answer[task](one.trainable, one.frozen, *arguments), "task": task}


def matching(forward: Callable[..., jax.Array], *, temperature: float | None = 2.0,
             ) -> Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]:
    """The loss of a student, ``(bound, batch of taught, key) -> (loss, {})``, mean over rows and, where the batch has a
    'weight', over those that count:

        T^2 sum_c p_c log(p_c / q_c),  p = softmax(target / T), q = softmax(outputs / T)  (arXiv 1503.02531, section 2)

    temperature: T; None for outputs that are no logits: their mean squared distance.
    """
    def loss(bound: Any, batch: Any, key: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        each = distance(forward(bound, *batch["inputs"]), batch["target"], temperature)
        weight = batch.get("weight")
        if weight is None:
            return jnp.mean(each), {}
        return jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1.0), {}

    return loss


def distance(outputs: jax.Array, target: jax.Array, temperature: float | None) -> jax.Array:
    """(..., classes) twice -> (...), float32."""
    outputs, target = outputs.astype(jnp.float32), target.astype(jnp.float32)
    if temperature is None:
        return jnp.mean(jnp.square(outputs - target), -1)
    p, q = (jax.nn.log_softmax(x / temperature, -1) for x in (target, outputs))
    return temperature**2 * jnp.sum(jnp.exp(p) * (p - q), -1)
