"""Merging and unmerging: the base stays bit for bit what it was, and nothing goes in twice."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composing import ONE, PARAMS, TWO, trained, updates

import lorajax as lj
from lorajax import compose, quant
from lorajax.variants import DoRA, LoRA


def test_merged_weights_are_the_base_and_the_updates() -> None:
    merged = compose.merge(PARAMS, ONE, weights=0.5)
    merged = compose.merge(merged, TWO)
    for path in PARAMS:
        want = PARAMS[path] + 0.5 * updates(ONE)[path] + updates(TWO)[path]
        np.testing.assert_allclose(merged.params[path], want, rtol=1e-5, atol=1e-5)
        assert merged.base[path] is PARAMS[path]
    only = compose.unmerge(merged, ONE)
    again = compose.merge(PARAMS, TWO)
    jax.tree.map(np.testing.assert_array_equal, only.params, again.params)
    assert compose.unmerge(merged).params is PARAMS
    with pytest.raises(ValueError, match=r"adapters\[0\] \(lj1:.*\) is in these weights already: unmerge it first"):
        compose.merge(merged, ONE)
    with pytest.raises(ValueError, match="lj1:.* is not in these weights; they hold"):
        compose.unmerge(only, ONE)


def test_a_thousand_merges_and_unmerges_leave_a_bfloat16_base_bit_identical() -> None:
    """PEFT, which adds and subtracts in place, changes 72 % of the entries in 20 rounds."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(8, 6)), jnp.bfloat16)}
    before = np.asarray(params["w"]).tobytes()
    adapt = lj.adapt(lj.sites(lambda p, x: x @ p["w"], params, jnp.ones((1, 8), jnp.bfloat16)), [("w", LoRA(rank=2))])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    trainable["w"] = trainable["w"]._replace(B=jnp.asarray(rng.normal(size=(2, 6)), jnp.float32))
    one = compose.Adapter(adapt, trainable, frozen)
    state: Any = params
    first = None
    for _ in range(1000):
        merged = compose.merge(state, one)
        first = merged.params["w"] if first is None else first
        state = compose.unmerge(merged, one)
    assert np.asarray(state.params["w"]).tobytes() == before == np.asarray(params["w"]).tobytes()
    assert first is not None and np.asarray(merged.params["w"]).tobytes() == np.asarray(first).tobytes() != before


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_base_that_contains_the_adapter_is_recognised(dtype: Any) -> None:
    base = {path: x.astype(dtype) for path, x in PARAMS.items()}
    one, two = (trained(i, LoRA(rank=2), base) for i in (1, 2))
    other = compose.merge(base, two).params
    there = compose.merge(compose.merge(base, two), one).params  # plain arrays, nobody's record
    with pytest.raises(ValueError, match=r"contain adapters\[0\] already \((0.9|1.0)\d times its update, at 4"):
        compose.merge(there, one)
    with pytest.raises(ValueError, match=r"adapters\[0\] was trained on another base than params: "):
        compose.merge(other, one)


def test_an_update_that_is_in_already_is_recognised_in_another_form() -> None:
    dora = trained(4, DoRA(LoRA(rank=2)))
    merged = compose.merge(compose.merge(PARAMS, dora), TWO, weights=0.5)
    for other in (compose.as_lora(*dora), compose.compose([dora]), compose.compose([TWO])):
        with pytest.raises(ValueError, match=r"adapters\[1\] has the update of one that is in these weights already"):
            compose.merge(merged, [ONE, other])
    assert len(compose.merge(merged, compose.compose([dora, TWO])).entries) == 3  # another adapter, made of both
    one, two = (trained(i, [("bias", lj.Full())]) for i in (5, 6))  # no update with factors
    assert len(compose.merge(compose.merge(PARAMS, one, full=0), two, full="drop").entries) == 2


