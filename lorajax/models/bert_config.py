"""One configuration for the BERT and RoBERTa family of encoders, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorajax.models.settings import ACTIVATIONS, Execution, choice, number_of_labels, read_keys

FAMILIES: Mapping[str, str] = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta"}
"""`model_type` of Hugging Face -> family, which decides the position rule, the head and the names in a checkpoint."""

@dataclass(frozen=True, kw_only=True)
class BertConfig(Execution):
    """Architecture of `Bert`; how it is executed is in `Execution`. Field defaults are those of bert-base-uncased.

    family: 'bert' or 'roberta'.
    pooling: 'first' (first token) or 'mean' (over unmasked tokens). With family 'bert', 'first' goes through the
        pooler (dense + tanh), 'mean' has no pooler. With 'roberta' either goes through the head's own dense + tanh.
    num_labels: width of the head; 1 is regression.
    attention_dropout: needs the probabilities, so a training pass with it does not use the fused kernels.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("family", self.family, ("bert", "roberta"))
        choice("pooling", self.pooling, ("first", "mean"))
        choice("activation (hidden_act)", self.activation, tuple(ACTIVATIONS))
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
        choice("model_type", model_type, tuple(FAMILIES))
        if config.get("position_embedding_type", "absolute") != "absolute":
            kind = config["position_embedding_type"]
            raise ValueError(f"position_embedding_type {kind!r} is not implemented; this model has: 'absolute'")
        for switch in ("is_decoder", "add_cross_attention"):
            if config.get(switch):
                raise ValueError(f"{switch} is true in this config.json; this model is an encoder only")
        fields = read_keys(config, _HF_KEYS, _HF_OPTIONAL)
        fields |= {"family": FAMILIES[model_type], "num_labels": number_of_labels(config)}
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
