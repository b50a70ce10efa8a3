"""BERT and RoBERTa encoders with a sequence classification or regression head, in plain Flax Linen.

Devlin et al. 2019 (arXiv:1810.04805), Liu et al. 2019 (arXiv:1907.11692). Parameter tree:

    params/embeddings/{word,position,token_type}/embedding   params/embeddings/norm/{scale,bias}
    params/layer_i/attention/{query,key,value,output}/{kernel,bias}   params/layer_i/attention_norm
    params/layer_i/ffn/{up,down}/{kernel,bias}                        params/layer_i/ffn_norm
    params/pooler/{kernel,bias}                 BERT with first-token pooling
    params/classifier/{kernel,bias}             BERT
    params/classifier/{dense,out_proj}/{kernel,bias}   RoBERTa

With `scan_layers` the layers are one subtree `params/layers` whose leaves have a leading layer axis.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.attention import Attention
from lorajax.models.bert_config import BertConfig
from lorajax.models.layers import FeedForward, rematerialised, scanned
from lorajax.models.norms import LayerNorm
from lorajax.models.settings import looked_up, pinned


def position_ids(config: BertConfig, input_ids: jax.Array) -> jax.Array:
    """Position of each token, int32 (1, T) for BERT and (B, T) for RoBERTa, from `input_ids` (B, T).

    BERT counts 0..T-1. RoBERTa, as Hugging Face does, counts the tokens that are not `pad_id` from pad_id + 1, and
    gives `pad_id` to the padding.
    """
    if config.family == "bert":
        return jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None, :]
    real = (input_ids != config.pad_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1, dtype=jnp.int32) * real + config.pad_id


def _dense(config: BertConfig, features: int, dtype: Any = None) -> nn.Dense:
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, dtype=dtype or config.dtype, param_dtype=config.param_dtype, kernel_init=init)


def _head_dropout(config: BertConfig, deterministic: bool) -> nn.Dropout:
    rate = config.hidden_dropout if config.head_dropout is None else config.head_dropout
    return nn.Dropout(rate, deterministic=deterministic)


class Embeddings(nn.Module):
    """Word + position + token type, summed in float32, normalised, dropped out: (B, T) ids -> (B, T, D)."""

    config: BertConfig
    deterministic: bool

    def setup(self) -> None:
        c = self.config

        def table(rows: int) -> nn.Embed:
            init = nn.initializers.normal(c.initializer_range)
            return nn.Embed(rows, c.hidden_size, param_dtype=c.param_dtype, embedding_init=init)

        self.word, self.position = table(c.vocab_size), table(c.max_positions)
        self.token_type = table(c.type_vocab_size)
        self.norm = LayerNorm(c, c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout, deterministic=self.deterministic)

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, positions: jax.Array) -> jax.Array:
        x = looked_up(self.config, self.word, input_ids).astype(jnp.float32)
        x = x + self.position(positions).astype(jnp.float32)
        x = x + self.token_type(token_type_ids).astype(jnp.float32)
        return self.dropout(self.norm(x))


class Layer(nn.Module):
    """One post-norm encoder layer: (B, T, D), key mask (B, T) -> ((B, T, D), None), the form that `nn.scan` carries."""

    config: BertConfig
    deterministic: bool

    def setup(self) -> None:
        c = self.config
        self.attention = Attention(
            c, c.hidden_size, c.num_heads, c.num_heads, c.hidden_size // c.num_heads, init_std=c.initializer_range,
            dropout=c.attention_dropout, deterministic=self.deterministic,
        )  # fmt: skip
        self.attention_norm, self.ffn_norm = (LayerNorm(c, c.hidden_size, c.layer_norm_eps) for _ in range(2))
        self.ffn = FeedForward(
            c, c.hidden_size, c.intermediate_size, c.activation, init_std=c.initializer_range
        )
        self.dropout = nn.Dropout(c.hidden_dropout, deterministic=self.deterministic)

    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        x = pinned(c, self.attention_norm(x + self.dropout(self.attention(x, mask=mask[:, None, None, :])[0])))
        return pinned(c, self.ffn_norm(x + self.dropout(self.ffn(x)))), None


class RobertaHead(nn.Module):
    """RoBERTa's head: dropout, dense, tanh, dropout, out_proj: (B, D) -> float32 (B, num_labels)."""

    config: BertConfig
    deterministic: bool

    def setup(self) -> None:
        self.dense = _dense(self.config, self.config.hidden_size)
        self.out_proj = _dense(self.config, self.config.num_labels, jnp.float32)
        self.dropout = _head_dropout(self.config, self.deterministic)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_proj(self.dropout(jnp.tanh(self.dense(self.dropout(x)))))


class Bert(nn.Module):
    """The encoder with its head. `deterministic=False` is training: it needs `rngs={'dropout': key}` in `apply`.

    Every method takes `input_ids` int (B, T), `attention_mask` (B, T) with nonzero = real token (None: all real),
    `token_type_ids` int (B, T) (None: zeros) and `positions` int (1 or B, T) (None: the family's rule).
    Masked positions do not influence the results of the others, nor any pooled result.
    Error: ValueError if T is greater than `config.max_length` (with given `positions`: than `config.max_positions`).
    """

    config: BertConfig
    deterministic: bool = True

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embeddings(c, self.deterministic)
        if c.scan_layers:
            self.layers = scanned(Layer, c, c.num_layers, nn.broadcast)(c, self.deterministic)
        else:
            self.layer = [rematerialised(Layer, c)(c, self.deterministic) for _ in range(c.num_layers)]
        if c.has_pooler:
            self.pooler = _dense(c, c.hidden_size)
        if c.family == "roberta":
            self.classifier: RobertaHead | nn.Dense = RobertaHead(c, self.deterministic)
        else:
            self.classifier = _dense(c, c.num_labels, jnp.float32)
            self.head_dropout = _head_dropout(c, self.deterministic)

    def encode(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Last hidden states (B, T, D) in `config.dtype`; rows of masked tokens carry no meaning."""
        c = self.config
        limit = c.max_length if positions is None else c.max_positions
        if input_ids.shape[1] > limit:
            raise ValueError(f"sequence of {input_ids.shape[1]} tokens; this model has {limit} positions: truncate")
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        if positions is None:
            positions = position_ids(c, input_ids)
        x = pinned(c, self.embeddings(input_ids, token_type_ids, positions))
        if c.scan_layers:
            return self.layers(x, mask)[0]
        for layer in self.layer:
            x, _ = layer(x, mask)
        return x

    def embed(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Sentence embedding, float32 (B, D): mean of the unmasked last hidden states, or the first token's.

        This is what sentence encoders compare by cosine; neither pooler nor normalisation is applied.
        """
        x = self.encode(input_ids, attention_mask, token_type_ids, positions).astype(jnp.float32)
        if self.config.pooling == "first":
            return x[:, 0]
        mask = jnp.ones(x.shape[:2], bool) if attention_mask is None else attention_mask.astype(bool)
        real = mask.astype(jnp.float32)[:, :, None]
        return (x * real).sum(1) / jnp.maximum(real.sum(1), 1.0)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32 (B, num_labels); with num_labels = 1 the regression output."""
        x = self.embed(input_ids, attention_mask, token_type_ids, positions).astype(self.config.dtype)
        if self.config.has_pooler:
            x = jnp.tanh(self.pooler(x))
        if self.config.family == "bert":
            x = self.head_dropout(x)
        return self.classifier(x)
