"""LoRA-One: LoRA that starts one approximate gradient step away (arXiv 2502.01235)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.core.variant import Statistic
from lorajax.variants.initializer import Initializer, mean_gradient, svd


@dataclass(frozen=True)
class LoRAOne(Initializer):
    """``-dL/dW = V S U^T; A = V_r sqrt(S_r / (S_1 gamma)), B = sqrt(S_r / (S_1 gamma)) U_r^T`` (arXiv 2502.01235,
    with the released code's square roots; its README prints S on both sides). W is left
    alone: the model starts near one step of gradient descent on W. Work: `LoRA(initializer=LoRAOne(...))`, with
    `lorajax.calibrate` for the gradient.

    Released for mathematics: one batch of 8, rsLoRA with alpha 16 and rank 8, learning rate 2e-4.

    gamma: divides the update (128).
    iterations: power iterations of a randomised SVD with 4 r columns, 0 for the exact one.
    """

    gamma: float = 128.0
    iterations: int = 0

    def statistic(self, rank: int) -> Statistic:
        """The mean gradient."""
        return mean_gradient()

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """A and B along the first r singular vectors of the negative mean gradient in `stats`."""
        v, values, ut = svd(key, -stats.mean, min(4 * rank, *w.shape), self.iterations)
        root = jnp.sqrt(values[:rank] / (jnp.where(values[0] > 0, values[0], 1.0) * self.gamma))
        return v[:, :rank] * root[None, :], root[:, None] * ut[:rank]

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        """Raises ValueError unless gamma is positive and iterations are not negative."""
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma} must be positive: it divides the start (the paper's code: 128)")
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations} is negative: 0 is the exact SVD, 4 a good randomised one")
