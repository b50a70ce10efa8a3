"""DeBERTa-v3: `transformers`, an attention score by hand, execution options, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models

from lorajax.models import Deberta, DebertaConfig, params_from_hf, params_to_hf, unstack_layers
from lorajax.models.deberta import DisentangledAttention, distances

V3: dict[str, Any] = {
    "model_type": "deberta-v2", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "hidden_act": "gelu", "relative_attention": True, "share_att_key": True,
    "position_biased_input": False, "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "position_buckets": 4,
    "max_relative_positions": -1, "max_position_embeddings": 16, "type_vocab_size": 0, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.peft
def test_deberta_equals_transformers(tmp_path: Path) -> None:
    settings = {name: value for name, value in V3.items() if name != "model_type"}
    settings |= {"num_labels": 3, "max_position_embeddings": 8}  # so short that distances are clipped
    settings |= {"pooler_hidden_act": "tanh"}
    theirs = torch_models.build("AutoModelForSequenceClassification", "deberta-v2", **settings)
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(1, 61, (2, 14)), np.ones((2, 14), np.int64)
    mask[1, 9:] = 0
    model, variables = torch_models.ours(theirs, tmp_path)
    want = torch_models.run(theirs, input_ids=ids, attention_mask=mask)
    assert want.std() > 0.1
    have = torch_models.apply(model, variables, jnp.asarray(ids), jnp.asarray(mask))
    np.testing.assert_allclose(have, want, atol=2e-5)


def test_disentangled_attention_by_hand() -> None:
    """Equation 4 of arXiv:2006.03654 in loops, distances short enough to be their own buckets."""
    config = DebertaConfig(vocab_size=5, hidden_size=6, num_layers=1, num_heads=2, intermediate_size=4, buckets=8,
                           max_distance=16)  # fmt: skip
    module, t = DisentangledAttention(config, True), 4
    x, positions = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((0, (1, t, 6)), (1, (16, 6))))
    mask = jnp.ones((1, 1, 1, t), bool)
    variables = golden.variables(module, x, mask, positions, scale=0.5)
    have = jax.jit(module.apply)(variables, x, mask, positions)
    layers = {name: jax.tree.map(np.asarray, part) for name, part in variables["params"].items()}

    def by(name: str, x: Any) -> np.ndarray:
        return x @ layers[name]["kernel"] + layers[name]["bias"]

    x_, r, out = np.asarray(x[0]), np.asarray(positions), np.zeros((t, 6))
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        q, k, v = (by(name, x_)[:, part] for name in ("query", "key", "value"))
        rq, rk = (by(name, r)[:, part] for name in ("query", "key"))
        score = [[q[i] @ k[j] + q[i] @ rk[8 + i - j] + k[j] @ rq[8 + i - j] for j in range(t)] for i in range(t)]
        weights = np.exp(np.asarray(score) / np.sqrt(9))
        out[:, part] = weights / weights.sum(1, keepdims=True) @ v
    np.testing.assert_allclose(have[0], by("output", out), atol=1e-5)


def test_distances_are_logarithmic_and_antisymmetric() -> None:
    config = DebertaConfig(buckets=8, max_distance=16)
    row = distances(config, 40)[:, 0]
    np.testing.assert_array_equal(row[:5], [0, 1, 2, 3, 4])
    assert row[15] == 7 and (np.diff(row) >= 0).all()
    np.testing.assert_array_equal(distances(config, 40), -distances(config, 40).T)


def test_options_and_checkpoint() -> None:
    config = DebertaConfig.from_hf(V3, num_labels=1, scan_layers=True, remat="full")
    ids = jax.random.randint(jax.random.key(0), (2, 9), 1, 61)
    variables = golden.variables(Deberta(config), ids)
    plain = dataclasses.replace(config, scan_layers=False, remat="none")
    want = jax.jit(Deberta(plain).apply)(unstack_layers(variables), ids)
    np.testing.assert_allclose(jax.jit(Deberta(config).apply)(variables, ids), want, atol=1e-5)
    tensors = params_to_hf(config, variables)
    assert "deberta.encoder.layer.1.attention.self.query_proj.weight" in tensors
    again = params_from_hf(config, tensors).variables
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    bare = {name: x for name, x in tensors.items() if name.startswith("deberta.")}
    loaded = params_from_hf(plain, bare | {"lm_predictions.lm_head.bias": np.zeros(61)}, jax.random.key(0))
    assert len(loaded.fresh) == 4 and loaded.ignored == ("lm_predictions.lm_head.bias",)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"conv_kernel_size": 3}, "no conv_kernel_size"), ({"share_att_key": False}, "which has share_att_key")],
)
def test_a_deberta_v2_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DebertaConfig.from_hf(V3 | change)
