"""ViT, DINOv2 and ResNet: goldens with adapters, options, running statistics, and `transformers`."""

from functools import partial
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models

from lorajax.models import ResNet, ResNetConfig, params_from_hf, params_to_hf
from lorajax.variants import LoHa, LoRA


def test_loha_on_vit() -> None:
    golden.load("loha_vit").check(LoHa(rank=4, alpha=4.0))


def test_lora_on_resnet() -> None:
    golden.load("lora_conv_resnet").check(LoRA(rank=4, alpha=8.0))


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": "full"}], ids=["plain", "scan_remat"])
def test_vit_logits_equal_the_golden(options: dict[str, Any]) -> None:
    case = golden.load("loha_vit", **options)
    have = jax.jit(case.model.apply)(case.params, **case.inputs)
    golden.close(have, case.expected["logits_base"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["loha_vit", "lora_conv_resnet"])
def test_vision_round_trip_and_a_fresh_head(name: str) -> None:
    case = golden.load(name)
    config = case.model.config  # type: ignore[attr-defined]
    tensors = params_to_hf(config, case.params)
    again = params_from_hf(config, tensors).variables
    jax.tree.map(np.testing.assert_array_equal, again, case.params)
    bare = {name: x for name, x in tensors.items() if not name.startswith("classifier")}
    fresh = params_from_hf(config, bare, jax.random.key(0)).fresh
    assert fresh == ("params/classifier/kernel", "params/classifier/bias")
    with pytest.raises(ValueError, match="the model needs"):
        params_from_hf(config, {name: x for name, x in tensors.items() if "1.bias" not in name and "norm" not in name})


def test_training_uses_the_batch_and_moves_the_running_statistics() -> None:
    """By hand: the stem's batch mean and variance are its convolution's; a tenth of them moves in."""
    config = ResNetConfig(sizes=(4,), depths=(1,), stem_size=4, kind="basic", num_labels=3)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    variables = golden.variables(ResNet(config), x)
    before = variables["batch_stats"]["stem"]["norm"]

    @partial(jax.jit, static_argnums=1)
    def run(variables: Any, train: bool) -> Any:
        return ResNet(config, train=train).apply(variables, x, mutable=["batch_stats"])

    _, changed = run(variables, True)
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    out = jax.lax.conv_general_dilated(x, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    stats = changed["batch_stats"]["stem"]["norm"]
    np.testing.assert_allclose(stats["mean"], 0.9 * before["mean"] + 0.1 * out.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 * before["var"] + 0.1 * out.var((0, 1, 2)), atol=1e-5)
    plain, same = run(variables, False)
    jax.tree.map(np.testing.assert_array_equal, same["batch_stats"], variables["batch_stats"])
    assert plain.shape == (3, 3)


# --- against transformers ---

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 12, "patch_size": 3}
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "vit": ("vit", {**VIT, "intermediate_size": 40, "qkv_bias": False}, (12, 12)),
    "dinov2": ("dinov2", VIT, (12, 12)),
    "dinov2_larger_image": ("dinov2", VIT, (18, 15)),
    "resnet_basic": ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1],
                                "layer_type": "basic"}, (24, 20)),
    "resnet_bottleneck": ("resnet", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]}, (24, 20)),
    "resnet_early": ("resnet", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2],
                                "downsample_in_bottleneck": True, "downsample_in_first_stage": True}, (24, 20)),
    "resnet_silu": ("resnet", {"embedding_size": 8, "hidden_sizes": [16], "depths": [2], "hidden_act": "silu"},
                    (24, 20)),
}  # fmt: skip


@pytest.mark.peft
@pytest.mark.parametrize("name", MODELS)
def test_vision_equals_transformers(name: str, tmp_path: Path) -> None:
    kind, settings, size = MODELS[name]
    theirs = torch_models.build("AutoModelForImageClassification", kind, num_labels=5, **settings)
    pixels = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    model, variables = torch_models.ours(theirs, tmp_path)
    want = torch_models.run(theirs, pixel_values=pixels)
    assert want.std() > 0.05
    have = torch_models.apply(model, variables, jnp.asarray(pixels.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(have, want, atol=3e-5)
