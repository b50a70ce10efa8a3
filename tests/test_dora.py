"""DoRA against NumPy: W' = V diag(m / ||V||), its two gradients, where dropout acts, its start, and what it costs."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import jaxprs
from core.case import Weight, normal
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lorajax as lj
from lorajax.control import adalora, compact
from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants import AdaLoRA, DoRA, LoRA
from lorajax.variants.adalora import AdaLoRAAdapter
from lorajax.variants.dora import _added, _cross

# The formulas, on one (in, out) matrix or a stack of them, float64


def dora(w: Any, delta: Any, m: Any) -> Any:
    v = np.float64(w) + np.float64(delta)
    return v * (np.float64(m) / np.linalg.norm(v, axis=-2))[..., None, :]


def gradients(w: Any, a: Any, b: Any, m: Any, s: float, g: Any, detach: bool) -> tuple[Any, Any, Any]:
    """dL/dA, dL/dB, dL/dm from G = dL/dW'."""
    w, a, b, m, g = (np.float64(x) for x in (w, a, b, m, g))
    v = w + s * a @ b
    n = np.linalg.norm(v, axis=-2, keepdims=True)
    along = (g * v / n).sum(-2, keepdims=True)  # <G_j, V_j> / n_j
    dv = m[..., None, :] / n * (g if detach else g - v / n * along)
    at, bt = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    return s * dv @ bt, s * at @ dv, along[..., 0, :]


def test_the_worked_example() -> None:
    w, variant = jnp.array([[3.0, 0.0], [4.0, 2.0]]), DoRA(LoRA(rank=2, alpha=2.0))
    adapter, _ = variant.init(jax.random.key(0), w)
    np.testing.assert_allclose(adapter.magnitude, [5, 2])
    moved = adapter._replace(A=jnp.eye(2), B=jnp.array([[0.0, 2.0], [0.0, 0.0]]))
    np.testing.assert_allclose(variant.gain(moved, w), [1, 2 / 2.828427], rtol=1e-6)
    np.testing.assert_allclose(w + variant.delta(moved, w), [[3, 1.414214], [4, 1.414214]], rtol=1e-6)


def test_published_parameter_count() -> None:
    """Llama-3.2-3B, query and value, rank 32: PEFT's result file."""
    start = DoRA(LoRA(rank=32)).init
    shapes = [jax.eval_shape(start, jax.random.key(0), jax.ShapeDtypeStruct((3072, out), jnp.float32))[0]
              for out in (3072, 1024)]
    assert 28 * sum(x.size for s in shapes for x in (s.A, s.B, s.magnitude)) == 9_289_728


# In a model. Each weight is laid out (stack..., in..., out...)


class Model(NamedTuple):
    fn: Callable[[Any, Any], Any]
    w: tuple[int, ...]
    x: Any
    matrix: tuple[int, ...]  # (stack..., in, out)
    bias: tuple[int, ...] = ()


def conv(p: Any, x: jax.Array, groups: int = 1) -> jax.Array:
    y = lax.conv_general_dilated(x, p["w"], (2, 1), [(2, 1), (0, 2)], rhs_dilation=(1, 2), feature_group_count=groups,
                                 dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + p["bias"]


def scanned(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, p: (jnp.tanh(x @ p["w"] + p["bias"]), None), x, p)[0]


IDS = jnp.array([[1, 4, 4], [0, 9, 3]])
MODELS = {
    "matmul": Model(lambda p, x: x @ p["w"] + p["bias"], (6, 8), normal(5, 6), (6, 8), (1, 8)),
    "heads": Model(lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]) + p["bias"], (6, 2, 4), normal(5, 6), (6, 8),
                   (1, 2, 4)),
    "from heads": Model(lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]) + p["bias"], (2, 4, 6), normal(5, 2, 4),
                        (8, 6), (1, 6)),
    "conv": Model(conv, (3, 2, 4, 6), normal(2, 7, 6, 4), (24, 6), (1, 1, 1, 6)),
    "conv in groups": Model(lambda p, x: conv(p, x, 2), (3, 2, 2, 6), normal(2, 7, 6, 4), (12, 6), (1, 1, 1, 6)),
    "lookup": Model(lambda p, x: 3.0 * p["w"][IDS] + p["bias"], (11, 6), jnp.zeros(1), (11, 6), (1, 1, 6)),
    "tied": Model(lambda p, x: jnp.tanh(p["w"][IDS]) @ p["w"].T, (11, 6), jnp.zeros(1), (11, 6)),
    "scan": Model(scanned, (3, 6, 6), normal(5, 6), (3, 6, 6), (3, 1, 6)),
}


