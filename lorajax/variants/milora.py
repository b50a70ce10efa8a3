"""MiLoRA: LoRA that starts from the weight's minor part (arXiv 2406.09044)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorajax.variants.initializer import Initializer, split, svd

PARTS = ("min", "mid", "max", "random")


@dataclass(frozen=True)
class MiLoRA(Initializer):
    """PiSSA with the last r singular triplets in place of the first (arXiv 2406.09044):
    ``A = U_m sqrt(S_m/s), B = sqrt(S_m/s) V_m^T``, and s A B is taken off W. Work: `LoRA(initializer=MiLoRA(...))`.

    The released launch files use alpha = rank with dropout 0.05; the best learning rate is about a third of LoRA's.

    part: which triplets, as in the released code: "min" (the paper), "mid", "max" (PiSSA's), or "random".
    """

    part: str = "min"
    subtracts: ClassVar[bool] = True

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """A and B of `rank` singular values, by `part`."""
        u, values, vt = svd(key, w, min(w.shape), 0)
        k = values.shape[0]
        first = {"min": k - rank, "mid": (k - rank) // 2, "max": 0}.get(self.part, 0)
        chosen = first + jnp.arange(rank)
        if self.part == "random":
            chosen = jax.random.choice(key, k, (rank,), replace=False)
        return split(u[:, chosen], values[chosen], vt[chosen], s)

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown part."""
        if self.part not in PARTS:
            raise ValueError(f"part={self.part!r} is unknown: it is one of {', '.join(PARTS)}")
