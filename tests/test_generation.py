"""Generation: greedy, restricted sampling, n-grams by hand; greedy and beam search against `transformers`."""

from functools import partial
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models

import lorajax as lj
from lorajax.models.generation import beam_search, generate, repeated, restricted
from lorajax.variants import LoRA


def decoder(model: Any, variables: Any) -> Any:
    return lambda ids, cache, **named: model.apply(variables, ids, cache, method="decode", **named)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_greedy_is_the_likeliest_token_each_time(scan_layers: bool) -> None:
    """Against the model without cache on the growing text; one row ends early and is padded."""
    case = golden.load("lora_qv_llama", scan_layers=scan_layers)
    model: Any = case.model
    prompt = case.inputs["input_ids"][:2, :4]
    texts, plain = prompt, jax.jit(model.apply)
    for _ in range(6):
        wide = jnp.pad(texts, ((0, 0), (0, 10 - texts.shape[1])))
        texts = jnp.concatenate([texts, plain(case.params, wide)[:, texts.shape[1] - 1].argmax(-1)[:, None]], 1)
    want = np.array(texts[:, 4:])
    eos = int(want[0, 2])
    for row in want:
        ends = np.flatnonzero(row == eos)
        row[ends[0] + 1 if len(ends) else 6 :] = 95
    decode = decoder(model, case.params)

    @jax.jit
    def run(prompt: jax.Array) -> jax.Array:
        logits, cache = decode(prompt, model.empty_cache(2, 10))
        return generate(decode, cache, logits[:, -1], max_new=6, eos_id=eos, pad_id=95)

    np.testing.assert_array_equal(run(prompt), want)
    assert (want == 95).any()


def test_sampling_is_restricted_and_follows_the_key() -> None:
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]]))
    np.testing.assert_array_equal(restricted(logits, top_k=2)[0] > -jnp.inf, [True, True, False, False])
    np.testing.assert_array_equal(restricted(logits, top_p=0.6)[0] > -jnp.inf, [True, True, False, False])
    np.testing.assert_array_equal(restricted(logits, top_p=0.4)[0] > -jnp.inf, [True, False, False, False])
    many = jnp.broadcast_to(logits, (4000, 4))

    def draw(seed: int, **named: Any) -> jax.Array:
        cache: Any = jnp.zeros(())
        return generate(lambda ids, cache: (many[:, None], cache), cache, many, max_new=1, key=jax.random.key(seed),
                        **named)[:, 0]  # fmt: skip

    share = np.bincount(draw(0), minlength=4) / 4000
    np.testing.assert_allclose(share, [0.5, 0.25, 0.15, 0.1], atol=0.03)
    hot = np.bincount(draw(0, temperature=0.5, top_k=2), minlength=4) / 4000
    np.testing.assert_allclose(hot, [0.8, 0.2, 0, 0], atol=0.03)
    assert (draw(0) != draw(1)).any() and (draw(0) == draw(0)).all()


def test_repeated_runs_are_found() -> None:
    tokens = jnp.asarray([[1, 2, 3, 1, 2, 9, 9], [4, 4, 4, 4, 4, 9, 9]])
    banned = repeated(tokens, jnp.asarray(5), 3, 10)
    np.testing.assert_array_equal(np.flatnonzero(banned[0]), [3])  # 1 2 3 is there, the text ends with 1 2
    np.testing.assert_array_equal(np.flatnonzero(banned[1]), [4])
    assert not repeated(tokens, jnp.asarray(2), 3, 10).any()


def test_an_adapter_generates_as_the_merged_model_does() -> None:
    """The lifted model is decoded inside the loop; beams and sampling take the same `decode`."""
    case = golden.load("lora_qv_llama")
    model: Any = case.model
    adapt = case.adapt(LoRA(rank=4, alpha=8.0))
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), case.params)
    trainable = case.adapters(LoRA(rank=4, alpha=8.0), case.tensors(), trainable)
    prompt = case.inputs["input_ids"][:2, :4]
    step = partial(model.apply, method="decode")

    def run(decode: Any) -> jax.Array:
        logits, cache = decode(prompt, model.empty_cache(2, 9))
        return generate(decode, cache, logits[:, -1], max_new=5)

    def lifted(trainable: Any) -> jax.Array:
        return run(partial(lj.lift(step, strict=True), adapt.bind(trainable, frozen)))

    have = jax.jit(lifted)(trainable)
    np.testing.assert_array_equal(have, jax.jit(lambda tr: run(partial(step, adapt.merge(tr, frozen))))(trainable))
    assert (have != jax.jit(lambda v: run(partial(step, v)))(case.params)).any()


