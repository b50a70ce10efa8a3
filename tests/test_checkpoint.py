"""Checkpoints come back bit for bit, survive SIGKILL, and refuse another configuration's state by name."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorajax.train.checkpoint import CheckpointMismatch, Checkpoints
from lorajax.train.step import TrainState, init_state


def odd_state(seed=0):
    """Every kind of leaf: bf16, bool, empty, scalar, NaN with a payload, -0, typed keys of two kinds, None slots."""
    rng = np.random.default_rng(seed)
    low = jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16)
    bits = rng.integers(0, 2**32, (3, 5), dtype=np.uint32)
    trainable = {
        "params/layer_0/query/kernel": {"a": jnp.asarray(bits.view(np.float32)), "b": None},
        "params/layer_1/query/kernel": {"a": low, "b": jnp.zeros((0, 4))},
    }
    control = {"mask": jnp.array([True, False]), "low": jnp.float32(-0.0), "key": jax.random.key(seed, impl="rbg")}
    moments = (jnp.full((3,), 1e-42 * (seed + 1), jnp.float32), optax.EmptyState())
    return TrainState(jnp.int32(seed), trainable, moments, control, jax.random.key(seed))


def bits(tree):
    """The bytes of every leaf."""
    keys = [(x, jnp.issubdtype(x.dtype, jax.dtypes.prng_key)) for x in jax.tree.leaves(tree)]
    return [(str(x.dtype), x.shape, np.asarray(jax.random.key_data(x) if key else x).tobytes()) for x, key in keys]


def test_restores_every_leaf_bit_for_bit(tmp_path):
    state = odd_state(3)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(3, state, {"epoch": 1, "batch": 17, "best": {"step": 2, "score": 0.5}})
    like = jax.eval_shape(lambda: odd_state(0))
    for wanted in (odd_state(0), like):
        with Checkpoints(tmp_path / "c") as checkpoints:
            assert checkpoints.latest() == 3
            got, position = checkpoints.restore(wanted)
        assert position == {"epoch": 1, "batch": 17, "best": {"step": 2, "score": 0.5}}
        assert jax.tree.structure(got) == jax.tree.structure(state)
        assert bits(got) == bits(state)
        assert jax.random.key_impl(got.control["key"]) == jax.random.key_impl(state.control["key"])
        np.testing.assert_array_equal(jax.random.uniform(got.key, 4), jax.random.uniform(state.key, 4))


def test_a_save_in_flight_does_not_see_later_donated_steps(tmp_path):
    add = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    state = add({str(i): jnp.zeros((200, 1000)) for i in range(10)})
    with Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        for step in range(3):
            checkpoints.save(step, state, {})
            for _ in range(5):
                state = add(state)
        jax.block_until_ready(state)
        for step in range(3):
            got, _ = checkpoints.restore(state, step)
            assert {float(v) for x in got.values() for v in (x.min(), x.max())} == {1.0 + 5 * step}


def test_keeps_the_newest_and_the_best(tmp_path):
    def folders():
        return sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.is_dir())

    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert (checkpoints.latest(), checkpoints.best()) == (None, None)
        for step in range(6):
            checkpoints.save(step, odd_state(step), {"step": step}, best=step in (0, 2))
        checkpoints.wait()
        assert folders() == [2, 4, 5]
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert (checkpoints.latest(), checkpoints.best()) == (5, 2)
        assert bits(checkpoints.restore(odd_state(), checkpoints.best())[0]) == bits(odd_state(2))
        checkpoints.save(6, odd_state(6), {}, best=True)
        checkpoints.wait()
        assert folders() == [5, 6]
        assert checkpoints.best() == 6


def test_saving_a_step_again_changes_nothing(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, odd_state(1), {"first": True})
        checkpoints.save(1, odd_state(2), {"first": False})
        got, position = checkpoints.restore(odd_state())
    assert position == {"first": True}
    assert bits(got) == bits(odd_state(1))


def test_restores_onto_the_sharding_asked_for(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    value = jnp.arange(32.0).reshape(8, 4)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(0, {"a": jax.device_put(value, rows)}, {})
        for sharding in (whole, rows):
            got, _ = checkpoints.restore({"a": jax.device_put(jnp.zeros((8, 4)), sharding)})
            assert got["a"].sharding == sharding
            np.testing.assert_array_equal(got["a"], value)


def test_another_configuration_is_refused_leaf_by_leaf(tmp_path):
    def state(rank, tx, name="b"):
        trainable = {"params/q/kernel": {"a": jnp.ones((4, rank)), name: jnp.ones((rank, 4), jnp.float32)}}
        return init_state(jax.random.key(0), trainable, tx)

    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(5, state(2, optax.sgd(0.1)), {})
        with pytest.raises(CheckpointMismatch) as rank:
            checkpoints.restore(state(3, optax.sgd(0.1)))
        with pytest.raises(CheckpointMismatch) as optimizer:
            checkpoints.restore(state(2, optax.adam(0.1)))
        with pytest.raises(CheckpointMismatch) as renamed:
            checkpoints.restore(state(2, optax.sgd(0.1), name="b1"))
        with pytest.raises(FileNotFoundError, match=r"asked for step 4 in .*; there is \[5\]"):
            checkpoints.restore(state(2, optax.sgd(0.1)), 4)
    assert "params/q/kernel.a is float32[4, 2] in the checkpoint, float32[4, 3] in this run" in str(rank.value)
    assert "restore that configuration, or start in a fresh run folder" in str(rank.value)
    assert "opt_state.0.mu.params/q/kernel.a float32[4, 2] is not in the checkpoint" in str(optimizer.value)
    assert "b1 float32[2, 4] is not in the checkpoint (nearest there: trainable.params" in str(renamed.value)
    assert "trainable.params/q/kernel.b float32[2, 4] is only in the checkpoint" in str(renamed.value)


def test_only_arrays_are_saved(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(TypeError, match=r"lr is a float.*jnp\.asarray"):
        checkpoints.save(0, {"lr": 0.1}, {})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path / "c", keep=0)


def test_a_half_deleted_old_checkpoint_does_no_harm(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, odd_state(step), {}, best=step == 2)
    for path in sorted((tmp_path / "c" / "1").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert (checkpoints.latest(), checkpoints.best()) == (2, 2)
        checkpoints.save(3, odd_state(3), {})
        assert bits(checkpoints.restore(odd_state())[0]) == bits(odd_state(3))


WRITER = """
import os, signal, sys
import jax.numpy as jnp
from lorajax.train.checkpoint import Checkpoints

