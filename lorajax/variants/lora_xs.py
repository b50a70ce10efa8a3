"""LoRA-XS: an r x r matrix between the frozen singular vectors of the weight (Bałazy et al., arXiv 2405.17604)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax

from lorajax.core import compat
from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.initializer import svd

OVERSAMPLES = 10
"""Directions that the randomised decomposition follows beyond the rank, as scikit-learn's."""


class LoRAXSAdapter(NamedTuple):
    """A: (in, rank) and B: (rank, out), frozen. R: (rank, rank)."""

    A: jax.Array
    R: jax.Array
    B: jax.Array


@dataclass(frozen=True)
class LoRAXS(Variant):
    """``W' = W + s A R B`` with ``s = alpha / rank`` (arXiv 2405.17604): of W = U S V^T, truncated to rank,
    A = U S and B = V^T are frozen, and R is trained. W itself stays as it is.

    rank: r; the paper has 4 to 25 for GLUE and 16 to 64 for large models. alpha: 16 in its GLUE runs.
    sigma: standard deviation of R's start, so small that the start is nearly the identity.
    iterations: 0 for an exact decomposition; n for a randomised one with n power iterations, of which the released code
    takes 10. Its random draw has a fixed seed, not the run's key.
    dropout: probability of dropping an input element on the branch through A, in training only.

    A and B are saved with the adapter: a decomposition repeated elsewhere may be rounded differently.
    """

    rank: int = 16
    alpha: float | jax.Array = 16.0
    sigma: float = 1e-5
    iterations: int = 0
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank"), peft="lora_A.weight", trainable=False),
        "R": Leaf("latent", ("rank", "mixed"), peft="default_lora_latent_mapping.weight"),
        "B": Leaf("b", ("mixed", "out"), peft="lora_B.weight", trainable=False),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[LoRAXSAdapter, jax.Array]:
        """Returns A, R ~ N(0, sigma^2), B, and `w` itself."""
        with jax.default_matmul_precision("highest"):
            u, s, vt = svd(jax.random.key(0), compat.whole(w), min(self.rank + OVERSAMPLES, *w.shape), self.iterations)
        r = self.rank
        return LoRAXSAdapter(u[:, :r] * s[None, :r], self.sigma * jax.random.normal(key, (r, r)), vt[:r]), w

    def factors(self, adapter: LoRAXSAdapter, w: Any) -> Factors:
        """a = A, b = R B, s."""
        with jax.default_matmul_precision("highest"):
            return Factors(a=adapter.A, b=adapter.R @ adapter.B, s=self.alpha / self.rank)

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for a negative number of iterations."""
        super().check(n_in, n_out)
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations} is below 0: 0 decomposes exactly, n by n power iterations")

