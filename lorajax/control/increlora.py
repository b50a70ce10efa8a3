"""IncreLoRA's growth: from time to time the most important matrices get more rank (arXiv 2308.12043, section 3.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.control.adalora import moving_averages
from lorajax.control.controller import Controller
from lorajax.variants.increlora import IncreLoRA


class IncreLoRAState(NamedTuple):
    """step: () int32, updates done. ranks: site path -> (stack...) int32. mean, deviation: of the scores, float32, of
    the same shapes."""

    step: jax.Array
    ranks: dict[str, jax.Array]
    mean: dict[str, jax.Array]
    deviation: dict[str, jax.Array]


def increlora(adapt: Any, *, total_steps: int, target_rank: float = 8.0, warmup: float = 0.1, interval: float = 0.08,
              top_h: int = 9, beta1: float = 0.85, beta2: float = 0.85) -> Controller:
    """The controller for the IncreLoRA sites of `adapt`; other sites pass through. A layer of a stack is a matrix.

    target_rank: final average rank of a matrix. Every `interval` steps after the first `warmup` (both below 1: a share
    of the run) the `top_h` matrices of the highest score take their reserve, until no further growth fits the budget.
    Then the reserves go: their E is set to 0. The budget is never exceeded; the released code counts matrices where it
    should count ranks, and its last round may.
    beta1, beta2: decay of the moving averages of score and uncertainty, whose product ranks the matrices; both stop
    when growth does.

    The released score ``sum |DW * dL/dDW| / sqrt(in out)`` needs the gradient of the full weight, which is never formed
    here: the score is ``|sum_i E_i dL/dE_i| / sqrt(in out)``, which is ``|sum DW * dL/dDW| / sqrt(in out)``, the same
    without the absolute value of each element. Adam's step count, and so its bias correction and the learning rate, are
    those of the run also for components that come in late; the released code starts new parameter groups.
    """
    plan = {path: variant for path, variant in adapt.plan.items() if isinstance(variant, IncreLoRA)}
    if not plan:
        found = sorted({type(variant).__name__ for variant in adapt.plan.values()})
        raise ValueError(f"the IncreLoRA controller found no IncreLoRA site; the rules made "
                         f"{', '.join(found) or 'none'}: give at least one path IncreLoRA(...), or use "
                         f"control.identity()")
    if len(sizes := {variant.reserve for variant in plan.values()}) > 1:
        raise ValueError(f"sites with reserves {sorted(sizes)}: all of them must grow by the same number")
    if top_h < 1:
        raise ValueError(f"top_h={top_h} is below 1: it counts the matrices that grow in a round")
    grow = sizes.pop()
    count = {path: adapt.sites[path].extent(adapt.sites[path].stack_axes) for path in plan}
    start = sum(count[path] * variant.initial for path, variant in plan.items())
    most = sum(count[path] * (variant.rank - (variant.rank - variant.initial) % grow) for path, variant in plan.items())
    target = int(target_rank * sum(count.values()))
    if not start <= target <= most:
        raise ValueError(f"target_rank={target_rank} makes a final budget of {target} ranks for {sum(count.values())} "
                         f"matrices that start with {start} and can reach {most}: raise the variant's rank, or choose "
                         f"a target in {start / sum(count.values()):g}..{most / sum(count.values()):g}")
    first, every = (round(t * total_steps) if t < 1 else int(t) for t in (warmup, interval))
    every = max(every, 1)
    rooms = [(v.rank - v.initial) // grow for path, v in plan.items() for _ in range(count[path])]
    rounds = most_rounds((target - start) // grow, top_h, rooms)
    done = (first // every + rounds) * every + 1 if rounds else 0
    if done > total_steps:
        raise ValueError(f"{rounds} rounds of growth, one each {every} steps after {first}, end at step {done} of a "
                         f"run of {total_steps}: raise top_h={top_h}, or shorten interval or warmup")

    def init(trainable: Any) -> IncreLoRAState:
        ranks = {path: jnp.full(trainable[path].n.shape, variant.initial, jnp.int32) for path, variant in plan.items()}
        zeros = {path: jnp.zeros(r.shape, jnp.float32) for path, r in ranks.items()}
        return IncreLoRAState(jnp.int32(0), ranks, zeros, jax.tree.map(jnp.copy, zeros))

    def update(grads: Any, old: Any, new: Any, state: IncreLoRAState) -> tuple[Any, IncreLoRAState]:
        t, ranks = state.step, state.ranks
        left = (target - _sum(ranks)) // grow  # how many more times a matrix may grow
        score = {path: _score(adapt.sites[path], old[path].E, grads[path].E) for path in plan}
        moved = moving_averages(score, state.mean, state.deviation, beta1, beta2)
        mean, deviation = jax.tree.map(lambda stopped, moving: jnp.where(left > 0, moving, stopped),
                                       (state.mean, state.deviation), moved)
        due = (t > first) & (t % every == 0)
        room = {path: ranks[path] + grow <= variant.rank for path, variant in plan.items()}
        value = {path: jnp.where(room[path], mean[path] * deviation[path], -jnp.inf) for path in plan}
        chosen = highest(value, jnp.where(due, jnp.minimum(top_h, left), 0))
        after = {path: ranks[path] + grow * (chosen[path] & room[path]).astype(jnp.int32) for path in plan}
        finished = _sum(after) + grow > target
        grown = {path: _grown(variant, old[path], new[path], after[path], finished) for path, variant in plan.items()}
        return {**new, **grown}, IncreLoRAState(t + 1, after, mean, deviation)

    return Controller(init=init, masks=lambda state: None, update=update, settled=done,
                      report=lambda state: {"ranks_kept": int(_sum(state.ranks))})


def most_rounds(left: int, top_h: int, rooms: list[int]) -> int:
    """In how many rounds `left` growths are over at the latest: when the matrices that are nearly full go first, so
    that soon fewer than `top_h` of them have room. rooms: how many times each matrix can grow, together at least
    `left`."""
    rooms, rounds = sorted(rooms), 0
    while left > 0:
        growing = [i for i, room in enumerate(rooms) if room > 0][:min(top_h, left)]
        for i in growing:
            rooms[i] -= 1
        left, rounds = left - len(growing), rounds + 1
    return rounds


def highest(value: dict[str, jax.Array], k: jax.Array) -> dict[str, jax.Array]:
    """Bool like `value`: the k largest of all, the first of equals."""
    order = jnp.argsort(-jnp.concatenate([x.ravel() for x in value.values()]), stable=True)
    among = jnp.argsort(order) < k
    found, at = {}, 0
    for path, x in value.items():
        found[path] = among[at:at + x.size].reshape(x.shape)
        at += x.size
    return found


def _score(site: Any, e: jax.Array, g: jax.Array) -> jax.Array:
    """(stack...) float32; the gradient of E is 0 where it is not active."""
    return jnp.abs(jnp.sum(e.astype(jnp.float32) * g.astype(jnp.float32), -1)) / (site.n_in * site.n_out) ** 0.5


def _grown(variant: IncreLoRA, old: Any, new: Any, ranks: jax.Array, finished: jax.Array) -> Any:
    """`new` with everything held that may not move (momentum and decay would move it), and n for the new ranks."""
    i = jax.lax.broadcasted_iota(jnp.int32, new.E.shape, new.E.ndim - 1)
    before = (variant.initial + jnp.round(old.n)).astype(jnp.int32)[..., None]
    active, live = i < before, i < before + variant.reserve
    e = jnp.where(active, new.E, old.E)
    e = jnp.where(finished & (i >= ranks[..., None]), jnp.zeros_like(e), e)
    return new._replace(A=jnp.where(live[..., None, :], new.A, old.A), E=e,
                        B=jnp.where(live[..., :, None], new.B, old.B), n=(ranks - variant.initial).astype(new.n.dtype))


def _sum(ranks: dict[str, jax.Array]) -> jax.Array:
    return jnp.sum(jnp.concatenate([r.ravel() for r in ranks.values()]))
