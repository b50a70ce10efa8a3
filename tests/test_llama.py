"""The Llama family: the goldens' logits, every member against `transformers`, execution options, cache, packing."""

import json
from pathlib import Path
from typing import Any

import golden as golden_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models
from safetensors.numpy import load_file

from lorajax.models import Llama, LlamaConfig, params_from_hf, params_to_hf, unstack_layers
from lorajax.models.attention import attend
from lorajax.models.experts import Experts
from lorajax.models.rotary import Rope, rope_table

GOLDENS = Path(__file__).parent / "goldens"
SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> tuple[Any, ...]:
    """(HF config, tensors, ids, mask, logits of the base)."""
    base, case = GOLDENS / "bases" / "llama_a", GOLDENS / "cases" / "lora_qv_llama"
    ids, mask = (jnp.asarray(np.load(case / f"{name}.npy"), jnp.int32) for name in ("input_ids", "attention_mask"))
    with np.load(case / "expected.npz") as expected:
        logits = expected["logits_base"]
    return json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors"), ids, mask, logits


def build(golden: tuple[Any, ...], **overrides: Any) -> tuple[Llama, Any]:
    config = LlamaConfig.from_hf(golden[0], **overrides)
    return Llama(config), params_from_hf(config, golden[1]).variables


def close(have: Any, want: Any, mask: Any, atol: float = 1e-4) -> None:
    real = np.asarray(mask) == 1
    np.testing.assert_allclose(np.asarray(have)[real], np.asarray(want)[real], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": "full"}], ids=["plain", "scan_remat"])
def test_logits_and_gradients_equal_the_golden(golden: Any, options: dict[str, Any]) -> None:
    _, _, ids, mask, expected = golden
    model, variables = build(golden, **options)
    close(jax.jit(model.apply)(variables, ids, mask), expected, mask)

    def gradient(model: Llama, variables: Any) -> Any:
        def total(v: Any) -> jax.Array:
            return jnp.square(model.apply(v, ids, mask)).mean()

        grads = jax.jit(jax.grad(total))(variables)
        return unstack_layers(grads) if model.config.scan_layers else grads

    if options:
        jax.tree.map(lambda have, want: np.testing.assert_allclose(have, want, atol=1e-5, rtol=1e-4),
                     gradient(model, variables), gradient(*build(golden)))  # fmt: skip


@pytest.mark.parametrize("scan_layers", [False, True])
def test_decoding_with_a_cache_gives_the_same_logits(golden: Any, scan_layers: bool) -> None:
    """Three tokens, then one at a time, in one program each; the rows are padded on the left."""
    _, _, ids, mask, _ = golden
    ids, mask = ids[:, ::-1], mask[:, ::-1]
    model, variables = build(golden, scan_layers=scan_layers)
    positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    expected = jax.jit(model.apply)(variables, ids, mask, positions)
    step = jax.jit(lambda cache, ids, mask: model.apply(variables, ids, cache, mask, method="decode"))
    cache, out = model.empty_cache(ids.shape[0], ids.shape[1] + 2), []
    for start, stop in [(0, 3), *((i, i + 1) for i in range(3, ids.shape[1]))]:
        logits, cache = step(cache, ids[:, start:stop], mask[:, start:stop])
        out.append(logits)
    close(jnp.concatenate(out, 1), expected, mask, 1e-5)
    assert step._cache_size() == 2 and int(cache.used) == ids.shape[1]


def test_packed_texts_do_not_see_each_other(golden: Any) -> None:
    _, _, ids, _, _ = golden
    model, variables = build(golden)
    packed = jnp.concatenate([ids[0, :5], ids[1, :4]])[None]
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(4)])[None]
    segments = jnp.asarray([[0] * 5 + [1] * 4])
    out, run = jax.jit(model.apply)(variables, packed, None, positions, segments), jax.jit(model.apply)
    np.testing.assert_allclose(out[0, :5], run(variables, ids[:1, :5])[0], atol=1e-5)
    np.testing.assert_allclose(out[0, 5:], run(variables, ids[1:2, :5])[0, :4], atol=1e-5)


