"""Pruning of single entries of A and B, at once or in stages, for good (arXiv 2210.04284; see `variants.sparse`)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.control.controller import Controller
from lorajax.core.masks import keep
from lorajax.variants.sparse import SCHEDULES, SCOPES, SCORES, densities, kept

Arrays = dict[tuple[str, str], jax.Array]
"""(site path, field) -> array."""


class SparseState(NamedTuple):
    """step: () int32, updates done. masks: site path -> adapter of bools, None for what is not pruned. key: of the
    random scores, constant; runs of one program have each their own."""

    step: jax.Array
    masks: dict[str, Any]
    key: jax.Array


def sparse(adapt: Any, *, total_steps: int, density: float = 0.1, score: str = "snip", scope: str = "global",
           stages: int = 1, schedule: str = "exponential", start: float = 0.1, stop: float = 0.5, seed: int = 0,
           masks: Mapping[str, Any] | None = None) -> Controller:
    """The controller for every array labelled `a` or `b`; all others pass through.

    density, score, scope, stages, schedule: see `variants.sparse`. start: the share of the run before the first
    pruning; 0 prunes before training, as the paper does (``snip`` behind the first step, whose gradient it needs).
    stop: the share of the run at the last of several stages. seed: of the random scores.
    masks: what `prune` returned, to begin with; nothing more is then pruned.

    Raises ValueError for settings out of range.
    """
    _check(adapt, density, score, scope)
    if stages < 1 or schedule not in SCHEDULES:
        raise ValueError(f"stages={stages} and schedule={schedule!r}: stages is at least 1, and the schedules are "
                         f"{', '.join(SCHEDULES)}")
    if not 0 <= start < 1 or (stages > 1 and not start < stop < 1):
        raise ValueError(f"start={start} and stop={stop} are shares of the run: 0 <= start < 1, and with "
                         f"stages={stages} start < stop < 1")
    shares = [start + (stop - start) * i / max(stages - 1, 1) for i in range(stages)]
    steps = np.array([max(round(share * total_steps), int(score == "snip")) for share in shares])
    left = densities(density, stages, schedule)
    given = masks

    def pruned(masks: Any, trainable: Any, grads: Any, stage: int | jax.Array, key: jax.Array) -> Any:
        return _pruned(adapt, masks, trainable, grads, left, stage, score, scope, key)

    def init(trainable: Any) -> SparseState:
        key = jax.random.key(seed)
        if given is not None:
            return SparseState(jnp.int32(0), jax.tree.map(lambda m: jnp.asarray(m, bool), dict(given)), key)
        masks = _ones(adapt, trainable)
        if steps[0] == 0:
            masks = pruned(masks, trainable, None, int(np.sum(steps == 0)) - 1, key)
        return SparseState(jnp.int32(0), masks, key)

    def update(grads: Any, old: Any, new: Any, state: SparseState) -> tuple[Any, SparseState]:
        done, masks = state.step + 1, state.masks
        if given is None:
            due = jnp.any(jnp.asarray(steps) == done)
            stage = jnp.maximum(jnp.sum(jnp.asarray(steps) <= done) - 1, 0)
            scored = old if score == "snip" else new
            masks = jax.lax.cond(due, lambda: pruned(masks, scored, grads, stage, state.key), lambda: masks)
        zeros = {path: jax.tree.map(jnp.zeros_like, new[path]) for path in masks}
        held = {path: keep(m, adapt.plan[path].leaves, new[path], zeros[path]) for path, m in masks.items()}
        return {**new, **held}, SparseState(done, masks, state.key)

    def report(state: SparseState) -> dict[str, float]:
        arrays = jax.tree.leaves(state.masks)
        return {"density": sum(int(m.sum()) for m in arrays) / sum(m.size for m in arrays)}

    return Controller(init=init, masks=lambda state: state.masks, update=update, report=report,
                      settled=0 if given is not None else int(steps[-1]))


def prune(adapt: Any, trainable: Any, density: float = 0.1, *, score: str = "snip", scope: str = "global",
          grads: Any = None, seed: int = 0) -> dict[str, Any]:
    """Masks in one shot: site path -> adapter of bools, for `bind`, `freeze_ranks`, or ``sparse(..., masks=masks)``.

    grads: like `trainable`, the gradient of the loss, over one batch or summed over many (`train.step.make_gradients`);
    ``snip`` needs it. Works under jit. Raises ValueError for settings out of range.
    """
    _check(adapt, density, score, scope)
    if score == "snip" and grads is None:
        raise ValueError("score='snip' multiplies parameters by gradients: give grads, or use score='magnitude'")
    key = jax.random.key(seed)
    return _pruned(adapt, _ones(adapt, trainable), trainable, grads, np.array([density]), 0, score, scope, key)


def _pruned(adapt: Any, masks: Any, trainable: Any, grads: Any, left: np.ndarray, stage: int | jax.Array, score: str,
            scope: str, key: jax.Array) -> Any:
    """`masks` less what falls below the threshold of `stage`."""
    on, values = _arrays(masks), _arrays(trainable)
    slopes = {at: jnp.abs(_arrays(grads)[at].astype(jnp.float32)) for at in on} if score == "snip" else {}
    layers = {at: len(adapt.sites[at[0]].stack_shape) for at in on}
    scores, silent = {}, []
    for at, mask in on.items():
        size = jnp.abs(values[at].astype(jnp.float32))
        chance = jax.random.uniform(_key(key, at), mask.shape, minval=0.5)  # never 0
        tries = {"random": [chance], "magnitude": [size, chance],
                 "snip": [size * slopes[at], slopes[at], chance] if slopes else []}[score]
        own = tuple(range(layers[at], mask.ndim))  # every layer of a stack is an array of its own
        best = jnp.zeros(mask.shape)
        for choice in tries:
            none = (jnp.max(best, axis=own, keepdims=True) == 0) & jnp.any(mask, axis=own, keepdims=True)
            silent.append(jnp.any(none) if choice is not tries[0] else jnp.bool_(False))
            best = jnp.where(none & mask, choice, best)
        scores[at] = best
    local = {at: _above(x, [kept(d, int(np.prod(x.shape[layers[at]:]))) for d in left], stage, layers[at])
             for at, x in scores.items()}
    if scope == "global":
        flat = jnp.concatenate([x.ravel() for x in scores.values()])
        counts = [flat.size - kept(d, flat.size) for d in left]
        threshold = jnp.sort(flat)[jnp.maximum(jnp.asarray(counts)[stage] - 1, 0)]
        fall_back = jnp.any(jnp.stack(silent))
        local = {at: jnp.where(fall_back, local[at], (x > threshold) | (jnp.asarray(counts)[stage] == 0))
                 for at, x in scores.items()}
    return {path: type(m)(*[None if x is None else x & local[path, name] for name, x in m._asdict().items()])
            for path, m in masks.items()}


def _above(x: jax.Array, counts: list[int], stage: int | jax.Array, stack: int) -> jax.Array:
    """Bool like x, (stack..., rows, columns): which of each matrix's entries lie above its `counts[stage]`-th largest
    neighbour; at least as many are False as the count says, ties all go."""
    flat = x.reshape(*x.shape[:stack], -1)
    gone = flat.shape[-1] - jnp.asarray(counts)[stage]
    threshold = jnp.take(jnp.sort(flat, axis=-1), jnp.maximum(gone - 1, 0), axis=-1)
    return (x > threshold.reshape(*x.shape[:stack], *[1] * (x.ndim - stack))) | (gone == 0)


def _ones(adapt: Any, trainable: Any) -> dict[str, Any]:
    """All of A and B."""
    masks = {}
    for path, variant in adapt.plan.items():
        names = [name for name, leaf in variant.leaves.items() if leaf.label in ("a", "b")]
        fields = {name: jnp.ones(x.shape, bool) if name in names and x is not None else None
                  for name, x in trainable[path]._asdict().items()}
        if any(m is not None for m in fields.values()):
            masks[path] = type(trainable[path])(**fields)
    return masks


def _arrays(tree: Any) -> Arrays:
    return {(path, name): x for path, adapter in tree.items() for name, x in adapter._asdict().items() if x is not None}


def _key(key: jax.Array, at: tuple[str, str]) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32("/".join(at).encode()))


def _check(adapt: Any, density: float, score: str, scope: str) -> None:
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density} is outside (0, 1]: it is the share of entries of A and B that stay")
    if score not in SCORES or scope not in SCOPES:
        raise ValueError(f"score={score!r} and scope={scope!r}: the scores are {', '.join(SCORES)}, the scopes "
                         f"{', '.join(SCOPES)}")
    if not any(leaf.label in ("a", "b") for variant in adapt.plan.values() for leaf in variant.leaves.values()):
        found = sorted({type(variant).__name__ for variant in adapt.plan.values()})
        raise ValueError(f"nothing to prune: the rules made {', '.join(found) or 'none'}, without an array labelled "
                         f"'a' or 'b'; give at least one path LoRA(...)")
