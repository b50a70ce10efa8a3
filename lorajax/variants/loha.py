"""LoHa: a Hadamard product of two low-rank products, of rank up to r^2 (FedPara, arXiv 2108.06098)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Leaf, Variant
from lorajax.variants.kaiming import kaiming


class LoHaAdapter(NamedTuple):
    """A1, A2: (in, rank). B1, B2: (rank, out)."""

    A1: jax.Array
    B1: jax.Array
    A2: jax.Array
    B2: jax.Array


@dataclass(frozen=True)
class LoHa(Variant):
    """``W' = W + s (A1 B1) * (A2 B2)``, an elementwise product, with ``s = alpha / rank``.

    Paper: FedPara, arXiv 2108.06098, Proposition 1, there for whole weights; an adapter in LyCORIS, arXiv 2309.14859.
    The paper's X1, Y1^T are A1, B1 here. Its update has no low-rank factors worth using (rank up to r^2), so the dense
    update is formed once per step; its two products are computed again in the backward pass instead of kept.

    rank: r of each product. alpha: numerator of s (PEFT: 8; LyCORIS, given none: rank).
    initializer: what it starts from, with W' = W:
      - ``kaiming`` (PEFT, after the paper's He initialisation): A2 = 0; B1, A1, B2 uniform on +-1/sqrt(fan in);
      - ``normal`` (LyCORIS): B2 = 0; A1 ~ N(0, 1), B1 ~ N(0, 0.1^2), A2 ~ N(0, 1).
    """

    rank: int = 8
    alpha: float | jax.Array = 8.0
    initializer: str = "kaiming"

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A1": Leaf("a", ("in", "rank"), peft="hada_w1_b"),
        "B1": Leaf("b", ("rank", "out"), peft="hada_w1_a"),
        "A2": Leaf("a", ("in", "rank"), peft="hada_w2_b"),
        "B2": Leaf("b", ("rank", "out"), peft="hada_w2_a"),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[LoHaAdapter, jax.Array]:
        """Returns (A1, B1, A2, B2), of which A2 or B2 is 0, and `w` itself."""
        (n_in, n_out), r = w.shape, self.rank
        a1, b1, second = jax.random.split(key, 3)
        if self.initializer == "normal":
            return LoHaAdapter(jax.random.normal(a1, (n_in, r)), 0.1 * jax.random.normal(b1, (r, n_out)),
                               jax.random.normal(second, (n_in, r)), jnp.zeros((r, n_out))), w
        # torch's fan in of a (out, r) array is r
        return LoHaAdapter(kaiming(a1, (n_in, r), n_in), kaiming(b1, (r, n_out), r),
                           jnp.zeros((n_in, r)), kaiming(second, (r, n_out), r)), w

    def delta(self, adapter: LoHaAdapter, w: jax.Array) -> jax.Array:
        """s (A1 B1) * (A2 B2)."""
        return self.alpha / self.rank * _hadamard(*adapter)

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown initializer."""
        super().check(n_in, n_out)
        if self.initializer not in ("kaiming", "normal"):
            raise ValueError(f"initializer={self.initializer!r} is unknown; there are kaiming and normal")


@jax.checkpoint
def _hadamard(a1: jax.Array, b1: jax.Array, a2: jax.Array, b2: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return (a1 @ b1) * (a2 @ b2)
