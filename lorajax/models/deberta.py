"""DeBERTa-v3 with a sequence classification or regression head, in plain Flax Linen.

He et al. 2021 (arXiv:2006.03654, disentangled attention, and arXiv:2111.09543). Parameter tree:

    params/embeddings/word/embedding    params/embeddings/norm/{scale,bias}
    params/relative/embedding           params/relative_norm/{scale,bias}          positions, shared by all layers
    params/layer_i/attention/{query,key,value,output}/{kernel,bias}   params/layer_i/attention_norm
    params/layer_i/ffn/{up,down}/{kernel,bias}                        params/layer_i/ffn_norm
    params/pooler/{kernel,bias}         params/classifier/{kernel,bias}

With `scan_layers` the layers are one subtree `params/layers` whose leaves have a leading layer axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorajax.models.attention import attend
from lorajax.models.checkpoint import Layout, Tensor, layout, linears, norms
from lorajax.models.layers import FeedForward, rematerialised, scanned
from lorajax.models.norms import LayerNorm
from lorajax.models.settings import ACTIVATIONS, Execution, choice, number_of_labels, pinned, read_keys


@dataclass(frozen=True, kw_only=True)
class DebertaConfig(Execution):
    """Architecture of `Deberta`; how it is executed is in `Execution`. Field defaults are those of DeBERTa-v3-base.

    buckets: of distances on each side, linear up to half of them, then logarithmic up to `max_distance`.
    """

    vocab_size: int = 128100
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    activation: str = "gelu"
    pooler_activation: str = "gelu"
    buckets: int = 256
    max_distance: int = 512
    norm_eps: float = 1e-7
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    pooler_dropout: float = 0.0
    head_dropout: float | None = None
    initializer_range: float = 0.02
    num_labels: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("activation (hidden_act)", self.activation, tuple(ACTIVATIONS))
        choice("pooler_activation (pooler_hidden_act)", self.pooler_activation, tuple(ACTIVATIONS))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> DebertaConfig:
        """Reads the dictionary of a Hugging Face `config.json`; `overrides` are fields of this class and win.

        Errors: ValueError that names a setting in which the file is not a DeBERTa-v3 (the v2 models with their own
        position projections or a convolution), for an unknown activation and for a missing key.
        """
        choice("model_type", str(config.get("model_type")), ("deberta-v2",))
        kinds = config.get("pos_att_type") or []
        kinds = {x.strip() for x in (kinds.split("|") if isinstance(kinds, str) else kinds)}
        wanted = {
            "relative_attention": bool(config.get("relative_attention")),
            "share_att_key": bool(config.get("share_att_key")),
            "position_biased_input=False": not config.get("position_biased_input", True),
            "pos_att_type=p2c|c2p": kinds == {"p2c", "c2p"},
            "norm_rel_ebd=layer_norm": config.get("norm_rel_ebd", "none") == "layer_norm",
            "position_buckets > 0": config.get("position_buckets", -1) > 0,
            "type_vocab_size=0": not config.get("type_vocab_size", 0),
            "no conv_kernel_size": not config.get("conv_kernel_size", 0),
        }
        if lacking := [name for name, there in wanted.items() if not there]:
            raise ValueError(f"this model is DeBERTa-v3, which has {', '.join(lacking)}; this config.json has not")
        fields = read_keys(config, _REQUIRED, _OPTIONAL)
        longest = config.get("max_relative_positions", -1)
        fields["max_distance"] = longest if longest > 0 else config.get("max_position_embeddings", 512)
        return cls(**(fields | {"num_labels": number_of_labels(config)} | overrides))


def distances(config: DebertaConfig, length: int) -> np.ndarray:
    """Signed bucket of query position - key position, int32 (length, length); beyond +-buckets it is to be clipped."""
    relative = np.arange(length)[:, None] - np.arange(length)[None, :]
    middle = config.buckets // 2
    far = np.where(np.abs(relative) < middle, middle - 1, np.abs(relative)).astype(np.float32)
    ratio = np.log(far / np.float32(middle)) / np.log(np.float32((config.max_distance - 1) / middle))
    steps = np.ceil(ratio * (middle - 1)) + middle
    return np.where(far <= middle, relative, steps * np.sign(relative)).astype(np.int32)


class DisentangledAttention(nn.Module):
    """Content to content, content to position and position to content: (B, T, D), (2 buckets, D) -> (B, T, D).

    Equation 4 of the first paper, with the positions projected by the contents' query and key matrices (v3).
    """

    config: DebertaConfig
    deterministic: bool

    def setup(self) -> None:
        c = self.config
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        dense = partial(nn.Dense, c.hidden_size, kernel_init=nn.initializers.normal(c.initializer_range), **types)
        self.query, self.key, self.value, self.output = (dense() for _ in range(4))
        self.drop = nn.Dropout(c.attention_dropout, deterministic=self.deterministic)
        self.drop_positions = nn.Dropout(c.hidden_dropout, deterministic=self.deterministic)

    def __call__(self, x: jax.Array, mask: jax.Array, positions: jax.Array) -> jax.Array:
        c, (rows, length, width) = self.config, x.shape
        size = width // c.num_heads
        q, k, v = (layer(x).reshape(rows, length, -1, size) for layer in (self.query, self.key, self.value))
        positions = self.drop_positions(positions)
        pq, pk = (layer(positions).reshape(-1, c.num_heads, size) for layer in (self.query, self.key))
        signed = distances(c, length)
        there, back = (jnp.asarray(np.clip(x + c.buckets, 0, 2 * c.buckets - 1)) for x in (signed, -signed))
        scale = (3 * size) ** -0.5
        shape = (rows, c.num_heads, length, length)
        to_position = jnp.einsum("bqnh,pnh->bnqp", q, pk)
        from_position = jnp.einsum("bknh,pnh->bnkp", k, pq)
        bias = jnp.take_along_axis(to_position, jnp.broadcast_to(there, shape), axis=-1)
        bias = bias + jnp.take_along_axis(from_position, jnp.broadcast_to(back, shape), axis=-1).swapaxes(-1, -2)
        drop = self.drop if c.attention_dropout and not self.deterministic else None
        y = attend(q, k, v, mask=mask, bias=bias * jnp.asarray(scale, bias.dtype), scale=scale,
                   implementation=c.attention, drop=drop)  # fmt: skip
        return self.output(y.reshape(x.shape))


class Layer(nn.Module):
    """One post-norm encoder layer: (B, T, D) -> ((B, T, D), None), the form that `nn.scan` carries."""

    config: DebertaConfig
    deterministic: bool

    def setup(self) -> None:
        c = self.config
        self.attention = DisentangledAttention(c, self.deterministic)
        self.attention_norm, self.ffn_norm = (LayerNorm(c, c.hidden_size, c.norm_eps) for _ in range(2))
        sizes = (c, c.hidden_size, c.intermediate_size, c.activation)
        self.ffn = FeedForward(*sizes, init_std=c.initializer_range)
        self.drop = nn.Dropout(c.hidden_dropout, deterministic=self.deterministic)

    def __call__(self, x: jax.Array, mask: jax.Array, positions: jax.Array) -> tuple[jax.Array, None]:
        x = pinned(self.config, self.attention_norm(x + self.drop(self.attention(x, mask, positions))))
        return pinned(self.config, self.ffn_norm(x + self.drop(self.ffn(x)))), None


class Embeddings(nn.Module):
    """Words, normalised; padding is zero: (B, T) -> (B, T, D)."""

    config: DebertaConfig
    deterministic: bool

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.word = nn.Embed(c.vocab_size, c.hidden_size, param_dtype=c.param_dtype, embedding_init=init)
        self.norm = LayerNorm(c, c.hidden_size, c.norm_eps)
        self.drop = nn.Dropout(c.hidden_dropout, deterministic=self.deterministic)

    def __call__(self, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.norm(self.word(input_ids))
        return self.drop(x * mask[:, :, None].astype(x.dtype))


class Deberta(nn.Module):
    """The encoder with its head. `deterministic=False` is training: it needs `rngs={'dropout': key}` in `apply`.

    `input_ids` int (B, T), `attention_mask` (B, T) with nonzero = real token (None: all real).
    """

    config: DebertaConfig
    deterministic: bool = True

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.embeddings = Embeddings(c, self.deterministic)
        self.relative = nn.Embed(2 * c.buckets, c.hidden_size, param_dtype=c.param_dtype, embedding_init=init)
        self.relative_norm = LayerNorm(c, c.hidden_size, c.norm_eps)
        if c.scan_layers:
            self.layers = scanned(Layer, c, c.num_layers, nn.broadcast)(c, self.deterministic)
        else:
            self.layer = [rematerialised(Layer, c)(c, self.deterministic) for _ in range(c.num_layers)]
        self.pooler = nn.Dense(c.hidden_size, dtype=c.dtype, param_dtype=c.param_dtype, kernel_init=init)
        self.classifier = nn.Dense(c.num_labels, dtype=jnp.float32, param_dtype=c.param_dtype, kernel_init=init)
        rate = c.hidden_dropout if c.head_dropout is None else c.head_dropout
        self.pooler_drop = nn.Dropout(c.pooler_dropout, deterministic=self.deterministic)
        self.head_drop = nn.Dropout(rate, deterministic=self.deterministic)

    def encode(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Last hidden states (B, T, D) in `config.dtype`; rows of masked tokens carry no meaning."""
        real = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
        x, mask = pinned(self.config, self.embeddings(input_ids, real)), real[:, None, None, :]
        positions = self.relative_norm(self.relative(jnp.arange(2 * self.config.buckets)))
        if self.config.scan_layers:
            return self.layers(x, mask, positions)[0]
        for layer in self.layer:
            x, _ = layer(x, mask, positions)
        return x

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Logits, float32 (B, num_labels); with num_labels = 1 the regression output."""
        x = self.pooler_drop(self.encode(input_ids, attention_mask)[:, 0])
        return self.classifier(self.head_drop(ACTIVATIONS[self.config.pooler_activation](self.pooler(x))))


@layout.register
def _(config: DebertaConfig) -> Layout:
    """Names carry the prefix `deberta.`, other than those of pooler and classifier, which may be absent."""
    tensors = {"params/embeddings/word/embedding": Tensor(("embeddings.word_embeddings.weight",))}
    tensors |= norms({"params/embeddings/norm": "embeddings.LayerNorm"})
    tensors["params/relative/embedding"] = Tensor(("encoder.rel_embeddings.weight",))
    tensors |= norms({"params/relative_norm": "encoder.LayerNorm"})
    modules = {f"attention/{name}": f"attention.self.{name}_proj" for name in ("query", "key", "value")}
    modules |= {"attention/output": "attention.output.dense"}
    modules |= {"ffn/up": "intermediate.dense", "ffn/down": "output.dense"}
    for i in range(config.num_layers):
        ours, theirs = f"params/layer_{i}/", f"encoder.layer.{i}."
        tensors |= linears({ours + module: theirs + name for module, name in modules.items()})
        tensors |= norms({f"{ours}attention_norm": f"{theirs}attention.output.LayerNorm",
                          f"{ours}ffn_norm": f"{theirs}output.LayerNorm"})  # fmt: skip
    return Layout(
        tensors | linears({"params/pooler": "pooler.dense", "params/classifier": "classifier"}),
        Deberta(config),
        (jax.ShapeDtypeStruct((1, 2), jnp.int32),),
        prefix="deberta.",
        bare=r"(pooler|classifier)\..*",
        unused=(r"(cls|lm_predictions|mask_predictions)\..*", r"embeddings\.position_(ids|embeddings\.weight)"),
        head=r"(pooler|classifier)\..*",
        init_std=config.initializer_range,
    )


_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "activation",
}
_OPTIONAL = {
    "position_buckets": "buckets",
    "layer_norm_eps": "norm_eps",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "pooler_dropout": "pooler_dropout",
    "pooler_hidden_act": "pooler_activation",
    "cls_dropout": "head_dropout",
    "initializer_range": "initializer_range",
}
