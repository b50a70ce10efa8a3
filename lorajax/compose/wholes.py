"""What becomes of the weights that adapters trained in full (heads, biases, norms) when they are composed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lorajax.compose.gathered import Gathered, Trained
from lorajax.core.variant import Full, FullAdapter

Whole = int | str | None
"""Number of the adapter whose weights are taken; 'sum' adds up the changes; 'drop' keeps the base's; None refuses."""


def wholes(found: Gathered, adapters: Sequence[Trained], weights: Any, full: Whole,
           ) -> tuple[dict[str, FullAdapter], dict[str, Any]]:
    """(path -> the weight trained in full, path -> the base weight of every other leaf).

    Raises ValueError where there are such weights and nobody said what becomes of them, and where the base's own is
    needed and no adapter has it.
    """
    having = {path: [i for i, one in enumerate(adapters) if isinstance(one.adapt.plan.get(path), Full)]
              for path in found.sites.leaves}
    having = {path: who for path, who in having.items() if who}
    if isinstance(full, int) and not 0 <= full < len(adapters):
        raise ValueError(f"full={full} names none of the {len(adapters)} adapters: give 0..{len(adapters) - 1}")
    if isinstance(full, str) and full not in ("sum", "drop"):
        raise ValueError(f"full={full!r} is unknown; there are 'sum', 'drop' and an adapter's number")
    if having and full is None:
        path, who = next(iter(having.items()))
        raise ValueError(f"adapters {who} trained {path} (and {len(having) - 1} others) in full, and two heads have no "
                         f"sum that means something: say full=<number of the adapter whose to take>, full='drop', or, "
                         f"for biases and norms, full='sum'")
    trained: dict[str, FullAdapter] = {}
    for path, who in having.items():
        if isinstance(full, int):
            if full in who:
                trained[path] = adapters[full].trainable[path]
        elif full == "sum":
            base = _base(found, path).astype(jnp.float32)
            changes = [weights[i] * (adapters[i].trainable[path].w.astype(jnp.float32) - base) for i in who]
            trained[path] = FullAdapter(base + sum(changes[1:], changes[0]))
    return trained, {path: _base(found, path) for path in found.sites.leaves if path not in trained}


def _base(found: Gathered, path: str) -> Any:
    if path not in found.base:
        raise ValueError(f"every adapter trained {path} in full, so none holds the base's own: give params=<the base>")
    return found.base[path]
