"""AdaLoRA's triplet: an SVD-like update whose singular values a controller prunes (arXiv 2303.10512, equation 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core import compat
from lorajax.core.variant import Factors, Leaf, Variant


class AdaLoRAAdapter(NamedTuple):
    """A: (in, rank). E: (rank,), the singular values. B: (rank, out)."""

    A: jax.Array
    E: jax.Array
    B: jax.Array


@dataclass(frozen=True)
class AdaLoRA(Variant):
    """``W' = W + s A diag(E) B`` with ``s = alpha / (init_rank + 1e-5)`` (arXiv 2303.10512, equation 3).

    The paper's P, Lambda, Q are A, E, B here. A, B ~ N(0, 0.02^2) and E = 0, so it starts as the identity and only E
    gets gradient at step 0. `lorajax.control.adalora` prunes; without it this is a LoRA with trained singular values.

    rank: r before pruning (the paper takes 1.5 times the final average; PEFT 12 for 8).
    init_rank: the rank that s is tied to, None for `rank`. Pruning does not change s; `compact` sets this field.
    alpha: numerator of s (the paper's scripts: 16 for MNLI, QQP and SST-2, 32 otherwise; PEFT: 8).
    orth: weight of the orthogonality term (the paper's gamma, Table 8: 0.1 for six of eight GLUE tasks; PEFT: 0.5).
    dropout: probability of dropping an input element on the branch through A, in training only.
    """

    rank: int = 12
    alpha: float | jax.Array = 16.0
    init_rank: int | None = None
    orth: float | jax.Array = 0.1
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank"), peft="lora_A"),
        "E": Leaf("e", ("rank",), peft="lora_E"),
        "B": Leaf("b", ("rank", "out"), peft="lora_B"),
    }

    @property
    def scale(self) -> float | jax.Array:
        """s, the number in front of A diag(E) B, tied to the initial rank."""
        return self.alpha / ((self.rank if self.init_rank is None else self.init_rank) + 1e-5)

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[AdaLoRAAdapter, jax.Array]:
        """Returns (A, E, B) with E = 0, and `w` itself."""
        key_a, key_b = jax.random.split(key)
        a = 0.02 * jax.random.normal(key_a, (w.shape[0], self.rank))
        b = 0.02 * jax.random.normal(key_b, (self.rank, w.shape[1]))
        return AdaLoRAAdapter(a, jnp.zeros(self.rank), b), w

    def factors(self, adapter: AdaLoRAAdapter, w: jax.Array) -> Factors:
        """a = A diag(E), b = B, and s."""
        return Factors(a=adapter.A * adapter.E[None, :], b=adapter.B, s=self.scale)

    def penalty(self, adapter: AdaLoRAAdapter, share: float) -> jax.Array:
        """orth * the mean over every A and every B of the model of the UNSQUARED ||A^T A - I||_F or ||B B^T - I||_F.

        This is the released code's term; the paper prints the sum of squares, with which its gamma does not work.
        share: 1 / number of matrices; each brings two of the norms to the mean.
        """
        a, b = compat.einsum("ir,is->rs", adapter.A, adapter.A), compat.einsum("ro,so->rs", adapter.B, adapter.B)
        return self.orth * (0.5 * share) * (distance_to_identity(a) + distance_to_identity(b))

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError when `init_rank` is below `rank`: pruning only lowers ranks."""
        super().check(n_in, n_out)
        if self.init_rank is not None and self.init_rank < self.rank:
            raise ValueError(f"init_rank={self.init_rank} is below rank={self.rank}, but it is the rank before "
                             f"pruning: leave it None, or set it to at least {self.rank}")


def distance_to_identity(gram: jax.Array) -> jax.Array:
    """Frobenius norm of gram - I, with gradient 0 (not NaN) where it is 0."""
    return norm(gram - jnp.eye(gram.shape[0], dtype=gram.dtype))


def norm(x: jax.Array) -> jax.Array:
    """Frobenius norm of x, with gradient 0 (not NaN) where it is 0."""
    squared = jnp.sum(jnp.square(x))
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
