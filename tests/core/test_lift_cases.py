"""Every model of the table, lifted, against itself on W + AB: outputs, gradients, no dense delta, fallbacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj

from . import jaxprs, probe
from .models import CASES, Built, Case

FACTORED = [case for case in CASES.values() if case.fallback is None]
FALLBACKS = [case for case in CASES.values() if case.fallback is not None]


def ids(case: Case) -> str:
    return case.name


def weighted(out: Any) -> jax.Array:
    """A scalar to which every element of every float output contributes with its own sign and size."""
    total = jnp.float32(0)
    for i, leaf in enumerate(jax.tree.leaves(out)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            flat = np.cos(np.arange(leaf.size, dtype=np.float32) + i).reshape(leaf.shape)
            total += jnp.sum(leaf.astype(jnp.float32) * flat)
    return total


def objective(fn: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """(outputs, gradients with respect to the adapters and to every float argument but the frozen weights); the
    outputs alone where JAX has no gradient. For functions (trainable, weights, *args)."""

    def loss(*args: Any) -> Any:
        out = fn(*args)
        return weighted(out), out

    def run(*args: Any) -> Any:
        floats = [all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(arg)) for arg in args]
        wrt = [i for i, is_float in enumerate(floats) if is_float and i != 1]
        (_, out), grads = jax.value_and_grad(loss, wrt, has_aux=True)(*args)
        return out, grads

    return run if case.differentiable else lambda *args: (fn(*args), ())


def prepared(case: Case) -> tuple[Built, Any, Any, Any]:
    """(built, adapt, trainable, frozen) with every weight of the table adapted by random factors."""
    built = case.built
    adapt = lj.adapt(lj.sites(built.fn, built.params, *built.args), probe.rules(case.weights))
    frozen = jax.jit(lambda params: adapt.init(jax.random.key(0), params)[1])(built.params)
    return built, adapt, probe.adapters(case.weights, built.params), frozen


def traced(case: Case, strict: bool) -> tuple[Any, Any, Any]:
    """The lifted program and the reference on W + AB, both traced, and their arguments."""
    built, adapt, trainable, frozen = prepared(case)
    lifted = lj.lift(built.fn, strict=strict)
    got = jaxprs.trace(objective(lambda t, f, *a: lifted(adapt.bind(t, f), *a), case), trainable, frozen, *built.args)
    want = jaxprs.trace(objective(lambda t, p, *a: built.fn(probe.merged(case.weights, p, t), *a), case),
                        trainable, built.params, *built.args)
    return got, want, (trainable, frozen)


def check(case: Case, got: Any, want: Any, trainable: Any, frozen: Any) -> None:
    """Outputs to 1e-5 and gradients to 1e-4; in half precision, as close to float32 as W + AB is, within a factor."""
    built = case.built
    out, grad = jaxprs.run(got, trainable, frozen, *built.args)
    out_ref, grad_ref = jaxprs.run(want, trainable, built.params, *built.args)
    for leaf in jax.tree.leaves(grad_ref):
        assert float(jnp.abs(leaf).max()) > 1e-3, "an adapter changes nothing: the case has no teeth"
    if built.exact is None:
        assert probe.error(out, out_ref) <= 1e-5
        assert probe.error(grad, grad_ref) <= 1e-4
        return
    assert jax.tree.map(lambda leaf: leaf.dtype, out) == jax.tree.map(lambda leaf: leaf.dtype, out_ref)
    exact = objective(lambda t, p, *a: built.exact(probe.merged(case.weights, p, t), *a), case)
    out_exact, grad_exact = jax.jit(exact)(trainable, built.params, *built.args)
    assert probe.error(out, out_exact) <= 2 * probe.error(out_ref, out_exact)
    assert probe.error(grad, grad_exact) <= 2 * probe.error(grad_ref, grad_exact)


@pytest.mark.parametrize("case", FACTORED, ids=ids)
def test_factored(case: Case):
    with case.scope():
        got, want, (trainable, frozen) = traced(case, strict=True)
        flat = probe.leaves(case.built.params)
        assert len(jaxprs.weight_shaped(want.jaxpr, case.weights, flat)) >= len(case.weights), "no teeth"
        assert jaxprs.weight_shaped(got.jaxpr, case.weights, flat) == []
        check(case, got, want, trainable, frozen)


@pytest.mark.parametrize("case", FALLBACKS, ids=ids)
def test_fallback_is_right_and_reported_once(case: Case):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, want, (trainable, frozen) = traced(case, strict=False)
    reports = [str(w.message) for w in caught if issubclass(w.category, lj.MaterialisedWeight)]
    assert len(reports) == len(caught)
    for path in case.weights:
        mine = [report for report in reports if report.startswith(f"{path}:")]
        assert len(mine) == len(set(mine)) == (case.places or len(mine)) > 0, (path, reports)
        for report in mine:
            assert case.fallback in report
            assert ".py:" in report or case.fallback == "return", "the report names the source line"
    check(case, got, want, trainable, frozen)


@pytest.mark.parametrize("case", FALLBACKS, ids=ids)
def test_strict_refuses_fallback(case: Case):
    built, adapt, trainable, frozen = prepared(case)
    with pytest.raises(lj.StrictLiftError) as caught:
        jax.eval_shape(lj.lift(built.fn, strict=True), adapt.bind(trainable, frozen), *built.args)
    assert any(path in str(caught.value) for path in case.weights)
    assert case.fallback in str(caught.value)


@pytest.mark.parametrize("name", ["linen_batchnorm", "nnx_scan_remat", "control_while", "raw_ragged_dot"])
def test_unbound_parameters_give_the_function_itself(name: str):
    """No adapter bound: bit for bit the plain function."""
    fn, params, args, _ = CASES[name].built
    out, base = jax.jit(lj.lift(fn, strict=True))(params, *args), jax.jit(fn)(params, *args)
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(x, y)
