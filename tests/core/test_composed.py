"""Weights that the function puts together before use, and stacks that the trace cannot see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj

WIDTH = 8
X = jax.random.normal(jax.random.key(0), (3, WIDTH))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 3


def concatenated(params, x):
    return jnp.split(x @ jnp.concatenate([params["q"], params["v"]], axis=1), 2, axis=-1)


def stacked_then_scanned(params, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.stack([params["q"], params["v"]]))[0]


def padded(params, x):
    wide = jnp.pad(x, ((0, 0), (0, 2)))
    return wide @ jnp.pad(params["q"], ((0, 2), (0, 0))) @ jnp.pad(params["v"], ((0, 0), (0, 1)))


@pytest.mark.parametrize("fn", [concatenated, stacked_then_scanned, padded], ids=lambda f: f.__name__)
def test_composed_weights_are_sites_and_fall_back_to_the_merged_weight(fn):
    params = {"q": normal(1, WIDTH, WIDTH), "v": normal(2, WIDTH, WIDTH)}
    sites = lj.sites(fn, params, X)
    assert {path: (site.op, site.in_axes, site.out_axes) for path, site in sites.items()} == {
        "q": ("matmul", (0,), (1,)), "v": ("matmul", (0,), (1,))}
    adapt = lj.adapt(sites, [("q|v", lj.LoRA(rank=2))])
    trainable, frozen = adapt.init(jax.random.key(3), params)
    trainable = jax.tree.map(lambda x: x + 0.3, trainable)
    with pytest.warns(lj.MaterialisedWeight):
        got = lj.lift(fn)(adapt.bind(trainable, frozen), X)
    want = fn({path: params[path] + 4.0 * trainable[path].A @ trainable[path].B for path in params}, X)  # alpha/r = 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def ensemble(params, x):
    """Every member reads the same input: to the trace one matrix of (in, members x out)."""
    return jax.vmap(lambda w: jnp.tanh(x @ w))(params["w"])


def test_a_stack_that_the_trace_cannot_see_can_be_named():
    params = {"w": normal(1, 4, WIDTH, 5)}
    sites = lj.sites(ensemble, params, X)
    assert sites["w"].stack_axes == ()
    named = sites.stacked("w", 0)
    assert (named["w"].in_axes, named["w"].out_axes, named["w"].stack_axes) == ((1,), (2,), (0,))
    adapt = lj.adapt(named, [("w", lj.LoRA(rank=2))])
    trainable, frozen = adapt.init(jax.random.key(3), params)
    assert trainable["w"].A.shape == (4, WIDTH, 2)
    trainable = jax.tree.map(lambda x: x + 0.3, trainable)
    got = lj.lift(ensemble, strict=True)(adapt.bind(trainable, frozen), X)
    merged = [w + 4.0 * a @ b for w, a, b in zip(params["w"], *trainable["w"], strict=True)]
    np.testing.assert_allclose(got, [np.tanh(X @ w) for w in merged], rtol=2e-5, atol=2e-6)


def test_naming_a_stack_that_is_not_there_is_an_error():
    sites = lj.sites(ensemble, {"w": normal(1, 4, WIDTH, 5)}, X)
    with pytest.raises(ValueError, match=r"no site matches 'experts'.*there are w"):
        sites.stacked("experts", 0)
    with pytest.raises(ValueError, match=r"w has shape \(4, 8, 5\): axes \(3,\)"):
        sites.stacked("w", 3)
