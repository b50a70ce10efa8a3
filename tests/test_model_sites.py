"""Every model with adapters: which weights are sites, what the presets take, and that lift and merge agree."""

import functools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from experiments.bench.shapes import SHAPES
from lorajax.models import (
    GPT2,
    T5,
    Deberta,
    DebertaConfig,
    GPT2Config,
    Llama,
    LlamaConfig,
    ResNet,
    ResNetConfig,
    T5Config,
    ViT,
    ViTConfig,
    Whisper,
    WhisperConfig,
    model_from_hf,
)
from lorajax.variants import LoRA

IDS = jnp.asarray([[3, 5, 7, 2], [1, 9, 4, 4]])
LLAMA: dict[str, Any] = {"vocab_size": 13, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
                         "head_dim": 4, "intermediate_size": 12}  # fmt: skip
T5_SIZES: dict[str, Any] = {"vocab_size": 13, "hidden_size": 8, "head_dim": 4, "intermediate_size": 12, "num_layers": 1,
                            "num_decoder_layers": 1, "num_heads": 2, "buckets": 8, "dropout": 0.0}  # fmt: skip
ENCODER: dict[str, Any] = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 12}
MODELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama": (Llama(LlamaConfig(**LLAMA)), (IDS,)),
    "llama_scan_remat": (Llama(LlamaConfig(**LLAMA, scan_layers=True, remat="full")), (IDS,)),
    "qwen3_tied": (Llama(LlamaConfig(**LLAMA, head_norm=True, tie_embeddings=True)), (IDS,)),
    "mixtral": (Llama(LlamaConfig(**LLAMA, experts=3)), (IDS,)),
    "mixtral_dense": (Llama(LlamaConfig(**LLAMA, experts=3, dense_experts=True)), (IDS,)),
    "gpt2": (GPT2(GPT2Config(**ENCODER, vocab_size=13, max_positions=8)), (IDS,)),
    "t5": (T5(T5Config(**T5_SIZES, gated=True, tie_embeddings=False)), (IDS, IDS[:, :3])),
    "vit": (ViT(ViTConfig(**ENCODER, image_size=4, patch_size=2)), (jnp.ones((2, 4, 4, 3)),)),
    "deberta": (Deberta(DebertaConfig(**ENCODER, vocab_size=13, buckets=4)), (IDS,)),
    "resnet": (ResNet(ResNetConfig(sizes=(8, 12), depths=(1, 1), stem_size=4)), (jnp.ones((1, 16, 16, 3)),)),
    "whisper": (Whisper(WhisperConfig(vocab_size=13, mels=4, hidden_size=8, num_layers=1, num_decoder_layers=1,
                                      num_heads=2, num_decoder_heads=2, intermediate_size=12, max_positions=6,
                                      decoder_intermediate_size=12, max_target_positions=8)),
                (jnp.ones((2, 6, 4)), IDS)),
}  # fmt: skip
QV = {"query", "value"}
QUICK = ("llama_scan_remat", "mixtral", "gpt2", "vit", "resnet")


@functools.cache
def given(name: str) -> tuple[Any, Any, tuple[Any, ...], Any]:
    """(model, variables, inputs, sites)."""
    model, inputs = MODELS[name]
    variables = golden.variables(model, *inputs)
    return model, variables, inputs, lj.sites(model.apply, variables, *inputs)


@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_and_table_is_a_site(name: str) -> None:
    _, variables, _, sites = given(name)
    leaves = [jax.tree_util.keystr(path, simple=True, separator="/")
              for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]  # fmt: skip
    expected = {path for path in leaves if path.endswith(("/kernel", "/embedding"))}
    assert set(sites) == expected
    if name.startswith("mixtral"):
        assert sites["params/layer_0/ffn/gate/kernel"].stack_shape == (3,)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet", "gpt2")])
def test_the_preset_takes_queries_and_values(name: str) -> None:
    """ResNet has none, GPT-2 one kernel for query, key and value."""
    sites = given(name)[-1]
    plan = lj.adapt(sites, [("qv", LoRA(rank=1))]).plan
    wanted = {path for path in sites if path.split("/")[-2] in QV}
    assert set(plan) == wanted and len(wanted) >= 2


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_lift_equals_merge(name: str) -> None:
    model, variables, inputs, sites = given(name)
    adapt = lj.adapt(sites, [(".*", LoRA(rank=2, alpha=2.0))])
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), variables)
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), trainable)
    run = jax.jit(lambda tr: model.apply(adapt.merge(tr, frozen), *inputs))
    lifted = jax.jit(lambda tr: lj.lift(model.apply, strict=True)(adapt.bind(tr, frozen), *inputs))(trainable)
    merged = run(trainable)
    np.testing.assert_allclose(lifted, merged, atol=2e-4, rtol=2e-4)
    zero = run(jax.tree.map(jnp.zeros_like, trainable))
    assert float(jnp.abs(lifted - zero).max()) > 1e-2


@pytest.mark.parametrize("kind", ["tiny", "tiny-bert"])
def test_roles_where_the_attention_is_one_operation(kind, monkeypatch):
    """cuDNN's fused attention shows the same query, key, value and output as two products do. Traced only."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    for check in ("check_cudnn_version", "check_compute_capability"):
        if hasattr(cudnn, check):
            monkeypatch.setattr(cudnn, check, lambda *_: 99999)
    ids, found = jnp.ones((2, 8), jnp.int32), []
    for attention in ("xla", "cudnn"):
        net = model_from_hf(SHAPES[kind], attention=attention, dtype=jnp.bfloat16)
        plain = model_from_hf(SHAPES[kind], dtype=jnp.bfloat16)
        params = jax.eval_shape(plain.init, jax.random.key(0), ids)
        sites = lj.sites(net.apply, params, ids)
        found.append({path: site.roles for path, site in sites.items()})
    assert found[0] == found[1]
    assert sum("query" in roles for roles in found[1].values()) == 2  # layers
