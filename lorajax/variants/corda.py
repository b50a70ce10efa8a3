"""CorDA: LoRA that starts from the weight seen through the covariance of its inputs (arXiv 2406.05223)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Seen, Statistic
from lorajax.variants.initializer import Initializer, split, svd

MODES = ("ipm", "kpm")
ENOUGH = 0.05  # of the inverse: ||C C^-1 - I||_F


class Covariance(NamedTuple):
    """total: (in, in), the sum over batches of X^T X, each X divided by max|X|. batches: () their number."""

    total: jax.Array
    batches: jax.Array


@dataclass(frozen=True)
class CorDA(Initializer):
    """``C W = V S U^T``, so ``W = C^-1 V S U^T``; ``A = C^-1 V sqrt(S/s), B = sqrt(S/s) U^T`` for r of the triplets,
    and s A B is taken off W (arXiv 2406.05223). C is the mean over batches of X^T X (the paper: 256 samples), each X
    divided by max|X| (the released code: by |max X|). Before it is inverted, 0.01 mean(diag C) is added to its
    diagonal, doubled until ||C C^-1 - I||_F < 0.05. Work: `LoRA(initializer=CorDA(...))`, with `lorajax.calibrate`.

    mode: "ipm" (instruction-previewed), the r largest triplets, with C from the task's data; "kpm"
    (knowledge-preserved), the r smallest, with C from the data whose knowledge is to stay.
    """

    mode: str = "ipm"
    subtracts: ClassVar[bool] = True

    def statistic(self, rank: int) -> Statistic:
        """The mean of X^T X."""

        def update(state: Covariance, seen: Seen) -> Covariance:
            peak = jnp.where(seen.peak > 0, seen.peak, 1.0)
            return Covariance(state.total + seen.gram / peak**2, state.batches + 1.0)

        return Statistic("inputs", lambda n_in, n_out: Covariance(jnp.zeros((n_in, n_in)), jnp.zeros(())), update)

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """A and B by `mode`, with the C of `stats`."""
        c, inverse = damped(stats.total / jnp.maximum(stats.batches, 1.0))
        v, values, ut = svd(key, c @ w, min(w.shape), 0)
        first = 0 if self.mode == "ipm" else values.shape[0] - rank
        part = slice(first, first + rank)
        return split(inverse @ v[:, part], values[part], ut[part], s)

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown mode."""
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is unknown: it is one of {', '.join(MODES)}")


def damped(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(C + d mean(diag C) I, its inverse) with the first d of 0.01, 0.02, 0.04, ... whose inverse is accurate."""
    eye = jnp.eye(c.shape[0])
    size = jnp.where(jnp.trace(c) > 0, jnp.mean(jnp.diag(c)), 1.0)

    def attempt(d: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        full = c + d * size * eye
        inverse = jnp.linalg.inv(full)
        return d, full, inverse, jnp.sqrt(jnp.sum(jnp.square(full @ inverse - eye)))

    last = jax.lax.while_loop(lambda x: ~(x[3] < ENOUGH) & (x[0] < 1e4), lambda x: attempt(2 * x[0]),
                              attempt(jnp.float32(0.01)))
    return last[1], last[2]
