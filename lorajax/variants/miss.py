"""MiSS (Bone): one trained shard that every shard of the weight's rows shares (arXiv 2409.15371)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant


class MiSSAdapter(NamedTuple):
    """D: (rank, out); in mode `bat` (out / rank, rank, rank); in mode `mini` (rank, mini_rank)."""

    D: jax.Array


@dataclass(frozen=True)
class MiSS(Variant):
    """``W' = W + E D``, where E (in, rank) stacks identity matrices: row i of W gets row i mod rank of D.

    Paper: arXiv 2409.15371 (v1 to v4 under the name Bone). There is no A and no scale. Lifted, x E is a product with a
    0/1 matrix (the paper's sum over shards of x), in rank * in multiplications per token, as in LoRA.

    rank: r, rows of a shard (64). in need not be a multiple of it: the last shard is cut.
    mode:
      - ``standard``;
      - ``bat``: block (q, p) gets ``W_qp D_p + D_p`` in the released code's (out, in) layout, p counting blocks of
        outputs; r must divide both sides, and the dense update is formed;
      - ``mini``: D is shared along the outputs too, column o of W getting column o mod mini_rank.
    mini_rank: columns of D in mode ``mini``; must divide out. dropout: of the branch's input, not in mode ``bat``.
    """

    rank: int = 64
    mode: str = "standard"
    mini_rank: int = 1
    dropout: float = 0.0

    reads_weight = True  # for its shape alone

    @property
    def leaves(self) -> Mapping[str, Leaf]:  # type: ignore[override]
        """The one row; its axes depend on `mode`."""
        axes = {"standard": ("rank", "out"), "bat": ("shard", "block", "block"), "mini": ("rank", "mini")}
        return {"D": Leaf("b", axes.get(self.mode, ("rank", "out")), peft="miss_block")}

    @property
    def factored(self) -> bool:
        """`bat` reads the weight's values and has no low-rank factors."""
        return self.mode != "bat"

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[MiSSAdapter, jax.Array]:
        """Returns D = 0, and `w` itself."""
        r, n_out = self.rank, w.shape[1]
        shapes = {"standard": (r, n_out), "bat": (n_out // r, r, r), "mini": (r, self.mini_rank)}
        return MiSSAdapter(jnp.zeros(shapes[self.mode])), w

    def factors(self, adapter: MiSSAdapter, w: jax.Array) -> Factors:
        """a = E, b = D (in mode ``mini`` repeated along the outputs)."""
        (n_in, n_out), d = w.shape, adapter.D
        shards = jnp.arange(n_in)[:, None] % self.rank == jnp.arange(self.rank)[None, :]
        b = jnp.tile(d, (1, n_out // self.mini_rank)) if self.mode == "mini" else d
        return Factors(a=shards.astype(d.dtype), b=b)

    def delta(self, adapter: MiSSAdapter, w: jax.Array) -> jax.Array:
        """E D, or in mode ``bat`` the transpose of W_qp D_p + D_p for each block."""
        if self.mode != "bat":
            return super().delta(adapter, w)
        (n_in, n_out), r = w.shape, self.rank
        blocks = w.reshape(n_in // r, r, n_out // r, r)
        with jax.default_matmul_precision("highest"):
            mixed = jnp.einsum("qbpa,pbc->qcpa", blocks, adapter.D)
        # the released code adds D_p itself to each (out, in) block: transposed in ours
        return (mixed + adapter.D.transpose(2, 0, 1)[None]).reshape(n_in, n_out)

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown mode, or a rank or mini_rank that does not divide what it must."""
        super().check(n_in, n_out)
        if self.mode not in ("standard", "bat", "mini"):
            raise ValueError(f"mode={self.mode!r} is unknown; there are standard, bat and mini")
        if self.mode == "bat" and (n_in % self.rank or n_out % self.rank):
            raise ValueError(f"rank={self.rank} does not divide both {n_in} and {n_out}, so mode='bat' cannot cut the "
                             f"weight into square blocks: choose a common divisor, or mode='standard'")
        if self.mode == "mini" and (self.mini_rank < 1 or n_out % self.mini_rank):
            raise ValueError(f"mini_rank={self.mini_rank} does not divide the {n_out} outputs: choose a divisor")
