"""GPT-2: the golden's logits under every execution, its cache, and `transformers`. With LoRA: tests/test_golden.py."""

from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models

from lorajax.models import GPT2, GPT2Config, params_to_hf


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": "full"}], ids=["plain", "scan_remat"])
def test_logits_and_cache_equal_the_golden(options: dict[str, Any]) -> None:
    case = golden.load("lora_conv1d_gpt2", **options)
    model, expected = case.model, case.real(case.expected["logits_base"])
    golden.close(case.real(jax.jit(model.apply)(case.params, **case.inputs)), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(model, GPT2)
    step = jax.jit(lambda cache, **named: model.apply(case.params, cache=cache, method="decode", **named))
    cache, out = model.empty_cache(*case.inputs["input_ids"].shape), []
    for start, stop in ((0, 4), (4, 7), (7, case.inputs["input_ids"].shape[1])):
        logits, cache = step(cache, **{name: x[:, start:stop] for name, x in case.inputs.items()})
        out.append(logits)
    golden.close(case.real(jnp.concatenate(out, 1)), expected, atol=1e-4, rtol=1e-4)


def test_round_trip_and_errors() -> None:
    case = golden.load("lora_conv1d_gpt2")
    back = params_to_hf(case.model.config, case.params)  # type: ignore[attr-defined]
    assert back["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)
    with pytest.raises(ValueError, match="33 tokens; this model has 32 positions: truncate"):
        case.model.apply(case.params, jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx is true"):
        GPT2Config.from_hf({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True})


def test_dropout_acts_only_in_training() -> None:
    case = golden.load("lora_conv1d_gpt2", hidden_dropout=0.5, attention_dropout=0.5)
    training = GPT2(case.model.config, deterministic=False)  # type: ignore[attr-defined]
    train = jax.jit(lambda key: training.apply(case.params, **case.inputs, rngs={"dropout": key}))
    assert float(jnp.abs(train(jax.random.key(0)) - train(jax.random.key(1))).max()) > 0.1
    plain = jax.jit(case.model.apply)(case.params, **case.inputs)
    golden.close(case.real(plain), case.real(case.expected["logits_base"]), atol=1e-4, rtol=1e-4)


@pytest.mark.peft
@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_equals_transformers(tied: bool, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 61, "n_inner": 40,
             "tie_word_embeddings": tied}  # fmt: skip
    theirs = torch_models.build("AutoModelForCausalLM", "gpt2", **sizes)
    ids = np.random.default_rng(0).integers(3, 61, (2, 12))
    model, variables = torch_models.ours(theirs, tmp_path)
    want = torch_models.run(theirs, input_ids=ids)
    np.testing.assert_allclose(torch_models.apply(model, variables, jnp.asarray(ids)), want, atol=3e-5)
