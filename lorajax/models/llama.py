"""The Llama family of decoders in plain Flax Linen: Llama, Mistral, Mixtral, Qwen2, Qwen3, SmolLM2, Gemma.

Touvron et al. 2023 (arXiv:2302.13971, 2307.09288), Jiang et al. 2023/2024 (arXiv:2310.06825, 2401.04088), Qwen2
(arXiv:2407.10671), Qwen3 (arXiv:2505.09388), Gemma (arXiv:2403.08295). Parameter tree:

    params/embed/embedding
    params/layer_i/attention_norm/scale       params/layer_i/attention/{query,key,value,output}/{kernel,bias}
    params/layer_i/attention/{query,key}_norm/scale         Qwen3
    params/layer_i/ffn_norm/scale             params/layer_i/ffn/{gate,up,down}/{kernel,bias}
    params/layer_i/ffn/router/kernel          Mixtral; gate, up, down then have a leading expert axis
    params/norm/scale                         params/head/kernel        unless the embeddings are tied

With `scan_layers` the layers are one subtree `params/layers` whose leaves have a leading layer axis.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.attention import Attention, KeyValue, causal_mask
from lorajax.models.cache import Cache, empty_cache, extend, layer_cache
from lorajax.models.layers import Experts, FeedForward, rematerialised, scanned
from lorajax.models.llama_config import LlamaConfig
from lorajax.models.norms import RMSNorm
from lorajax.models.rotary import rope_table


class Context(NamedTuple):
    """What all layers of one call share: rotary tables, mask of keys (True = may attend), slots used before."""

    rope: tuple[jax.Array, jax.Array]
    mask: jax.Array | None
    used: jax.Array | None


class Layer(nn.Module):
    """One pre-norm decoder layer: (B, T, D) -> ((B, T, D), new cache), the form that `nn.scan` carries."""

    config: LlamaConfig
    window: int | None

    def setup(self) -> None:
        c = self.config
        self.attention = Attention(
            c, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, init_std=c.initializer_range, causal=True,
            bias=(c.query_bias, c.query_bias, c.query_bias, c.output_bias), window=self.window,
            norm_eps=c.norm_eps if c.head_norm else None,
        )  # fmt: skip
        self.attention_norm, self.ffn_norm = (
            RMSNorm(c, c.hidden_size, c.norm_eps, c.norm_offset) for _ in range(2)
        )
        sizes = (c, c.hidden_size, c.intermediate_size, c.activation)
        if c.experts:
            self.ffn: nn.Module = Experts(*sizes, c.experts, c.experts_per_token, c.dense_experts, c.initializer_range)
        else:
            self.ffn = FeedForward(*sizes, gated=True, bias=c.mlp_bias, init_std=c.initializer_range)

    def __call__(self, x: jax.Array, context: Context, cache: KeyValue | None) -> tuple[jax.Array, KeyValue | None]:
        mask = context.mask
        if cache is not None:
            assert mask is not None and context.used is not None
            seen = causal_mask(x.shape[1], cache[0].shape[1], context.used, self.window)
            mask = seen & mask
        y, cache = self.attention(
            self.attention_norm(x), mask=mask, rope=context.rope, cache=cache, index=context.used
        )
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), cache


class Llama(nn.Module):
    """The decoder with its head.

    Every method takes `input_ids` int (B, T), `attention_mask` (B, T) with nonzero = real token (None: all real),
    `positions` int (B, T) (None: 0..T-1) and `segments` int (B, T): tokens attend within their segment only, for
    several texts packed in a row, each with its own positions. Masked positions do not influence the others.
    """

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, param_dtype=c.param_dtype, embedding_init=init)
        if c.scan_layers:
            self.layers = scanned(Layer, c, c.num_layers, (nn.broadcast, 0))(c, c.window(0))
        else:
            self.layer = [rematerialised(Layer, c)(c, c.window(i)) for i in range(c.num_layers)]
        self.norm = RMSNorm(c, c.hidden_size, c.norm_eps, c.norm_offset)
        if not c.tie_embeddings:
            types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
            self.head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=init, **types)

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
        return self._run(input_ids, positions, mask, None)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: (B, T, D) -> float32 (B, T, V)."""
        if not self.config.tie_embeddings:
            return self.head(hidden).astype(jnp.float32)
        table = self.embed.embedding.astype(self.config.dtype)
        return jnp.einsum("btd,vd->btv", hidden, table).astype(jnp.float32)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 (B, T, V)."""
        return self.logits(self.hidden(input_ids, attention_mask, positions, segments))

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of at most `length` tokens; needs no parameters."""
        c = self.config
        return empty_cache(c.num_layers, batch, length, c.num_kv_heads, c.head_dim, dtype=c.dtype,
                           scan_layers=c.scan_layers)  # fmt: skip

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
            counts = jnp.cumsum(cache.mask, axis=1, dtype=jnp.int32) - 1
            positions = jax.lax.dynamic_slice_in_dim(jnp.maximum(counts, 0), used, input_ids.shape[1], axis=1)
        x, layers = self._run(input_ids, positions, cache.mask[:, None, None, :], cache._replace(used=used))
        return self.logits(x), cache._replace(layers=layers)

    def _run(
        self, input_ids: jax.Array, positions: jax.Array | None, mask: jax.Array | None, cache: Cache | None
    ) -> tuple[jax.Array, object]:
        c = self.config
        if positions is None:
            positions = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None, :]
        x = self.embed(input_ids).astype(c.dtype)
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, c.dtype)
        used = None if cache is None else cache.used
        context = Context(rope_table(c.rope, c.head_dim, positions), mask, used)
        if c.scan_layers:
            x, layers = self.layers(x, context, None if cache is None else cache.layers)
            return self.norm(x), layers
        new = []
        for i, layer in enumerate(self.layer):
            x, kept = layer(x, context, layer_cache(cache, i))
            new.append(kept)
        return self.norm(x), tuple(new)
