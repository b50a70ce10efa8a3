"""Variants of other shapes than LoRA: scales, frozen arrays, a bare delta, an init that changes the base, a penalty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax.core.variant import Factors, Leaf, Variant

from . import probe
from .models import CASES
from .probe import Probe
from .test_adapt import same_as_merged, setup


class ScaleAdapter(NamedTuple):
    g: jax.Array
    fixed: jax.Array


@dataclass(frozen=True)
class Scale(Variant):
    """W' = W * (g + fixed): only a scale per output unit, one array of it frozen; with a penalty."""

    weight: float = 1.0
    leaves: ClassVar[Mapping[str, Leaf]] = {
        "g": Leaf("gate", ("out",)), "fixed": Leaf("fixed", ("out",), trainable=False)}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[ScaleAdapter, jax.Array]:
        return ScaleAdapter(1 + jax.random.normal(key, w.shape[1:]) / 4, jnp.full(w.shape[1:], 0.25)), w

    def factors(self, adapter: ScaleAdapter, w: jax.Array) -> Factors:
        return Factors(g=adapter.g + adapter.fixed)

    def penalty(self, adapter: ScaleAdapter, share: float) -> jax.Array:
        return self.weight * share * jnp.sum(adapter.g**2)


class DenseAdapter(NamedTuple):
    d: jax.Array


@dataclass(frozen=True)
class Dense(Variant):
    """Only a delta, W' = W + D W: no factors. Its init changes the base: w_new = w / 2."""

    rewrites_weight: ClassVar[bool] = True
    leaves: ClassVar[Mapping[str, Leaf]] = {"d": Leaf("d", ("in", "in"))}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[DenseAdapter, jax.Array]:
        return DenseAdapter(jax.random.normal(key, (w.shape[0], w.shape[0])) / 4), w / 2

    def restore(self, adapter: DenseAdapter, w: jax.Array) -> jax.Array:
        return w / 2

    def delta(self, adapter: DenseAdapter, w: jax.Array) -> jax.Array:
        return adapter.d @ w


def test_frozen_leaves_of_an_adapter_are_on_the_frozen_side():
    adapt, trainable, frozen, built = setup("linen_scan", Scale())
    for path, adapter in trainable.items():
        assert adapter.fixed is None
        assert frozen.aux[path].g is None
        assert frozen.aux[path].fixed.shape == adapter.g.shape
        assert adapt.labels[path] == ScaleAdapter("gate", None)
    merged = probe.leaves(jax.jit(adapt.merge)(trainable, frozen))
    for path, weight in CASES["linen_scan"].weights.items():
        w = np.asarray(probe.leaves(built.params)[path])
        shape = [n if i in weight.stack_axes + weight.out_axes else 1 for i, n in enumerate(w.shape)]
        scale = np.asarray(trainable[path].g + 0.25).reshape(shape)
        assert probe.error(merged[path], w * scale) <= 1e-6
    same_as_merged(built.fn, adapt, trainable, frozen, built.args)


def test_a_variant_without_factors_is_applied_as_its_delta():
    """And an init that changes the base: the frozen side holds the new weight, the caller's tree the old one."""
    adapt, trainable, frozen, built = setup("linen_dense", Dense())
    path = "params/layers_0/kernel"
    w = np.asarray(built.params["params"]["layers_0"]["kernel"])
    np.testing.assert_allclose(frozen.base[path], w / 2, rtol=1e-6)
    want = w / 2 + np.asarray(trainable[path].d) @ (w / 2)
    merged = adapt.merge(trainable, frozen)
    assert probe.error(merged["params"]["layers_0"]["kernel"], want) <= 1e-5
    same_as_merged(built.fn, adapt, trainable, frozen, built.args)


def test_penalty_is_zero_by_default_and_a_sum_over_matrices_otherwise():
    """share is 1 / number of matrices of that variant; a stack of four counts as four."""
    adapt, trainable, _, built = setup("linen_scan")
    assert float(adapt.penalty(trainable)) == 0.0
    sites = lj.sites(built.fn, built.params, *built.args)
    adapt = lj.adapt(sites, [(".*/(up|down)/kernel", Scale(weight=3.0)), (".*", Probe())])
    trainable, _ = probe.init(adapt, built.params)
    squares = sum(float(np.sum(np.square(t.g))) for t in trainable.values() if isinstance(t, ScaleAdapter))
    assert float(jax.jit(adapt.penalty)(trainable)) == pytest.approx(3.0 * squares / 8, rel=1e-5)
    grad = jax.grad(adapt.penalty)(trainable)
    up = "params/blocks/up/kernel"
    np.testing.assert_allclose(grad[up].g, 6 / 8 * trainable[up].g, rtol=1e-5)


def test_two_rules_two_variants_in_one_model():
    case = CASES["linen_attention"]
    fn, params, args, _ = case.built
    adapt = lj.adapt(lj.sites(fn, params, *args), [(".*/(query|key)/kernel", Scale()), (".*", Probe(rank=2))])
    trainable, frozen = probe.init(adapt, params)
    types = {"query": "ScaleAdapter", "key": "ScaleAdapter", "value": "ProbeAdapter", "out": "ProbeAdapter"}
    assert {path.split("/")[1]: type(adapter).__name__ for path, adapter in trainable.items()} == types
    same_as_merged(fn, adapt, trainable, frozen, args)
