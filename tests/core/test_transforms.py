"""What people do around a lifted function: JAX transformations, many adapters on one base, dropout, meshes, sharing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec as P

import lorajax as lj

from . import jaxprs, models_mesh, probe
from .case import normal
from .models import CASES, Weight
from .models_linen import linen
from .probe import Probe
from .test_lift_cases import weighted

STYLES = ["linen_attention", "linen_scan_remat"]


class Setup(NamedTuple):
    """A model with its adapter: `f(trainable, *args)` is lifted, `ref` is the model on W + AB."""

    f: Callable[..., Any]
    ref: Callable[..., Any]
    adapt: Any
    trainable: Any
    frozen: Any
    args: tuple[Any, ...]


@cache
def setup(name: str) -> Setup:
    case = CASES[name]
    fn, params, args, _ = case.built
    adapt = lj.adapt(lj.sites(fn, params, *args), probe.rules(case.weights))
    trainable, frozen = probe.init(adapt, params)
    lifted = lj.lift(fn, strict=True)
    return Setup(lambda t, *a: lifted(adapt.bind(t, frozen), *a), lambda t, *a: fn(probe.merged(case.weights, params, t), *a),
                 adapt, trainable, frozen, args)


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
    assert probe.error(jaxprs.jit(f)(*args), jaxprs.jit(ref)(*args)) <= tol


def test_eager_equals_jit():
    m = setup("control_scan")
    assert probe.error(m.f(m.trainable, *m.args), jaxprs.jit(m.f)(m.trainable, *m.args)) <= 1e-6


def test_eval_shape_needs_no_arrays(model: Setup):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (model.trainable, *model.args))
    got, want = jax.eval_shape(model.f, *shapes), jax.eval_shape(model.ref, *shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), want)


def test_checkpoint_outside(model: Setup):
    grads = [jax.grad(square(jax.checkpoint(model.f))), jax.grad(square(model.ref))]
    agree(*grads, model.trainable, *model.args, tol=1e-4)


def test_jvp(model: Setup):
    push = lambda f: lambda t, v: jax.jvp(lambda t: f(t, *model.args), (t,), (v,))
    agree(push(model.f), push(model.ref), model.trainable, tangent(model.trainable), tol=1e-4)


def test_hessian_vector_product(model: Setup):
    """Forward over reverse."""
    hvp = lambda f: lambda t, v: jax.jvp(jax.grad(lambda t: square(f)(t, *model.args)), (t,), (v,))[1]
    agree(hvp(model.f), hvp(model.ref), model.trainable, tangent(model.trainable), tol=1e-4)


def test_gradient_per_example():
    m = setup("linen_scan")
    per = lambda f: lambda t, x: jax.vmap(jax.grad(square(lambda t, row: f(t, row[None]))), (None, 0))(t, x)
    agree(per(m.f), per(m.ref), m.trainable, *m.args, tol=1e-4)


def several(trainable: Any, k: int) -> Any:
    """K adapters, stacked in front."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *[tangent(trainable, 100 * i) for i in range(k)])


@pytest.mark.parametrize("name", STYLES)
def test_vmap_over_adapters_does_not_replicate_the_base(name: str):
    m, k = setup(name), 9
    many = several(m.trainable, k)
    run = lambda f: jax.vmap(jax.value_and_grad(lambda t: square(f)(t, *m.args)))
    program = jaxprs.trace(run(m.f), many)
    flat = probe.leaves(CASES[name].built.params)
    copies = {jaxprs.squeezed([k, *shape]) for shape in jaxprs.forbidden(CASES[name].weights, flat)}
    found = lambda jaxpr: [(prim, shape) for prim, shape in jaxprs.shapes(jaxpr) if jaxprs.squeezed(shape) in copies]
    assert found(jaxprs.trace(run(m.ref), many).jaxpr), "merged weights are K copies: the search has teeth"
    assert found(program.jaxpr) == []
    assert probe.error(jaxprs.run(program, many), jaxprs.jit(run(m.ref))(many)) <= 1e-4


def test_each_row_of_a_batch_picks_its_adapter():
    m = setup("linen_attention")
    many, index = several(m.trainable, 3), jnp.array([2, 0, 0, 1, 2])
    pick = lambda t, i: jax.tree.map(lambda x: x[i], t)
    rows = lambda f: jax.vmap(lambda i, *row: f(pick(many, i), *[r[None] for r in row])[0])(index, *m.args)
    got = jaxprs.jit(lambda: rows(m.f))()
    ref = jaxprs.jit(m.ref)
    for row, i in enumerate(index.tolist()):
        want = ref(pick(many, i), *[a[row:row + 1] for a in m.args])[0]
        assert probe.error(got[row], want) <= 1e-5


