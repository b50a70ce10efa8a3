"""One configuration for the Llama family of decoders, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorajax.models.rotary import Rope
from lorajax.models.settings import ACTIVATIONS, Execution, choice, read_keys

MEMBERS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma")
"""`model_type` of Hugging Face. Llama 1 to 3 and SmolLM2 are 'llama'."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Execution):
    """Architecture of `Llama`; how it is executed is in `Execution`. Field defaults are those of Llama 2 7B.

    num_kv_heads: fewer than num_heads for grouped-query, 1 for multi-query attention.
    query_bias, output_bias, mlp_bias: biases of the query, key and value projections (Qwen2), of the attention's
        output projection, and of the feed-forward layers.
    head_norm: RMS norm of each head's queries and keys (Qwen3).
    windows: for each layer the width of its sliding window, None = full attention; () = full attention everywhere.
    embedding_scale: the embeddings are multiplied by it (Gemma: sqrt(hidden_size)).
    norm_offset: 1.0 where norms multiply by 1 + scale (Gemma).
    experts, experts_per_token: with experts > 0 the feed-forward block is a Mixtral mixture; `dense_experts` computes
        every expert on every token instead of sorting.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    intermediate_size: int = 11008
    activation: str = "silu"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    rope: Rope = field(default_factory=Rope)
    query_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False
    windows: tuple[int | None, ...] = ()
    embedding_scale: float = 1.0
    tie_embeddings: bool = False
    experts: int = 0
    experts_per_token: int = 2
    dense_experts: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("activation (hidden_act)", self.activation, tuple(ACTIVATIONS))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of dimensions")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.num_layers} layers")
        if self.scan_layers and len(set(self.windows)) > 1:
            raise ValueError(f"scan_layers needs equal layers, these have windows {self.windows}: use per-layer trees")

    def window(self, layer: int) -> int | None:
        """Width of a layer's sliding window, None for full attention."""
        return self.windows[layer] if self.windows else None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> LlamaConfig:
        """Reads the dictionary of a Hugging Face `config.json`; `overrides` are fields of this class and win.

        Errors: ValueError for a `model_type`, activation or rope type that this model does not implement, and for a
        required key that is missing (each named); TypeError for an unknown override.
        """
        member = str(config.get("model_type"))
        choice("model_type", member, MEMBERS)
        fields = read_keys(config, _REQUIRED, _OPTIONAL)
        fields["num_kv_heads"] = config.get("num_key_value_heads") or fields["num_heads"]
        fields["head_dim"] = config.get("head_dim") or fields["hidden_size"] // fields["num_heads"]
        fields["rope"] = Rope.from_hf(config)
        fields["query_bias"] = bool(config.get("attention_bias", False)) or member == "qwen2"
        fields["output_bias"] = bool(config.get("attention_bias", False)) and member != "qwen2"
        fields["head_norm"] = member == "qwen3"
        fields["windows"] = _windows(config, member, fields["num_layers"])
        if member == "gemma":
            fields |= {"norm_offset": 1.0, "embedding_scale": fields["hidden_size"] ** 0.5}
            fields["tie_embeddings"] = bool(config.get("tie_word_embeddings", True))
            activation = config.get("hidden_activation") or fields["activation"]
            fields["activation"] = "gelu_pytorch_tanh" if activation == "gelu" else activation  # files of 2024 say so
        if member == "mixtral":
            fields["experts"] = config.get("num_local_experts", 8)
            fields["experts_per_token"] = config.get("num_experts_per_tok", 2)
        return cls(**(fields | overrides))


def _windows(config: Mapping[str, Any], member: str, layers: int) -> tuple[int | None, ...]:
    width, kinds = config.get("sliding_window"), config.get("layer_types")
    if not width or member in ("llama", "gemma") or not config.get("use_sliding_window", not member.startswith("qwen")):
        return ()
    if kinds:
        return tuple(width if kind == "sliding_attention" else None for kind in kinds)
    first = config.get("max_window_layers", 28) if member.startswith("qwen") else 0
    return tuple(width if layer >= first else None for layer in range(layers))


_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "activation",
    "rms_norm_eps": "norm_eps",
}
_OPTIONAL = {
    "mlp_bias": "mlp_bias",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initializer_range",
}
