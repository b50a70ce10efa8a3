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

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.attention import Attention
from lorajax.models.cache import Cache, empty_cache
from lorajax.models.decoder import CausalLM
from lorajax.models.experts import Experts
from lorajax.models.layers import FeedForward, add_layers
from lorajax.models.llama_config import LlamaConfig
from lorajax.models.norms import RMSNorm
from lorajax.models.rotary import rope_table
from lorajax.models.settings import looked_up


class Llama(CausalLM):
    """The decoder with its head; no member has dropout."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        norm = partial(RMSNorm, c, c.hidden_size, c.norm_eps, c.norm_offset)
        attention = partial(
            Attention, c, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, init_std=c.initializer_range,
            bias=(c.query_bias, c.query_bias, c.query_bias, c.output_bias), causal=True,
            norm_eps=c.norm_eps if c.head_norm else None,
        )  # fmt: skip
        sizes = (c, c.hidden_size, c.intermediate_size, c.activation)
        ffn: Any = partial(FeedForward, *sizes, gated=True, bias=c.mlp_bias, init_std=c.initializer_range)
        if c.experts:
            ffn = partial(Experts, *sizes, c.experts, c.experts_per_token, c.dense_experts, c.initializer_range)

        def fields(layer: int) -> dict[str, Any]:
            window = partial(attention, window=c.window(layer))
            return {"make_norm": norm, "make_attention": window, "make_ffn": ffn}

        self.embed = nn.Embed(c.vocab_size, c.hidden_size, param_dtype=c.param_dtype, embedding_init=init)
        add_layers(self, c, c.num_layers, fields)
        self.norm = norm()
        if not c.tie_embeddings:
            types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
            self.head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=init, **types)

    def embedded(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        c = self.config
        x = looked_up(c, self.embed, input_ids).astype(c.dtype)
        return x if c.embedding_scale == 1.0 else x * jnp.asarray(c.embedding_scale, c.dtype)

    def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope_table(self.config.rope, self.config.head_dim, positions)

    def empty_cache(self, batch: int, length: int) -> Cache:
        c = self.config
        return empty_cache(c, c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