@pytest.mark.parametrize("name", ["linen_scan", "linen_tied", "linen_conv_grouped"])
def test_two_adapters_add_up_on_one_base(name: str):
    case = CASES[name]
    fn, params, args, _ = case.built
    first, second = dict(list(case.weights.items())), dict(list(case.weights.items())[:1])  # the second is on fewer sites
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
    assert probe.error(jaxprs.run(program, t1, t2), jaxprs.jit(jax.value_and_grad(ref, (0, 1)))(t1, t2)) <= 1e-4


# Dropout


def square_stack(w: jax.Array, x: jax.Array) -> jax.Array:
    for i in range(4):
        x = jnp.tanh(x @ w[i])
    return x


def scan_stack(w: jax.Array, x: jax.Array, wrap: Callable[..., Any] = lambda f: f) -> jax.Array:
    return lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0]


def dropping(fn: Callable[..., Any], rate: float, params: Any, x: jax.Array, rank: int = 3) -> tuple[Any, Any, Any]:
    """(key -> output, (trainable, key) -> output, trainable) of a lifted function whose adapters drop their input."""
    adapt = lj.adapt(lj.sites(fn, params, x), [(".*", Probe(rank, dropout=rate))])
    trainable, frozen = probe.init(adapt, params)
    lifted = jax.jit(lambda t, key: lj.lift(fn, strict=True)(adapt.bind(t, frozen, key=key), x))
    return partial(lifted, trainable), lifted, trainable


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
        results.append(jax.value_and_grad(lambda t, f=lifted: weighted(f(t, jax.random.key(7))))(trainable))
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
    fn = lambda p, x: x @ p["w"]
    params, x, rate = {"w": normal(8, 12)}, normal(2, 8, seed=3), 0.25
    f, _, trainable = dropping(fn, rate, params, x, rank=8)
    samples = np.asarray(jax.vmap(f)(jax.random.split(jax.random.key(0), 4096)), np.float64)
    a, b = (np.asarray(v, np.float64) for v in trainable["w"])
    ab, w, x = a @ b * 0.5, np.asarray(params["w"], np.float64), np.asarray(x, np.float64)
    spread = np.sqrt(rate / (1 - rate) * (x**2) @ (ab**2))  # of an inverted-dropout sum
    assert np.all(np.abs(samples.mean(0) - x @ (w + ab)) <= 5 * spread / 64)
    masks = (samples[:50, 0] - np.asarray(x[0]) @ w) @ np.linalg.pinv(x[0][:, None] * ab) * (1 - rate)
    np.testing.assert_allclose(np.minimum(np.abs(masks), np.abs(masks - 1)), 0, atol=1e-3)
    assert 0.65 < masks.mean() < 0.85


# Meshes


def specs(path: str, ndim: int) -> P:
    """Megatron-style: query, key, value and up are column parallel, out and down row parallel."""
    if "query" in path or "key" in path or "value" in path:
        return P(None, "model", None) if ndim == 3 else P()
    return P("model", None, None) if "out/kernel" in path else P()


def test_jit_on_a_mesh():
    """2 x 4 devices, Auto axes, tensor-parallel base: same values, and no more collectives than the base itself needs."""
    case = CASES["linen_attention"]
    mesh = models_mesh.auto()
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    fn, params, (x, _), _ = linen(nn.MultiHeadDotProductAttention(4, qkv_features=16), normal(6, 7, 8), normal(6, 7, 8))
    sharded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: put(leaf, specs(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.ndim)), params)
    adapt = lj.adapt(lj.sites(fn, params, x, x), probe.rules(case.weights))
    trainable, frozen = probe.init(adapt, params)
    trainable_sharded, frozen_sharded = jax.jit(adapt.init)(jax.random.key(1), sharded)
    loss = lambda t, f, x: weighted(lj.lift(fn, strict=True)(adapt.bind(t, f), x, x))
    want = jax.jit(jax.value_and_grad(loss))(trainable, frozen, x)
    program = jax.jit(jax.value_and_grad(loss)).lower(trainable_sharded, frozen_sharded, put(x, P("data"))).compile()
    assert probe.error(program(trainable_sharded, frozen_sharded, put(x, P("data"))), want) <= 1e-4
    base = jax.jit(jax.value_and_grad(lambda x, p: weighted(fn(p, x, x)))).lower(put(x, P("data")), sharded).compile()
    gathers = lambda compiled: compiled.as_text().count("all-gather(") + compiled.as_text().count("all-to-all(")
    assert gathers(program) <= gathers(base)


def test_gradients_on_an_explicit_mesh_have_the_sharding_of_the_adapter():
    case = CASES["explicit_row"]
    with case.scope():
        fn, params, args, _ = case.built
        adapt = lj.adapt(lj.sites(fn, params, *args), probe.rules(case.weights))
        trainable, frozen = probe.init(adapt, params)
        trainable = {"w": trainable["w"]._replace(a=models_mesh.placed(trainable["w"].a, "model", None))}
        grad = jax.jit(jax.grad(lambda t: weighted(lj.lift(fn, strict=True)(adapt.bind(t, frozen), *args))))(trainable)
        assert grad["w"].a.sharding.is_equivalent_to(trainable["w"].a.sharding, 2)
        assert {a for a in jax.typeof(grad["w"].a).sharding.spec if a} == {"model"}


