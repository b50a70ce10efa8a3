"""Whisper in plain Flax Linen (Radford et al. 2022, arXiv:2212.04356). Parameter tree:

    params/conv1/{kernel,bias}  params/conv2/{kernel,bias}               (width, in, out)
    params/source_positions/embedding   params/embed/embedding   params/positions/embedding
    params/{encoder,decoder}/layer_i/{attention_norm,cross_norm,ffn_norm}/{scale,bias}
    params/{encoder,decoder}/layer_i/{attention,cross_attention}/{query,key,value,output}/{kernel,bias}  key: no bias
    params/{encoder,decoder}/layer_i/ffn/{up,down}/{kernel,bias}
    params/{encoder,decoder}/norm/{scale,bias}                           the head is the table of embeddings

With `scan_layers` the layers of each side are one subtree `layers` whose leaves have a leading layer axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lorajax.models.attention import Attention
from lorajax.models.cache import Cache, empty_cache
from lorajax.models.checkpoint import Layout, Tensor, layout, linears, norms
from lorajax.models.decoder import tied_logits
from lorajax.models.encoder_decoder import EncoderDecoder, Stack
from lorajax.models.layers import Context, FeedForward
from lorajax.models.norms import LayerNorm
from lorajax.models.settings import ACTIVATIONS, Execution, choice, read_keys


@dataclass(frozen=True, kw_only=True)
class WhisperConfig(Execution):
    """Architecture of `Whisper`; how it is executed is in `Execution`. Field defaults are those of Whisper tiny.

    max_positions: of the encoder's frames, after the stride of 2. start_id: token that begins every target.
    """

    vocab_size: int = 51865
    mels: int = 80
    hidden_size: int = 384
    num_layers: int = 4
    num_decoder_layers: int = 4
    num_heads: int = 6
    num_decoder_heads: int = 6
    intermediate_size: int = 1536
    decoder_intermediate_size: int = 1536
    activation: str = "gelu"
    max_positions: int = 1500
    max_target_positions: int = 448
    norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    start_id: int = 50257
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("activation (activation_function)", self.activation, tuple(ACTIVATIONS))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> WhisperConfig:
        """Reads the dictionary of a Hugging Face `config.json`; `overrides` are fields of this class and win.

        `scale_embedding` is not read: no Whisper scales its embeddings, those of `transformers` with it neither.
        Errors: ValueError for an unknown activation and a missing key, named.
        """
        choice("model_type", str(config.get("model_type")), ("whisper",))
        return cls(**(read_keys(config, _REQUIRED, _OPTIONAL) | overrides))


class Whisper(EncoderDecoder):
    """Encoder and decoder with the head. Called as `model.apply(params, input_features, decoder_input_ids)`, with
    log-mel `input_features` (B, frames, mels): frames before channels, unlike Hugging Face's.
    """

    config: WhisperConfig

    def setup(self) -> None:
        c = self.config
        init, std = nn.initializers.normal(c.initializer_range), c.initializer_range
        norm = partial(LayerNorm, c, c.hidden_size, c.norm_eps)
        training = {"deterministic": self.deterministic}

        def attention(heads: int) -> Any:
            return partial(
                Attention, c, c.hidden_size, heads, heads, c.hidden_size // heads, (True, False, True, True), std,
                dropout=c.attention_dropout, **training,  # type: ignore[arg-type]
            )  # fmt: skip

        def fields(heads: int, inner: int) -> dict[str, Any]:
            ffn = partial(FeedForward, c, c.hidden_size, inner, c.activation, init_std=std)
            parts = {"make_norm": norm, "make_attention": attention(heads), "make_ffn": ffn}
            return {**parts, "dropout": c.dropout, **training}

        encoder, heads = fields(c.num_heads, c.intermediate_size), c.num_decoder_heads
        decoder = fields(heads, c.decoder_intermediate_size)
        decoder |= {"make_attention": partial(attention(heads), causal=True), "make_cross": attention(heads)}
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        conv = partial(nn.Conv, c.hidden_size, (3,), padding=1, kernel_init=init, **types)
        self.conv1, self.conv2 = conv(), conv(strides=(2,))
        self.source_positions, self.embed, self.positions = (
            nn.Embed(rows, c.hidden_size, param_dtype=c.param_dtype, embedding_init=init)
            for rows in (c.max_positions, c.vocab_size, c.max_target_positions)
        )
        self.encoder = Stack(c, c.num_layers, lambda _: encoder, norm)
        self.decoder = Stack(c, c.num_decoder_layers, lambda _: decoder, norm)
        self.drop = nn.Dropout(c.dropout, deterministic=self.deterministic)

    def encode(self, source: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """source: log-mel features (B, frames, mels) -> (B, frames / 2, D). attention_mask is not used."""
        act = ACTIVATIONS["gelu"]
        x = act(self.conv2(act(self.conv1(source.astype(self.config.dtype)))))
        if x.shape[1] > self.config.max_positions:
            limit = 2 * self.config.max_positions
            raise ValueError(f"{source.shape[1]} frames; this model has positions for {limit}: cut the sound in parts")
        positions = self.source_positions(jnp.arange(x.shape[1])[None, :])
        return self.encoder(self.drop(x + positions.astype(x.dtype)), Context())[0]

    def embedded(self, decoder_input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        self._fits(decoder_input_ids.shape[1])
        x = self.embed(decoder_input_ids).astype(jnp.float32) + self.positions(positions).astype(jnp.float32)
        return self.drop(x.astype(self.config.dtype))

    def logits(self, hidden: jax.Array) -> jax.Array:
        return tied_logits(self.embed, hidden)

    def __call__(self, input_features: jax.Array, decoder_input_ids: jax.Array) -> jax.Array:
        """Logits, float32 (B, T, V), of the target."""
        return self.logits(self.hidden(input_features, decoder_input_ids))

    def empty_cache(self, batch: int, length: int) -> Cache:
        c = self.config
        self._fits(length)
        heads = c.num_decoder_heads
        return empty_cache(c, c.num_decoder_layers, batch, length, heads, c.hidden_size // heads)

    def _fits(self, length: int) -> None:
        limit = self.config.max_target_positions
        if length > limit:
            raise ValueError(f"target of {length} tokens; this model has {limit} positions: truncate")


@layout.register
def _(config: WhisperConfig) -> Layout:
    """Names carry the prefix `model.`, other than the tied head's."""
    c = config
    tensors = linears({"params/conv1": "encoder.conv1", "params/conv2": "encoder.conv2"}, kernel="conv")
    tables = {"source_positions": "encoder.embed_positions", "embed": "decoder.embed_tokens"}
    tables["positions"] = "decoder.embed_positions"
    tensors |= {f"params/{ours}/embedding": Tensor((f"{theirs}.weight",)) for ours, theirs in tables.items()}
    for side, layers in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        blocks = {"attention": "self_attn"} | ({"cross_attention": "encoder_attn"} if side == "decoder" else {})
        for i in range(layers):
            ours, theirs = f"params/{side}/layer_{i}", f"{side}.layers.{i}"
            for name, block in blocks.items():
                norm = "attention_norm" if name == "attention" else "cross_norm"
                tensors |= norms({f"{ours}/{norm}": f"{theirs}.{block}_layer_norm"})
                for part, short in {"query": "q", "key": "k", "value": "v", "output": "out"}.items():
                    tensors |= linears({f"{ours}/{name}/{part}": f"{theirs}.{block}.{short}_proj"})
                del tensors[f"{ours}/{name}/key/bias"]
            tensors |= norms({f"{ours}/ffn_norm": f"{theirs}.final_layer_norm"})
            tensors |= linears({f"{ours}/ffn/up": f"{theirs}.fc1", f"{ours}/ffn/down": f"{theirs}.fc2"})
        tensors |= norms({f"params/{side}/norm": f"{side}.layer_norm"})
    return Layout(
        tensors,
        Whisper(c),
        (jax.ShapeDtypeStruct((1, 4, c.mels), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)),
        prefix="model.",
        bare=r"proj_out\..*",
        tied={"proj_out.weight": "decoder.embed_tokens.weight"},
        init_std=c.initializer_range,
    )


_REQUIRED = {
    "vocab_size": "vocab_size",
    "num_mel_bins": "mels",
    "d_model": "hidden_size",
    "encoder_layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "encoder_attention_heads": "num_heads",
    "decoder_attention_heads": "num_decoder_heads",
    "encoder_ffn_dim": "intermediate_size",
    "decoder_ffn_dim": "decoder_intermediate_size",
    "max_source_positions": "max_positions",
    "max_target_positions": "max_target_positions",
}
_OPTIONAL = {
    "activation_function": "activation",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "decoder_start_token_id": "start_id",
    "init_std": "initializer_range",
}
