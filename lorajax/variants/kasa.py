"""KaSA: LoRA with trained singular values on a weight that has lost its least ones (arXiv 2412.06071)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core import compat
from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.adalora import distance_to_identity
from lorajax.variants.kaiming import kaiming


class KaSAAdapter(NamedTuple):
    """A: (in, rank). d: (rank,). B: (rank, out). A0: (in, rank), B0: (rank, out), what the weight has lost; fixed."""

    A: jax.Array
    d: jax.Array
    B: jax.Array
    A0: jax.Array
    B0: jax.Array


@dataclass(frozen=True)
class KaSA(Variant):
    """``W' = W - A0 B0 + s A diag(d) B`` with ``s = alpha / rank``; A0 B0 holds the `rank` least singular values of W.

    Paper: arXiv 2412.06071, equations 9 to 12 for the loss. The codes overwrite the weight with W - A0 B0; here the
    base stays as it is and A0, B0 are part of the adapter, so that other adapters find the base that they know. The
    model is changed at the start (by what the paper takes for noise); d ~ N(0, 1), A as in LoRA, B = 0.

    rank: r, also the number of components lost. alpha: numerator of s (released GLUE script: 16 for rank 8).
    beta, gamma: weights of the loss ``beta sum d^2 + gamma (|A^T A - I|_F + |B B^T - I|_F)``, averaged over matrices
    as in the released code (1e-4, 1e-3; PEFT, which hands the term out instead of adding it, sums). The Gram matrices
    are (rank, rank) as in the paper and PEFT; the released code takes the large side's, which have the same minima.
    """

    rank: int = 8
    alpha: float | jax.Array = 16.0
    beta: float | jax.Array = 1e-4
    gamma: float | jax.Array = 1e-3

    behind: ClassVar[str] = "fixed"
    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank"), peft="lora_A.weight"),
        "d": Leaf("e", ("rank",), peft="lora_diag"),
        "B": Leaf("b", ("rank", "out"), peft="lora_B.weight"),
        "A0": Leaf("a", ("in", "lost"), trainable=False),
        "B0": Leaf("b", ("lost", "out"), trainable=False),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[KaSAAdapter, jax.Array]:
        """Returns (A, d, B = 0, A0, B0), and `w` itself."""
        r, key_a, key_d = self.rank, *jax.random.split(key)
        u, singular, v = jnp.linalg.svd(compat.whole(w), full_matrices=False)
        a, b = kaiming(key_a, (w.shape[0], r), w.shape[0]), jnp.zeros((r, w.shape[1]))
        return KaSAAdapter(a, jax.random.normal(key_d, (r,)), b, u[:, -r:] * singular[None, -r:], v[-r:]), w

    def factors(self, adapter: KaSAAdapter, w: jax.Array) -> Factors:
        """a = [A | A0], b = [s diag(d) B; -B0]."""
        scaled = adapter.B * (self.alpha / self.rank * adapter.d)[:, None]
        return Factors(jnp.concatenate([adapter.A, adapter.A0], 1), jnp.concatenate([scaled, -adapter.B0], 0))

    def penalty(self, adapter: KaSAAdapter, share: float) -> jax.Array:
        """share * (beta sum d^2 + gamma (|A^T A - I|_F + |B B^T - I|_F))."""
        with jax.default_matmul_precision("highest"):
            grams = distance_to_identity(adapter.A.T @ adapter.A) + distance_to_identity(adapter.B @ adapter.B.T)
        return share * (self.beta * jnp.sum(jnp.square(adapter.d)) + self.gamma * grams)

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for a rank that leaves nothing of the weight."""
        super().check(n_in, n_out)
        if self.rank == min(n_in, n_out):
            raise ValueError(f"rank={self.rank} is all that a ({n_in}, {n_out}) weight has, and KaSA takes that many "
                             f"singular components away: lower the rank by a rule for this path")
