"""LoRA: a trained low-rank update beside the frozen weight (Hu et al., arXiv 2106.09685, equation 3)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant


class LoRAAdapter(NamedTuple):
    """A: (in, rank). B: (rank, out)."""

    A: jax.Array
    B: jax.Array


@dataclass(frozen=True)
class LoRA(Variant):
    """``W' = W + s A B`` with ``s = alpha / rank`` (arXiv 2106.09685, equation 3 and section 4.1).

    rank: r. alpha: numerator of the scale; a float, or a traced scalar when one program runs several values.
    rslora: ``s = alpha / sqrt(rank)`` instead (arXiv 2312.03732, the rank-stabilised scale). At the same alpha this
    multiplies s by sqrt(rank): a fair comparison divides alpha by the square root of a reference rank.
    dropout: probability of dropping an input element on the branch through A, in training only.
    initializer: what the adapter starts from. All start as the identity, ``A B = 0``:
      - ``kaiming`` (loralib, PEFT): A uniform on +-1/sqrt(in), B = 0;
      - ``gaussian`` (PEFT): A normal with standard deviation 1/rank, B = 0 (the paper: Gaussian, of unstated width);
      - ``orthogonal`` (PEFT): A and B non-zero with A B = 0, so both get gradient at step 0; rank must be even;
      - ``embedding`` (loralib, PEFT): A = 0, B standard normal; what ``kaiming`` becomes on a lookup table.
    freeze_a: A gets no gradient (LoRA-FA, arXiv 2308.03303): the backward pass then keeps x A in place of x. Pair it
    with `lorajax.optim.lora_fa`, which gives A no optimizer state.
    """

    rank: int = 8
    alpha: float | jax.Array = 8.0
    rslora: bool = False
    dropout: float = 0.0
    initializer: str = "kaiming"
    freeze_a: bool = False

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank"), peft="lora_A.weight"),
        "B": Leaf("b", ("rank", "out"), peft="lora_B.weight"),
    }

    @property
    def scale(self) -> float | jax.Array:
        """s, the number in front of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[LoRAAdapter, jax.Array]:
        """Returns (A, B) by `initializer`, and `w` itself."""
        n_in, n_out = w.shape
        return INITIALIZERS[self.initializer](key, n_in, n_out, self.rank), w

    def factors(self, adapter: LoRAAdapter, w: jax.Array) -> Factors:
        """a = A, b = B, and s."""
        a = jax.lax.stop_gradient(adapter.A) if self.freeze_a else adapter.A
        return Factors(a=a, b=adapter.B, s=self.scale)

    def for_lookup(self) -> LoRA:
        """On an embedding table loralib and PEFT swap the roles: A = 0 and B random."""
        return replace(self, initializer="embedding") if self.initializer == "kaiming" else self

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown initializer, and for an odd rank with the orthogonal one."""
        super().check(n_in, n_out)
        if self.initializer not in INITIALIZERS:
            near = difflib.get_close_matches(str(self.initializer), INITIALIZERS, n=1)
            raise ValueError(f"initializer={self.initializer!r} is unknown; there are {', '.join(INITIALIZERS)}"
                             + (f"; did you mean {near[0]!r}?" if near else ""))
        if self.initializer == "orthogonal" and self.rank % 2:
            raise ValueError(f"rank={self.rank} is odd and initializer='orthogonal' splits the ranks into halves: "
                             f"use rank={self.rank + 1} or another initializer")


def kaiming(key: jax.Array, n_in: int, n_out: int, rank: int) -> LoRAAdapter:
    """A ~ U(+-1/sqrt(in)), which is torch's ``kaiming_uniform_(a=sqrt(5))``; B = 0."""
    bound = 1.0 / math.sqrt(n_in)
    return LoRAAdapter(jax.random.uniform(key, (n_in, rank), minval=-bound, maxval=bound), jnp.zeros((rank, n_out)))


def gaussian(key: jax.Array, n_in: int, n_out: int, rank: int) -> LoRAAdapter:
    """A ~ N(0, 1/rank^2); B = 0."""
    return LoRAAdapter(jax.random.normal(key, (n_in, rank)) / rank, jnp.zeros((rank, n_out)))


def orthogonal(key: jax.Array, n_in: int, n_out: int, rank: int) -> LoRAAdapter:
    """A = N1 Q1 / 10 and B = Q2^T N2 / 10, where Q1 and Q2 are the even and odd rows of one orthogonal (rank, rank)."""
    key_q, key_a, key_b = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank)))
    n1 = jax.random.normal(key_a, (n_in, rank // 2))
    n2 = jax.random.normal(key_b, (rank // 2, n_out))
    with jax.default_matmul_precision("highest"):
        return LoRAAdapter(n1 @ q[0::2] / 10.0, q[1::2].T @ n2 / 10.0)


def embedding(key: jax.Array, n_in: int, n_out: int, rank: int) -> LoRAAdapter:
    """A = 0 of (vocabulary, rank); B ~ N(0, 1)."""
    return LoRAAdapter(jnp.zeros((n_in, rank)), jax.random.normal(key, (rank, n_out)))


INITIALIZERS: Mapping[str, Callable[[jax.Array, int, int, int], LoRAAdapter]] = {
    "kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal, "embedding": embedding,
}
