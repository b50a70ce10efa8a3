"""T5, mT5 and Whisper: the goldens with LoRA, decoding with a cache, and `transformers`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models

from lorajax.models import T5, T5Config, Whisper, WhisperConfig, params_from_hf, params_to_hf, unstack_layers
from lorajax.variants import LoRA


def test_lora_on_t5() -> None:
    golden.load("lora_t5_regex").check(LoRA(rank=3, alpha=9.0))


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": "full"}], ids=["plain", "scan_remat"])
def test_t5_logits_and_cache_equal_the_golden(options: dict[str, Any]) -> None:
    case = golden.load("lora_t5_regex", **options)
    model, inputs, expected = case.model, case.inputs, case.expected["logits_base"]
    golden.close(jax.jit(model.apply)(case.params, **inputs), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(model, T5)
    ids, mask = inputs["decoder_input_ids"], inputs["attention_mask"]
    source = jax.jit(partial(model.apply, method="encode"))(case.params, inputs["input_ids"], mask)
    decode = jax.jit(lambda ids, cache, **named: model.apply(case.params, ids, cache, method="decode", **named))
    cache = model.empty_cache(ids.shape[0], ids.shape[1] + 3)
    first, cache = decode(ids[:, :2], cache, source=source, source_mask=mask)
    out = [first]
    for i in range(2, ids.shape[1]):
        logits, cache = decode(ids[:, i : i + 1], cache)
        out.append(logits)
    golden.close(jnp.concatenate(out, 1), expected, atol=1e-4, rtol=1e-4)


def test_t5_tensors_are_all_accounted_for() -> None:
    case = golden.load("lora_t5_regex")
    config = case.model.config  # type: ignore[attr-defined]
    tensors = params_to_hf(config, case.params)
    copy = {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    assert params_from_hf(config, tensors | copy).ignored == ("encoder.embed_tokens.weight",)
    with pytest.raises(ValueError, match="'lm_head.weight' differs from 'shared.weight'"):
        params_from_hf(config, tensors | {"lm_head.weight": tensors["shared.weight"] + 1})


T5_SIZES = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
            "vocab_size": 61, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}  # fmt: skip


@pytest.mark.peft
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("t5", {}),
        ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
        ("mt5", {"feed_forward_proj": "gated-gelu"}),
    ],
    ids=["t5", "t5_v1_1", "mt5"],
)
def test_t5_equals_transformers(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = torch_models.build("AutoModelForSeq2SeqLM", kind, **T5_SIZES, **settings)
    rng = np.random.default_rng(0)
    ids, mask, target = rng.integers(2, 61, (2, 15)), np.ones((2, 15), np.int64), rng.integers(2, 61, (2, 13))
    mask[1, 9:] = 0
    model, variables = torch_models.ours(theirs, tmp_path)
    want = torch_models.run(theirs, input_ids=ids, attention_mask=mask, decoder_input_ids=target)
    have = torch_models.apply(model, variables, jnp.asarray(ids), jnp.asarray(target), jnp.asarray(mask))
    np.testing.assert_allclose(have, want, atol=5e-5)


def test_an_untied_head_of_an_old_configuration() -> None:
    """transformers 4 wrote v1.1 like this: a head of its own, outputs not scaled."""
    old = {"model_type": "t5", **T5_SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    config = T5Config.from_hf(old)
    assert (config.gated, config.activation) == (True, "gelu_new")
    assert not config.tie_embeddings and not config.scale_outputs
    assert jax.eval_shape(T5(config).init, jax.random.key(0), *[jnp.zeros((1, 2), jnp.int32)] * 2)["params"]["head"]


@pytest.mark.peft
def test_whisper_equals_transformers(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 48, "num_mel_bins": 8,
             "max_source_positions": 10, "max_target_positions": 12, "vocab_size": 61, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "scale_embedding": True}  # fmt: skip
    theirs = torch_models.build("AutoModelForSpeechSeq2Seq", "whisper", **sizes)
    rng = np.random.default_rng(0)
    sound, target = rng.normal(size=(2, 8, 20)).astype(np.float32), rng.integers(2, 61, (2, 7))
    model, variables = torch_models.ours(theirs, tmp_path)
    want = torch_models.run(theirs, input_features=sound, decoder_input_ids=target)
    features = jnp.asarray(sound.transpose(0, 2, 1))
    np.testing.assert_allclose(torch_models.apply(model, variables, features, jnp.asarray(target)), want, atol=5e-5)


def test_whisper_cache_and_scan_give_the_same_logits() -> None:
    config = WhisperConfig(vocab_size=31, mels=4, hidden_size=16, num_layers=2, num_decoder_layers=2, num_heads=2,
                           num_decoder_heads=2, intermediate_size=24, decoder_intermediate_size=24, max_positions=6,
                           max_target_positions=8, scan_layers=True)  # fmt: skip
    model, features = Whisper(config), jax.random.normal(jax.random.key(0), (2, 12, 4))
    ids = jax.random.randint(jax.random.key(1), (2, 5), 0, 31)
    variables = golden.variables(model, features, ids)
    expected = jax.jit(model.apply)(variables, features, ids)
    plain = jax.jit(Whisper(replace(config, scan_layers=False)).apply)(unstack_layers(variables), features, ids)
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    apply = jax.jit(model.apply, static_argnames="method")
    source = apply(variables, features, method="encode")
    first, cache = apply(variables, ids[:, :3], model.empty_cache(2, 8), source=source, method="decode")
    second, cache = apply(variables, ids[:, 3:], cache, method="decode")
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), expected, atol=1e-5)
    with pytest.raises(ValueError, match="14 frames; this model has positions for 12"):
        model.apply(variables, jnp.zeros((1, 14, 4)), ids)
