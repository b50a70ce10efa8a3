"""One configuration for the BERT and RoBERTa family of encoders, read from a Hugging Face `config.json`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""`hidden_act` names of Hugging Face; `gelu` is the exact one (erf)."""

FAMILIES: Mapping[str, str] = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta"}
"""`model_type` of Hugging Face -> family, which decides the position rule, the head and the names in a checkpoint."""

REMAT_POLICIES = (
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
)


@dataclass(frozen=True)
class BertConfig:
    """Architecture and execution choices of `Bert`. Field defaults are those of bert-base-uncased.

    family: 'bert' or 'roberta'.
    pooling: 'first' (first token) or 'mean' (over unmasked tokens). With family 'bert', 'first' goes through the
        pooler (dense + tanh), 'mean' has no pooler. With 'roberta' either goes through the head's own dense + tanh.
    num_labels: width of the head; 1 is regression.
    dtype: computation dtype of the matrix products; LayerNorm, softmax and the last linear layer run in float32.
    param_dtype: dtype of the stored parameters.
    scan_layers: one stacked tree `layers` (leading axis = layer) run by `lax.scan`, instead of `layer_0`, `layer_1`...
    remat: 'none', 'full', or a name in `jax.checkpoint_policies` (see `REMAT_POLICIES`), applied to each layer.
    attention: implementation given to `jax.nn.dot_product_attention`: None (JAX chooses), 'xla' or 'cudnn'. Attention
        dropout needs the probabilities, so a training pass with `attention_dropout` > 0 does not use it.
    """

    family: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    activation: str = "gelu"
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_id: int = 0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float | None = None
    initializer_range: float = 0.02
    num_labels: int = 2
    pooling: str = "first"
    dtype: Any = field(default=jnp.float32)
    param_dtype: Any = field(default=jnp.float32)
    scan_layers: bool = False
    remat: str = "none"
    attention: Literal["xla", "cudnn"] | None = None

    def __post_init__(self) -> None:
        _choice("family", self.family, ("bert", "roberta"))
        _choice("pooling", self.pooling, ("first", "mean"))
        _choice("activation (hidden_act)", self.activation, tuple(ACTIVATIONS))
        _choice("remat", self.remat, ("none", "full", *REMAT_POLICIES))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @property
    def position_offset(self) -> int:
        """First position id of a sequence: 0 for BERT, pad_id + 1 for RoBERTa."""
        return self.pad_id + 1 if self.family == "roberta" else 0

    @property
    def max_length(self) -> int:
        """Longest sequence that has position embeddings: max_positions - position_offset."""
        return self.max_positions - self.position_offset

    @property
    def has_pooler(self) -> bool:
        """True where the model owns BERT's pooler (dense + tanh on the first token)."""
        return self.family == "bert" and self.pooling == "first"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> BertConfig:
        """Reads the dictionary of a Hugging Face `config.json`; `overrides` are fields of this class and win.

        `num_labels` comes from `num_labels` or `id2label`, otherwise it is 2.
        Errors: ValueError for a `model_type`, activation or position embedding that this model does not implement, for
        a decoder, and for a required key that is missing (each named); TypeError for an unknown override.
        """
        model_type = str(config.get("model_type"))
        if model_type not in FAMILIES:
            raise ValueError(_unknown("model_type", model_type, tuple(FAMILIES)))
        if config.get("position_embedding_type", "absolute") != "absolute":
            kind = config["position_embedding_type"]
            raise ValueError(f"position_embedding_type {kind!r} is not implemented; this model has: 'absolute'")
        for switch in ("is_decoder", "add_cross_attention"):
            if config.get(switch):
                raise ValueError(f"{switch} is true in this config.json; this model is an encoder only")
        missing = sorted(key for key in _HF_KEYS if key not in config)
        if missing:
            raise ValueError(f"config.json lacks {missing}; it has {sorted(config)}")
        fields: dict[str, Any] = {ours: config[theirs] for theirs, ours in _HF_KEYS.items()}
        fields |= {ours: config[theirs] for theirs, ours in _HF_OPTIONAL.items() if config.get(theirs) is not None}
        labels = config.get("num_labels") or len(config.get("id2label") or ()) or 2
        fields |= {"family": FAMILIES[model_type], "num_labels": labels}
        return cls(**(fields | overrides))


_HF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "activation",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab_size",
    "pad_token_id": "pad_id",
}
_HF_OPTIONAL = {
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "head_dropout",
    "initializer_range": "initializer_range",
}


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(_unknown(name, value, known))


def _unknown(name: str, value: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{name} {value!r} is not implemented; this model has: {', '.join(known)}{hint}"