# --- against transformers ---

SIZES = {"vocab_size": 23, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0, "head_dim": 8}  # fmt: skip
BEAMS: dict[str, dict[str, Any]] = {
    "e2e": {"num_beams": 5, "length_penalty": 0.8, "no_repeat_ngram_size": 4},
    "early": {"num_beams": 3, "length_penalty": 1.5, "early_stopping": True},
    "short": {"num_beams": 2, "length_penalty": 0.0, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, np.ndarray, np.ndarray]:
    theirs = torch_models.build("AutoModelForCausalLM", "llama", **SIZES)
    import torch

    with torch.no_grad():
        theirs.lm_head.weight.mul_(2.0)  # spread, so that beams differ, and ends that come now and then
    ids, mask = np.random.default_rng(3).integers(3, 23, (3, 6)), np.ones((3, 6), np.int64)
    ids[1, :2], mask[1, :2] = 0, 0
    return (theirs, *torch_models.ours(theirs, tmp_path_factory.mktemp("llama")), ids, mask)


def text(row: np.ndarray, end: int = 2) -> list[int]:
    """Up to the end token."""
    kept = [int(token) for token in row]
    return kept[: kept.index(end) + 1] if end in kept else kept


@pytest.mark.peft
def test_greedy_equals_transformers(llama: Any) -> None:
    import torch

    theirs, model, variables, ids, mask = llama
    want = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=9, do_sample=False)
    decode = decoder(model, variables)
    logits, cache = decode(jnp.asarray(ids), model.empty_cache(3, 15), attention_mask=jnp.asarray(mask))
    have = jax.jit(lambda c, x: generate(decode, c, x, max_new=9, eos_id=2))(cache, logits[:, -1])
    for ours, row in zip(np.asarray(have), want.numpy()[:, 6:], strict=True):
        assert text(ours) == text(row)


@pytest.mark.peft
@pytest.mark.parametrize("name", BEAMS)
def test_beam_search_equals_transformers(llama: Any, name: str) -> None:
    import torch

    theirs, model, variables, ids, mask = llama
    settings = BEAMS[name]
    want = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=9, do_sample=False,
                           output_scores=True, return_dict_in_generate=True, **settings)  # fmt: skip
    decode = decoder(model, variables)
    logits, cache = decode(jnp.asarray(ids), model.empty_cache(3, 15), attention_mask=jnp.asarray(mask))
    tokens, scores = jax.jit(
        lambda cache, logits: beam_search(
            decode, cache, logits, max_new=9, beams=settings["num_beams"], eos_id=2, prompt=jnp.asarray(ids),
            length_penalty=settings["length_penalty"], early_stopping=settings.get("early_stopping", False),
            no_repeat_ngram=settings.get("no_repeat_ngram_size", 0),
        )
    )(cache, logits[:, -1])  # fmt: skip
    np.testing.assert_allclose(scores, want.sequences_scores.numpy(), atol=1e-4)
    for ours, row in zip(np.asarray(tokens), want.sequences.numpy()[:, 6:], strict=True):
        assert text(ours) == text(row)


@pytest.mark.peft
def test_t5_beams_equal_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    theirs = torch_models.build(
        "AutoModelForSeq2SeqLM", "t5", d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, vocab_size=23,
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.no_grad():
        theirs.shared.weight.mul_(6.0)
    model, variables = torch_models.ours(theirs, tmp_path)
    ids = np.random.default_rng(3).integers(2, 23, (2, 7))
    want = theirs.generate(torch.tensor(ids), max_new_tokens=8, num_beams=4, do_sample=False, output_scores=True,
                           return_dict_in_generate=True)  # fmt: skip
    decode = decoder(model, variables)
    source = model.apply(variables, jnp.asarray(ids), method="encode")
    start = jnp.zeros((2, 1), jnp.int32)
    logits, cache = decode(start, model.empty_cache(2, 10), source=source)
    tokens, scores = beam_search(decode, cache, logits[:, -1], max_new=8, beams=4, eos_id=1)
    np.testing.assert_allclose(scores, want.sequences_scores.numpy(), atol=1e-4)
    for ours, row in zip(np.asarray(tokens), want.sequences.numpy()[:, 1:], strict=True):
        assert text(ours, 1) == text(row, 1)
