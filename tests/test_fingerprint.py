"""`lorajax.core.fingerprint`: a known answer, what it must notice, and what it must not care about."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax.core.fingerprint import SAMPLES, fingerprint

TREE = {
    "params": {
        "b": {"kernel": np.arange(90_000, dtype=np.float32).reshape(300, 300)},
        "a": np.array([1, 2], np.int32),
    }
}


def test_small_leaves_are_hashed_whole_in_path_order():
    tree = {"z": np.array([[1.5]], np.float32), "a": {"k": np.array([1, 2], "<i4")}}
    text = b"a/k\0" + b"2\0int32\0" + b"\1\0\0\0\2\0\0\0" + b"z\0" + b"1x1\0float32\0" + b"\0\0\xc0\x3f"
    assert fingerprint(tree) == "lj1:" + hashlib.sha256(text).hexdigest()[:32]


@pytest.mark.parametrize("fetched", [0, 1 << 22])  # sampled on its device, or fetched whole
def test_same_content_same_fingerprint_wherever_it_lies(monkeypatch, fetched):
    monkeypatch.setattr("lorajax.core.fingerprint.FETCHED", fetched)
    expected = fingerprint(TREE)
    assert fingerprint(jax.tree.map(jnp.asarray, TREE)) == expected
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        kernel = jax.device_put(TREE["params"]["b"]["kernel"], spread)
        assert fingerprint({"params": {"a": TREE["params"]["a"], "b": {"kernel": kernel, "gone": None}}}) == expected
    swapped = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype.newbyteorder(">")), TREE)
    assert fingerprint(swapped) == expected


@pytest.mark.parametrize("change", ["cast", "train", "reshape", "rename", "transpose", "one row", "one column"])
def test_it_notices(change):
    kernel = TREE["params"]["b"]["kernel"]
    trained = kernel.copy()
    if change == "train":
        trained += 1e-2
    if change == "one row":
        trained[7:11] = 0  # 4 of 300 rows: about 14 of the 1024 samples
    if change == "one column":
        trained[:, 7:11] = 0
    new = {
        "cast": kernel.astype(np.float64),
        "reshape": kernel.reshape(900, 100),
        "transpose": kernel.T,
    }.get(change, trained)
    name = "weight" if change == "rename" else "kernel"
    assert fingerprint({"params": {"a": TREE["params"]["a"], "b": {name: new}}}) != fingerprint(TREE)


def test_bfloat16_and_the_sampling_limit():
    leaf = jnp.arange(SAMPLES, dtype=jnp.float32).astype(jnp.bfloat16)
    changed = leaf.at[SAMPLES // 2].add(jnp.asarray(64, jnp.bfloat16))
    assert fingerprint({"w": leaf}) != fingerprint({"w": changed})  # a leaf of SAMPLES elements is read whole


def test_a_leaf_of_any_size_costs_its_samples():
    """128 GiB that are not there: whatever reads more than the samples of a leaf has no room for it."""
    huge = np.broadcast_to(np.arange(2**15, dtype=np.float32), (2**20, 2**15))
    assert fingerprint({"w": huge}) != fingerprint({"w": huge[:, ::-1]})


def test_not_an_array_is_named():
    with pytest.raises(TypeError, match="'a/b' is a float"):
        fingerprint({"a": {"b": 1.0}})
