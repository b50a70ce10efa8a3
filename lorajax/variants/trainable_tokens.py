"""Trainable tokens: chosen rows of an embedding table trained, the others frozen (PEFT's method of that name)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant


class TrainableTokensAdapter(NamedTuple):
    """rows: (tokens, width), what stands in the table in place of the base's rows."""

    rows: jax.Array


@dataclass(frozen=True)
class TrainableTokens(Variant):
    """``W' = W + S (rows - S^T W)``, S the columns of the identity that `tokens` names: rows of W replaced.

    For new or re-used tokens, without a trained or stored copy of the table; PEFT's method, which no paper describes.
    It is near to prompt tuning (arXiv 2104.08691), but for tokens that stand in the text. Starts as the base's rows. A
    head that is tied to the table follows, since it is the same weight.

    tokens: their ids, each once. side: ``out`` where tokens are the outputs of the weight (a head of its own), ``in``
    on a lookup table, which `for_lookup` chooses. Weight decay draws the rows to 0, not to the base's: set it to 0.
    """

    tokens: tuple[int, ...] = (0,)
    side: str = "out"

    reads_weight: ClassVar[bool] = True
    leaves: ClassVar[Mapping[str, Leaf]] = {
        "rows": Leaf("token", ("token", "width"), peft="trainable_tokens_delta"),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[TrainableTokensAdapter, jax.Array]:
        """The base's rows, and `w` itself."""
        return TrainableTokensAdapter(self._rows(w)), w

    def factors(self, adapter: TrainableTokensAdapter, w: jax.Array) -> Factors:
        """a = S and b = rows - S^T W; on side ``out`` their transposes, swapped."""
        table = w if self.side == "in" else w.T
        chosen = (jnp.arange(table.shape[0])[:, None] == jnp.asarray(self.tokens)[None, :]).astype(jnp.float32)
        change = adapter.rows - self._rows(w)
        return Factors(a=chosen, b=change) if self.side == "in" else Factors(a=change.T, b=chosen.T)

    def _rows(self, w: jax.Array) -> jax.Array:
        return jnp.take(w if self.side == "in" else w.T, jnp.asarray(self.tokens), axis=0)

    def for_lookup(self) -> TrainableTokens:
        """On a table the tokens are its inputs."""
        return replace(self, side="in")

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown side, and for tokens that are none, twice, or outside the table."""
        super().check(n_in, n_out)
        if self.side not in ("out", "in"):
            raise ValueError(f"side={self.side!r} is unknown; there are out (a head) and in (a table)")
        size = n_in if self.side == "in" else n_out
        wrong = [t for t in self.tokens if not 0 <= t < size]
        if wrong or not self.tokens or len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"tokens={self.tokens} of a table of {size}: give some, each once, in 0..{size - 1}")