# What the original program says is kept


def test_effects_are_kept():
    seen = []

    def fn(p: Any, x: jax.Array) -> jax.Array:
        y = x @ p["w"]
        jax.debug.callback(lambda y: seen.append(float(y)), y.sum())
        return y

    adapt = lj.adapt(lj.sites(fn, {"w": normal(8, 12)}, ROWS), [("w", Probe())])
    trainable, frozen = probe.init(adapt, {"w": normal(8, 12)})
    out = jax.jit(lambda t: lj.lift(fn, strict=True)(adapt.bind(t, frozen), ROWS))(trainable)
    jax.effects_barrier()
    assert len(seen) == 1
    assert seen[0] == pytest.approx(float(out.sum()), rel=1e-5)


def test_remat_policy_and_names_are_kept():
    """A policy that saves the named sine computes it once, one that saves nothing twice: as on W + AB."""
    policies = jax.checkpoint_policies
    params = {"w": normal(8, 12)}
    for policy, sines in ((policies.save_only_these_names("hidden"), 1), (policies.nothing_saveable, 2)):
        def fn(p: Any, x: jax.Array, policy: Any = policy) -> jax.Array:
            return jax.checkpoint(lambda w, x: checkpoint_name(jnp.sin(x @ w), "hidden") ** 3, policy=policy)(p["w"], x)

        adapt = lj.adapt(lj.sites(fn, params, ROWS), [("w", Probe())])
        trainable, frozen = probe.init(adapt, params)
        lifted = lambda t, fn=fn, frozen=frozen, adapt=adapt: lj.lift(fn, strict=True)(adapt.bind(t, frozen), ROWS)
        naive = lambda t, fn=fn: fn(probe.merged({"w": Weight()}, params, t), ROWS)
        forward = jax.make_jaxpr(lifted)(trainable)
        assert [e.params["policy"] for e in jaxprs.equations(forward) if "policy" in e.params] == [policy]
        assert [e.params["name"] for e in jaxprs.equations(forward) if e.primitive.name == "name"] == ["hidden"]
        for f in (lifted, naive):
            backward = jax.make_jaxpr(jax.grad(lambda t, f=f: weighted(f(t))))(trainable)
            assert jaxprs.primitives(backward).count("sin") == sines


def test_sharding_constraints_are_kept():
    case = CASES["sharding_constraint"]
    m = setup("sharding_constraint")
    specs = lambda jaxpr: [e.params["sharding"].spec for e in jaxprs.equations(jaxpr)
                           if e.primitive.name == "sharding_constraint"]
    plain = specs(jax.make_jaxpr(case.built.fn)(case.built.params, *m.args))
    lifted = specs(jax.make_jaxpr(m.f)(m.trainable, *m.args))
    assert len(plain) == 2
    for spec in plain:
        assert spec in lifted


@pytest.mark.parametrize("n", [3, 6])
def test_identical_jitted_layers_stay_one_function(n: int):
    """As many functions in the lowered program for 6 layers as for 3, called once per layer."""
    @jax.jit
    def layer(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.tanh(x @ w["up"]) @ w["down"]

    def fn(p: Any, x: jax.Array) -> jax.Array:
        for i in range(n):
            x = layer(p[f"layer_{i}"], x)
        return x

    params = {f"layer_{i}": {"up": normal(8, 12, seed=i), "down": normal(12, 8, seed=i)} for i in range(n)}
    adapt = lj.adapt(lj.sites(fn, params, ROWS), [(".*", Probe())])
    trainable, frozen = probe.init(adapt, params)
    text = jax.jit(lambda t: lj.lift(fn, strict=True)(adapt.bind(t, frozen), ROWS)).lower(trainable).as_text()
    plain = jax.jit(lambda p: fn(p, ROWS)).lower(params).as_text()
    assert (plain.count("func.func"), plain.count("call @layer")) == (2, n)
    assert (text.count("func.func"), text.count("call @layer")) == (2, n)


def test_the_function_keeps_its_name_and_docstring():
    def fn(params: Any) -> Any:
        """Documented."""

    assert (lj.lift(fn).__name__, lj.lift(fn).__doc__) == ("fn", "Documented.")


def test_lifted_functions_nest():
    """A lifted function inside another traced function with its own bound tree."""
    m = setup("control_scan")
    outer = jax.jit(lambda t, x: m.f(t, m.f(t, x)))
    assert probe.error(outer(m.trainable, *m.args), m.ref(m.trainable, m.ref(m.trainable, *m.args))) <= 1e-5
