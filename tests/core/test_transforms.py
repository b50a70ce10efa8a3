"""JAX transformations around a lifted function, and many adapters on one base."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import lorajax as lj

from . import jaxprs, probe
from .case import normal
from .models import CASES
from .probe import Probe
from .test_lift_cases import weighted

STYLES = ["linen_attention", "linen_scan_remat"]


class Setup(NamedTuple):
    """A model with its adapter: `f(trainable, *args)` is lifted, `ref` is the model on W + AB."""

    f: Callable[..., Any]
    ref: Callable[..., Any]
    trainable: Any
    args: tuple[Any, ...]


@cache
def setup(name: str) -> Setup:
    case = CASES[name]
    fn, params, args, _ = case.built
    adapt = lj.adapt(lj.sites(fn, params, *args), probe.rules(case.weights))
    trainable, frozen = probe.init(adapt, params)

    def f(t: Any, *args: Any) -> Any:
        return lj.lift(fn, strict=True)(adapt.bind(t, frozen), *args)

    def ref(t: Any, *args: Any) -> Any:
        return fn(probe.merged(case.weights, params, t), *args)

    return Setup(f, ref, trainable, args)


@pytest.fixture(params=STYLES)
def model(request: pytest.FixtureRequest) -> Setup:
    return setup(request.param)


def tangent(tree: Any, seed: int = 5) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [normal(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)])


def square(f: Callable[..., Any]) -> Callable[..., jax.Array]:
    """A loss with curvature."""
    return lambda t, *args: jnp.sin(weighted(f(t, *args)) / 8)


def agree(f: Callable[..., Any], ref: Callable[..., Any], *args: Any, tol: float) -> None:
    assert probe.error(jax.jit(f)(*args), jax.jit(ref)(*args)) <= tol


def test_eager_equals_jit():
    m = setup("control_scan")
    assert probe.error(m.f(m.trainable, *m.args), jax.jit(m.f)(m.trainable, *m.args)) <= 1e-6


def test_eval_shape_needs_no_arrays(model: Setup):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (model.trainable, *model.args))
    got, want = jax.eval_shape(model.f, *shapes), jax.eval_shape(model.ref, *shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), want)


def test_checkpoint_outside(model: Setup):
    grads = [jax.grad(square(jax.checkpoint(model.f))), jax.grad(square(model.ref))]
    agree(*grads, model.trainable, *model.args, tol=1e-4)


def test_jvp(model: Setup):
    def push(f):
        return lambda t, v: jax.jvp(lambda t: f(t, *model.args), (t,), (v,))

    agree(push(model.f), push(model.ref), model.trainable, tangent(model.trainable), tol=1e-4)


def test_hessian_vector_product(model: Setup):
    """Forward over reverse."""
    def hvp(f):
        return lambda t, v: jax.jvp(jax.grad(lambda t: square(f)(t, *model.args)), (t,), (v,))[1]

    agree(hvp(model.f), hvp(model.ref), model.trainable, tangent(model.trainable), tol=1e-4)


def test_gradient_per_example():
    m = setup("linen_scan")

    def per(f):
        return lambda t, x: jax.vmap(jax.grad(square(lambda t, row: f(t, row[None]))), (None, 0))(t, x)

    agree(per(m.f), per(m.ref), m.trainable, *m.args, tol=1e-4)


def several(trainable: Any, k: int) -> Any:
    """K adapters, stacked in front."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *[tangent(trainable, 100 * i) for i in range(k)])


@pytest.mark.parametrize("name", STYLES)
def test_vmap_over_adapters_does_not_replicate_the_base(name: str):
    m, k = setup(name), 9
    many = several(m.trainable, k)

    def run(f):
        return jax.vmap(jax.value_and_grad(lambda t: square(f)(t, *m.args)))

    program = jaxprs.trace(run(m.f), many)
    flat = probe.leaves(CASES[name].built.params)
    copies = {jaxprs.squeezed([k, *shape]) for shape in jaxprs.forbidden(CASES[name].weights, flat)}

    def found(jaxpr):
        return [(prim, shape) for prim, shape in jaxprs.shapes(jaxpr) if jaxprs.squeezed(shape) in copies]

    assert found(jaxprs.trace(run(m.ref), many).jaxpr), "merged weights are K copies: the search has teeth"
    assert found(program.jaxpr) == []
    assert probe.error(jaxprs.run(program, many), jax.jit(run(m.ref))(many)) <= 1e-4