def bound(model: Model, variant: Variant, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """(params, adapt, trainable, frozen) with noise for A, B and m."""
    params = {"w": normal(*model.w, seed=seed, scale=0.6)}
    params |= {"bias": normal(*model.bias, seed=seed + 1)} if model.bias else {}
    adapt = lj.adapt(lj.sites(model.fn, params, model.x), [("w", variant)])
    trainable, frozen = adapt.init(jax.random.key(seed), params)
    noisy = {name: None if x is None else normal(*x.shape, seed=seed + 2, scale=0.7)
             for name, x in trainable["w"]._asdict().items()}
    return params, adapt, {"w": trainable["w"]._replace(**noisy)}, frozen


@pytest.mark.parametrize(("name", "detach"), [*[(name, True) for name in MODELS], ("matmul", False), ("scan", False)])
def test_output_and_gradients(name: str, detach: bool) -> None:
    model, s = MODELS[name], 1.5
    params, adapt, trainable, frozen = bound(model, DoRA(LoRA(rank=2, alpha=3.0), detach))
    # One magnitude is 0 and one far below it: their gradients are what they are for any other.
    low = trainable["w"].magnitude.at[..., 1].set(0.0).at[..., 2].set(1e-30)
    trainable = {"w": trainable["w"]._replace(magnitude=low)}
    a, b, m, _ = trainable["w"]
    w = np.asarray(params["w"]).reshape(model.matrix)
    new = dora(w, s * np.float64(a) @ np.float64(b), m).reshape(model.w)
    weights = jnp.cos(jnp.arange(1, 1001, dtype=jnp.float32))

    def loss(out: jax.Array) -> jax.Array:
        return jnp.sum(out.ravel() * weights[:out.size])

    def plain(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = model.fn({**params, "w": w}, model.x)
        return loss(out), out

    def lifted(trainable: Any) -> tuple[jax.Array, jax.Array]:
        out = lj.lift(model.fn, strict=True)(adapt.bind(trainable, frozen), model.x)
        return loss(out), out

    (_, want), g = jax.jit(jax.value_and_grad(plain, has_aux=True))(jnp.float32(new))
    (_, got), ours = jax.jit(jax.value_and_grad(lifted, has_aux=True))(trainable)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adapt.merge(trainable, frozen)["w"], new, rtol=1e-4, atol=1e-6)
    expected = gradients(w, a, b, m, s, np.asarray(g).reshape(model.matrix), detach)
    for field, theirs in zip("ABm", expected, strict=True):
        mine = ours["w"].magnitude if field == "m" else getattr(ours["w"], field)
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=2e-5 * np.abs(theirs).max(), err_msg=field)
    other = gradients(w, a, b, m, s, np.asarray(g).reshape(model.matrix), not detach)
    assert np.abs(other[0] - expected[0]).max() > 0.01 * np.abs(expected[0]).max(), "the two gradients differ"


@pytest.mark.parametrize(("name", "dtype"), [*[(name, jnp.float32) for name in MODELS], ("conv", jnp.bfloat16),
                                            ("scan", jnp.bfloat16)])
