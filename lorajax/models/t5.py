"""T5, T5 v1.1 and mT5 in plain Flax Linen (Raffel et al. 2020, arXiv:1910.10683; Xue et al. 2021, arXiv:2010.11934).

    params/embed/embedding
    params/{encoder,decoder}/relative_bias/table/embedding
    params/{encoder,decoder}/layer_i/{attention_norm,cross_norm,ffn_norm}/scale
    params/{encoder,decoder}/layer_i/{attention,cross_attention}/{query,key,value,output}/kernel
    params/{encoder,decoder}/layer_i/ffn/{gate,up,down}/kernel           gate: v1.1 and mT5
    params/{encoder,decoder}/norm/scale
    params/head/kernel                                                   unless tied

With `scan_layers` the layers of each side are one subtree `layers` whose leaves have a leading layer axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.attention import Attention
from lorajax.models.cache import Cache, empty_cache
from lorajax.models.checkpoint import Layout, Tensor, layout
from lorajax.models.decoder import tied_logits
from lorajax.models.encoder_decoder import EncoderDecoder, Stack
from lorajax.models.layers import Context, FeedForward
from lorajax.models.norms import RMSNorm
from lorajax.models.settings import ACTIVATIONS, Execution, choice, looked_up, read_keys


@dataclass(frozen=True, kw_only=True)
class T5Config(Execution):
    """Architecture of `T5`; how it is executed is in `Execution`. Field defaults are those of T5-base.

    gated: activation(gate) * up (v1.1, mT5). scale_outputs: the decoder's hidden states are multiplied by
    hidden_size ** -0.5 before the head (where it is tied). start_id: token that begins every target.
    dropout: acts on embeddings, attention's probabilities, the feed-forward's inner states and what each block adds.
    """

    vocab_size: int = 32128
    hidden_size: int = 768
    head_dim: int = 64
    intermediate_size: int = 3072
    num_layers: int = 12
    num_decoder_layers: int = 12
    num_heads: int = 12
    activation: str = "relu"
    gated: bool = False
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.1
    tie_embeddings: bool = True
    scale_outputs: bool = True
    start_id: int = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("activation (feed_forward_proj)", self.activation, tuple(ACTIVATIONS))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> T5Config:
        """Reads the dictionary of a Hugging Face `config.json`; `overrides` are fields of this class and win.

        transformers 4 writes `tie_word_embeddings: false` for v1.1 and mT5, which means a head of its own and no
        scaling; transformers 5 ties always, and writes `scale_decoder_outputs`.
        """
        choice("model_type", str(config.get("model_type")), ("t5", "mt5"))
        fields = read_keys(config, _REQUIRED, _OPTIONAL)
        kind = str(config.get("feed_forward_proj", "relu"))
        fields["gated"], fields["activation"] = kind.startswith("gated-"), kind.removeprefix("gated-")
        if kind == "gated-gelu":
            fields["activation"] = "gelu_new"
        fields.setdefault("num_decoder_layers", fields["num_layers"])
        tied = bool(config.get("tie_word_embeddings", True))
        fields |= {"tie_embeddings": tied, "scale_outputs": config.get("scale_decoder_outputs", tied)}
        if config["model_type"] == "mt5":
            fields["scale_outputs"] = False
        return cls(**(fields | overrides))


class RelativeBias(nn.Module):
    """A learned number for each head and bucket of distances: -> float (1, heads, queries, keys)."""

    config: T5Config
    causal: bool

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.table = nn.Embed(c.buckets, c.num_heads, param_dtype=c.param_dtype, embedding_init=init)

    def __call__(self, first: jax.Array, queries: int, keys: int) -> jax.Array:
        distance = jnp.arange(keys)[None, :] - (first + jnp.arange(queries))[:, None]
        buckets = bucket(distance, self.config.buckets, self.config.max_distance, self.causal)
        return self.table(buckets).transpose(2, 0, 1)[None].astype(self.config.dtype)


def bucket(distance: jax.Array, buckets: int, max_distance: int, causal: bool) -> jax.Array:
    """Bucket of key position - query position: one for each small distance, then logarithmically wider ones.

    causal: only distances <= 0 are told apart; otherwise half of the buckets are for positive ones.
    """
    start = jnp.zeros_like(distance)
    if not causal:
        buckets //= 2
        start = jnp.where(distance > 0, buckets, 0)
    distance = jnp.maximum(-distance, 0) if causal else jnp.abs(distance)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(distance.dtype)
    return start + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


class T5(EncoderDecoder):
    """Encoder and decoder with the head: `model.apply(params, input_ids, decoder_input_ids, attention_mask)`."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        init, std = nn.initializers.normal(c.initializer_range), c.initializer_range
        attention = partial(
            Attention, c, c.hidden_size, c.num_heads, c.num_heads, c.head_dim, bias=(False,) * 4, init_std=std,
            scale=1.0, dropout=c.dropout, deterministic=self.deterministic,
        )  # fmt: skip
        norm = partial(RMSNorm, c, c.hidden_size, c.norm_eps)
        shared: dict[str, Any] = {
            "make_norm": norm,
            "make_ffn": partial(
                FeedForward, c, c.hidden_size, c.intermediate_size, c.activation, c.gated, False, std, c.dropout,
                self.deterministic,
            ),
            "dropout": c.dropout, "deterministic": self.deterministic,
        }  # fmt: skip
        encoder = shared | {"make_attention": attention}
        decoder = shared | {"make_attention": partial(attention, causal=True), "make_cross": attention}
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, param_dtype=c.param_dtype, embedding_init=init)
        self.encoder = Stack(c, c.num_layers, lambda _: encoder, norm, partial(RelativeBias, c, False))
        self.decoder = Stack(c, c.num_decoder_layers, lambda _: decoder, norm, partial(RelativeBias, c, True))
        self.drop = nn.Dropout(c.dropout, deterministic=self.deterministic)
        if not c.tie_embeddings:
            types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
            self.head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=init, **types)

    def embedded(self, decoder_input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        return self.drop(looked_up(self.config, self.embed, decoder_input_ids).astype(self.config.dtype))

    def encode(self, source: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """source: token ids (B, S)."""
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        x = self.drop(looked_up(self.config, self.embed, source).astype(self.config.dtype))
        return self.drop(self.encoder(x, Context(mask=mask))[0])

    def logits(self, hidden: jax.Array) -> jax.Array:
        c = self.config
        hidden = self.drop(hidden)
        if c.scale_outputs:
            hidden = hidden * jnp.asarray(c.hidden_size**-0.5, c.dtype)
        return tied_logits(self.embed, hidden) if c.tie_embeddings else self.head(hidden).astype(jnp.float32)

    def __call__(
        self, input_ids: jax.Array, decoder_input_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """Logits, float32 (B, T, V), of the target."""
        return self.logits(self.hidden(input_ids, decoder_input_ids, attention_mask))

    def empty_cache(self, batch: int, length: int) -> Cache:
        c = self.config
        return empty_cache(c, c.num_decoder_layers, batch, length, c.num_heads, c.head_dim)


@layout.register
def _(config: T5Config) -> Layout:
    """No prefix. The table of embeddings may be stored again for each side."""
    c, tensors = config, {"params/embed/embedding": Tensor(("shared.weight",))}
    for side, layers in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tensors[f"params/{side}/relative_bias/table/embedding"] = Tensor((table,))
        blocks = {"attention": "SelfAttention"} | ({"cross_attention": "EncDecAttention"} if side == "decoder" else {})
        for i in range(layers):
            ours, theirs = f"params/{side}/layer_{i}", f"{side}.block.{i}.layer"
            for j, (name, block) in enumerate(blocks.items()):
                norm = name.removesuffix("_attention") if j else name
                tensors[f"{ours}/{norm}_norm/scale"] = Tensor((f"{theirs}.{j}.layer_norm.weight",))
                for part in ("query", "key", "value", "output"):
                    tensor = Tensor((f"{theirs}.{j}.{block}.{part[0]}.weight",), "linear")
                    tensors[f"{ours}/{name}/{part}/kernel"] = tensor
            j = len(blocks)
            tensors[f"{ours}/ffn_norm/scale"] = Tensor((f"{theirs}.{j}.layer_norm.weight",))
            linears = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if c.gated else {"up": "wi", "down": "wo"}
            for name, short in linears.items():
                tensor = Tensor((f"{theirs}.{j}.DenseReluDense.{short}.weight",), "linear")
                tensors[f"{ours}/ffn/{name}/kernel"] = tensor
        tensors[f"params/{side}/norm/scale"] = Tensor((f"{side}.final_layer_norm.weight",))
    if not c.tie_embeddings:
        tensors["params/head/kernel"] = Tensor(("lm_head.weight",), "linear")
    tied = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"] + ["lm_head.weight"] * c.tie_embeddings
    return Layout(
        tensors,
        T5(c),
        (jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), jnp.int32)),
        unused=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
        tied=dict.fromkeys(tied, "shared.weight"),
        init_std=c.initializer_range,
    )


_REQUIRED = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_kv": "head_dim",
    "d_ff": "intermediate_size",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
}
_OPTIONAL = {
    "num_decoder_layers": "num_decoder_layers",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "norm_eps",
    "dropout_rate": "dropout",
    "decoder_start_token_id": "start_id",
}
