"""IncreLoRA: an SVD-like update that starts with rank 1 and grows where it matters (arXiv 2308.12043)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.adalora import norm


class IncreLoRAAdapter(NamedTuple):
    """A: (in, rank). E: (rank,), the singular values. B: (rank, out). n: (), ranks added so far, a whole number."""

    A: jax.Array
    E: jax.Array
    B: jax.Array
    n: jax.Array


@dataclass(frozen=True)
class IncreLoRA(Variant):
    """``W' = W + s A diag(E) B`` with ``s = alpha / (r + 1e-5)``, r the rank so far (arXiv 2308.12043, section 3).

    The paper's P, Lambda, Q are A, E, B. Of the `rank` components the first ``r = initial + n`` are active, and the
    next `reserve` are trained in advance: their A and B learn, while their E is held at 1e-5 (the paper's advance
    learning). The others neither act nor learn. The work of growing, n, is done by `lorajax.control.increlora`; without
    it this is AdaLoRA's update at rank `initial`. A, B ~ N(0, 0.02^2), E = 0 where active: the start is the identity up
    to the reserve's 1e-5.

    rank: the largest that a matrix can reach; arrays have this size from the start. initial: r at the start (1).
    reserve: components by which a chosen matrix grows (released code: 1, 2, 3, 4 for a final average of 2, 4, 6, 8).
    alpha: numerator of s, which falls as r grows (released code; AdaLoRA's stays tied to its start).
    orth: weight of AdaLoRA's orthogonality term over active and reserved components. The released code sums the term
    over the pieces that have grown, one row each, so that it only fixes norms there: not offered.
    dropout: probability of dropping an input element on the branch through A, in training only.
    """

    rank: int = 16
    alpha: float | jax.Array = 16.0
    initial: int = 1
    reserve: int = 4
    orth: float | jax.Array = 0.1
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank")),
        "E": Leaf("e", ("rank",)),
        "B": Leaf("b", ("rank", "out")),
        "n": Leaf("count", ()),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[IncreLoRAAdapter, jax.Array]:
        """Returns (A, E, B, n) and `w` itself."""
        key_a, key_b = jax.random.split(key)
        a = 0.02 * jax.random.normal(key_a, (w.shape[0], self.rank))
        b = 0.02 * jax.random.normal(key_b, (self.rank, w.shape[1]))
        e = jnp.where(jnp.arange(self.rank) < self.initial, 0.0, 1e-5)
        return IncreLoRAAdapter(a, e, b, jnp.zeros(())), w

    def parts(self, adapter: IncreLoRAAdapter) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(r, which components are active, which are active or in reserve): (), (rank,) bool, (rank,) bool."""
        r = self.initial + jnp.round(jax.lax.stop_gradient(adapter.n))
        i = jnp.arange(self.rank, dtype=r.dtype)
        return r, i < r, i < r + self.reserve

    def factors(self, adapter: IncreLoRAAdapter, w: jax.Array) -> Factors:
        """a = A diag(e), b = B, and s; e is E where active, E without gradient in reserve, and 0 elsewhere."""
        r, active, live = self.parts(adapter)
        e = jnp.where(active, adapter.E, jax.lax.stop_gradient(adapter.E)) * live.astype(adapter.E.dtype)
        return Factors(a=adapter.A * e[None, :], b=adapter.B, s=self.alpha / (r + 1e-5))

    def penalty(self, adapter: IncreLoRAAdapter, share: float) -> jax.Array:
        """orth * the mean over every A and every B of the model of the UNSQUARED ||A^T A - I||_F or ||B B^T - I||_F."""
        live = self.parts(adapter)[2].astype(adapter.A.dtype)
        a, b = adapter.A * live[None, :], adapter.B * live[:, None]
        with jax.default_matmul_precision("highest"):
            far = [norm(a.T @ a - jnp.diag(live)), norm(b @ b.T - jnp.diag(live))]
        return self.orth * (0.5 * share) * (far[0] + far[1])

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError when the start and its reserve do not fit into `rank`."""
        super().check(n_in, n_out)
        if self.initial < 1 or self.reserve < 1 or self.initial + self.reserve > self.rank:
            raise ValueError(f"rank={self.rank} must hold initial={self.initial} and reserve={self.reserve}, both at "
                             f"least 1: raise rank, or lower these")