def test_bfloat16_computes_and_differentiates(golden: Any) -> None:
    _, _, ids, mask, expected = golden
    model, variables = build(golden, dtype=jnp.bfloat16)
    logits = jax.jit(model.apply)(variables, ids, mask)
    assert logits.dtype == jnp.float32
    hidden = jax.eval_shape(lambda v: model.apply(v, ids, mask, method="hidden"), variables)
    assert hidden.dtype == jnp.bfloat16
    assert 1e-3 < np.abs(np.asarray(logits - expected)[np.asarray(mask) == 1]).max() < 0.3  # the logits reach 10
    with jax.numpy_dtype_promotion("standard"):  # JAX's attention mixes dtypes in its backward pass
        grads = jax.jit(jax.grad(lambda v: model.apply(v, ids, mask).mean()))(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype("float32")}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_state_dict_round_trip_is_exact(golden: Any, scan_layers: bool) -> None:
    model, variables = build(golden, scan_layers=scan_layers)
    back = params_to_hf(model.config, variables)
    assert back.keys() == golden[1].keys()
    for name, array in golden[1].items():
        np.testing.assert_array_equal(back[name], array)


def test_tensors_are_all_accounted_for(golden: Any) -> None:
    hf, tensors, *_ = golden
    config = LlamaConfig.from_hf(hf)
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    with pytest.raises(ValueError, match=r"no place in the model: 'layers.0.self_attn.q_proj.bias'"):
        params_from_hf(config, tensors | bias)
    with pytest.raises(ValueError, match="not in the checkpoint: 'lm_head.weight'"):
        params_from_hf(config, {name: x for name, x in tensors.items() if name != "lm_head.weight"})
    tied = LlamaConfig.from_hf(hf, tie_embeddings=True)
    with pytest.raises(ValueError, match="'lm_head.weight' differs from 'embed_tokens.weight'"):
        params_from_hf(tied, tensors)
    assert params_from_hf(tied, tensors, ignore=[r"lm_head\.weight"]).ignored == ("lm_head.weight",)
    copied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert params_from_hf(tied, copied).ignored == ("lm_head.weight",)


def test_gemmas_gelu_is_the_one_by_tanh(golden: Any) -> None:
    """As `transformers` reads the first files, which say 'gelu'."""
    gemma = LlamaConfig.from_hf(golden[0] | {"model_type": "gemma", "hidden_act": "gelu"})
    assert gemma.activation == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"hidden_act": "silou"}, "did you mean 'silu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' is not implemented"),
        ({"rope_parameters": {"full_attention": {}}}, r"differ by kind of layer \(\['full_attention'\]\)"),
        ({"hidden_size": None}, "config.json has {'hidden_size': None}: each must be a number or a name"),
        ({"vocab_size": "big"}, "vocab_size='big' of LlamaConfig is no int: see config.json"),
        ({"rope_scaling": "x"}, "rope_scaling='x': it must be an object, or null"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_config_errors_say_what_and_what_instead(golden: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LlamaConfig.from_hf(golden[0] | change)


def test_scan_refuses_layers_that_differ() -> None:
    with pytest.raises(ValueError, match="scan_layers needs equal layers"):
        LlamaConfig(num_layers=2, windows=(4, None), scan_layers=True)


def test_llama3_frequencies_by_hand() -> None:
    """Wavelengths above trained / low are stretched, below trained / high kept (Llama 3.1's released code)."""
    rope = Rope(theta=500000.0, kind="llama3", factor=8.0, trained=8192)
    cos, sin = rope_table(rope, 128, jnp.ones((1, 1), jnp.int32))
    have = np.arctan2(np.asarray(sin), np.asarray(cos))[0, 0]
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    length = 2 * np.pi / plain
    smooth = (8192 / length - 1) / 3
    want = np.where(length < 2048, plain, np.where(length > 8192, plain / 8, (1 - smooth) * plain / 8 + smooth * plain))
    np.testing.assert_allclose(have, want, rtol=1e-4)


def test_experts_sorted_and_dense_agree() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    sizes = (LlamaConfig(), 8, 12, "silu", 4, 2)
    sparse, dense = Experts(*sizes, init_std=0.5), Experts(*sizes, dense=True, init_std=0.5)
    variables = golden_case.variables(sparse, x, scale=0.5)
    np.testing.assert_allclose(sparse.apply(variables, x), dense.apply(variables, x), atol=1e-5)


# --- against transformers ---

MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0,
                                              "original_max_position_embeddings": 4},
                          "max_position_embeddings": 8}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
                                           "original_max_position_embeddings": 8}}),
    "yarn_mscale": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7,
        "mscale_all_dim": 1.3, "truncate": False}}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 2,
                          "head_dim": 8, "hidden_size": 48}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}  # fmt: skip