def test_starts_as_exactly_the_identity_with_zero_columns_and_finite_gradients(name: str, dtype: Any) -> None:
    model = MODELS[name]
    params, adapt, _, _ = bound(model, DoRA(LoRA(rank=2)))
    params = {**params, "w": params["w"].at[..., -1].set(0).at[..., 0].multiply(1e-5)}
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    x = model.x.astype(dtype)
    adapt = lj.adapt(lj.sites(model.fn, params, x), [("w", DoRA(LoRA(rank=2)))])
    trainable, frozen = adapt.init(jax.random.key(0), params)

    def lifted(trainable: Any) -> tuple[jax.Array, jax.Array]:
        out = lj.lift(model.fn, strict=True)(adapt.bind(trainable, frozen), x)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    for term in jax.jit(adapt.bind)(trainable, frozen)["w"].terms:
        np.testing.assert_array_equal(term.g.array, np.ones(term.g.array.shape))
    with jax.disable_jit():  # op by op: compiled together, a product and a sum may be rounded once
        np.testing.assert_array_equal(np.float32(lifted(trainable)[1]), np.float32(model.fn(params, x)))
    np.testing.assert_array_equal(np.float32(adapt.merge(trainable, frozen)["w"]), np.float32(params["w"]))
    grads, _ = jax.jit(jax.grad(lifted, has_aux=True))(trainable)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads)
    again = jax.jit(jax.grad(lifted, has_aux=True))(moved)[0]
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(again))