def test_each_row_of_a_batch_picks_its_adapter():
    m = setup("linen_attention")
    many, index = several(m.trainable, 3), jnp.array([2, 0, 0, 1, 2])

    def pick(t, i):
        return jax.tree.map(lambda x: x[i], t)

    def rows(f):
        return jax.vmap(lambda i, *row: f(pick(many, i), *[r[None] for r in row])[0])(index, *m.args)

    got = jax.jit(lambda: rows(m.f))()
    ref = jax.jit(m.ref)
    for row, i in enumerate(index.tolist()):
        want = ref(pick(many, i), *[a[row:row + 1] for a in m.args])[0]
        assert probe.error(got[row], want) <= 1e-5


@pytest.mark.parametrize("name", ["linen_scan", "linen_tied", "linen_conv_grouped"])
def test_two_adapters_add_up_on_one_base(name: str):
    case = CASES[name]
    fn, params, args, _ = case.built
    first = case.weights
    second = dict(list(first.items())[:1])  # on fewer sites
    sites = lj.sites(fn, params, *args)
    one, two = lj.adapt(sites, probe.rules(first)), lj.adapt(sites, probe.rules(second, Probe(rank=2, scale=1.5)))
    (t1, f1), (t2, f2) = probe.init(one, params, seed=1), probe.init(two, params, seed=2)

    def lifted(t1: Any, t2: Any) -> jax.Array:
        bound = two.bind(t2, f2, onto=one.bind(t1, f1))
        return weighted(lj.lift(fn, strict=True)(bound, *args))

    def ref(t1: Any, t2: Any) -> jax.Array:
        return weighted(fn(probe.merged(second, probe.merged(first, params, t1), t2, scale=1.5), *args))

    program = jaxprs.trace(jax.value_and_grad(lifted, (0, 1)), t1, t2)
    assert jaxprs.weight_shaped(program.jaxpr, case.weights, probe.leaves(params)) == []
    assert probe.error(jaxprs.run(program, t1, t2), jax.jit(jax.value_and_grad(ref, (0, 1)))(t1, t2)) <= 1e-4


def test_the_function_keeps_its_name_and_docstring():
    def fn(params: Any) -> Any:
        """Documented."""

    assert (lj.lift(fn).__name__, lj.lift(fn).__doc__) == ("fn", "Documented.")


def test_bound_trees_are_arguments_like_any_other():
    """Of a jitted or vmapped lifted function, by position or by name, of a function that was jitted or vmapped."""
    case = CASES["control_scan_xs_and_closure"]
    fn, params, (x,), _ = case.built
    adapt = lj.adapt(lj.sites(fn, params, x), probe.rules(case.weights))
    trainable, frozen = probe.init(adapt, params)
    bound, xs = adapt.bind(trainable, frozen), jnp.stack([x, -x])

    def call(*, params, x):
        return fn(params, x)

    ref = jax.jit(lambda p: (fn(p, x), fn(p, -x)))(probe.merged(case.weights, params, trainable))
    for got in (jax.jit(lj.lift(fn, strict=True))(bound, x),
                jax.jit(lj.lift(call, strict=True))(x=x, params=bound),
                jax.jit(lj.lift(jax.jit(fn), strict=True))(bound, x)):
        assert probe.error(got, ref[0]) <= 1e-5
    for many in (jax.vmap(lj.lift(fn, strict=True), (None, 0)), lj.lift(jax.vmap(fn, (None, 0)), strict=True)):
        got = jax.jit(many)(bound, xs)
        for i in range(2):
            assert probe.error(jax.tree.map(lambda y, i=i: y[i], got), ref[i]) <= 1e-5


def test_lifted_functions_nest():
    """A lifted function inside another traced function with its own bound tree."""
    m = setup("control_scan")
    outer = jax.jit(lambda t, x: m.f(t, m.f(t, x)))
    ref = jax.jit(lambda t, x: m.ref(t, m.ref(t, x)))
    assert probe.error(outer(m.trainable, *m.args), ref(m.trainable, *m.args)) <= 1e-5