@pytest.mark.peft
@pytest.mark.parametrize("name", MEMBERS)
def test_member_equals_transformers(name: str, tmp_path: Path) -> None:
    model_type, settings = MEMBERS[name]
    theirs = torch_models.build("AutoModelForCausalLM", model_type, **(SMALL | settings))
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, 61, (2, 12)), np.ones((2, 12), np.int64)
    mask[1, 9:] = 0
    model, variables = torch_models.ours(theirs, tmp_path)
    want = torch_models.run(theirs, input_ids=ids, attention_mask=mask)
    assert want.std() > 0.1
    have = torch_models.apply(model, variables, jnp.asarray(ids), jnp.asarray(mask))
    close(have, want, mask, 2e-5)
    cache = model.empty_cache(2, 12)  # and again, all at once, through the cache
    if name != "dynamic":
        out, _ = jax.jit(model.apply, static_argnames="method")(variables, ids, cache, mask, method="decode")
        close(out, want, mask, 2e-5)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_transformers_loads_what_we_save(name: str, tmp_path: Path) -> None:
    """A model with changed weights, saved in shards."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: peft)")
    from lorajax.io.hf import open_checkpoint, save_checkpoint

    model_type, settings = MEMBERS[name]
    theirs = torch_models.build("AutoModelForCausalLM", model_type, **(SMALL | settings))
    model, variables = torch_models.ours(theirs, tmp_path / "theirs")
    changed = jax.tree.map(lambda x: x * 1.1 + 0.01, variables)
    config, _ = open_checkpoint(tmp_path / "theirs")
    save_checkpoint(tmp_path / "ours", config, params_to_hf(model.config, changed), shard_bytes=20_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    ids = np.random.default_rng(0).integers(3, 61, (2, 8))
    have = torch_models.apply(model, changed, jnp.asarray(ids))
    np.testing.assert_allclose(have, torch_models.run(loaded, input_ids=ids), atol=5e-5)


def test_a_function_in_place_of_the_kernel_is_told_all() -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
    mask = (jnp.arange(5) < 4)[None, None, None]
    told: dict[str, Any] = {"mask": mask, "causal": True, "window": 3, "scale": 0.3}

    def mine(q: Any, k: Any, v: Any, **how: Any) -> Any:
        assert set(how) == {*told, "bias"}
        return attend(q, k, v, **how)

    np.testing.assert_array_equal(attend(q, k, v, implementation=mine, **told), attend(q, k, v, **told))


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_the_same_attention(golden: Any, masked: bool) -> None:
    _, _, ids, mask, _ = golden
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    logits = []
    for implementation in ("xla", "cudnn"):
        model, variables = build(golden, dtype=jnp.bfloat16, attention=implementation)
        logits.append(jax.jit(model.apply)(variables, ids, mask if masked else None))
    close(logits[1], logits[0], mask, 0.3)  # bfloat16; the logits reach 10
