"""AdaLoRA's rank allocator: importance of triplets, a global cubic budget, masking (arXiv 2303.10512, section 3.2-3.3).

One global threshold over the triplets of every AdaLoRA site; each layer of a stacked (scanned) site counts as a matrix
of its own. The trained arrays keep their shapes: pruning zeroes E, and `compact` shrinks the result afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.control.controller import Controller
from lorajax.variants.adalora import AdaLoRA, AdaLoRAAdapter

Adapters = dict[str, AdaLoRAAdapter]


class AdaLoRAState(NamedTuple):
    """All that a resumed run needs.

    step: () int32, updates done. budget: () int32, triplets allowed by the last update, over all sites.
    mean, deviation: the two moving averages for every element of every A, E, B, float32, site path -> adapter.
    kept: site path -> (stack..., rank) bool, the pattern of the last masking; its sums are the ranks of the sites.
    """

    step: jax.Array
    budget: jax.Array
    mean: Adapters
    deviation: Adapters
    kept: dict[str, jax.Array]


def adalora(adapt: Any, *, total_steps: int, target_rank: float = 8.0, t_initial: int = 0, t_final: int = 0,
            delta_t: int = 1, beta1: float = 0.85, beta2: float = 0.85, timing: str = "peft",
            of_steps: int = 0) -> Controller:
    """The controller for the AdaLoRA sites of `adapt`, also those inside DoRA; other sites pass through.

    total_steps: optimizer steps of the whole run. target_rank: final average rank of a matrix.
    t_initial: steps before the budget falls. t_final: steps at the end with the final pattern. delta_t: steps between
    maskings. of_steps: the length of the run for which these three are stated; a longer or shorter run stretches them
    in proportion, 0 takes them as they are.
    beta1, beta2: decay of the averages, which start at zero and have no bias correction.
    timing: both stop the scores at step ``total_steps - t_final`` and mask by them in every later step; ``peft`` masks
    at that step itself, whatever delta_t is, ``official`` (the authors' code) only if delta_t divides it.
    Like both, importance multiplies the gradient by the parameter AFTER the optimizer step (the paper's equation has it
    before), and a masked E is only zeroed: the optimizer may revive it until the next masking.

    Raises ValueError for a schedule that does not fit the run, and, when `init` sees the shapes, for a target above the
    initial ranks or below one triplet per matrix.
    """
    paths = [path for path, variant in adapt.plan.items() if isinstance(getattr(variant, "inner", None), AdaLoRA)]
    if not paths:
        found = sorted({type(variant).__name__ for variant in adapt.plan.values()})
        raise ValueError(f"the AdaLoRA controller found no AdaLoRA site; the rules made {', '.join(found) or 'none'}: "
                         f"give at least one path AdaLoRA(...), or use control.identity()")
    if timing not in ("peft", "official"):
        raise ValueError(f"timing={timing!r} is unknown; there are 'peft' and 'official'")
    if delta_t < 1:
        raise ValueError(f"delta_t={delta_t} is below 1: it counts the steps between maskings")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 < beta < 1.0:
            raise ValueError(f"{name}={beta} is outside (0, 1): the paper and both codes use 0.85")
    if of_steps:
        ratio = total_steps / of_steps
        t_initial, t_final, delta_t = round(t_initial * ratio), round(t_final * ratio), max(1, round(delta_t * ratio))
    start = total_steps - t_final  # the step at which the scores stop
    budget_schedule(total_steps, t_initial, t_final, 2, 1)  # raises before any array exists

    def table(trainable: Any) -> np.ndarray:
        sizes = [trainable[path].E.size for path in paths]
        matrices = sum(size // trainable[path].E.shape[-1] for size, path in zip(sizes, paths, strict=True))
        target = int(target_rank * matrices)
        if target < matrices or target > sum(sizes):
            raise ValueError(f"target_rank={target_rank} makes a final budget of {target} triplets for {matrices} "
                             f"matrices that start with {sum(sizes)}: it must be in 1..{sum(sizes) / matrices:g}")
        return budget_schedule(total_steps, t_initial, t_final, sum(sizes), target)

    def init(trainable: Any) -> AdaLoRAState:
        zeros = {path: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), triplets(trainable[path]))
                 for path in paths}
        kept = {path: jnp.ones(trainable[path].E.shape, bool) for path in paths}
        return AdaLoRAState(jnp.int32(0), jnp.int32(table(trainable)[0]), zeros, jax.tree.map(jnp.copy, zeros), kept)

    def update(grads: Any, old: Any, new: Any, state: AdaLoRAState) -> tuple[Any, AdaLoRAState]:
        t = state.step
        budgets = table(new)
        sensitivity = {path: jax.tree.map(_sensitivity, triplets(new[path]), triplets(grads[path])) for path in paths}
        mean, deviation = moving_averages(sensitivity, state.mean, state.deviation, beta1, beta2)
        frozen = t >= start
        mean, deviation = jax.tree.map(lambda stopped, moving: jnp.where(frozen, stopped, moving),
                                       (state.mean, state.deviation), (mean, deviation))
        scores = {path: triplet_scores(mean[path], deviation[path]) for path in paths}
        budget = jnp.asarray(budgets)[jnp.minimum(t, budgets.size - 1)]
        due = (t > start) | ((t > t_initial) & (t % delta_t == 0))
        if timing == "peft":
            due = due | (t == start)
        keep = keep_largest(scores, budget)
        kept = {path: jnp.where(due, keep[path], state.kept[path]) for path in paths}
        masked = {path: new[path]._replace(E=jnp.where(due & ~keep[path], 0, new[path].E)) for path in paths}
        return {**new, **masked}, AdaLoRAState(t + 1, budget, mean, deviation, kept)

    # The pattern is final behind update `start` itself (peft), or the one after it.
    settled = min(start + (1 if timing == "peft" or start % delta_t == 0 else 2), total_steps)
    return Controller(init=init, masks=lambda state: None, update=update, settled=settled,
                      report=lambda state: ranks_kept(state.kept))


def ranks_kept(kept: dict[str, jax.Array]) -> dict[str, int | float]:
    """`ranks_kept`, over all, and ``rank/<path>`` of each matrix (``rank/<path>[i]`` of a stack), from the patterns."""
    each: dict[str, int | float] = {}
    for path, pattern in jax.device_get(kept).items():
        for index in np.ndindex(*pattern.shape[:-1]):
            each[f"rank/{path}" + (f"[{','.join(map(str, index))}]" if index else "")] = int(pattern[index].sum())
    return {"ranks_kept": sum(each.values()), **each}


def budget_schedule(total_steps: int, t_initial: int, t_final: int, initial: int, target: int) -> np.ndarray:
    """Triplets allowed at steps 0..total_steps, int32: cubic from `initial` to `target`, truncated, as the codes do.

    In float64 on the host, because float32 would truncate to a neighbour at some steps.
    """
    if min(t_initial, t_final) < 0 or total_steps <= t_initial + t_final:
        raise ValueError(f"total_steps={total_steps} leaves no step for pruning between t_initial={t_initial} and "
                         f"t_final={t_final}: lower these, or train longer than {t_initial + t_final} steps")
    length = total_steps - t_final - t_initial
    left = (1 - min(max(t - t_initial, 0), length) / length for t in range(total_steps + 1))
    return np.array([int(target + (initial - target) * x**3) for x in left], np.int32)


def moving_averages(sensitivity: Any, mean: Any, deviation: Any, beta1: float, beta2: float) -> tuple[Any, Any]:
    """Equations 9 and 10: the smoothed sensitivity, and the smoothed distance of the new value from it."""
    mean = jax.tree.map(lambda m, i: beta1 * m + (1 - beta1) * i, mean, sensitivity)
    deviation = jax.tree.map(lambda u, i, m: beta2 * u + (1 - beta2) * jnp.abs(i - m), deviation, sensitivity, mean)
    return mean, deviation


def triplet_scores(mean: AdaLoRAAdapter, deviation: AdaLoRAAdapter) -> jax.Array:
    """Equation 7: (stack..., rank), importance of E plus the mean importances of its column of A and its row of B."""
    a, e, b = jax.tree.map(jnp.multiply, mean, deviation)
    return e + a.mean(-2) + b.mean(-1)


def keep_largest(scores: dict[str, jax.Array], budget: jax.Array) -> dict[str, jax.Array]:
    """Bool like `scores`: which lie above the k-th smallest of all, k = number of scores - budget; all if k = 0.

    Scores equal to the threshold all go, so that fewer than `budget` may stay.
    """
    ordered = jnp.sort(jnp.concatenate([x.ravel() for x in scores.values()]))
    k = ordered.size - budget
    threshold = ordered[jnp.maximum(k - 1, 0)]
    return {path: (x > threshold) | (k <= 0) for path, x in scores.items()}


def triplets(adapter: Any) -> AdaLoRAAdapter:
    """The A, E, B of an AdaLoRA site or of a wrapped one."""
    return AdaLoRAAdapter(adapter.A, adapter.E, adapter.B)


def _sensitivity(w: jax.Array, g: jax.Array) -> jax.Array:
    """Equation 8: |w g|, float32."""
    return jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32))
