"""MiCA: only A is trained, against the frozen minor output directions of the weight (arXiv 2604.01694)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core import compat
from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.initializer import svd


class MiCAAdapter(NamedTuple):
    """A: (in, rank). B: (rank, out), frozen."""

    A: jax.Array
    B: jax.Array


@dataclass(frozen=True)
class MiCA(Variant):
    """``W' = W + s A B``, s = alpha / rank, with B = the singular vectors of W on its output side that belong to the r
    smallest singular values, frozen, and A = 0, trained (arXiv 2604.01694, equation 4). It starts as the identity and
    W is left alone. rank * in trained parameters.

    rank: r. alpha: numerator of the scale. dropout: probability of dropping an input element on the branch through A,
    in training only.
    """

    rank: int = 8
    alpha: float | jax.Array = 8.0
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank"), peft="lora_A.weight"),
        "B": Leaf("b", ("rank", "out"), peft="lora_B.weight", trainable=False),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[MiCAAdapter, jax.Array]:
        """Returns (0, B) and `w` itself."""
        _, _, vt = svd(key, compat.whole(w), min(w.shape), 0)
        return MiCAAdapter(jnp.zeros((w.shape[0], self.rank)), vt[vt.shape[0] - self.rank:]), w

    def factors(self, adapter: MiCAAdapter, w: jax.Array) -> Factors:
        """a = A, b = B, and s."""
        return Factors(a=adapter.A, b=adapter.B, s=self.alpha / self.rank)
