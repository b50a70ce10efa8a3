"""Adapters with dropout: what is dropped, when, and that it does not depend on how the layers are run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorajax as lj
from lorajax.core.bound import dense, is_bound
from lorajax.core.variant import Factors, Leaf, Variant

from . import probe
from .case import normal
from .models import CASES
from .probe import Probe
from .test_lift_cases import weighted


def square_stack(w: jax.Array, x: jax.Array) -> jax.Array:
    for i in range(4):
        x = jnp.tanh(x @ w[i])
    return x


def scan_stack(w: jax.Array, x: jax.Array, wrap: Callable[..., Any] = lambda f: f) -> jax.Array:
    return lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0]


def dropping(fn: Callable[..., Any], rate: float, params: Any, x: jax.Array, rank: int = 3) -> tuple[Any, Any, Any]:
    """(key -> output, (trainable, key) -> output, trainable) of a lifted function whose adapters drop their input.
    The first is jitted."""
    adapt = lj.adapt(lj.sites(fn, params, x), [(".*", Probe(rank, dropout=rate))])
    trainable, frozen = probe.init(adapt, params)

    def lifted(t: Any, key: Any) -> Any:
        return lj.lift(fn, strict=True)(adapt.bind(t, frozen, key=key), x)

    return jax.jit(partial(lifted, trainable)), lifted, trainable


STACKED = {"w": normal(4, 8, 8, scale=0.4)}
ROWS = normal(5, 8)
LOOPS = {
    "python": lambda p, x: square_stack(p["w"], x),
    "scan": lambda p, x: scan_stack(p["w"], x),
    "scan_remat": lambda p, x: scan_stack(p["w"], x, jax.checkpoint),
}


def test_dropout_is_a_function_of_the_key():
    f, _, _ = dropping(LOOPS["scan"], 0.5, STACKED, ROWS)
    a, b, other, off = f(jax.random.key(0)), f(jax.random.key(0)), f(jax.random.key(1)), f(None)
    np.testing.assert_array_equal(a, b)
    assert probe.error(other, a) > 1e-3
    assert probe.error(a, off) > 1e-3


def test_no_key_means_no_dropout_and_so_does_rate_zero():
    off = dropping(LOOPS["scan"], 0.0, STACKED, ROWS)[0](None)
    np.testing.assert_array_equal(dropping(LOOPS["scan"], 0.9, STACKED, ROWS)[0](None), off)
    assert probe.error(dropping(LOOPS["scan"], 0.0, STACKED, ROWS)[0](jax.random.key(0)), off) <= 1e-6
    assert probe.error(dropping(LOOPS["scan"], 1e-7, STACKED, ROWS)[0](jax.random.key(0)), off) <= 1e-6


def test_dropout_is_the_same_in_a_loop_a_scan_and_a_rematerialised_scan():
    results = []
    for fn in LOOPS.values():
        _, lifted, trainable = dropping(fn, 0.5, STACKED, ROWS)
        loss = jax.value_and_grad(lambda t, key, f=lifted: weighted(f(t, key)))
        results.append(jax.jit(loss)(trainable, jax.random.key(7)))
    assert probe.error(results[1], results[0]) <= 1e-5
    assert probe.error(results[2], results[0]) <= 1e-5


def test_dropout_differs_between_sites_and_between_layers_of_a_stack():
    """Identical weights, adapters and inputs everywhere: only the masks can make the outputs differ."""
    params = {"stack": jnp.tile(normal(8, 12), (3, 1, 1)), "u": normal(8, 12), "v": normal(8, 12)}

    def fn(p: Any, x: jax.Array) -> Any:
        return [x @ p["u"], x @ p["v"], *lax.scan(lambda c, w: (c, x @ w), 0.0, p["stack"])[1]]

    adapt = lj.adapt(lj.sites(fn, params, ROWS), [(".*", Probe(dropout=0.5))])
    trainable, frozen = probe.init(adapt, params)
    trainable["v"] = trainable["u"]
    trainable["stack"] = jax.tree.map(lambda x: jnp.tile(x, (3, 1, 1)), trainable["u"])
    lifted = jax.jit(lambda key: lj.lift(fn, strict=True)(adapt.bind(trainable, frozen, key=key), ROWS))
    for y in (plain := lifted(None)):
        assert probe.error(y, plain[0]) <= 1e-5
    outputs = lifted(jax.random.key(3))
    for i, y in enumerate(outputs):
        for z in outputs[:i]:
            assert probe.error(y, z) > 1e-2


def test_dropout_keeps_the_expectation_and_the_base_branch():
    """Mean over 4096 keys of one linear layer: within five standard errors of the output without dropout, everywhere.
    What is dropped is an element of the adapter's input: the difference to the base is x mask A B / keep."""
    def fn(p, x):
        return x @ p["w"]

    params, x, rate = {"w": normal(8, 12)}, normal(2, 8, seed=3), 0.25
    _, lifted, trainable = dropping(fn, rate, params, x, rank=8)
    keys = jax.random.split(jax.random.key(0), 4096)
    samples = np.asarray(jax.jit(jax.vmap(partial(lifted, trainable)))(keys), np.float64)
    a, b = (np.asarray(v, np.float64) for v in trainable["w"])
    ab, w, x = a @ b * 0.5, np.asarray(params["w"], np.float64), np.asarray(x, np.float64)
    spread = np.sqrt(rate / (1 - rate) * (x**2) @ (ab**2))  # of an inverted-dropout sum
    assert np.all(np.abs(samples.mean(0) - x @ (w + ab)) <= 5 * spread / 64)
    masks = (samples[:50, 0] - np.asarray(x[0]) @ w) @ np.linalg.pinv(x[0][:, None] * ab) * (1 - rate)
    np.testing.assert_allclose(np.minimum(np.abs(masks), np.abs(masks - 1)), 0, atol=1e-3)
    assert 0.65 < masks.mean() < 0.85


