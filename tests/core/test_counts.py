"""Evidence as counts: FLOPs of the backward pass, dense intermediates, compiles."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj

from . import jaxprs, probe
from .case import normal
from .probe import Probe

LAYERS, D, F, HEADS, ROWS, RANK = 12, 48, 96, 4, 2 * 25, 3  # rows and tokens are no size of a weight


def layer(p: Any, x: jax.Array) -> jax.Array:
    """Post-norm-free encoder layer: attention and MLP with six weights, (b, t, d) -> (b, t, d)."""
    b, t, _ = x.shape
    q, k, v = ((x @ p[n]).reshape(b, t, HEADS, D // HEADS) for n in ("query", "key", "value"))
    a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D // HEADS))
    x = x + jnp.einsum("bhqk,bkhd->bqhd", a, v).reshape(b, t, D) @ p["out"]
    return x + jnp.maximum(x @ p["up"], 0) @ p["down"]


def encoder(params: Any, x: jax.Array) -> jax.Array:
    for i in range(LAYERS):
        x = layer(params[f"layer_{i}"], x)
    return jnp.sum(jnp.square(x))


SHAPES = {"query": (D, D), "key": (D, D), "value": (D, D), "out": (D, D), "up": (D, F), "down": (F, D)}
PARAMS = {f"layer_{i}": {n: normal(*s, seed=i, scale=1 / math.sqrt(s[0])) for n, s in SHAPES.items()}
          for i in range(LAYERS)}
X = normal(2, 25, D)


@cache
def programs() -> dict[str, Any]:
    """Traced: value_and_grad with respect to the adapters (lifted, and on W + AB) and to the embeddings alone."""
    adapt = lj.adapt(lj.sites(encoder, PARAMS, X), [(".*", Probe(RANK))])
    trainable, frozen = jax.eval_shape(adapt.init, jax.random.key(0), PARAMS)
    rows = {path: probe.Weight() for path in trainable}

    def lifted(t: Any, f: Any) -> jax.Array:
        return lj.lift(encoder, strict=True)(adapt.bind(t, f), X)

    def naive(t: Any, p: Any) -> jax.Array:
        return encoder(probe.merged(rows, p, t), X)

    return {
        "lifted": jaxprs.trace(jax.value_and_grad(lifted), trainable, frozen),
        "naive": jaxprs.trace(jax.value_and_grad(naive), trainable, PARAMS),
        "ideal": jaxprs.trace(jax.value_and_grad(lambda x, p: encoder(p, x)), X, PARAMS),
        "rows": rows,
    }


def flops(program: Any) -> float:
    analysis = program.lower().compile().cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])


def adapter_products() -> int:
    """x A, (x A) B, and twice that again for the gradients of the inputs and of A and B."""
    return sum(3 * 2 * ROWS * RANK * (n_in + n_out) for n_in, n_out in SHAPES.values()) * LAYERS


def test_flops_of_the_gradient():
    """Forward + activation gradients (the gradient with respect to the embeddings) + adapter products, within 5 %."""
    ideal = flops(programs()["ideal"]) + adapter_products()
    assert flops(programs()["naive"]) > 1.2 * ideal, "the count has teeth: W + AB needs the gradient of W"
    assert 0.95 * ideal <= flops(programs()["lifted"]) <= 1.05 * ideal


def test_dot_products_by_hand():
    """The same from the jaxpr, exactly: multiply-adds of every dot_general, none of which XLA has touched."""
    def dots(jaxpr: Any) -> int:
        total = 0
        for eqn in jaxprs.equations(jaxpr):
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                left = eqn.invars[0].aval.shape
                total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        return total

    first = 2 * ROWS * D * D * 3  # the gradient with respect to the first layer's input, which adapters do not need
    first += 3 * 2 * ROWS * RANK * D  # nor do the adapters of its query, key and value
    assert dots(programs()["lifted"].jaxpr) == dots(programs()["ideal"].jaxpr) + adapter_products() - first


def test_no_intermediate_of_the_weights_shape():
    flat = probe.leaves(PARAMS)
    rows = programs()["rows"]
    assert len(rows) == 6 * LAYERS
    assert len(jaxprs.weight_shaped(programs()["naive"].jaxpr, rows, flat)) >= len(rows)
    assert jaxprs.weight_shaped(programs()["lifted"].jaxpr, rows, flat) == []


def test_adapters_alone_never_multiply():
    """No product of A with B, of whatever shape: a dot_general that reads an adapter also reads data or a weight."""
    def products(jaxpr: Any, pure: set[Any]) -> int:
        """Number of dot_general equations that depend on `pure` inputs alone; `pure` grows by what they make."""
        count = 0
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            operands = [v in pure for v in eqn.invars if not hasattr(v, "val")]
            if operands and all(operands):
                pure |= set(eqn.outvars)
                count += eqn.primitive.name == "dot_general"
            if eqn.primitive.name == "jit":
                inner = eqn.params["jaxpr"].jaxpr
                known = [not hasattr(v, "val") and v in pure for v in eqn.invars]
                inside = {v for v, is_pure in zip(inner.invars, known, strict=True) if is_pure}
                count += products(inner, inside)
                pure |= {o for o, v in zip(eqn.outvars, inner.outvars, strict=True) if v in inside}
        return count

    for name, expected in (("naive", 6 * LAYERS), ("lifted", 0)):
        jaxpr = programs()[name].jaxpr.jaxpr
        assert products(jaxpr, set(jaxpr.invars[:2 * 6 * LAYERS])) == expected, name


def test_one_compile_for_many_steps():
    """Also with other values of the adapters, masks and dropout keys."""
    traces = []

    def fn(p: Any, x: jax.Array) -> jax.Array:
        traces.append(1)
        return layer(p, x)

    params = PARAMS["layer_0"]
    adapt = lj.adapt(lj.sites(fn, params, X), [(".*", Probe(RANK, dropout=0.1))])
    trainable, frozen = probe.init(adapt, params)
    traces.clear()

    @jax.jit
    def step(trainable: Any, frozen: Any, masks: Any, key: jax.Array) -> Any:
        def loss(t: Any) -> jax.Array:
            return jnp.sum(lj.lift(fn, strict=True)(adapt.bind(t, frozen, key=key, masks=masks), X) ** 2)

        return jax.tree.map(lambda t, g: t - 1e-6 * g, trainable, jax.grad(loss)(trainable))

    for i in range(4):
        masks = {path: jnp.asarray(np.arange(RANK) <= i, jnp.float32) for path in trainable}
        trainable = step(trainable, frozen, masks, jax.random.key(i))
    assert step._cache_size() == 1
    assert len(traces) == 1


@pytest.mark.parametrize("scanned", [False, True])
def test_the_jaxpr_grows_by_a_constant_per_site(scanned: bool):
    """Six more products in value_and_grad for each input that weights read and each weight, three for either: x A and
    its transposes, h B and its transposes, however the layers are run."""
    def fn(p: Any, x: jax.Array) -> jax.Array:
        if scanned:
            return jnp.sum(jax.lax.scan(lambda x, p: (layer(p, x), None), x, p)[0])
        for i in range(3):
            x = layer(p[i], x)
        return jnp.sum(x)

    shape = jax.ShapeDtypeStruct
    params: Any = [{n: shape(s, jnp.float32) for n, s in SHAPES.items()} for _ in range(3)]
    if scanned:
        params = {n: shape((3, *s), jnp.float32) for n, s in SHAPES.items()}
    adapt = lj.adapt(lj.sites(fn, params, X), [(".*", Probe(RANK))])
    adapters = jax.eval_shape(adapt.init, jax.random.key(0), params)

    def loss(t: Any, f: Any) -> jax.Array:
        return lj.lift(fn, strict=True)(adapt.bind(t, f), X)

    jaxpr = jaxprs.trace(jax.value_and_grad(loss), *adapters).jaxpr
    plain = jaxprs.trace(jax.value_and_grad(fn, 1), params, X).jaxpr
    extra = jaxprs.primitives(jaxpr).count("dot_general") - jaxprs.primitives(plain).count("dot_general")
    sites = 6 if scanned else 18
    inputs = sites * 4 // 6  # of query, key and value; output; up; down
    skipped = 0 if scanned else 3 + 1  # dx through W and through A of the first layer's query, key and value
    assert extra == 3 * sites + 3 * inputs - skipped
