"""OFT: the inputs of a weight rotated in blocks (Qiu et al., arXiv 2306.07280; the series: OFTv2, arXiv 2506.19847)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Leaf, Variant


class OFTAdapter(NamedTuple):
    """Q: (blocks, b (b - 1) / 2), the parts above the diagonals of skew-symmetric (b, b) matrices, row by row."""

    Q: jax.Array


@dataclass(frozen=True)
class OFT(Variant):
    """``W' = R W``, R block-diagonal with orthogonal (b, b) blocks of the inputs (arXiv 2306.07280, equation 3).

    Angles between neurons stay as they were pretrained. A block is the Cayley transform of a skew Q, by default as the
    first terms of a series (arXiv 2506.19847, equation 5): ``I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4``, nearly orthogonal while Q
    is small. Starts as the identity. There are no factors of low rank: R W is formed once per step for every weight.

    block_size: b (PEFT: 32). blocks: their number, where that is what is given; block_size then follows. Both have to
    divide the inputs.
    share: one block for all (PEFT's block_share). terms: of the series (PEFT: 5; 3 and 4 are the same there and here),
    0 for the exact transform ``(I - Q) (I + Q)^-1``, which turns the other way round, as in PEFT.
    eps: bound of ||Q|| per block times the root of the number of blocks (COFT, section 3.4, PEFT's form; its value is
    6e-5), 0 for none: Q outside is taken at the bound, with the gradient of there.
    """

    block_size: int = 32
    blocks: int = 0
    share: bool = False
    terms: int = 5
    eps: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {"Q": Leaf("rotation", ("block", "element"), peft="oft_R.weight")}

    def size(self, n_in: int) -> int:
        """b for a weight of n_in inputs."""
        return n_in // self.blocks if self.blocks else self.block_size

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[OFTAdapter, jax.Array]:
        """Q = 0, and `w` itself."""
        b = self.size(w.shape[0])
        return OFTAdapter(jnp.zeros((1 if self.share else w.shape[0] // b, b * (b - 1) // 2))), w

    def delta(self, adapter: OFTAdapter, w: jax.Array) -> jax.Array:
        """(R - I) W, block by block."""
        b = self.size(w.shape[0])
        parts = w.reshape(-1, b, w.shape[1])
        with jax.default_matmul_precision("highest"):
            turned = jnp.matmul(jnp.broadcast_to(self.turn(adapter.Q, b), (parts.shape[0], b, b)), parts)
        return turned.reshape(w.shape)

    def turn(self, q: jax.Array, b: int) -> jax.Array:
        """R - I of every block, (blocks, b, b)."""
        upper = jnp.triu_indices(b, 1)
        skew = jnp.zeros((q.shape[0], b, b), q.dtype).at[:, upper[0], upper[1]].set(q)
        skew = skew - skew.mT
        if self.eps:
            bound = self.eps / math.sqrt(q.shape[0])
            length = jnp.sqrt(jnp.sum(jnp.square(skew), (1, 2), keepdims=True))
            at_bound = jnp.where(length > bound, skew * (bound / jnp.maximum(length, bound)), skew)
            skew = skew + jax.lax.stop_gradient(at_bound - skew)
        if not self.terms:
            one = jnp.eye(b, dtype=q.dtype)[None]
            return jnp.linalg.solve((one + skew).mT, (one - skew).mT).mT - one
        power = change = 2 * skew
        if self.terms == 2:
            return change
        for _ in range(2, max(self.terms - 1, 3)):
            power = power @ skew
            change = change + power
        return change + 0.5 * power @ skew

    def for_conv(self, window: int) -> OFT:
        """Raises ValueError: what a block of a window's inputs is differs between the paper and PEFT."""
        raise ValueError("OFT rotates the inputs of matmuls, and this is a convolution: leave it out of the rule")

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError where the blocks do not divide the inputs."""
        super().check(n_in, n_out)
        b = self.size(n_in)
        if b < 1 or n_in % b or (self.blocks and b * self.blocks != n_in):
            what = f"blocks={self.blocks}" if self.blocks else f"block_size={self.block_size}"
            near = [d for d in range(1, n_in + 1) if n_in % d == 0]
            near.sort(key=lambda d: abs(d - (self.blocks or self.block_size)))
            raise ValueError(f"{what} does not divide the {n_in} inputs of a ({n_in}, {n_out}) weight; the nearest "
                             f"that does is {near[0]}")
        if self.terms < 0 or self.terms == 1:
            raise ValueError(f"terms={self.terms} turns nothing: 2 or more, or 0 for the exact transform")
