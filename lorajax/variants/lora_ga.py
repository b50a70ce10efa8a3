"""LoRA-GA: LoRA that starts along the gradient of the weight (arXiv 2407.05000)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorajax.core.variant import Statistic
from lorajax.variants.initializer import Initializer, mean_gradient, svd

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit", "weightS")


@dataclass(frozen=True)
class LoRAGA(Initializer):
    """``dL/dW = V S U^T; A = f V_{1..r}, B = f U_{r+1..2r}^T``, and s A B is taken off W (arXiv 2407.05000).
    f = out^(1/4) / sqrt(gamma), the paper's stable scale, makes the output's change independent of rank and width.
    Work: `LoRA(initializer=LoRAGA(...))`, with `lorajax.calibrate` for the gradient.

    The paper averages the gradient over 32 batches of 2 (its reproduction command: 8 of 1) and uses rsLoRA, alpha 16.

    direction: which singular vectors A and B take: "ArB2r" (the paper), "A2rBr", "ArBr" (odd ones and even ones), or
    "random" (2r drawn without repetition; PEFT's draws the same ones for both).
    scale: "stable" (the paper, the factor f), "gd" (1/s), "unit" (1), or "weightS" (the mean root of W's first r
    singular values over s). PEFT multiplies B by the gradient's singular values, which is none of these.
    gamma: of the stable scale (16 in the released configuration, 64 in its command for mathematics).
    clip: shrink A and B by sqrt(max|W| / max|s A B|) where that is below 1 (the released norm_clip).
    iterations: power iterations of the randomised SVD with 4 r columns, 0 for the exact SVD (released: 4).
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    gamma: float = 16.0
    clip: bool = False
    iterations: int = 4
    subtracts: ClassVar[bool] = True

    def statistic(self, rank: int) -> Statistic:
        """The mean gradient."""
        return mean_gradient()

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """A and B by `direction` and `scale`, of the mean gradient in `stats`."""
        key_svd, key_draw = jax.random.split(key)
        v, _, ut = svd(key_svd, stats.mean, min(4 * rank, *w.shape), self.iterations)
        low, high = jnp.arange(rank), rank + jnp.arange(rank)
        drawn = jax.random.permutation(key_draw, 2 * rank)
        of_a, of_b = {"ArB2r": (low, high), "A2rBr": (high, low), "ArBr": (2 * low + 1, 2 * low),
                      "random": (drawn[:rank], drawn[rank:])}[self.direction]
        factor: Any = 1.0
        if self.scale == "stable":
            factor = w.shape[1] ** 0.25 / self.gamma**0.5
        elif self.scale == "gd":
            factor = 1.0 / s
        elif self.scale == "weightS":
            factor = jnp.mean(jnp.sqrt(jnp.linalg.svd(w, compute_uv=False)[:rank] / s))
        a, b = v[:, of_a] * factor, ut[of_b] * factor
        if self.clip:
            shrink = jnp.sqrt(jnp.minimum(1.0, jnp.max(jnp.abs(w)) / jnp.max(jnp.abs(s * (a @ b)))))
            a, b = a * shrink, b * shrink
        return a, b

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        """Raises ValueError for unknown names, numbers out of range, and where 2 r singular vectors do not exist."""
        for name, value, known in (("direction", self.direction, DIRECTIONS), ("scale", self.scale, SCALES)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: it is one of {', '.join(known)}")
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma} must be positive: the start is divided by its root (the paper: 16)")
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations} is negative: 0 is the exact SVD, 4 a good randomised one")
        if 2 * rank > min(n_in, n_out):
            raise ValueError(f"rank={rank} needs {2 * rank} singular vectors of the gradient, and a ({n_in}, {n_out}) "
                             f"weight has {min(n_in, n_out)}: lower the rank to {min(n_in, n_out) // 2} by a rule for "
                             f"this path")
