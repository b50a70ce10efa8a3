"""VB-LoRA: factors put together from a bank of vectors that all layers share (Li et al., arXiv 2405.15179)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lorajax.core.variant import Factors, Leaf, Variant


class VBLoRAAdapter(NamedTuple):
    """bank: (num_vectors, vector_length), shared by all sites. logits_A: (rank, in / vector_length, num_vectors),
    logits_B: (out / vector_length, rank, num_vectors)."""

    bank: jax.Array | None
    logits_A: jax.Array
    logits_B: jax.Array


@dataclass(frozen=True)
class VBLoRA(Variant):
    """``W' = W + A B`` (arXiv 2405.15179): each column of A and each row of B is a sequence of
    sub-vectors, and each of these a mixture of `topk` vectors of the bank, weighed by a softmax of its `topk` largest
    logits. There is no alpha. Bank and logits are trained; the update does not start at zero.

    rank: r (4). num_vectors: h, size of the bank (256).
    vector_length: b, which must divide both sides of every weight (256). topk: k (2).
    bank_bound: the bank starts uniform on +-0.02. logits_std: the logits start normal with this deviation (0.1).
    dropout: probability of dropping an input element on the branch through A, in training only.

    The labels `bank` and `logits` are for learning rates of their own (PEFT's GLUE example: 1e-3 and 1e-2, the head
    4e-3). PEFT can save the top k logits alone; such a file cannot be trained further: here the logits are kept whole.
    """

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    bank_bound: float = 0.02
    logits_std: float = 0.1
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "bank": Leaf("bank", ("vectors", "length"), peft="vblora_vector_bank", shared=True),
        "logits_A": Leaf("logits", ("rank", "tiles", "vectors"), peft="vblora_logits_A"),
        "logits_B": Leaf("logits", ("tiles", "rank", "vectors"), peft="vblora_logits_B"),
    }

    @property
    def slot(self) -> str:
        """Of all sites with a bank of this size, whatever their rank."""
        return f"vblora-{self.num_vectors}-{self.vector_length}"

    def init_shared(self, key: jax.Array, n_in: int, n_out: int) -> dict[str, jax.Array]:
        """The bank."""
        shape = self.num_vectors, self.vector_length
        return {"bank": jax.random.uniform(key, shape, minval=-self.bank_bound, maxval=self.bank_bound)}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[VBLoRAAdapter, jax.Array]:
        """The logits, and `w` itself."""
        key_a, key_b = jax.random.split(key)
        tiles_in, tiles_out = (n // self.vector_length for n in w.shape)
        a = jax.random.normal(key_a, (self.rank, tiles_in, self.num_vectors))
        b = jax.random.normal(key_b, (tiles_out, self.rank, self.num_vectors))
        return VBLoRAAdapter(None, self.logits_std * a, self.logits_std * b), w

    def factors(self, adapter: VBLoRAAdapter, w: Any) -> Factors:
        """a = A^T of (rank, in), b = B."""
        if adapter.bank is None:
            raise ValueError("VBLoRA does not start at zero, and its start needs the shared bank: it cannot be wrapped "
                             "by a variant that reads the update when it starts, such as DoRA")
        a = mixed(adapter.logits_A, adapter.bank, self.topk)  # (rank, tiles, length)
        b = mixed(adapter.logits_B, adapter.bank, self.topk)  # (tiles, rank, length)
        return Factors(a=a.reshape(self.rank, -1).T, b=b.swapaxes(0, 1).reshape(self.rank, -1))

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for a weight that vector_length does not divide, and a topk outside the bank."""
        super().check(n_in, n_out)
        if n_in % self.vector_length or n_out % self.vector_length:
            raise ValueError(f"vector_length={self.vector_length} does not divide both sides of a ({n_in}, {n_out}) "
                             f"weight: take a common divisor of all sides, or leave this weight out")
        if not 1 <= self.topk <= self.num_vectors:
            raise ValueError(f"topk={self.topk} is outside 1..{self.num_vectors}, the num_vectors of the bank")


def mixed(logits: jax.Array, bank: jax.Array, topk: int) -> jax.Array:
    """(..., length): the `topk` vectors with the largest logits, averaged with the softmax of these."""
    largest, index = lax.top_k(logits, topk)
    return jnp.einsum("...k,...kl->...l", jax.nn.softmax(largest, axis=-1), bank[index], precision="highest")
