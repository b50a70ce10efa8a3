"""Any adapter as plain LoRA: the same weights, or the error that SVD leaves."""

from typing import Any

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax.compose import plain
from lorajax.variants import DoRA, LoHa, LoRA

PARAMS = {"w": jax.random.normal(jax.random.key(0), (3, 12, 8)), "b": jnp.zeros(8)}
SITES = lj.sites(lambda p, x: jax.lax.map(lambda w: x @ w, p["w"]) + p["b"][None, None], PARAMS, jnp.ones((2, 12)))
ROWS = ["lora-rslora", "lora-pissa", "lora-pissa-folded", "adalora", "sora", "dora", "loha", "lokr", "hira",
        "gralora-hybrid", "miss", "delora", "ia3", "shira", "vera"]  # fmt: skip


def trained(variant: Any) -> Any:
    adapt = lj.adapt(SITES, [("w", variant), ("b", lj.Full())])
    trainable, frozen = adapt.init(jax.random.key(1), PARAMS)
    rng = np.random.default_rng(2)
    noise = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3 + 0.5, x.dtype), trainable)
    return adapt, noise, frozen


VARIANTS = {name: conformance.ROWS[name].variant for name in ROWS}
VARIANTS["dora-pissa-folded"] = DoRA(LoRA(rank=2, initializer="pissa", fold=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_lost(name: str) -> None:
    adapt, trainable, frozen = trained(VARIANTS[name])
    made = plain.as_lora(adapt, trainable, frozen)
    assert type(made.adapt.plan["w"]) is LoRA and made.errors == {"w": 0.0}
    want, have = adapt.merge(trainable, frozen), made.adapt.merge(made.trainable, made.frozen)
    np.testing.assert_allclose(made.frozen.base["w"], PARAMS["w"], atol=1e-5)  # also where a start was folded into it
    np.testing.assert_allclose(have["w"], want["w"], rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(have["b"], want["b"])


def test_truncated_it_says_what_is_lost() -> None:
    adapt, trainable, frozen = trained(LoHa(3))
    made = plain.as_lora(adapt, trainable, frozen, rank=2)
    assert made.adapt.plan["w"].rank == 2
    update = np.asarray(adapt.merge(trainable, frozen)["w"] - PARAMS["w"], np.float64)
    left = update - np.asarray(made.adapt.merge(made.trainable, made.frozen)["w"] - PARAMS["w"])
    s = np.linalg.svd(update, compute_uv=False)
    best = np.linalg.norm(s[:, 2:], axis=1) / np.linalg.norm(s, axis=1)
    norms = np.linalg.norm(left, axis=(1, 2)) / np.linalg.norm(update, axis=(1, 2))
    np.testing.assert_allclose(norms, best, rtol=1e-3)
    np.testing.assert_allclose(made.errors["w"], best.max(), rtol=1e-4)
    assert 0.01 < made.errors["w"] < 1


def test_bad_ranks_and_methods() -> None:
    adapt, trainable, frozen = trained(LoHa(2))
    with pytest.raises(ValueError, match="rank=0 is below 1"):
        plain.as_lora(adapt, trainable, frozen, rank=0)
