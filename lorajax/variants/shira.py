"""SHiRA: trains scattered entries of the weight itself (arXiv 2406.13175)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Leaf, Variant


class SHiRAAdapter(NamedTuple):
    """values: (n,). indices: (2, n) int32, each entry's input and output; fixed."""

    values: jax.Array
    indices: jax.Array


@dataclass(frozen=True)
class SHiRA(Variant):
    """``W' = W + sparse``: n = rank (in + out) entries of W, drawn at random once, get a trained addend.

    Paper: arXiv 2406.13175, the SHiRA-Rand mask; PEFT's layout, with as many parameters as LoRA of this rank. The
    update is full rank and has no factors: it is scattered into the dense weight once per step. The positions are kept
    with the adapter (PEFT redraws them from a seed), integers whatever the dtype of the rest.

    rank: sets the number of entries. Values start at 0, so W' = W.
    """

    rank: int = 32

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "values": Leaf("entries", ("entry",), peft="shira_weight"),
        "indices": Leaf("indices", ("side", "entry"), trainable=False),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[SHiRAAdapter, jax.Array]:
        """Returns values = 0 at distinct positions drawn from `key`, in ascending order; and `w` itself."""
        n_in, n_out = w.shape
        n = self.rank * (n_in + n_out)
        flat = jnp.sort(jax.random.permutation(key, n_in * n_out)[:n]).astype(jnp.int32)
        return SHiRAAdapter(jnp.zeros(n), jnp.stack([flat // n_out, flat % n_out])), w

    def delta(self, adapter: SHiRAAdapter, w: jax.Array) -> jax.Array:
        """The values at their positions, 0 elsewhere."""
        rows, columns = adapter.indices
        return jnp.zeros_like(w).at[rows, columns].add(adapter.values)

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError when there are fewer entries than rank (in + out)."""
        limit = n_in * n_out // (n_in + n_out)
        if not 1 <= self.rank <= limit:
            raise ValueError(f"rank={self.rank} is outside 1..{limit}: rank * (in + out) entries of a weight with "
                             f"{n_in * n_out}, ({n_in}, {n_out}), are trained: lower the rank by a rule for this path")
        super().check(n_in, n_out)
