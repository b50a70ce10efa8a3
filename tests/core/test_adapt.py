"""The adapter as a value: two ordinary pytrees, an immutable base, plain arrays after merge."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lorajax as lj
from lorajax.core.variant import Variant

from . import models_mesh, probe
from .case import normal
from .models import CASES
from .probe import Probe

PLAIN = [case for case in CASES.values() if case.mesh is None]


def setup(name: str, variant: Variant | None = None) -> tuple[Any, ...]:
    """(adapt, trainable, frozen, built) with one variant on all weights of a model of the table."""
    case = CASES[name]
    adapt = lj.adapt(lj.sites(case.built.fn, case.built.params, *case.built.args), probe.rules(case.weights, variant))
    return adapt, *probe.init(adapt, case.built.params), case.built


def same_as_merged(fn: Any, adapt: Any, trainable: Any, frozen: Any, args: Any) -> None:
    lifted = jax.jit(lambda t, f: lj.lift(fn, strict=True)(adapt.bind(t, f), *args))(trainable, frozen)
    assert probe.error(lifted, jax.jit(lambda t, f: fn(adapt.merge(t, f), *args))(trainable, frozen)) <= 1e-5


def same(tree: Any, other: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_shapes_lead_with_the_stack():
    """(stack..., in, r) and (stack..., r, out), on every model of the table; from shapes alone."""
    for case in PLAIN:
        fn, params, args, _ = case.built
        adapt = lj.adapt(lj.sites(fn, params, *args), probe.rules(case.weights))
        trainable, _ = jax.eval_shape(adapt.init, jax.random.key(1), params)
        want = probe.adapters(case.weights, params)
        assert jax.tree.map(jnp.shape, trainable) == jax.tree.map(jnp.shape, want), case.name


LAYOUTS = ["linen_scan", "linen_scan_axis_1", "linen_attention", "linen_tied", "linen_conv_transpose",
           "linen_partitioned", "nnx_scan", "raw_transposed", "raw_conv_nchw", "raw_lookup_axis_1",
           "raw_random_contractions", "control_scan_nested"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_merge_is_w_plus_sab(name: str):
    """Against NumPy and the table's axes; untouched leaves bit for bit; plain arrays in the model's own tree."""
    weights, params = CASES[name].weights, CASES[name].built.params
    adapt, _, frozen, _ = setup(name)
    trainable = probe.adapters(weights, params)
    got = jax.jit(adapt.merge)(trainable, frozen)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    want = probe.merged(weights, jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, trainable))
    assert probe.error(got, want) <= 1e-6
    got_flat, flat = probe.leaves(got), probe.leaves(params)
    for path in set(flat) - set(weights):
        np.testing.assert_array_equal(got_flat[path], flat[path])


def test_layers_of_a_stack_start_differently():
    _, trainable, _, _ = setup("linen_scan")
    a = trainable["params/blocks/up/kernel"].a
    for i in range(4):
        for j in range(i):
            assert float(jnp.abs(a[i] - a[j]).max()) > 0.1


def test_sites_start_differently():
    _, trainable, _, _ = setup("linen_attention")
    a = [adapter.a for adapter in trainable.values() if adapter.a.shape == (8, 3)]
    assert len(a) == 4
    for i, x in enumerate(a):
        for y in a[:i]:
            assert float(jnp.abs(x - y).max()) > 0.1


def test_init_is_a_function_of_the_key_alone():
    """Also of nothing but the path: a rule more leaves the other sites as they were."""
    adapt, trainable, _, built = setup("linen_attention")
    same(probe.init(adapt, built.params)[0], trainable)
    other = probe.init(adapt, built.params, seed=2)[0]
    assert float(jnp.abs(other["params/out/kernel"].a - trainable["params/out/kernel"].a).max()) > 0.1
    sites = lj.sites(built.fn, built.params, *built.args)
    alone = lj.adapt(sites, [("params/out/kernel", Probe())])
    alone = probe.init(alone, built.params)[0]
    same(alone["params/out/kernel"], trainable["params/out/kernel"])


def test_the_base_is_immutable_and_comes_back_bit_for_bit():
    adapt, trainable, frozen, built = setup("control_scan")
    before = jax.tree.map(lambda x: np.array(x), built.params)
    same(frozen.base, probe.leaves(built.params))
    grad = jax.jit(jax.grad(
        lambda t: jnp.sum(lj.lift(built.fn, strict=True)(adapt.bind(t, frozen), *built.args) ** 2)))
    tx = optax.adam(1e-1)
    state = tx.init(trainable)
    for _ in range(2):
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, state = tx.update(grad(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    jax.jit(adapt.merge)(trainable, frozen)
    same(frozen.base, probe.leaves(before))
    same(built.params, before)


def test_merging_zero_adapters_gives_the_base_bit_for_bit():
    adapt, trainable, frozen, built = setup("linen_scan_axis_1")
    same(adapt.merge(jax.tree.map(jnp.zeros_like, trainable), frozen), built.params)


def test_merge_keeps_dtypes():
    """Added in float32, rounded once."""
    params = {"w": normal(8, 12).astype(jnp.bfloat16), "b": normal(12).astype(jnp.float16)}
    sites = lj.sites(lambda p, x: x @ p["w"] + p["b"][None].astype(x.dtype), params, normal(5, 8).astype(jnp.bfloat16))
    adapt = lj.adapt(sites, [("w", Probe())])
    trainable, frozen = probe.init(adapt, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    a, b = trainable["w"]
    want = (np.asarray(params["w"], np.float32) + 0.5 * np.asarray(a) @ np.asarray(b)).astype(jnp.bfloat16)
    merged = adapt.merge(trainable, frozen)
    assert (merged["w"].dtype, merged["b"].dtype) == (jnp.bfloat16, jnp.float16)
    ulps = np.abs(np.asarray(merged["w"]).view(np.int16).astype(int) - np.asarray(want).view(np.int16))
    assert ulps.max() <= 1


def test_the_dtype_of_the_adapter_is_an_option():
    case = CASES["linen_dense"]
    fn, params, args, _ = case.built
    adapt = lj.adapt(lj.sites(fn, params, *args), probe.rules(case.weights), dtype=jnp.bfloat16)
    trainable, _ = probe.init(adapt, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("bfloat16")}


def test_trainable_and_frozen_are_ordinary_pytrees():
    """jax.tree, optax and pickle need no help."""
    _, trainable, frozen, _ = setup("linen_batchnorm")
    assert type(trainable) is dict
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((trainable, frozen)))
    doubled = jax.tree.map(lambda x: 2 * x, trainable)
    assert jax.tree.structure(doubled) == jax.tree.structure(trainable)
    tx = optax.adam(1e-3)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        updates, _ = tx.update(doubled, tx.init(trainable), trainable)
    assert jax.tree.structure(optax.apply_updates(trainable, updates)) == jax.tree.structure(trainable)
    for tree in (trainable, frozen):
        numpy = jax.tree.map(np.asarray, tree)
        same(pickle.loads(pickle.dumps(numpy)), numpy)


def test_labels_drive_multi_transform():
    """Same structure, strings as leaves: optax freezes `b` and moves `a`."""
    adapt, trainable, _, _ = setup("linen_attention")
    assert jax.tree.structure(adapt.labels) == jax.tree.structure(trainable)
    assert all(labels == ("a", "b") for labels in adapt.labels.values())
    tx = optax.multi_transform({"a": optax.sgd(1.0), "b": optax.set_to_zero()}, adapt.labels)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable)
    for adapter in updates.values():
        assert float(adapter.a.max()) == float(adapter.a.min()) == -1
        assert not adapter.b.any()


def test_full_moves_the_leaf_to_the_trainable_side():
    """The base holds no second copy; bind and merge put it back."""
    case = CASES["linen_dense"]
    fn, params, args, _ = case.built
    kernel, bias = "params/layers_0/kernel", "params/layers_0/bias"
    rules = [(kernel, lj.Full()), (bias, lj.Full()), (".*layers_2/kernel", Probe())]
    adapt = lj.adapt(lj.sites(fn, params, *args), rules)
    trainable, frozen = probe.init(adapt, params)
    assert (adapt.labels[kernel].w, adapt.labels[bias].w) == ("full", "full")
    np.testing.assert_array_equal(trainable[kernel].w, params["params"]["layers_0"]["kernel"])
    assert set(frozen.base) == set(probe.leaves(params)) - {kernel, bias}
    changed = {**trainable, bias: trainable[bias]._replace(w=trainable[bias].w + 1)}
    merged = adapt.merge(changed, frozen)
    np.testing.assert_array_equal(merged["params"]["layers_0"]["bias"], params["params"]["layers_0"]["bias"] + 1)
    got = lj.lift(fn, strict=True)(adapt.bind(changed, frozen), *args)
    assert probe.error(got, fn(merged, *args)) <= 1e-5
    grad = jax.grad(lambda t: lj.lift(fn, strict=True)(adapt.bind(t, frozen), *args).sum())(trainable)
    assert float(jnp.abs(grad[kernel].w).max()) > 1e-3


def test_only_full_rules_is_full_fine_tuning():
    case = CASES["linen_dense"]
    fn, params, args, _ = case.built
    adapt = lj.adapt(lj.sites(fn, params, *args), [(".*", lj.Full())])
    trainable, frozen = probe.init(adapt, params)
    assert jax.tree.leaves(frozen) == []
    np.testing.assert_array_equal(lj.lift(fn)(adapt.bind(trainable, frozen), *args), fn(params, *args))
    same(adapt.merge(trainable, frozen), params)


def test_init_under_jit_is_the_same():
    """And without its arrays: `eval_shape` gives the partitions that a checkpoint restores into."""
    adapt, trainable, frozen, built = setup("control_scan_xs_and_closure")
    eager = adapt.init(jax.random.key(1), built.params)
    assert probe.error((trainable, frozen), eager) <= 1e-6
    shapes = jax.eval_shape(adapt.init, jax.random.key(1), built.params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), eager)


@pytest.mark.parametrize("jit", [False, True])
def test_init_on_sharded_parameters(jit: bool):
    """Same numbers as on one device; the base stays where it is."""
    mesh, (fn, params, args, _) = models_mesh.auto(), CASES["control_scan_xs_and_closure"].built
    specs = {"w": P(None, "data", "model"), "v": P("model", "data")}
    sharded = {path: jax.device_put(leaf, NamedSharding(mesh, specs[path])) for path, leaf in params.items()}
    adapt = lj.adapt(lj.sites(fn, sharded, *args), [(".*", Probe())])
    trainable, frozen = (jax.jit(adapt.init) if jit else adapt.init)(jax.random.key(1), sharded)
    assert probe.error((trainable, frozen), probe.init(adapt, params)) <= 1e-6
    for path, leaf in frozen.base.items():
        assert leaf.sharding.is_equivalent_to(sharded[path].sharding, leaf.ndim)


@pytest.mark.parametrize("name", ["linen_scan_axis_1", "linen_conv_grouped", "linen_tied"])
def test_masks_multiply_the_rank(name: str):
    """Rank 1 masked out equals columns cut off; a real mask multiplies A and B alike. Per layer of a stack."""
    adapt, trainable, frozen, built = setup(name)
    case = CASES[name]
    merge = jax.jit(lambda m: adapt.merge(trainable, frozen, masks=m))
    run = jax.jit(lambda m: lj.lift(built.fn, strict=True)(adapt.bind(trainable, frozen, masks=m), *built.args))
    ref = jax.jit(lambda params: built.fn(params, *built.args))
    params = jax.tree.map(np.asarray, built.params)
    for values in (np.array([1, 0, 1], np.float32), np.array([0.5, 2.0, -1.0], np.float32)):
        masks = {}
        for path, t in trainable.items():
            layers = t.a.shape[:-2]
            masks[path] = np.stack([np.roll(values, i) for i in range(math.prod(layers))]).reshape(*layers, 3)
        masked = {path: (np.asarray(t.a) * masks[path][..., None, :], np.asarray(t.b) * masks[path][..., :, None])
                  for path, t in trainable.items()}
        want = probe.merged(case.weights, params, masked)
        assert probe.error(merge(masks), want) <= 1e-6
        assert probe.error(run(masks), ref(want)) <= 1e-5


def test_masks_of_some_sites_leave_the_others():
    adapt, trainable, frozen, built = setup("linen_attention")
    path = "params/value/kernel"
    masked = jax.jit(lambda m: adapt.merge(trainable, frozen, masks={path: m}))(jnp.zeros(3))
    want = jax.jit(adapt.merge)(trainable, frozen)
    want["params"]["value"]["kernel"] = built.params["params"]["value"]["kernel"]
    assert probe.error(masked, want) <= 1e-6


def test_bind_without_lift_is_a_tree_of_the_models_structure():
    """Every path of the model is there; what is bound is a node, what is not is the array itself."""
    adapt, trainable, frozen, built = setup("linen_batchnorm")
    bound = adapt.bind(trainable, frozen)
    assert set(bound) == set(built.params)
    assert bound["Dense_0"]["bias"] is frozen.base["Dense_0/bias"]
    assert not isinstance(bound["Dense_0"]["kernel"], jax.Array)


def test_parameters_of_another_model_are_refused():
    """Named by path, with both shapes."""
    adapt, _, _, built = setup("linen_dense")
    params = probe.replace(built.params, {"params/layers_0/kernel": normal(8, 13)})
    with pytest.raises(ValueError, match=re.escape("params/layers_0/kernel")) as caught:
        adapt.init(jax.random.key(0), params)
    assert "13" in str(caught.value)
    assert "12" in str(caught.value)


def test_masks_of_unknown_paths_are_refused():
    adapt, trainable, frozen, _ = setup("linen_dense")
    with pytest.raises((KeyError, ValueError), match="params/layers_0/kernle"):
        adapt.bind(trainable, frozen, masks={"params/layers_0/kernle": jnp.ones(3)})
