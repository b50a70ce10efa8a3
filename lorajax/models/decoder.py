"""What all decoders with a language head share: logits, hidden states, and decoding with a key-value cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.cache import Cache, extend, next_positions
from lorajax.models.layers import Context, run_layers


class CausalLM(nn.Module):
    """A decoder with its head. Abstract: `setup` makes `embed`, layers (`add_layers`), `norm` and, unless the config
    says `tie_embeddings`, `head`.

    Every method takes `input_ids` int (B, T), `attention_mask` (B, T) with nonzero = real token (None: all real),
    `positions` int (B, T) (None: 0..T-1) and `segments` int (B, T): tokens attend within their segment only, for
    several texts packed in a row, each with its own positions. Masked positions do not influence the others.
    `deterministic=False` is training with dropout, where the family has one: it needs `rngs={'dropout': key}`.
    """

    config: Any
    deterministic: bool = True

    def embedded(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """What enters the first layer, (B, T, D)."""
        raise NotImplementedError

    def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Tables of rotary positions, where the family has them."""
        return None

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of at most `length` tokens; needs no parameters."""
        raise NotImplementedError

    def hidden(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Last hidden states after the final norm, (B, T, D) in `config.dtype`: what the head multiplies."""
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        if segments is not None:
            same = (segments[:, :, None] == segments[:, None, :])[:, None]
            mask = same if mask is None else same & mask
        if positions is None:
            positions = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None, :]
        x = self.embedded(input_ids, positions)
        return self.norm(run_layers(self, self.config, x, Context(self.rope(positions), mask))[0])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: (B, T, D) -> float32 (B, T, V)."""
        if not self.config.tie_embeddings:
            return self.head(hidden).astype(jnp.float32)
        return tied_logits(self.embed, hidden)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 (B, T, V)."""
        return self.logits(self.hidden(input_ids, attention_mask, positions, segments))

    def decode(
        self,
        input_ids: jax.Array,
        cache: Cache,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Logits float32 (B, T, V) of the next T tokens of each row, and the cache that holds them too.

        positions: None counts the row's real tokens, so that rows may be padded on the left.
        A cache that overflows is not noticed under jit: give `empty_cache` the whole length.
        """
        used, cache = cache.used, extend(cache, attention_mask, input_ids.shape[1])
        if positions is None:
            positions = next_positions(cache, input_ids.shape[1])
        context = Context(self.rope(positions), cache.mask[:, None, None, :], used=used)
        x, layers = run_layers(self, self.config, self.embedded(input_ids, positions), context, cache.layers)
        return self.logits(self.norm(x)), cache._replace(layers=layers)


def tied_logits(embed: nn.Embed, hidden: jax.Array) -> jax.Array:
    """The head that is the table of embeddings: (B, T, D) -> float32 (B, T, V)."""
    return jnp.einsum("btd,vd->btv", hidden, embed.embedding.astype(hidden.dtype)).astype(jnp.float32)
