"""A rank schedule: every site starts with a high rank and loses components on the way to a low one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.control.adalora import budget_schedule
from lorajax.control.controller import Controller
from lorajax.variants.lora import LoRA


class ReduceState(NamedTuple):
    """step: () int32, updates done. kept: site path -> (stack..., rank) bool; its sums are the ranks."""

    step: jax.Array
    kept: dict[str, jax.Array]


def reduce(adapt: Any, *, total_steps: int, final: int | Mapping[str, int], t_initial: float = 0.1,
           t_final: float = 0.5, by: str = "magnitude") -> Controller:
    """The controller that lowers the ranks of the LoRA sites of `adapt` from theirs to `final`, each on its own.

    final: a rank for all, or site path -> rank (`lorajax.control.allocate` makes such a table; a site that is not named
    keeps its rank). t_initial, t_final: steps before the ranks fall, and at the end with the final ranks; below 1 a
    share of the run. Between them the rank falls along AdaLoRA's cubic, and never rises.
    by: which component goes: the one with the least ``||A_i|| ||B_i||`` (``magnitude``), or the ``last``.

    What has gone has B_i = 0, gets no gradient and does not move. s stays that of the initial rank.
    """
    paths = [path for path, variant in adapt.plan.items() if isinstance(variant, LoRA)]
    targets = {path: final for path in paths} if isinstance(final, int) else dict(final)
    if missing := sorted(set(targets) - set(paths)):
        raise ValueError(f"final names {missing}, which are no LoRA sites; those are: {', '.join(paths) or 'none'}")
    for path, rank in targets.items():
        if not 1 <= rank <= adapt.plan[path].rank:
            raise ValueError(f"{path}: final rank {rank} is outside 1..{adapt.plan[path].rank}, the rank it starts "
                             f"with: raise the variant's rank, or leave this site out of `final`")
    if not targets:
        raise ValueError("no site to reduce: give at least one path LoRA(...)")
    if by not in ("magnitude", "last"):
        raise ValueError(f"by={by!r} is unknown; there are 'magnitude' and 'last'")
    first, last = (round(t * total_steps) if t < 1 else int(t) for t in (t_initial, t_final))
    tables = {path: budget_schedule(total_steps, first, last, adapt.plan[path].rank, rank)
              for path, rank in targets.items()}

    def init(trainable: Any) -> ReduceState:
        shape = {path: (*trainable[path].A.shape[:-2], trainable[path].A.shape[-1]) for path in targets}
        return ReduceState(jnp.int32(0), {path: jnp.ones(s, bool) for path, s in shape.items()})

    def update(grads: Any, old: Any, new: Any, state: ReduceState) -> tuple[Any, ReduceState]:
        after, kept = dict(new), {}
        for path, table in tables.items():
            rank = jnp.asarray(table)[jnp.minimum(state.step + 1, table.size - 1)]
            kept[path] = strongest(_weights(new[path], by), state.kept[path], rank)
            b = new[path].B
            after[path] = new[path]._replace(B=jnp.where(kept[path][..., None], b, jnp.zeros_like(b)))
        return after, ReduceState(state.step + 1, kept)

    return Controller(init=init, update=update, settled=total_steps - last,
                      masks=lambda state: {path: kept.astype(jnp.float32) for path, kept in state.kept.items()},
                      report=lambda state: {"ranks_kept": sum(int(k.sum()) for k in state.kept.values())})


def strongest(weights: jax.Array, among: jax.Array, rank: jax.Array) -> jax.Array:
    """(..., r) bool: the `rank` largest of `weights` where `among`, the first of equals."""
    order = jnp.argsort(jnp.where(among, -weights, jnp.inf), axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1)
    return (place < rank) & among


def _weights(adapter: Any, by: str) -> jax.Array:
    """(stack..., rank) float32."""
    if by == "last":
        ranks = jnp.arange(adapter.A.shape[-1], dtype=jnp.float32)
        return jnp.broadcast_to(-ranks, (*adapter.A.shape[:-2], ranks.size))
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731
    return jnp.linalg.norm(wide(adapter.A), axis=-2) * jnp.linalg.norm(wide(adapter.B), axis=-1)