folder, point, nth = sys.argv[1], sys.argv[2], int(sys.argv[3])

def state(step):
    return {"x": jnp.full((300, 1000), step, jnp.float32), "step": jnp.int32(step)}

with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(1, state(1), {"at": 1})
    checkpoints.wait()
    print("saved 1", flush=True)
    seen = 0

    def watch(event, args):  # dies at the nth system call of a kind, in whatever thread makes it
        global seen
        if event == point:
            seen += 1
            if seen == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    if point == "saved":
        checkpoints.save(2, state(2), {"at": 2})
        os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    checkpoints.save(2, state(2), {"at": 2})
    checkpoints.wait()
    print("saved 2", flush=True)
"""


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        ("saved", 0), ("os.mkdir", 1), ("os.mkdir", 2), ("os.mkdir", 3), ("open", 1), ("open", 2), ("open", 4),
        ("os.rename", 1), ("os.rename", 2), ("os.rmdir", 1), ("os.remove", 1), ("os.remove", 2), ("shutil.rmtree", 1),
    ],
)  # fmt: skip
def test_sigkill_during_a_save_leaves_a_usable_checkpoint(tmp_path, point, nth):
    """Whichever of the two is the newest afterwards is whole, and the next save works."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", WRITER, str(tmp_path / "c"), point, str(nth)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "saved 1" in done.stdout, done.stderr
    assert done.returncode == -signal.SIGKILL, done.stderr
    like = {"x": jnp.zeros((300, 1000)), "step": jnp.int32(0)}
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        newest = checkpoints.latest()
        assert newest in (1, 2)
        got, position = checkpoints.restore(like)
        assert position == {"at": newest}
        assert got["step"] == newest
        np.testing.assert_array_equal(got["x"], np.full((300, 1000), newest, np.float32))
        checkpoints.save(3, {**like, "step": jnp.int32(3)}, {"at": 3})
        assert checkpoints.restore(like)[0]["step"] == 3
    assert not [p.name for p in (tmp_path / "c").iterdir() if "tmp" in p.name]
