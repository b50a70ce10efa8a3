"""GraLoRA: a grid of k x k blocks, each with a low-rank update of its own (arXiv 2505.20355)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.kaiming import kaiming


class GraLoRAAdapter(NamedTuple):
    """A: (in, rank), its rows in k chunks. B: (rank, out), its columns in k chunks. A0: (in, hybrid_rank) and
    B0: (hybrid_rank, out), the plain LoRA beside the grid, None without one."""

    A: jax.Array
    B: jax.Array
    A0: Any
    B0: Any


@dataclass(frozen=True)
class GraLoRA(Variant):
    """``W' = W + s (grid + A0 B0)`` with ``s = alpha / (rank + hybrid_rank)``; grid block (n, j) is A_nj B_nj.

    Paper: arXiv 2505.20355. Input chunk n (in / k rows of A) has rank / k columns for every output chunk j, and output
    chunk j (out / k columns of B) has rank / k rows for every n: as many parameters as LoRA, rank up to k rank.
    Lifted, the grid is one pair of factors of rank k r with zeros outside the blocks: k times the paper's products, on
    matrices that are r wide, and no (in, out) array.

    rank: r, over all blocks of a row of the grid. alpha: numerator of s (64, twice the rank; PEFT).
    k: chunks on either side (the paper: 2 for r <= 64 or so). hybrid_rank: rank of the plain LoRA beside the grid,
    besides `rank` (PEFT's hybrid_r). dropout: of the branch's input.
    """

    rank: int = 32
    alpha: float | jax.Array = 64.0
    k: int = 2
    hybrid_rank: int = 0
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {  # "blocks": column i of A and row i of B belong to different blocks
        "A": Leaf("a", ("in", "blocks"), peft="gralora_A"),
        "B": Leaf("b", ("blocks", "out"), peft="gralora_B"),
        "A0": Leaf("a", ("in", "hybrid"), peft="gralora_A_general.weight"),
        "B0": Leaf("b", ("hybrid", "out"), peft="gralora_B_general.weight"),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[GraLoRAAdapter, jax.Array]:
        """Returns (A, B = 0, A0, B0 = 0), and `w` itself. A's fan in is a chunk's."""
        n_in, n_out = w.shape
        key_a, key_0 = jax.random.split(key)
        a, b = kaiming(key_a, (n_in, self.rank), n_in // self.k), jnp.zeros((self.rank, n_out))
        if not self.hybrid_rank:
            return GraLoRAAdapter(a, b, None, None), w
        a0, b0 = kaiming(key_0, (n_in, self.hybrid_rank), n_in), jnp.zeros((self.hybrid_rank, n_out))
        return GraLoRAAdapter(a, b, a0, b0), w

    def factors(self, adapter: GraLoRAAdapter, w: jax.Array) -> Factors:
        """a: (in, k rank + hybrid_rank), zero but for its row chunk's columns; b: (k rank + hybrid_rank, out)."""
        k, part = self.k, self.rank // self.k
        eye = jnp.eye(k, dtype=adapter.A.dtype)
        a = adapter.A.reshape(k, -1, 1, self.rank) * eye[:, None, :, None]  # (n, in / k, n', (j, i))
        b = adapter.B.reshape(k, 1, part, k, -1) * eye[None, :, None, :, None]  # (n, j, i, j', out / k)
        a, b = a.reshape(-1, k * self.rank), b.reshape(k * self.rank, -1)
        if adapter.A0 is not None:
            a, b = jnp.concatenate([a, adapter.A0], 1), jnp.concatenate([b, adapter.B0], 0)
        return Factors(a=a, b=b, s=self.alpha / (self.rank + self.hybrid_rank))

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError where k does not divide the rank or a side, or hybrid_rank is negative."""
        super().check(n_in, n_out)
        for name, n in (("inputs", n_in), ("outputs", n_out), ("ranks", self.rank)):
            if self.k < 1 or n % self.k:
                raise ValueError(f"k={self.k} does not divide the {n} {name}: choose k among the common divisors of "
                                 f"{n_in}, {n_out} and rank={self.rank}, or leave this path out by a rule")
        if not 0 <= self.hybrid_rank <= min(n_in, n_out):
            raise ValueError(f"hybrid_rank={self.hybrid_rank} is outside 0..{min(n_in, n_out)}: lower it")
