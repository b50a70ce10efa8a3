"""GPT-2 in plain Flax Linen (Radford et al. 2019). Parameter tree:

    params/embed/embedding      params/positions/embedding
    params/layer_i/{attention_norm,ffn_norm}/{scale,bias}
    params/layer_i/attention/{query_key_value,output}/{kernel,bias}      one kernel (D, 3 D), as it is stored
    params/layer_i/ffn/{up,down}/{kernel,bias}
    params/norm/{scale,bias}    params/head/kernel     unless the head is the table of embeddings

With `scan_layers` the layers are one subtree `params/layers` whose leaves have a leading layer axis.
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
from lorajax.models.decoder import CausalLM
from lorajax.models.layers import FeedForward, add_layers
from lorajax.models.norms import LayerNorm
from lorajax.models.settings import ACTIVATIONS, Execution, choice, looked_up, read_keys


@dataclass(frozen=True, kw_only=True)
class GPT2Config(Execution):
    """Architecture of `GPT2`; how it is executed is in `Execution`. Field defaults are those of the smallest GPT-2.

    hidden_dropout acts after the embeddings and each block; attention_dropout needs the probabilities, so a training
    pass with it does not use the fused kernels.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    activation: str = "gelu_new"
    max_positions: int = 1024
    norm_eps: float = 1e-5
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("activation (activation_function)", self.activation, tuple(ACTIVATIONS))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> GPT2Config:
        """Reads the dictionary of a Hugging Face `config.json`; `overrides` are fields of this class and win.

        Errors: ValueError for a switch that this model does not implement, an unknown activation and a missing key.
        """
        choice("model_type", str(config.get("model_type")), ("gpt2",))
        for switch in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if config.get(switch):
                raise ValueError(f"{switch} is true in this config.json; this GPT-2 does not implement it")
        if not config.get("scale_attn_weights", True):
            raise ValueError("scale_attn_weights is false in this config.json; this GPT-2 scales by sqrt(head size)")
        fields = read_keys(config, _REQUIRED, _OPTIONAL)
        fields["intermediate_size"] = config.get("n_inner") or 4 * fields["hidden_size"]
        return cls(**(fields | overrides))


class GPT2(CausalLM):
    """The decoder with its head."""

    config: GPT2Config

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        norm = partial(LayerNorm, c, c.hidden_size, c.norm_eps)
        attention = partial(
            Attention, c, c.hidden_size, c.num_heads, c.num_heads, c.hidden_size // c.num_heads, fused=True,
            init_std=c.initializer_range, causal=True, dropout=c.attention_dropout,
            deterministic=self.deterministic,
        )  # fmt: skip
        sizes = (c, c.hidden_size, c.intermediate_size, c.activation)
        fields: dict[str, Any] = {
            "make_norm": norm,
            "make_attention": attention,
            "make_ffn": partial(FeedForward, *sizes, init_std=c.initializer_range),
            "dropout": c.hidden_dropout,
            "deterministic": self.deterministic,
        }
        self.embed, self.positions = (
            nn.Embed(rows, c.hidden_size, param_dtype=c.param_dtype, embedding_init=init)
            for rows in (c.vocab_size, c.max_positions)
        )
        self.drop = nn.Dropout(c.hidden_dropout, deterministic=self.deterministic)
        add_layers(self, c, c.num_layers, lambda _: fields)
        self.norm = norm()
        if not c.tie_embeddings:
            types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
            self.head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=init, **types)

    def embedded(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        self._fits(input_ids.shape[1])
        x = looked_up(self.config, self.embed, input_ids).astype(jnp.float32)
        x = x + self.positions(positions).astype(jnp.float32)
        return self.drop(x.astype(self.config.dtype))

    def empty_cache(self, batch: int, length: int) -> Cache:
        c = self.config
        self._fits(length)
        return empty_cache(c, c.num_layers, batch, length, c.num_heads, c.hidden_size // c.num_heads)

    def _fits(self, length: int) -> None:
        limit = self.config.max_positions
        if length > limit:
            raise ValueError(f"sequence of {length} tokens; this model has {limit} positions: truncate")


@layout.register
def _(config: GPT2Config) -> Layout:
    """Conv1D weights are (in, out), as here. The causal masks of old files are dropped."""
    tensors = {"params/embed/embedding": Tensor(("wte.weight",)), "params/positions/embedding": Tensor(("wpe.weight",))}
    modules = {"attention/query_key_value": "attn.c_attn", "attention/output": "attn.c_proj"}
    modules |= {"ffn/up": "mlp.c_fc", "ffn/down": "mlp.c_proj"}
    for i in range(config.num_layers):
        ours, theirs = f"params/layer_{i}/", f"h.{i}."
        tensors |= norms({f"{ours}attention_norm": f"{theirs}ln_1", f"{ours}ffn_norm": f"{theirs}ln_2"})
        tensors |= linears({ours + module: theirs + name for module, name in modules.items()}, kernel="same")
    tensors |= norms({"params/norm": "ln_f"})
    if not config.tie_embeddings:
        tensors["params/head/kernel"] = Tensor(("lm_head.weight",), "linear")
    return Layout(
        tensors,
        GPT2(config),
        (jax.ShapeDtypeStruct((1, 2), jnp.int32),),
        prefix="transformer.",
        bare=r"lm_head\..*",
        unused=(r"h\.\d+\.attn\.(masked_)?bias",),
        tied={"lm_head.weight": "wte.weight"} if config.tie_embeddings else {},
        init_std=config.initializer_range,
    )


_REQUIRED = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_positions": "max_positions",
    "activation_function": "activation",
}
_OPTIONAL = {
    "layer_norm_epsilon": "norm_eps",
    "resid_pdrop": "hidden_dropout",
    "attn_pdrop": "attention_dropout",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_embeddings",
}
