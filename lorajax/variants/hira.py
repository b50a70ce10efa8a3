"""HiRA: the weight times a low-rank product, element by element (Huang et al., ICLR 2025, OpenReview TwJrTz9cRS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Leaf, Variant
from lorajax.variants.kaiming import kaiming


class HiRAAdapter(NamedTuple):
    """A: (in, rank). B: (rank, out)."""

    A: jax.Array
    B: jax.Array


@dataclass(frozen=True)
class HiRA(Variant):
    """``W' = W + W * (s A B)``, elementwise: an update of full rank with LoRA's parameters.

    Paper: "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", OpenReview TwJrTz9cRS.
    Merging needs the weight itself, and so does every step: the update is formed dense, in float32. It is relative to
    the weight, whose entries are small, so learning rates are larger than LoRA's (PEFT's run: 4.5e-3, no decay).

    rank: r. s: number in front of A B; 1 in PEFT, which has no alpha.
    initializer: ``kaiming`` (A uniform on +-1/sqrt(in), B = 0) or ``gaussian`` (PEFT's option: A ~ N(0, 1/rank^2));
    on a lookup table PEFT starts with A = 0 and B ~ N(0, 1), which is ``embedding``.
    """

    rank: int = 32
    s: float | jax.Array = 1.0
    initializer: str = "kaiming"

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank"), peft="hira_A"),
        "B": Leaf("b", ("rank", "out"), peft="hira_B"),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[HiRAAdapter, jax.Array]:
        """Returns (A, B) with A B = 0, and `w` itself."""
        (n_in, n_out), r = w.shape, self.rank
        if self.initializer == "embedding":
            return HiRAAdapter(jnp.zeros((n_in, r)), jax.random.normal(key, (r, n_out))), w
        a = kaiming(key, (n_in, r), n_in) if self.initializer == "kaiming" else jax.random.normal(key, (n_in, r)) / r
        return HiRAAdapter(a, jnp.zeros((r, n_out))), w

    def delta(self, adapter: HiRAAdapter, w: jax.Array) -> jax.Array:
        """W * (s A B)."""
        with jax.default_matmul_precision("highest"):
            return self.s * w * (adapter.A @ adapter.B)

    def for_lookup(self) -> HiRA:
        """On an embedding table the roles are swapped: A = 0 and B random."""
        return replace(self, initializer="embedding") if self.initializer == "kaiming" else self

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown initializer."""
        super().check(n_in, n_out)
        if self.initializer not in ("kaiming", "gaussian", "embedding"):
            raise ValueError(f"initializer={self.initializer!r} is unknown; there are kaiming, gaussian, embedding")
