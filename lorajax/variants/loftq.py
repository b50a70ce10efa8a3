"""LoftQ: a quantised weight and low-rank factors that together come close to the weight (arXiv 2310.08659)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.core.variant import Statistic
from lorajax.variants.initializer import Initializer, Pair, Rounded, quantization, split, svd


@dataclass(frozen=True)
class LoftQ(Initializer):
    """``min ||W - Q - s A B||_F`` by turns (arXiv 2310.08659, algorithm 1): ``Q_t = q(W - L_{t-1})``, then
    ``L_t = SVD_r(W - Q_t)``, from L_0 = 0; the weight is Q_T and ``s A B = L_T``, of one turn.

    The paper has s = 1. Here S is divided by s, so that the start is the same for any alpha (the released code and PEFT
    leave s out, so alpha must be the rank there). The work is done by `lorajax.quant.plan(...).start`.

    iterations: T, 5 in the released code (1 in PEFT). The singular values are exact.
    """

    iterations: int = 5

    def before_quantizing(self, w: jax.Array, rank: int, s: Any, rounded: Rounded) -> tuple[jax.Array, Any]:
        """W - L_{T-1}, and A and B."""
        low = jnp.zeros_like(w)
        for t in range(self.iterations):
            found = svd(jax.random.key(0), w - rounded(w - low), rank, 0)
            if t == self.iterations - 1:
                return w - low, Pair(*split(*found, s))
            low = found[0] * found[1][None, :] @ found[2]
        raise ValueError(f"iterations={self.iterations}: LoftQ quantises at least once")

    def statistic(self, rank: int) -> Statistic:
        """A and B, made when the weight is quantised."""
        return quantization(rank)

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """Those."""
        return stats.A, stats.B

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        """Raises ValueError for fewer than one iteration."""
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: LoftQ quantises at least once; the paper's code does 5")
