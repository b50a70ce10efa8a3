"""QPiSSA: PiSSA on a quantised weight; what is quantised is what the principal part leaves (arXiv 2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from lorajax.core.variant import Statistic
from lorajax.variants.initializer import Initializer, Pair, Rounded, quantization, split, svd


@dataclass(frozen=True)
class QPiSSA(Initializer):
    """``L_t = SVD_r(W - Q_{t-1})``, then ``Q_t = q(W - L_t)``, from Q_0 = 0; the weight is Q_T and ``s A B = L_T``, of
    one turn (arXiv 2404.02948, section 4.3, and the released code). Where LoftQ ends with the decomposition, this ends
    with the quantisation; one iteration is PiSSA with its residual quantised.

    The released code quantises without double quantisation: ``NF4(double=False)``. The work is done by
    `lorajax.quant.plan(...).start`.

    iterations: T, 5 in the released code. The singular values are exact.
    """

    iterations: int = 5

    def before_quantizing(self, w: jax.Array, rank: int, s: Any, rounded: Rounded) -> tuple[jax.Array, Any]:
        """W - L_T, and A and B."""
        left = w
        for t in range(self.iterations):
            found = svd(jax.random.key(0), left, rank, 0)
            rest = w - found[0] * found[1][None, :] @ found[2]
            if t == self.iterations - 1:
                return rest, Pair(*split(*found, s))
            left = w - rounded(rest)
        raise ValueError(f"iterations={self.iterations}: QPiSSA quantises at least once")

    def statistic(self, rank: int) -> Statistic:
        """A and B, made when the weight is quantised."""
        return quantization(rank)

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """Those."""
        return stats.A, stats.B

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        """Raises ValueError for fewer than one iteration."""
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: QPiSSA quantises at least once; the paper's code does 5")
