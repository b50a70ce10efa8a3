"""What encoder-decoders share: a stack of layers with its last norm, and decoding against an encoded source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.cache import Cache, extend, next_positions
from lorajax.models.layers import Context, add_layers, run_layers
from lorajax.models.settings import Execution


class Stack(nn.Module):
    """`length` layers, the fields of each from `make_fields`, and `norm`; `make_bias` gives a module `relative_bias`
    from (first query slot, queries, keys) to the bias of self-attention."""

    run: Execution
    length: int
    make_fields: Callable[[int], Mapping[str, Any]]
    make_norm: Callable[[], nn.Module]
    make_bias: Callable[[], nn.Module] | None = None

    def setup(self) -> None:
        if self.make_bias is not None:
            self.relative_bias = self.make_bias()
        add_layers(self, self.run, self.length, self.make_fields)
        self.norm = self.make_norm()

    def __call__(self, x: jax.Array, context: Context, caches: Any = None, slots: int = 0) -> tuple[jax.Array, Any]:
        """(B, T, D) and the caches of `slots` keys, or None -> the same."""
        if self.make_bias is not None:
            first = jnp.zeros((), jnp.int32) if context.used is None else context.used
            context = context._replace(bias=self.relative_bias(first, x.shape[1], slots or x.shape[1]))
        x, caches = run_layers(self, self.run, x, context, caches)
        return self.norm(x), caches


class EncoderDecoder(nn.Module):
    """An encoder and a decoder with a language head. Abstract: `setup` makes `decoder` (a `Stack`).

    `decoder_input_ids` int (B, T) start with the model's start token; `attention_mask` (B, S) with nonzero = real
    token (None: all real) is of the source. `deterministic=False` is training with dropout: it needs
    `rngs={'dropout': key}`.
    """

    config: Any
    deterministic: bool = True

    def encode(self, source: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Hidden states (B, S, D) of the source."""
        raise NotImplementedError

    def embedded(self, decoder_input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """What enters the decoder's first layer, (B, T, D)."""
        raise NotImplementedError

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: (B, T, D) -> float32 (B, T, V)."""
        raise NotImplementedError

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of at most `length` target tokens; needs no parameters."""
        raise NotImplementedError

    def hidden(
        self, source: jax.Array, decoder_input_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """Last hidden states of the decoder, (B, T, D) in `config.dtype`."""
        positions = jnp.arange(decoder_input_ids.shape[1], dtype=jnp.int32)[None, :]
        context = Context(source=self.encode(source, attention_mask), source_mask=_keys(attention_mask))
        return self.decoder(self.embedded(decoder_input_ids, positions), context)[0]

    def decode(
        self,
        input_ids: jax.Array,
        cache: Cache,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        source: jax.Array | None = None,
        source_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Logits float32 (B, T, V) of the next T target tokens of each row, and the cache that holds them too.

        source, source_mask: what `encode` gave, and its mask, in the first call; the cache keeps them for the others.
        attention_mask: of the target tokens.
        """
        used, cache = cache.used, extend(cache, attention_mask, input_ids.shape[1])
        if source is not None:
            cache = cache._replace(source_mask=_keys(source_mask))
        if positions is None:
            positions = next_positions(cache, input_ids.shape[1])
        context = Context(
            mask=cache.mask[:, None, None, :], used=used, source=source, source_mask=cache.source_mask
        )
        x = self.embedded(input_ids, positions)
        x, layers = self.decoder(x, context, cache.layers, cache.mask.shape[1])
        return self.logits(x), cache._replace(layers=layers)


def _keys(mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else mask.astype(bool)[:, None, None, :]
