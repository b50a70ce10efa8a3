"""LoftQ: a quantised weight and low-rank factors that together come close to the weight (arXiv 2310.08659)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.variants.initializer import Pair, Rounded, WithQuantization, split, svd


@dataclass(frozen=True)
class LoftQ(WithQuantization):
    """``min ||W - Q - s A B||_F`` by turns (arXiv 2310.08659, algorithm 1): ``Q_t = q(W - L_{t-1})``, then
    ``L_t = SVD_r(W - Q_t)``, from L_0 = 0; the weight is Q_T and ``s A B = L_T``, of one turn.

    The paper has s = 1. Here S is divided by s, so that the start is the same for any alpha (the released code and PEFT
    leave s out, so alpha must be the rank there). The work is done by `lorajax.quant.plan(...).start`.

    iterations: T, 5 in the released code (1 in PEFT). The singular values are exact.
    """

    def before_quantizing(self, w: jax.Array, rank: int, s: Any, rounded: Rounded) -> tuple[jax.Array, Pair]:
        """W - L_{T-1}, and A and B."""
        low = jnp.zeros_like(w)
        for _ in range(self.iterations):
            rest = w - low
            u, sigma, v = svd(jax.random.key(0), w - rounded(rest), rank, 0)
            low = u * sigma[None, :] @ v
        return rest, Pair(*split(u, sigma, v, s))