@pytest.mark.parametrize("name", ["matmul", "conv"])
def test_dropout_acts_on_the_update_and_on_the_change_of_scale(name: str) -> None:
    """y = x W + (g - 1) (x~ W) + g s (x~ A) B, where x~ is the dropped input: the same as LoRA's at this path."""
    model, rate, key = MODELS[name], 0.4, jax.random.key(3)
    n = model.x.shape[-1]
    see = Model(conv if name == "conv" else model.fn, (1, 1, n, n) if name == "conv" else (n, n), model.x, (n, n),
                (1,) * (model.x.ndim - 1) + (n,))
    if name == "conv":
        see = see._replace(fn=lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")))

    params, adapt, trainable, frozen = bound(see, LoRA(rank=n, alpha=float(n), dropout=rate))
    run = lj.lift(see.fn, strict=True)
    update = run(adapt.bind(trainable, frozen, key=key), see.x) - see.fn(params, see.x)
    ab = np.float64(trainable["w"].A) @ np.float64(trainable["w"].B)
    dropped = np.float64(update) @ np.linalg.inv(ab)
    on = np.abs(dropped) > 0.1 * np.abs(see.x)
    np.testing.assert_allclose(dropped, np.where(on, see.x / (1 - rate), 0), atol=1e-3)
    assert 0.4 < on.mean() < 0.8

    params, adapt, trainable, frozen = bound(model, DoRA(LoRA(rank=2, alpha=3.0, dropout=rate)))
    a, b, m, _ = trainable["w"]
    w = np.asarray(params["w"]).reshape(model.matrix)
    delta = 1.5 * np.float64(a) @ np.float64(b)
    changed = dora(w, delta, m) - w  # (g - 1) W + g s A B
    x = jnp.float32(np.where(on, see.x / (1 - rate), 0))
    silent = {**params, "bias": jnp.zeros_like(params["bias"])}
    want = model.fn(params, model.x) + model.fn({**silent, "w": jnp.float32(changed).reshape(model.w)}, x)
    got = lj.lift(model.fn, strict=True)(adapt.bind(trainable, frozen, key=key), model.x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# What it wraps


class HadamardAdapter(NamedTuple):
    P: jax.Array
    Q: jax.Array


@dataclass(frozen=True)
class Hadamard(Variant):
    """A variant with a delta alone: W + P * Q, elementwise."""

    leaves: ClassVar[dict[str, Leaf]] = {"P": Leaf("a", ("in", "out")), "Q": Leaf("b", ("in", "out"))}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[HadamardAdapter, jax.Array]:
        return HadamardAdapter(jax.random.normal(key, w.shape), jnp.zeros(w.shape)), w

    def delta(self, adapter: HadamardAdapter, w: jax.Array) -> jax.Array:
        return adapter.P * adapter.Q


@dataclass(frozen=True)
class Stretch(Hadamard):
    """One that scales the weight."""

    def factors(self, adapter: HadamardAdapter, w: jax.Array) -> Factors:
        return Factors(g=adapter.P[0])


@pytest.mark.parametrize("name", ["matmul", "scan", "conv"])
def test_around_a_variant_that_has_only_a_delta(name: str) -> None:
    model = MODELS[name]
    params, adapt, trainable, frozen = bound(model, DoRA(Hadamard()))
    p, q, m, _ = trainable["w"]
    want = dora(np.asarray(params["w"]).reshape(model.matrix), np.float64(p) * np.float64(q), m).reshape(model.w)
    np.testing.assert_allclose(adapt.merge(trainable, frozen)["w"], want, rtol=1e-4, atol=1e-5)
    got = lj.lift(model.fn)(adapt.bind(trainable, frozen), model.x)
    np.testing.assert_allclose(got, model.fn({**params, "w": jnp.float32(want)}, model.x), rtol=1e-3, atol=1e-4)
    start = adapt.init(jax.random.key(0), params)
    np.testing.assert_array_equal(adapt.merge(*start)["w"], params["w"])


@pytest.mark.parametrize("detach", [True, False])
def test_gradient_around_a_delta(detach: bool) -> None:
    w, g = normal(6, 8), normal(6, 8, seed=1)
    variant = DoRA(Hadamard(), detach)
    adapter = variant.init(jax.random.key(0), w)[0]._replace(Q=normal(6, 8, seed=2))
    grads = jax.grad(lambda ad: jnp.sum(g * variant.delta(ad, w)))(adapter)
    _, dv, dm = gradients(w, np.eye(6), adapter.P * adapter.Q, adapter.magnitude, 1.0, g, detach)
    np.testing.assert_allclose(grads.P, dv * np.asarray(adapter.Q), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads.magnitude, dm, rtol=1e-4, atol=1e-5)


def test_magnitude_alone() -> None:
    """The released code's Wdecompose_target_modules: W diag(m / ||W||), beside a rule with an update."""
    model = MODELS["matmul"]
    params, adapt, trainable, frozen = bound(model, DoRA(of=None))
    assert trainable["w"]._fields == ("magnitude", "weight_norm")
    assert adapt.labels["w"].magnitude == "magnitude"
    want = dora(params["w"], 0.0, trainable["w"].magnitude)
    got = lj.lift(model.fn, strict=True)(adapt.bind(trainable, frozen), model.x)
    np.testing.assert_allclose(got, model.fn({**params, "w": jnp.float32(want)}, model.x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fold", [False, True])
def test_around_a_start_that_is_taken_off_again(fold: bool) -> None:
    """PiSSA inside: A and B are large, W' is W and m is ||W||."""
    variant, w = DoRA(LoRA(rank=2, initializer="pissa", fold=fold)), normal(6, 8)
    adapter, base = variant.init(jax.random.key(0), w)
    assert np.abs(adapter.A @ adapter.B).max() > 0.1
    np.testing.assert_allclose(base + variant.delta(adapter, base), w, atol=1e-5)
    np.testing.assert_allclose(adapter.magnitude, np.linalg.norm(w, axis=0), rtol=1e-5)


def test_it_stands_for_what_it_wraps() -> None:
    variant = DoRA(LoRA(rank=4, dropout=0.25))
    assert (variant.rank, variant.dropout, variant.factored) == (4, 0.25, True)
    assert variant.for_lookup() == DoRA(LoRA(rank=4, dropout=0.25, initializer="embedding"))
    assert (DoRA(None).rank, DoRA(None).dropout, DoRA(Hadamard()).factored) == (None, 0.0, False)
    assert {k: v.label for k, v in variant.leaves.items()} == {
        "A": "a", "B": "b", "magnitude": "magnitude", "weight_norm": "norm"}


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (DoRA(LoRA(rank=40)), r"w .*rank=40 is outside 1\.\.6.*lower the rank"),
        (DoRA(Stretch()), r"w .*Stretch scales the weight.*added.*wrap LoRA"),
        (DoRA(DoRA(LoRA(rank=2))), r"w .*DoRA scales the weight"),
    ],
)
def test_errors(variant: DoRA, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bound(MODELS["matmul"], variant)


# AdaLoRA inside


def test_adalora_inside_is_pruned_and_compacted_as_outside() -> None:
    """The controller keeps the same triplets for the same A, E, B and gradients; m has no part in it. The penalty is
    the same too, and the smaller adapter gives the same weights."""
    params = {"u": normal(6, 8), "v": normal(8, 6, seed=1)}
    sites = lj.sites(lambda p, x: x @ p["u"] @ p["v"], params, normal(5, 6))
    plans = [lj.adapt(sites, [(".*", v)]) for v in (AdaLoRA(rank=4), DoRA(AdaLoRA(rank=4)))]
    controllers = [adalora(adapt, total_steps=4, target_rank=1.5) for adapt in plans]
    noise = lambda seed: {p: AdaLoRAAdapter(normal(n, 4, seed=seed), normal(4, seed=seed), normal(4, 14 - n, seed=seed))  # noqa: E731
                          for p, n in (("u", 6), ("v", 8))}
    started, frozen = plans[1].init(jax.random.key(0), params)
    norms = {p: t[-2:] for p, t in started.items()}
    wrap = lambda inner: {p: type(started[p])(*ad, *norms[p]) for p, ad in inner.items()}  # noqa: E731
    states = [c.init(t) for c, t in zip(controllers, (noise(0), wrap(noise(0))), strict=True)]
    for step in range(4):
        plain, states[0] = controllers[0].update(noise(step), None, noise(step + 50), states[0])
        new, states[1] = controllers[1].update(wrap(noise(step)), None, wrap(noise(step + 50)), states[1])
        for path in params:
            np.testing.assert_array_equal(new[path].E, plain[path].E)
            np.testing.assert_array_equal(new[path].magnitude, norms[path][0])
    assert sum(int((ad.E == 0).sum()) for ad in new.values()) >= 5
    np.testing.assert_allclose(plans[1].penalty(new), plans[0].penalty(plain))
    small, shrunk = compact(plans[1], new)
    assert [small.plan[p].rank for p in params] == [int((plain[p].E != 0).sum()) for p in params]
    for got, want in zip(jax.tree.leaves(small.merge(shrunk, frozen)), jax.tree.leaves(plans[1].merge(new, frozen)),
                         strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    emptied = {p: t._replace(E=jnp.zeros(4)) for p, t in new.items()}
    small, shrunk = compact(plans[1], emptied)
    np.testing.assert_allclose(small.merge(shrunk, frozen)["u"], plans[1].merge(emptied, frozen)["u"], rtol=1e-6)


def test_penalty_is_shared_over_wrapped_and_plain_matrices_alike() -> None:
    params = {"u": normal(6, 8), "v": normal(8, 6, seed=1)}
    sites = lj.sites(lambda p, x: x @ p["u"] @ p["v"], params, normal(5, 6))
    values = []
    for rules in ([(".*", AdaLoRA(rank=4))], [("u", DoRA(AdaLoRA(rank=4))), ("v", AdaLoRA(rank=4))]):
        adapt = lj.adapt(sites, rules)
        values.append(float(adapt.penalty(adapt.init(jax.random.key(0), params)[0])))
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] > 0


def test_sharded_adapters_on_a_mesh_with_explicit_axes() -> None:
    """A norm over sharded inputs, its gradient, and the penalty of what is inside, as on one device."""
    params, x = {"w": normal(16, 32)}, normal(4, 16)
    adapt = lj.adapt(lj.sites(MODELS["matmul"].fn, {**params, "bias": jnp.zeros((1, 32))}, x),
                     [("w", DoRA(AdaLoRA(rank=2), detach=False))])
    trainable, frozen = adapt.init(jax.random.key(0), {**params, "bias": jnp.zeros((1, 32))})
    adapter = trainable["w"]._replace(E=normal(2), magnitude=jnp.abs(normal(32)))
    run = jax.value_and_grad(lambda t, f, x: adapt.penalty(t) + jnp.sum(
        jnp.sin(lj.lift(MODELS["matmul"].fn, strict=True)(adapt.bind(t, f), x))))
    want = jax.jit(run)({"w": adapter}, frozen, x)
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    with jax.set_mesh(mesh):
        spread = adapter._replace(A=put(adapter.A, "d"), E=put(adapter.E), B=put(adapter.B, None, "t"),
                                  magnitude=put(adapter.magnitude, "t"))
        base = {"w": put(frozen.base["w"], "d", "t"), "bias": put(frozen.base["bias"])}
        aux = {"w": frozen.aux["w"]._replace(weight_norm=put(frozen.aux["w"].weight_norm, "t"))}
        got = jax.jit(run)({"w": spread}, frozen._replace(base=base, aux=aux), put(x))
    for ours, alone in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-4)


# What it costs


LAYERS, D, F, TOKENS, RANK = 12, 48, 96, 256, 8
SIZES = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "up": (D, F), "down": (F, D)}


def layer(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = (x @ p[n] for n in "qkv")
    x = x + jax.nn.softmax(q @ k.T / math.sqrt(D)) @ v @ p["o"]
    return x + jnp.maximum(x @ p["up"], 0) @ p["down"]


def encoder(params: Any, x: jax.Array) -> jax.Array:
    if isinstance(params, dict):
        return jnp.sum(jnp.square(lax.scan(lambda x, p: (layer(p, x), None), x, params)[0]))
    for p in params:
        x = layer(p, x)
    return jnp.sum(jnp.square(x))


def program(variant: Variant, scan: bool) -> Any:
    shape, x = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((TOKENS, D), jnp.float32)
    params: Any = [{n: shape(s, jnp.float32) for n, s in SIZES.items()} for _ in range(LAYERS)]
    if scan:
        params = {n: shape((LAYERS, *s), jnp.float32) for n, s in SIZES.items()}
    adapt = lj.adapt(lj.sites(encoder, params, x), [(".*", variant)])
    shapes = jax.eval_shape(adapt.init, jax.random.key(0), params)
    return jaxprs.trace(jax.value_and_grad(
        lambda t, f, x: lj.lift(encoder, strict=True)(adapt.bind(t, f), x)), *shapes, x)


def dots(jaxpr: Any) -> int:
    """FLOPs of every dot_general, those in a scan's body times its length."""
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _), left = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    total += eqn.params.get("length", 1) * dots(inner)
    return total


@pytest.mark.parametrize("scan", [False, True])
def test_cost(scan: bool) -> None:
    """Products at most 5 % above LoRA's (test_bench has XLA's count); nothing of a weight's shape is computed."""
    lora, dora = (program(v, scan) for v in (LoRA(rank=RANK), DoRA(LoRA(rank=RANK))))
    norms = LAYERS * sum(2 * RANK * (n_in * n_out + RANK * n_in) for n_in, n_out in SIZES.values())
    summed = LAYERS * sum(2 * RANK * RANK * n_out for _, n_out in SIZES.values())  # A^T A B, which is no product
    assert dots(dora.jaxpr) == dots(lora.jaxpr) + norms
    assert norms + summed < 0.05 * dots(lora.jaxpr)
    paths = list(SIZES) if scan else [f"{i}/{n}" for i in range(LAYERS) for n in SIZES]
    weights = {path: Weight((1,), (2,), (0,)) if scan else Weight() for path in paths}
    flat = {path: np.empty((LAYERS, *SIZES[path]) if scan else SIZES[path.split("/")[1]]) for path in paths}
    assert jaxprs.weight_shaped(dora.jaxpr, weights, flat) == []
    full = program(DoRA(LoRA(rank=RANK), detach=False), scan)
    assert jaxprs.weight_shaped(full.jaxpr, weights, flat) == []


# PEFT


def test_golden() -> None:
    """PEFT's logits, loss, gradients, five AdamW steps and merged weights of a Llama."""
    golden.load("dora_llama").check(DoRA(LoRA(rank=4, alpha=8.0)))


@pytest.mark.peft
@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_pefts_convolution_and_embedding(kind: str) -> None:
    """Output and gradients of PEFT's own layer, with the same arrays."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: peft)")
    made = torch.nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)) if kind == "conv" else torch.nn.Embedding(11, 6)
    net = peft.get_peft_model(torch.nn.Sequential(made), peft.LoraConfig(
        r=2, lora_alpha=3, use_dora=True, target_modules=["0"]))
    x = normal(2, 7, 6, 4) if kind == "conv" else IDS
    theirs = {re.sub(r".*lora_(embedding_)?|\.default|\.weight", "", name): p for name, p in net.named_parameters()
              if p.requires_grad}
    for i, (name, p) in enumerate(sorted(theirs.items())):
        p.data = torch.from_numpy(np.array(normal(*p.shape, seed=i, scale=0.7)))
        assert name in ("A", "B", "magnitude_vector"), name
    given = np.array(x)
    out = net(torch.from_numpy(given.transpose(0, 3, 1, 2).copy() if kind == "conv" else given))
    out = out.permute(0, 2, 3, 1) if kind == "conv" else out
    weights = np.array(normal(*out.shape, seed=7))
    (out * torch.from_numpy(weights)).sum().backward()
    numpy = {name: p.detach().numpy() for name, p in theirs.items()}
    grads = {name: p.grad.numpy() for name, p in theirs.items()}
    params = {"w": made.weight.detach().numpy()} | ({"bias": made.bias.detach().numpy()} if kind == "conv" else {})

    def ours(t: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A from (r, in, kh, kw) to (kh kw in, r), B to (r, out)."""
        a = t["A"].transpose(2, 3, 1, 0).reshape(-1, 2) if kind == "conv" else t["A"].T
        return {"A": jnp.asarray(a), "B": jnp.asarray(t["B"].reshape(6, 2).T),
                "magnitude": jnp.asarray(t["magnitude_vector"].ravel())}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        if kind == "embedding":
            return p["w"][x]
        y = lax.conv_general_dilated(x, p["w"], (2, 1), [(1, 1), (2, 2)], dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + p["bias"].reshape(1, 1, 1, -1)

    params = {k: jnp.asarray(v.transpose(2, 3, 1, 0) if v.ndim == 4 else v) for k, v in params.items()}
    adapt = lj.adapt(lj.sites(fn, params, x), [("w", DoRA(LoRA(rank=2, alpha=3.0)))])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    trainable = {"w": trainable["w"]._replace(**ours(numpy))}
    run = lambda t: lj.lift(fn, strict=True)(adapt.bind(t, frozen), x)  # noqa: E731
    np.testing.assert_allclose(run(trainable), out.detach().numpy(), rtol=1e-4, atol=1e-5)
    mine = jax.grad(lambda t: jnp.sum(run(t) * weights))(trainable)
    for name, want in ours(grads).items():
        np.testing.assert_allclose(getattr(mine["w"], name), want, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_scale_of_the_sum_of_both_products_is_the_last_pass() -> None:
    """(x W + x A B) g: whatever reads the result can do it as it reads, and only this sum is kept for g's gradient."""
    x, params = normal(40, 6), {"w": normal(6, 8, scale=0.6)}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    adapt = lj.adapt(lj.sites(fn, params, x), [("w", DoRA(LoRA(rank=2)))])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    jaxpr = jaxprs.trace(lambda t: lj.lift(fn)(adapt.bind(t, frozen), x), trainable)
    large = [eqn.primitive.name for eqn in jaxprs.equations(jaxpr) if eqn.outvars[0].aval.shape == (40, 8)]
    assert [name for name in large if name != "jit"] == ["dot_general", "dot_general", "add", "name", "mul"]


@pytest.mark.parametrize("rank", [1, 32, 33])
def test_what_the_update_adds_to_the_norms(rank: int) -> None:
    """||W + s A B||^2 - ||W||^2 in float64, where A^T A B is a sum and where it is a product."""
    w, a, b = normal(40, 24), normal(40, rank, seed=1), normal(rank, 24, seed=2)
    want = np.square(np.float64(w) + 0.5 * np.float64(a) @ np.float64(b)).sum(0) - np.square(np.float64(w)).sum(0)
    found, jaxpr = jax.jit(_added)(Factors(a, b, s=0.5), w), jaxprs.trace(_added, Factors(a, b, s=0.5), w)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert jaxprs.primitives(jaxpr).count("dot_general") == (2 if rank <= 32 else 3)


def test_norms_of_a_bfloat16_weight_are_as_exact_as_of_float32() -> None:
    w, a = normal(256, 32).astype(jnp.bfloat16), normal(256, 4, seed=1)
    want = np.float64(a).T @ np.float64(w)
    found = jax.jit(_cross)(w, a)
    np.testing.assert_allclose(found, want, atol=2e-6 * np.abs(want).max() * 4)
    rough = jnp.einsum("io,ir->ro", w, a.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    assert np.abs(rough - want).max() > 100 * np.abs(found - want).max()
    jaxpr = jaxprs.trace(_cross, w, a)
    assert not [e for e in jaxprs.equations(jaxpr) if e.outvars[0].aval.shape == w.shape]
