"""DyLoRA's rank sampling: one rank per optimizer step for the whole model (arXiv 2210.07558; see `variants.dylora`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.control.controller import Controller
from lorajax.core.masks import Mask, keep
from lorajax.variants.dylora import mask
from lorajax.variants.lora import LoRA


class DyLoRAState(NamedTuple):
    """step: () int32, updates done. key: PRNG key, constant; step n draws its rank from ``fold_in(key, n)``."""

    step: jax.Array
    key: jax.Array


def dylora(adapt: Any, *, total_steps: int = 0, frozen: bool = True, strict: bool = True,
           probabilities: Sequence[float] = (), ranks: Sequence[int] = (), seed: int = 0) -> Controller:
    """The controller for the LoRA sites of `adapt`, all of one rank R; other sites pass through.

    total_steps: not used; every controller is told. frozen, strict: see `variants.dylora`.
    probabilities: of the ranks 1..R, in proportion; () for the uniform distribution. ranks: those at which `views`
    shows the adapter, () for all. seed: of the draws, which depend on it and the step's number alone: a resumed run,
    any number of devices and of micro-batches see the same ranks.
    Evaluation without a mask is evaluation at rank R; `rank_masks` and `truncate` give the others.

    Raises ValueError for sites of unlike ranks, for a LoRA with frozen arrays, and for settings that do not fit R.
    """
    plan = _loras(adapt)
    top = next(iter(plan.values())).rank
    if len(probabilities) not in (0, top) or any(float(p) < 0 for p in probabilities) or (
            probabilities and sum(float(p) for p in probabilities) <= 0):
        raise ValueError(f"probabilities={tuple(probabilities)} must be {top} numbers, one for each rank 1..{top}, "
                         f"none negative and not all 0; () is the uniform distribution")
    shown = [int(rank) for rank in ranks] or list(range(1, top + 1))
    for rank in shown:
        _check(rank, top)
    logits = jnp.log(jnp.asarray([float(p) for p in probabilities] or [1.0] * top))

    def drawn(state: DyLoRAState) -> dict[str, Mask]:
        b = jax.random.categorical(jax.random.fold_in(state.key, state.step), logits)
        return {path: jax.tree.map(lambda m, path=path: _stacked(adapt, path, m), mask(variant, b, frozen, strict))
                for path, variant in plan.items()}

    def update(grads: Any, old: Any, new: Any, state: DyLoRAState) -> tuple[Any, DyLoRAState]:
        held = {path: keep(m, plan[path].leaves, new[path], old[path]) for path, m in drawn(state).items()}
        return {**new, **held}, state._replace(step=state.step + 1)

    return Controller(
        init=lambda trainable: DyLoRAState(jnp.int32(0), jax.random.key(seed)),
        masks=drawn,
        update=update,
        views=lambda state: {f"rank_{rank}": rank_masks(adapt, rank) for rank in shown},
    )


def rank_masks(adapt: Any, rank: int) -> dict[str, jax.Array]:
    """Masks for `bind` and `merge` that make of a trained DyLoRA its form of `rank`, 1..R. ValueError outside."""
    plan = _loras(adapt)
    _check(rank, next(iter(plan.values())).rank)
    return {path: _stacked(adapt, path, mask(variant, rank - 1).on) for path, variant in plan.items()}


def _stacked(adapt: Any, path: str, m: jax.Array) -> jax.Array:
    return jnp.broadcast_to(m, (*adapt.sites[path].stack_shape, m.shape[-1]))


def _check(rank: int, top: int) -> None:
    if not 1 <= rank <= top:
        raise ValueError(f"rank={rank} is outside 1..{top}, the ranks of this DyLoRA (the paper's b is rank - 1)")


def _loras(adapt: Any) -> dict[str, LoRA]:
    """path -> LoRA of the sites that DyLoRA acts on."""
    plan = {path: variant for path, variant in adapt.plan.items() if isinstance(variant, LoRA)}
    if not plan:
        found = sorted({type(variant).__name__ for variant in adapt.plan.values()})
        raise ValueError(f"the DyLoRA controller found no LoRA site; the rules made {', '.join(found) or 'none'}: give "
                         f"at least one path LoRA(...), or use control.identity()")
    if len(ranks := {variant.rank for variant in plan.values()}) > 1:
        raise ValueError(f"DyLoRA draws one rank for all sites, and the rules made LoRA of ranks {sorted(ranks)}: give "
                         f"all sites one rank")
    for path, variant in plan.items():
        if set(variant.leaves) != {"A", "B"}:
            raise ValueError(f"{path}: a LoRA with initializer={variant.initializer!r} has the arrays "
                             f"{', '.join(variant.leaves)}, whose parts are no smaller adapters: use 'kaiming'")
    return plan
