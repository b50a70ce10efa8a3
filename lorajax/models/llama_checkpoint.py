"""Checkpoints of the Llama family. Kernels are (out, in) there; Mixtral's experts are one tensor each."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lorajax.models.checkpoint import Fused, Layout, Tensor, layout
from lorajax.models.llama import Llama
from lorajax.models.llama_config import LlamaConfig

_EXPERTS = {"gate": "w1", "up": "w3", "down": "w2"}


@layout.register
def _(config: LlamaConfig) -> Layout:
    """Names carry the prefix `model.`, other than the head's. The head may be stored although it is tied."""
    c, tensors = config, {"params/embed/embedding": Tensor(("embed_tokens.weight",))}

    def linear(ours: str, theirs: str, bias: bool) -> None:
        tensors[f"{ours}/kernel"] = Tensor((f"{theirs}.weight",), "linear")
        if bias:
            tensors[f"{ours}/bias"] = Tensor((f"{theirs}.bias",))

    for i in range(c.num_layers):
        ours, theirs = f"params/layer_{i}", f"layers.{i}"
        tensors[f"{ours}/attention_norm/scale"] = Tensor((f"{theirs}.input_layernorm.weight",))
        for name, short in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
            bias = c.output_bias if name == "output" else c.query_bias
            linear(f"{ours}/attention/{name}", f"{theirs}.self_attn.{short}_proj", bias)
        if c.head_norm:
            for name, short in {"query": "q", "key": "k"}.items():
                tensors[f"{ours}/attention/{name}_norm/scale"] = Tensor((f"{theirs}.self_attn.{short}_norm.weight",))
        tensors[f"{ours}/ffn_norm/scale"] = Tensor((f"{theirs}.post_attention_layernorm.weight",))
        if c.experts:
            block = f"{theirs}.block_sparse_moe"
            linear(f"{ours}/ffn/router", f"{block}.gate", False)
            for name, short in _EXPERTS.items():
                names = tuple(f"{block}.experts.{e}.{short}.weight" for e in range(c.experts))
                whole = (f"{theirs}.mlp.experts.{'down_proj' if name == 'down' else 'gate_up_proj'}",)
                fused = Fused(whole) if name == "down" else Fused(whole, int(name == "up"), 2)
                tensors[f"{ours}/ffn/{name}/kernel"] = Tensor(names, "linear", True, fused)
        else:
            for name in ("gate", "up", "down"):
                linear(f"{ours}/ffn/{name}", f"{theirs}.mlp.{name}_proj", c.mlp_bias)
    tensors["params/norm/scale"] = Tensor(("norm.weight",))
    if not c.tie_embeddings:
        linear("params/head", "lm_head", False)
    return Layout(
        tensors,
        Llama(c),
        (jax.ShapeDtypeStruct((1, 2), jnp.int32),),
        prefix="model.",
        bare=r"lm_head\..*",
        modules=((r"block_sparse_moe\.gate$", "mlp.gate"),),
        unused=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
        tied={"lm_head.weight": "embed_tokens.weight"} if c.tie_embeddings else {},
        init_std=c.initializer_range,
    )
