"""Published numbers of trained parameters, by the framework's own count on abstract models of the real shapes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lorajax as lj
from lorajax.core.variant import Variant
from lorajax.variants import (
    AdaLoRA,
    DeLoRA,
    DoRA,
    GraLoRA,
    HiRA,
    LoHa,
    LoKr,
    LoRA,
    MiCA,
    MiSS,
    RandLoRA,
    SHiRA,
    VBLoRA,
    VeRA,
)

Shapes = Mapping[str, tuple[int, int]]
# layers, and the adapted weights of one
LLAMA_3B: tuple[int, Shapes] = (28, {"query": (3072, 3072), "value": (3072, 1024)})
LLAMA_3B_MLP: tuple[int, Shapes] = (28, {"gate": (3072, 8192), "up": (3072, 8192), "down": (8192, 3072)})
ROBERTA_BASE: tuple[int, Shapes] = (12, {"query": (768, 768), "value": (768, 768)})
ROBERTA_LARGE: tuple[int, Shapes] = (24, {"query": (1024, 1024), "value": (1024, 1024)})
SQUARE: Shapes = dict.fromkeys(["query", "key", "value", "output"], (768, 768))
DEBERTA_BASE: tuple[int, Shapes] = (12, {**SQUARE, "up": (768, 3072), "down": (3072, 768)})


def adapted(model: tuple[int, Shapes], variant: Variant) -> lj.Adapt:
    layers, weights = model
    struct = jax.ShapeDtypeStruct
    params = {name: struct((layers, *shape), jnp.float32) for name, shape in weights.items()}

    def fn(params: Any, xs: Mapping[str, jax.Array]) -> jax.Array:
        def layer(total: jax.Array, ws: Any) -> tuple[jax.Array, None]:
            return total + sum(jnp.sum(xs[name] @ w) for name, w in ws.items()), None

        return jax.lax.scan(layer, jnp.zeros(()), params)[0]

    inputs = {name: struct((1, shape[0]), jnp.float32) for name, shape in weights.items()}
    return lj.adapt(lj.sites(fn, params, inputs), [(".*", variant)])


@pytest.mark.parametrize(("model", "variant", "published"), [
    # PEFT's result files
    (LLAMA_3B, LoRA(rank=32), 9_175_040),
    (LLAMA_3B, LoRA(rank=64), 18_350_080),
    (LLAMA_3B, LoRA(rank=64, rslora=True), 18_350_080),
    (LLAMA_3B_MLP, LoRA(rank=10), 9_461_760),
    (LLAMA_3B, DoRA(LoRA(rank=32)), 9_289_728),
    (LLAMA_3B, MiCA(rank=32), 5_505_024),
    (LLAMA_3B, VeRA(rank=256), 129_024),
    (LLAMA_3B, RandLoRA(rank=32), 9_289_728),
    (LLAMA_3B, VBLoRA(rank=4, num_vectors=256, vector_length=256), 1_212_416),
    (LLAMA_3B, DeLoRA(rank=32), 9_175_096),
    (LLAMA_3B, LoHa(rank=32), 18_350_080),
    (LLAMA_3B, LoKr(rank=32, factor=4), 2_294_656),
    (LLAMA_3B, MiSS(rank=64), 7_340_032),
    (LLAMA_3B, MiSS(rank=64, mode="mini", mini_rank=64), 229_376),
    (LLAMA_3B, AdaLoRA(rank=64), 18_353_664),
    (LLAMA_3B, HiRA(rank=32), 9_175_040),
    (LLAMA_3B, GraLoRA(rank=32), 9_175_040),
    (LLAMA_3B, SHiRA(rank=32), 9_175_040),
    # The papers of LoRA (0.3M, 0.8M), VeRA (0.043M) and AdaLoRA (0.33M, 1.33M)
    (ROBERTA_BASE, LoRA(rank=8), 294_912),
    (ROBERTA_LARGE, LoRA(rank=8), 786_432),
    (ROBERTA_BASE, VeRA(rank=1024), 43_008),
    (DEBERTA_BASE, LoRA(rank=2), 331_776),
    (DEBERTA_BASE, LoRA(rank=8), 1_327_104),
], ids=str)  # fmt: skip
def test_published_count(model: tuple[int, Shapes], variant: Variant, published: int) -> None:
    assert adapted(model, variant).count() == published


@pytest.mark.parametrize("wrapped", [False, True])
def test_lora_fa_trains_b_alone(wrapped: bool) -> None:
    """A stays among the trainable arrays, where a projected LoRA-FA reads it, but no gradient reaches it."""
    variant = LoRA(rank=32, freeze_a=True)
    adapt = adapted(LLAMA_3B, DoRA(variant) if wrapped else variant)
    labels, shapes = jax.tree.leaves(adapt.labels), jax.tree.leaves(adapt.shapes[0])
    moved = [x.size for label, x in zip(labels, shapes, strict=True) if label != "a"]
    assert adapt.count() == sum(moved)
    if not wrapped:
        assert sum(moved) == 3_670_016
        assert "trains 3,670,016 of " in str(adapt)