def test_dropout_on_a_merged_weight_is_refused():
    """Dropout acts on the input of a product; a weight that has to be merged has none."""
    def fn(p, x):
        return (x @ p["w"], jnp.cumsum(p["w"], 1))

    params = {"w": normal(8, 12)}
    adapt = lj.adapt(lj.sites(fn, params, ROWS), [("w", Probe(dropout=0.5))])
    trainable, frozen = probe.init(adapt, params)
    with pytest.raises(ValueError, match="w: .*dropout.*cumsum.*set dropout=0"):
        lj.lift(fn)(adapt.bind(trainable, frozen, key=jax.random.key(0)), ROWS)


# Rank components and whole adapters


def linear(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


def test_rank_dropout_drops_components_of_the_update_and_keeps_the_mean():
    """Each draw is W + sum over kept r of A[:, r] B[r] / (1 - p); over 2048 keys the share of each kept component and
    the mean are within five standard errors of the truth."""
    params, x, rate, rank = {"w": normal(8, 12)}, jnp.eye(8), 0.25, 4
    lifted, trainable = bound(linear, Probe(rank, rank_dropout=rate), params, x)
    samples = np.asarray(jax.jit(jax.vmap(partial(lifted, trainable)))(
        jax.random.split(jax.random.key(0), 2048)), np.float64)
    a, b = (np.asarray(v, np.float64) for v in trainable["w"])
    parts = 0.5 * np.einsum("ir,ro->rio", a, b)
    change = samples - np.asarray(params["w"], np.float64)
    kept = np.linalg.lstsq(parts.reshape(rank, -1).T, change.reshape(2048, -1).T)[0].T * (1 - rate)
    np.testing.assert_allclose(np.minimum(np.abs(kept), np.abs(kept - 1)), 0, atol=1e-4)
    error = np.sqrt(rate * (1 - rate) / 2048)
    assert np.abs(kept.mean(0) - (1 - rate)).max() <= 5 * error
    spread = np.sqrt(rate / (1 - rate) * np.sum(parts**2, 0) / 2048)
    assert np.all(np.abs(change.mean(0) - parts.sum(0)) <= 5 * spread)


class GainAdapter(NamedTuple):
    a: jax.Array
    b: jax.Array
    g: jax.Array


@dataclass(frozen=True)
class Gain(Variant):
    """W' = (W + A B) diag(g), all random."""

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "a": Leaf("a", ("in", "rank")), "b": Leaf("b", ("rank", "out")), "g": Leaf("gate", ("out",))}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[GainAdapter, jax.Array]:
        a, b = Probe().init(key, w)[0]
        return GainAdapter(a, b, 1 + jax.random.normal(key, w.shape[1:]) / 4), w

    def factors(self, adapter: GainAdapter, w: Any) -> Factors:
        return Factors(adapter.a, adapter.b, adapter.g)


@dataclass(frozen=True)
class Bare(Variant):
    """W' = W + D: no factors."""

    leaves: ClassVar[Mapping[str, Leaf]] = {"d": Leaf("d", ("in", "out"))}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[Any, jax.Array]:
        return BareAdapter(jax.random.normal(key, w.shape)), w

    def delta(self, adapter: Any, w: jax.Array) -> jax.Array:
        return adapter.d


class BareAdapter(NamedTuple):
    d: jax.Array


@pytest.mark.parametrize("make", [Probe, Gain, Bare])
def test_module_dropout_leaves_the_whole_adapter_out(make: Any):
    """Each draw is x W or x W', nothing between: scales of the weight, and updates without factors, go too."""
    params, x = {"w": normal(8, 12)}, normal(2, 8)
    lifted, trainable = bound(linear, make(module_dropout=0.4), params, x)
    outputs = jax.jit(jax.vmap(partial(lifted, trainable)))(jax.random.split(jax.random.key(1), 512))
    with_, without = lifted(trainable, None), x @ params["w"]
    assert probe.error(with_, without) > 0.1
    skipped = np.array([probe.error(y, without) < 1e-5 for y in outputs])
    assert all(skip or probe.error(y, with_) < 1e-5 for skip, y in zip(skipped, outputs, strict=True))
    assert abs(skipped.mean() - 0.4) <= 5 * np.sqrt(0.4 * 0.6 / 512)


