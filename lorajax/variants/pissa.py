"""PiSSA: LoRA that starts from the weight's principal part (arXiv 2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from lorajax.variants.initializer import Initializer, split, svd


@dataclass(frozen=True)
class PiSSA(Initializer):
    """``W = U S V^T; A = U_r sqrt(S_r/s), B = sqrt(S_r/s) V_r^T`` and s A B is taken off W (arXiv 2404.02948,
    equations 2 to 4). The work is done by `LoRA(initializer=PiSSA(...))`.

    The paper has s = 1 (alpha = rank = 128); dividing S by s makes the start the pretrained function for any s, as in
    the released code. The paper's learning rate is 2e-5 on all linear layers: an order of magnitude below LoRA's.

    iterations: 0 for the exact SVD, n for a randomised one with n power iterations of `rank` columns (the released
    ``pissa_niter_n``; 4 in its README, 16 in its script).
    """

    iterations: int = 0
    subtracts: ClassVar[bool] = True

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """A and B of the `rank` largest singular values."""
        return split(*svd(key, w, rank, self.iterations), s)

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        """Raises ValueError for a negative number of iterations."""
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations} is negative: 0 is the exact SVD, 4 a good randomised one")
