"""The key-value cache of a decoder: arrays of a fixed length, so that every step of a generation is one program."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.models.attention import KeyValue


class Cache(NamedTuple):
    """layers: keys and values of each layer, (B, S, kv_heads, head_dim) each, a tuple of layers or, for scanned layers,
    one pair with a leading layer axis. used: int32 scalar, slots that are filled. mask: bool (B, S), filled slots that
    hold a real token. memory: what an encoder gave (keys and values of cross-attention, mask), or None.
    """

    layers: Any
    used: jax.Array
    mask: jax.Array
    memory: Any = None


def empty_cache(
    num_layers: int, batch: int, length: int, kv_heads: int, head_dim: int, *, dtype: Any, scan_layers: bool
) -> Cache:
    """A cache of `length` slots for each of `batch` rows, none filled."""
    shape = (batch, length, kv_heads, head_dim)
    if scan_layers:
        layers: Any = (jnp.zeros((num_layers, *shape), dtype), jnp.zeros((num_layers, *shape), dtype))
    else:
        layers = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(num_layers))
    return Cache(layers, jnp.zeros((), jnp.int32), jnp.zeros((batch, length), bool))


def extend(cache: Cache, attention_mask: jax.Array | None, tokens: int) -> Cache:
    """The cache with `tokens` more slots in use, real where `attention_mask` (B, tokens) is non-zero (None: all)."""
    rows = cache.mask.shape[0]
    new = jnp.ones((rows, tokens), bool) if attention_mask is None else attention_mask.astype(bool)
    mask = jax.lax.dynamic_update_slice(cache.mask, new, (0, cache.used))
    return cache._replace(mask=mask, used=cache.used + tokens)


def layer_cache(cache: Cache | None, layer: int) -> KeyValue | None:
    """Keys and values of one layer of a cache that is not stacked."""
    return None if cache is None else cache.layers[layer]