@pytest.mark.parametrize("option", ["rank_dropout", "module_dropout"])
def test_drops_are_functions_of_the_key_alike_in_a_loop_and_a_scan(option: str):
    """One draw per matrix: layers of a stack and sites draw on their own; without a key nothing is dropped."""
    results = []
    for name in ("python", "scan"):
        lifted, trainable = bound(LOOPS[name], Probe(**{option: 0.5}), STACKED, ROWS)
        draw = jax.jit(partial(lifted, trainable))
        results.append([draw(None), *[draw(jax.random.key(i)) for i in (0, 0, 1, 2)]])
    assert probe.error(results[1], results[0]) <= 1e-5
    off, first, again, *others = results[0]
    np.testing.assert_array_equal(first, again)
    assert max(probe.error(other, first) for other in others) > 1e-3
    same, _ = bound(LOOPS["python"], Probe(), STACKED, ROWS)
    np.testing.assert_allclose(same(trainable, jax.random.key(0)), off, rtol=1e-5)
    adapt = lj.adapt(lj.sites(LOOPS["scan"], STACKED, ROWS), [("w", Probe(8, **{option: 0.5}))])
    term = adapt.bind(*probe.init(adapt, STACKED), key=jax.random.key(5))["w"].terms[0]
    assert term.e.array.shape == (4, 8)
    assert len(np.unique(np.asarray(term.e.array)[:, 0 if option == "module_dropout" else slice(None)], axis=0)) > 1


def test_unit_dropout_drops_rows_of_a_and_columns_of_b():
    """Each draw is W + D_in A B D_out / (1 - p)^2, D_in and D_out diagonal zeros and ones with a share p of zeros."""
    params, x, rate = {"w": normal(8, 12)}, jnp.eye(8), 0.25
    lifted, trainable = bound(linear, Probe(3, unit_dropout=rate), params, x)
    samples = np.asarray(jax.jit(jax.vmap(partial(lifted, trainable)))(
        jax.random.split(jax.random.key(0), 512)), np.float64)
    a, b = (np.asarray(v, np.float64) for v in trainable["w"])
    kept = (samples - np.asarray(params["w"], np.float64)) / (0.5 * a @ b) * (1 - rate)**2
    rows, columns = kept.max(2) > 0.5, kept.max(1) > 0.5
    np.testing.assert_allclose(kept, rows[:, :, None] & columns[:, None, :], atol=1e-3)
    for on in (rows, columns):
        assert np.abs(on.mean(0) - (1 - rate)).max() <= 5 * np.sqrt(rate * (1 - rate) / 512)


@pytest.mark.parametrize("name", ["linen_conv_grouped", "linen_attention", "linen_scan"])
def test_unit_dropout_on_other_weights_merges_to_the_same(name: str):
    """Kernels of more dimensions and convolutions: the lifted model is the plain one with the bound weights merged."""
    case = CASES[name]
    fn, params, args, _ = case.built
    adapt = lj.adapt(lj.sites(fn, params, *args), [(".*kernel", Probe(unit_dropout=0.4))])
    bound = adapt.bind(*probe.init(adapt, params), key=jax.random.key(2))
    merged = jax.tree.map(lambda w: dense(w) if is_bound(w) else w, bound, is_leaf=is_bound)
    assert probe.error(jax.jit(lj.lift(fn, strict=True))(bound, *args), jax.jit(fn)(merged, *args)) <= 1e-4


def bound(fn: Callable[..., Any], variant: Variant, params: Any, x: jax.Array) -> tuple[Any, Any]:
    """((trainable, key) -> output, trainable)"""
    adapt = lj.adapt(lj.sites(fn, params, x), [(".*", variant)])
    trainable, frozen = probe.init(adapt, params)
    return lambda t, key: lj.lift(fn, strict=True)(adapt.bind(t, frozen, key=key), x), trainable


@pytest.mark.parametrize(
    ("variant", "words"),
    [(Probe(rank_dropout=1.0), r"rank_dropout=1.0 is not a probability"),
     (Probe(unit_dropout=1.5), r"unit_dropout=1.5 is not a probability"),
     (Bare(unit_dropout=0.1), r"w .*unit_dropout=0.1, but Bare has no factors.*set unit_dropout=0"),
     (Probe(module_dropout=-0.1), r"module_dropout=-0.1 is not a probability"),
     (Bare(rank_dropout=0.1), r"w .*rank_dropout=0.1, but Bare has no rank components to drop: set rank_dropout=0")])
def test_bad_rates_are_refused(variant: Variant, words: str):
    with pytest.raises(ValueError, match=words):
        lj.adapt(lj.sites(linear, {"w": normal(8, 12)}, ROWS), [("w", variant)])
