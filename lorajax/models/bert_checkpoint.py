"""Checkpoints of BERT and RoBERTa. A classifier and BERT's pooler may be absent; heads of pretraining are dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lorajax.models.bert import Bert
from lorajax.models.bert_config import BertConfig
from lorajax.models.checkpoint import Layout, Tensor, layout, linears, norms

_LINEARS = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "ffn/up": "intermediate.dense",
    "ffn/down": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "ffn_norm": "output.LayerNorm"}
_TABLES = {"word": "word_embeddings", "position": "position_embeddings", "token_type": "token_type_embeddings"}


@layout.register
def _(config: BertConfig) -> Layout:
    """Names carry the prefix `bert.` or `roberta.`, LayerNorms their old or new names."""
    tensors = {
        f"params/embeddings/{ours}/embedding": Tensor((f"embeddings.{theirs}.weight",))
        for ours, theirs in _TABLES.items()
    } | norms({"params/embeddings/norm": "embeddings.LayerNorm"})
    for i in range(config.num_layers):
        ours, theirs = f"params/layer_{i}/", f"encoder.layer.{i}."
        tensors |= linears({ours + module: theirs + name for module, name in _LINEARS.items()})
        tensors |= norms({ours + module: theirs + name for module, name in _NORMS.items()})
    if config.has_pooler:
        tensors |= linears({"params/pooler": "pooler.dense"})
    heads = ("classifier/dense", "classifier/out_proj") if config.family == "roberta" else ("classifier",)
    tensors |= linears({f"params/{head}": head.replace("/", ".") for head in heads})
    return Layout(
        tensors,
        Bert(config),
        (jax.ShapeDtypeStruct((1, 2), jnp.int32),),
        prefix=f"{config.family}.",
        bare=r"classifier\..*",
        renames=((r"^(bert|roberta)\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"),
                 (r"LayerNorm\.beta$", "LayerNorm.bias")),
        unused=(r"embeddings\.position_ids", r"embeddings\.token_type_ids", r"cls\..*", r"lm_head\..*"),
        head=r"(pooler|classifier)\..*",
        init_std=config.initializer_range,
    )  # fmt: skip
