"""What `sites` finds in one abstract trace: every weight with its axes, and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lorajax as lj

from . import probe
from .case import normal
from .models import CASES, Case


def abstract(tree: Any) -> Any:
    """The tree with every array replaced by its shape: whoever wants a number has to fail."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding), tree)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_sites_of_the_table(case: Case):
    """Exactly the weights of the table, found without a single array."""
    fn, params, args, _ = case.built
    with case.scope():
        sites = lj.sites(fn, *abstract((params, *args)))
    flat = probe.leaves(params)
    assert set(sites) == set(case.weights)
    for path, weight in case.weights.items():
        site = sites[path]
        found = (tuple(site.in_axes), tuple(site.out_axes), tuple(site.stack_axes), site.op)
        assert found == weight[:4], path
        assert (site.path, tuple(site.shape), site.dtype) == (path, flat[path].shape, flat[path].dtype)


@pytest.mark.parametrize("name", ["linen_tied", "nnx_tied"])
def test_a_tied_weight_lists_each_use(name: str):
    """As a lookup from vocabulary to features, as a product from features to vocabulary."""
    case = CASES[name]
    fn, params, args, _ = case.built
    sites = lj.sites(fn, params, *args)
    for path, weight in case.weights.items():
        assert len(sites[path].uses) == weight.uses, path
    table = next(path for path in sites if "embedding" in path)
    assert sites[table].op == "lookup"
    assert "matmul" in str(sites[table].uses)


def test_leaves_are_every_parameter():
    """Biases and norms too: what Full() and None may take."""
    case = CASES["linen_batchnorm"]
    fn, params, args, _ = case.built
    sites = lj.sites(fn, abstract(params), *abstract(args))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in sites.leaves.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in probe.leaves(params).items()}


def test_the_function_runs_on_no_numbers():
    """A branch on a value would need one."""
    ran = []

    def fn(p: Any, x: jax.Array) -> jax.Array:
        ran.append(x)
        assert isinstance(x, jax.core.Tracer)
        return x @ p["w"]

    huge = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)  # 4 TiB
    sites = lj.sites(fn, {"w": huge}, jax.ShapeDtypeStruct((5, 1 << 20), jnp.float32))
    assert list(sites) == ["w"]
    assert len(ran) == 1


def test_keywords_and_static_arguments_reach_the_function():
    def fn(p: Any, x: jax.Array, *, train: bool, name: str) -> jax.Array:
        assert train is True
        assert name == "a"
        return x @ p["w"]

    assert list(lj.sites(fn, {"w": normal(8, 12)}, normal(5, 8), train=True, name="a")) == ["w"]


def test_what_is_no_weight_is_no_site():
    """Biases, norms, position tables that are added, scales, unused leaves, and arrays that are not parameters."""
    def fn(p: Any, x: jax.Array, projection: jax.Array) -> jax.Array:
        h = (x - x.mean(-1, keepdims=True)) * p["norm"][None, None] + p["position"][None]
        return (h @ projection) @ p["w"] + p["bias"][None, None] * p["temperature"]

    params = {"norm": normal(8), "position": normal(7, 8), "bias": normal(12), "w": normal(8, 12),
              "temperature": jnp.float32(2), "unused": normal(8, 12)}
    sites = lj.sites(fn, params, normal(5, 7, 8), normal(8, 8))
    assert list(sites) == ["w"]
    assert set(sites.leaves) == set(params)


def test_lists_tuples_and_attributes_in_the_tree_have_paths():
    params = {"layers": [{"w": normal(8, 8)}, {"w": normal(8, 8)}], "pair": (normal(8, 8), normal(8))}
    sites = lj.sites(lambda p, x: x @ p["layers"][0]["w"] @ p["layers"][1]["w"] @ p["pair"][0] + p["pair"][1][None],
                     params, normal(5, 8))
    assert set(sites) == {"layers/0/w", "layers/1/w", "pair/0"}


def test_integer_and_key_leaves_are_no_sites():
    params = {"table": jnp.arange(11), "key": jax.random.key(0), "w": normal(11, 8)}
    sites = lj.sites(lambda p, i: jax.random.normal(p["key"], (5, 8)) + p["w"][p["table"][i]], params, jnp.arange(5))
    assert list(sites) == ["w"]


def test_the_table_prints_what_was_found():
    case = CASES["linen_scan_axis_1"]
    sites = lj.sites(case.built.fn, case.built.params, *case.built.args)
    text = str(sites)
    for path, weight in case.weights.items():
        line = next(line for line in text.splitlines() if path in line)
        assert weight.op in line
        for size in sites[path].shape:
            assert str(size) in line


def test_sites_is_a_mapping():
    case = CASES["linen_dense"]
    sites = lj.sites(case.built.fn, case.built.params, *case.built.args)
    assert len(sites) == 2
    assert "params/layers_0/kernel" in sites
    with pytest.raises(KeyError, match="nowhere"):
        sites["nowhere"]