def test_dense_methods_are_merged_without_a_rank() -> None:
    merged = compose.merge(PARAMS, [ONE, TWO], compose.TIES(0.5), weights=[0.7, 0.3])
    ranked = compose.compose([ONE, TWO], compose.TIES(0.5), weights=[0.7, 0.3], measure=False)
    for path in PARAMS:
        np.testing.assert_allclose(merged.params[path] - PARAMS[path], updates(ranked)[path], atol=2e-5)
    with pytest.raises(ValueError, match="TIES merged 2 adapters together: unmerge all"):
        compose.unmerge(merged, ONE)
    assert compose.unmerge(merged, [ONE, TWO]).params["stack"] is PARAMS["stack"] or not compose.unmerge(merged).entries
    with pytest.raises(ValueError, match="is in these weights already"):
        compose.merge(PARAMS, [ONE, ONE])


def test_a_quantised_base_is_added_to_as_it_is_read() -> None:
    packed = quant.plan(trained(0, LoRA(rank=1)).adapt.sites, [("stack", quant.NF4(block=6))]).quantize(PARAMS)
    one, two = (trained(i, LoRA(rank=2), packed) for i in (1, 2))
    read = packed["stack"].dense()
    for made in (compose.compose([one, two], weights=[0.5, 2.0]), compose.interpolate([one, two], [0.5, 0.5])):
        have = made.adapt.merge(made.trainable, made.frozen)["stack"] - read
        s = (0.5, 2.0) if isinstance(made, compose.Composed) else (0.5, 0.5)
        want = sum(w * x.adapt.plan["stack"].scale * x.trainable["stack"].A @ x.trainable["stack"].B
                   for w, x in zip(s, (one, two), strict=True))
        np.testing.assert_allclose(have, want, atol=1e-5)
    merged = compose.merge(packed, one)
    np.testing.assert_allclose(merged.params["stack"], one.adapt.merge(one.trainable, one.frozen)["stack"], atol=1e-6)
    assert compose.unmerge(merged).params["stack"] is packed["stack"]
    with pytest.raises(ValueError, match="another base than params: stack"):
        compose.merge(PARAMS, one)


@pytest.mark.parametrize("start", ["loftq", "qpissa"])
def test_the_correction_of_a_quantised_base_goes_in_once(start: str) -> None:
    """Two such adapters that did not train: composed they are the start again, or an error says why they are not."""
    adapt = lj.adapt(trained(0, LoRA(rank=1)).adapt.sites, [("stack", LoRA(rank=3, initializer=start))])
    base, stats = quant.plan(adapt.sites, [("stack", quant.NF4(block=6))]).start(adapt, PARAMS)
    start_of = adapt.init(jax.random.key(0), base, stats)
    one = compose.Adapter(adapt, *start_of)
    two = one._replace(trainable=jax.tree.map(lambda x: x * 1.001, start_of[0]))
    plain = trained(3, [("stack", LoRA(rank=1))], base)
    made = compose.compose([one, one, plain], weights=[0.25, 0.75, 2.0])
    want = adapt.merge(*start_of)["stack"] + 2 * (plain.adapt.merge(plain.trainable, plain.frozen)["stack"]
                                                  - base["stack"].dense())
    np.testing.assert_allclose(made.adapt.merge(made.trainable, made.frozen)["stack"], want, atol=1e-5)
    once = compose.merge(base, one)
    for call in (lambda: compose.compose([one, two]), lambda: compose.merge(base, one, weights=0.5),
                 lambda: compose.compose([one], compose.TIES()), lambda: compose.merge(once, two)):
        with pytest.raises(ValueError, match=r"stack: .*quantisation of their base.*weights .* that sum to 1"):
            call()


def test_dora_and_heads() -> None:
    one = trained(5, [("stack", DoRA(LoRA(rank=2))), ("head|bias", lj.Full())])
    with pytest.raises(ValueError, match="in full"):
        compose.merge(PARAMS, one)
    merged = compose.merge(PARAMS, one, full=0).params
    want = one.adapt.merge(one.trainable, one.frozen)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), merged, want)
