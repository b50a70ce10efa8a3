"""The step against numpy re-derivations on a linear model y = x (W + a b), and its word on buffers and NaN."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from core import jaxprs
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lorajax as lj
from lorajax.control.adalora import adalora
from lorajax.control.controller import Controller
from lorajax.optim import freeze_ranks
from lorajax.shard.mesh import make_mesh
from lorajax.train.elementwise import elementwise
from lorajax.train.step import _joined, init_state, make_eval, make_step, make_update
from lorajax.train.watch import HELD, Watch

N_IN, RANK, N_OUT, BATCH = 4, 2, 3, 8


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array


class Linear:
    """Stands in for `lorajax.adapt`: one site 'w', and a penalty of `strength` times the sum of squares of b."""

    def __init__(self, strength=0.0):
        self.strength = strength
        self.seen = []

    def bind(self, trainable, frozen, *, key=None, masks=None, onto=None):
        self.seen.append(key)
        a, b = trainable["w"]
        a = a if masks is None else a * masks["w"][None, :]
        return {"w": frozen["w"] + a @ b, "key": key}

    def penalty(self, trainable):
        return self.strength * jnp.sum(trainable["w"].b ** 2) if self.strength else 0.0


def squares(bound, batch, key):
    """Mean over real examples of the squared error, and the mean absolute one as a scalar to report."""
    error = batch["x"] @ bound["w"] - batch["y"]
    count = jnp.sum(batch["weight"])
    mean = jnp.sum(jnp.sum(error**2, axis=1) * batch["weight"]) / count
    return mean, {"absolute": jnp.sum(jnp.abs(error).sum(axis=1) * batch["weight"]) / count}


def numbers(seed=0, weight=None):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    weight = np.ones(BATCH, np.float32) if weight is None else np.asarray(weight, np.float32)
    batch = {"x": draw(BATCH, N_IN), "y": draw(BATCH, N_OUT), "weight": weight}
    return {"w": Pair(draw(N_IN, RANK), draw(RANK, N_OUT))}, {"w": draw(N_IN, N_OUT)}, batch


def start(tx, controller=None, seed=0, weight=None):
    trainable, frozen, batch = jax.tree.map(jnp.asarray, numbers(seed, weight))
    return init_state(jax.random.key(7), trainable, tx, controller), frozen, batch


def derived(trainable, frozen, batch, strength=0.0):
    """(loss, gradient of a, gradient of b) in float64, by hand."""
    a, b, w = (np.float64(x) for x in (*trainable["w"], frozen["w"]))
    x, y, weight = (np.float64(batch[name]) for name in ("x", "y", "weight"))
    error = x @ (w + a @ b) - y
    share = weight / weight.sum()
    loss = (share * (error**2).sum(1)).sum()
    pull = 2 * x.T @ (error * share[:, None])
    return loss, pull @ b.T, a.T @ pull + 2 * strength * b


def split(batch, n):
    return jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)


def host(tree):
    """The tree as numpy copies, keys as their data."""

    def is_key(x):
        return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), tree)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, host(left), host(right))


def test_adamw_with_clipping_and_penalty_is_the_numpy_recursion():
    rate, b1, b2, eps, decay, clip, strength = 0.05, 0.8, 0.9, 1e-8, 0.01, 0.7, 0.3
    tx = optax.adamw(rate, b1, b2, eps, weight_decay=decay)
    trainable, frozen, batch = numbers()
    state, device_frozen, device_batch = start(tx)
    step = make_step(squares, Linear(strength), tx, clip=clip)
    values = {name: np.float64(getattr(trainable["w"], name)) for name in "ab"}
    m, v = ({name: np.zeros_like(x) for name, x in values.items()} for _ in range(2))
    for t in range(1, 6):
        loss, *grads = derived({"w": Pair(**values)}, frozen, batch, strength)
        penalty = strength * (values["b"] ** 2).sum()
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        assert norm > clip
        for name, g in zip("ab", grads, strict=True):
            g = g * clip / norm
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            adam = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            values[name] = values[name] - rate * (adam + decay * values[name])
        state, metrics = step(state, device_frozen, device_batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["penalty"], penalty, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        assert metrics["finite"]
        assert metrics["weight"] == BATCH
    assert state.step == 5
    for name in "ab":
        np.testing.assert_allclose(getattr(state.trainable["w"], name), values[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("clip", "factor"), [(0.5, "clipped"), (None, "whole"), (1e6, "whole")])
def test_clip_bounds_the_update_and_reports_the_norm_before(clip, factor):
    trainable, frozen, batch = numbers()
    _, *grads = derived(trainable, frozen, batch)
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    state, device_frozen, device_batch = start(optax.sgd(1.0))
    state, metrics = make_step(squares, Linear(), optax.sgd(1.0), clip=clip)(state, device_frozen, device_batch)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    scale = 0.5 / norm if factor == "clipped" else 1.0
    for name, g in zip("ab", grads, strict=True):
        moved = getattr(trainable["w"], name) - np.asarray(getattr(state.trainable["w"], name))
        np.testing.assert_allclose(moved, g * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [[1] * 8, [1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
def test_accumulation_is_the_one_big_batch(weight):
    """Micro-batches with unlike numbers of real examples, one of them (third case) nothing but padding."""
    tx = optax.sgd(0.1)
    state, frozen, batch = start(tx, weight=weight)
    whole, want = make_step(squares, Linear(0.2), tx, clip=None)(state, frozen, batch)
    state, frozen, batch = start(tx, weight=weight)
    parts, got = make_step(squares, Linear(0.2), tx, clip=None, accumulate=4)(state, frozen, split(batch, 4))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)
    for got_leaf, want_leaf in zip(parts.trainable["w"], whole.trainable["w"], strict=True):
        np.testing.assert_allclose(got_leaf, want_leaf, rtol=1e-6, atol=1e-6)
    assert parts.step == whole.step == 1


def test_the_state_is_donated_and_nothing_else():
    tx = optax.adam(0.1)
    trainable, frozen, batch = jax.tree.map(jnp.asarray, numbers())
    state = init_state(jax.random.key(0), trainable, tx)
    before = jax.tree.leaves(state)
    make_step(squares, Linear(), tx)(state, frozen, batch)
    assert all(x.is_deleted() for x in before)
    assert not any(x.is_deleted() for x in jax.tree.leaves((trainable, frozen, batch)))


def test_one_compile_for_many_steps_and_the_base_is_an_argument():
    traces = []

    def counted(bound, batch, key):
        traces.append(1)
        return squares(bound, batch, key)

    tx = optax.adam(0.1)
    state, frozen, batch = start(tx)
    step = make_step(counted, Linear(), tx)
    for seed in range(4):
        _, other, batch = jax.tree.map(jnp.asarray, numbers(seed))
        want, *_ = derived(host(state.trainable), host(other), host(batch))
        state, metrics = step(state, other, batch)
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    assert len(traces) == 1
    step(state, frozen, jax.tree.map(lambda x: x[:4], batch))
    assert len(traces) == 2


def counting_masks(seen):
    """Rank 0 in even steps, rank 1 in odd ones; the state counts the steps."""

    def masks(state):
        seen.append("masks")
        return {"w": jnp.where(state["count"] % 2 == 0, jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))}

    def update(grads, old, new, state):
        return new, {"count": state["count"] + 1}

    return Controller(lambda trainable: {"count": jnp.int32(0)}, masks, update)


def test_masks_are_drawn_once_per_step_and_shared_by_the_micro_batches():
    seen = []
    controller, tx = counting_masks(seen), optax.sgd(1e-3)
    state, frozen, batch = start(tx, controller)
    step = make_step(squares, Linear(), tx, controller, clip=None, accumulate=4)
    for t in range(3):
        mask = np.array([1.0, 0.0] if t % 2 == 0 else [0.0, 1.0])
        trainable = host(state.trainable)
        masked = {"w": Pair(trainable["w"].a * mask, trainable["w"].b)}
        loss, ga, gb = derived(masked, host(frozen), host(batch))
        state, metrics = step(state, frozen, split(batch, 4))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(state.trainable["w"].a, trainable["w"].a - 1e-3 * ga * mask, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.trainable["w"].b, trainable["w"].b - 1e-3 * gb, rtol=1e-5, atol=1e-6)
        assert state.control["count"] == t + 1
    assert seen == ["masks"]  # once in the one trace


def test_frozen_ranks_stay_still_under_adam_and_decay():
    """`freeze_ranks` gets each step's masks: momentum and decay do not move the rank left out."""
    params, x = {"w": jax.random.normal(jax.random.key(1), (N_IN, N_OUT))}, jnp.ones((BATCH, N_IN))

    def model(params, x):
        return x @ params["w"]

    adapt = lj.adapt(lj.sites(model, params, x), [("w", lj.LoRA(rank=RANK))])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda leaf: leaf + 0.5, trainable)
    tx = optax.chain(optax.adamw(0.1, weight_decay=0.1), freeze_ranks(adapt.plan))
    controller = counting_masks([])

    def loss(bound, batch, key):
        return jnp.mean(lj.lift(model, strict=True)(bound, batch) ** 2), {}

    state = init_state(jax.random.key(0), trainable, tx, controller)
    step = make_step(loss, adapt, tx, controller)
    for t in range(4):
        before = host(state.trainable)["w"]
        state, _ = step(state, frozen, x)
        after = host(state.trainable)["w"]
        still, moving = 1 - t % 2, t % 2
        np.testing.assert_array_equal(after.A[:, still], before.A[:, still])
        np.testing.assert_array_equal(after.B[still], before.B[still])
        assert np.all(after.A[:, moving] != before.A[:, moving])


def test_the_controller_gets_clipped_gradients_and_both_sides_of_the_step():
    def update(grads, old, new, state):
        return jax.tree.map(lambda x: x + 1.0, new), {"grads": grads, "old": old, "new": new}

    controller = Controller(lambda t: {"grads": t, "old": t, "new": t}, lambda state: None, update)
    tx = optax.sgd(1.0)
    state, frozen, batch = start(tx, controller)
    before = host(state.trainable)
    state, _ = make_step(squares, Linear(), tx, controller, clip=0.5)(state, frozen, batch)
    control = host(state.control)
    np.testing.assert_allclose(np.sqrt(sum((g**2).sum() for g in control["grads"]["w"])), 0.5, rtol=1e-5)
    for old, grad, new, final, start_ in zip(
        control["old"]["w"], control["grads"]["w"], control["new"]["w"], state.trainable["w"], before["w"], strict=True
    ):
        np.testing.assert_array_equal(old, start_)
        np.testing.assert_allclose(new, old - grad, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(final, new + 1.0)


def noisy(bound, batch, key):
    """Reports one draw of each key, so that a test sees which keys the step hands out."""
    loss, _ = squares(bound, batch, key)
    return loss, {"model": jax.random.uniform(key), "adapter": jax.random.uniform(bound["key"])}


def test_dropout_keys_differ_by_purpose_and_step_and_survive_a_resume():
    tx = optax.adam(0.1)
    step = make_step(noisy, Linear(), tx)
    state, frozen, batch = start(tx)
    drawn = []
    for t in range(4):
        if t == 2:
            saved = jax.tree.map(jnp.copy, state)
        state, metrics = step(state, frozen, batch)
        drawn += [float(metrics["model"]), float(metrics["adapter"])]
    assert len(set(drawn)) == 8
    for _ in range(2):
        saved, _ = step(saved, frozen, batch)
    same(saved, state)


def test_micro_batches_have_keys_of_their_own():
    tx = optax.sgd(0.0)
    state, frozen, batch = start(tx)
    alike = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    _, first = make_step(noisy, Linear(), tx)(state, frozen, batch)
    state, *_ = start(tx)
    _, mean = make_step(noisy, Linear(), tx, accumulate=2)(state, frozen, alike)
    assert abs(float(first["model"]) - float(mean["model"])) > 1e-3  # the mean of two draws, not one draw twice


def test_eval_gives_the_adapter_no_key():
    adapt = Linear()
    trainable, frozen, batch = numbers()
    evaluate = make_eval(lambda bound, batch: batch["x"] @ bound["w"], adapt)
    got = evaluate(*jax.tree.map(jnp.asarray, (trainable, frozen, batch)))
    a, b = trainable["w"]
    np.testing.assert_allclose(got, batch["x"] @ (frozen["w"] + a @ b), rtol=1e-5, atol=1e-5)
    got = evaluate(*jax.tree.map(jnp.asarray, (trainable, frozen, batch)), {"w": jnp.zeros(RANK)})
    np.testing.assert_allclose(got, batch["x"] @ frozen["w"], rtol=1e-5, atol=1e-5)
    assert set(adapt.seen) == {None}


def test_several_steps_per_call_give_identical_numbers():
    seen = []
    tx, controller = optax.adam(0.05), counting_masks(seen)
    batches = [jax.tree.map(jnp.asarray, numbers(seed)[2]) for seed in range(6)]
    state, frozen, _ = start(tx, controller)
    one = make_step(squares, Linear(0.1), tx, controller)
    rows = []
    for batch in batches:
        state, metrics = one(state, frozen, batch)
        rows.append(metrics)
    many_state, frozen, _ = start(tx, controller)
    many = make_step(squares, Linear(0.1), tx, controller, steps_per_call=3)
    for i in (0, 3):
        many_state, metrics = many(many_state, frozen, jax.tree.map(lambda *x: jnp.stack(x), *batches[i : i + 3]))
        for j in range(3):
            same({name: x[j] for name, x in metrics.items()}, rows[i + j])
    same(many_state, state)


def test_a_nan_leaves_the_state_as_it_was():
    tx = optax.adam(0.1)
    step = make_step(squares, Linear(), tx)
    state, frozen, batch = start(tx)
    state, _ = step(state, frozen, batch)
    before = host(state)
    state, metrics = step(state, frozen, {**batch, "x": batch["x"].at[0, 0].set(jnp.nan)})
    assert not metrics["finite"]
    same(state, before)
    state, metrics = step(state, frozen, batch)
    assert metrics["finite"]
    assert state.step == 2


@pytest.mark.parametrize("small", [0, 6, 8])  # of 8 and 6 numbers: neither, one or both are laid end to end
@pytest.mark.parametrize("broken", [None, 0, 1])
def test_arrays_reduced_together_give_the_norm_and_show_what_is_not_finite(small, broken, monkeypatch):
    monkeypatch.setattr("lorajax.train.step.SMALL", small)

    def update(grads, state, params=None):
        spoil = jnp.zeros(2).at[0 if broken is None else broken].set(0.0 if broken is None else jnp.inf)
        return {"w": Pair(*[g.at[-1, -1].add(spoil[i]) for i, g in enumerate(grads["w"])])}, state

    tx = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    state, frozen, batch = start(tx)
    before = host(state.trainable)
    _, of_a, of_b = derived(before, frozen, batch)
    state, metrics = make_step(squares, Linear(), tx, clip=None)(state, frozen, batch)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((of_a**2).sum() + (of_b**2).sum()), rtol=1e-5)
    assert metrics["finite"] == (broken is None)
    if broken is not None:
        same(state.trainable, before)


@pytest.mark.parametrize("how", ["large", "product", "apart"])
def test_new_values_are_made_twice_where_that_is_cheap(how, monkeypatch):
    """Once to be looked at, once to be kept, behind a barrier, or XLA would see that they are the same. Not where the
    optimizer multiplies matrices. Either way what is not finite is not kept."""
    monkeypatch.setattr("lorajax.train.step.SMALL", 0)
    huge = optax.scale(-jnp.inf) if how != "product" else optax.stateless(
        lambda grads, _: jax.tree.map(lambda g: -jnp.inf * (g @ jnp.eye(g.shape[1])), grads))  # fmt: skip
    tx = optax.chain(optax.scale_by_adam(), huge)
    state, frozen, batch = start(tx)
    one = make_update(squares, Linear(), tx, clip=None, together=how != "apart")
    assert ("optimization_barrier" in str(jax.make_jaxpr(one)(state, frozen, batch))) == (how == "large")
    after, metrics = jax.jit(one)(state, frozen, batch)
    assert not metrics["finite"] and np.isfinite(metrics["grad_norm"])
    same(after, state)


@pytest.mark.parametrize(("fn", "told"), [
    (lambda x: jnp.where(x > 0, jnp.sqrt(x), 2.0) + x.T, True), (jax.jit(lambda x: x**2 - 1), True),
    (lambda x: x @ x, False), (jax.jit(lambda x: jnp.linalg.qr(x)[0]), False), (lambda x: x / x.sum(), False),
    (lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y * x, x), False), (lambda x: x[jnp.argsort(x[0])], False),
])  # fmt: skip
def test_what_is_element_by_element(fn, told):
    assert elementwise(jax.make_jaxpr(fn)(jnp.ones((2, 2)))) == told


def test_small_arrays_of_one_type_are_one_reduction():
    """Eight arrays of two types: with `together` two reductions say whether all are finite, without it eight."""
    from lorajax.train.step import _all_finite, _joined

    tree = [jnp.ones(n, kind) for n in (2, 3, 4, 5) for kind in (jnp.float32, jnp.bfloat16)]
    for collect, count in ((_joined, 2), (jax.tree.leaves, 8)):
        found = str(jax.make_jaxpr(lambda x, collect=collect: _all_finite(collect(x)))(tree))
        assert found.count("reduce_and") == count + 1  # and one over those
    assert sorted(x.size for x in _joined(tree)) == [14, 14]


def test_on_a_mesh_arrays_that_lie_alike_are_one_reduction():
    from lorajax.train.step import _joined

    mesh = make_mesh({"tensor": 2})
    whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(None, "tensor")))
    tree = [jnp.full(shape, i) for i, shape in enumerate([(2, 4), (3,), (2, 4), (2, 4), (2, 6)])]
    found = _joined(tree, [split, whole, whole, split, split])
    assert [x.shape for x in found] == [(2, 2, 4), (11,), (1, 2, 6)]
    assert [np.unique(x).tolist() for x in found] == [[0, 3], [1, 2], [4]]

    state, given, batch = start(optax.adam(0.1))
    for shardings in (None, (whole, whole)):  # A and B are one array; one reduction over those, one over `good`
        step = make_step(squares, Linear(), optax.adam(0.1), shardings=shardings)
        assert str(jax.make_jaxpr(step)(state, given, batch)).count("reduce_and") == 3


def test_a_nan_inside_a_call_of_many_steps_keeps_the_last_good_one():
    tx = optax.adam(0.1)
    state, frozen, batch = start(tx)
    good, _ = make_step(squares, Linear(), tx)(state, frozen, batch)
    state, frozen, batch = start(tx)
    batches = jax.tree.map(lambda x: jnp.stack([x] * 3), batch)
    batches["x"] = batches["x"].at[1, 0, 0].set(jnp.inf)
    state, metrics = make_step(squares, Linear(), tx, steps_per_call=3)(state, frozen, batches)
    assert metrics["finite"].tolist() == [True, False, False]
    same(state, good)


@pytest.mark.parametrize("n", [1, 2])
def test_calls_behind_one_that_failed_change_nothing_until_it_is_looked_at(n):
    """What `Watch` finds late is the first call that failed, and the state is the one before it."""
    tx = optax.adam(0.1)
    step = make_step(squares, Linear(), tx, steps_per_call=n)
    state, frozen, batch = start(tx)
    batches = batch if n == 1 else jax.tree.map(lambda x: jnp.stack([x] * n), batch)
    broken = {**batches, "x": batches["x"].at[(n - 1,) * (n > 1)].set(jnp.nan)}
    watch, kept = Watch(n), None
    for call, given in enumerate([batches, broken, batches, batches]):
        state, metrics = step(state, frozen, given, watch.good)
        kept = host(state) if call == 1 else kept
        assert not watch.add(call * n, given, metrics)
    same(state, kept)
    assert state.step == n + n - 1
    assert [call.begun for call in watch.look(behind=3)[0]] == [0] and watch.look(behind=3) == ([], None)
    fine, bad = watch.look(behind=1)
    assert not fine and bad.begun == n and bad.batch is broken and int(np.sum(bad.metrics["finite"])) == n - 1
    fine, again = watch.look()
    assert not fine and again.begun == 3 * n and watch.look() == ([], None)
    watch = Watch(n)
    found = [watch.add(call, batches, {"finite": np.ones((n,) * (n > 1), bool)}) for call in range(HELD)]
    assert found == [False] * (HELD - 1) + [True]
    fine, bad = watch.look()
    assert [call.begun for call in fine] == list(range(HELD)) and bad is None


def test_adalora_accumulates_like_the_big_batch_on_the_real_core():
    """Penalty, rank budget and masking go once per step, whatever the number of micro-batches."""

    def model(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    def loss(bound, batch, key):
        return squares({"w": jnp.eye(N_OUT)}, {**batch, "x": lj.lift(model, strict=True)(bound, batch["x"])}, key)

    _, frozen, batch = jax.tree.map(jnp.asarray, numbers(weight=[1, 1, 1, 0, 1, 1, 0, 0]))
    params = {"up": frozen["w"] @ jnp.ones((N_OUT, 6)) / 3, "down": jnp.ones((6, N_OUT)) / 6}
    adapt = lj.adapt(lj.sites(model, params, batch["x"]), [("up|down", lj.AdaLoRA(rank=3))])
    controller = adalora(adapt, total_steps=6, target_rank=1.5, t_final=1)
    trainable, frozen = adapt.init(jax.random.key(0), params)
    tx = optax.sgd(0.3)
    whole = parts = init_state(jax.random.key(1), trainable, tx, controller)
    parts = jax.tree.map(jnp.copy, parts)
    big = make_step(loss, adapt, tx, controller, clip=None)
    small = make_step(loss, adapt, tx, controller, clip=None, accumulate=4)
    for t in range(6):
        penalty = float(adapt.penalty(whole.trainable))
        whole, want = big(whole, frozen, batch)
        parts, got = small(parts, frozen, split(batch, 4))
        assert penalty > 0
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=2e-5, err_msg=name)
        np.testing.assert_allclose(got["penalty"], penalty, rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, parts.control.kept, whole.control.kept)
        assert parts.control.step == t + 1
    assert sum(int(kept.sum()) for kept in whole.control.kept.values()) == 3  # 1.5 of 3 ranks, two matrices


def test_low_precision_adapters_keep_their_dtype():
    tx = optax.adam(0.1)
    trainable, frozen, batch = jax.tree.map(jnp.asarray, numbers())
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (trainable, frozen))
    batch = {**batch, "x": batch["x"].astype(jnp.bfloat16)}

    def loss(bound, batch, key):
        return squares({"w": bound["w"].astype(jnp.float32)}, {**batch, "x": batch["x"].astype(jnp.float32)}, key)

    state, metrics = make_step(loss, Linear(), tx, accumulate=2)(
        init_state(jax.random.key(0), low[0], tx), low[1], split(batch, 2)
    )
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.bfloat16)}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32


def test_a_batch_split_over_eight_devices_gives_the_same_step():
    tx = optax.sgd(0.1)
    state, frozen, batch = start(tx, weight=[1, 1, 0, 1, 1, 1, 0, 1])
    want, want_metrics = make_step(squares, Linear(), tx)(state, frozen, batch)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, spread = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    state, frozen, batch = start(tx, weight=[1, 1, 0, 1, 1, 1, 0, 1])
    state, frozen, batch = jax.device_put((state, frozen, batch), (everywhere, everywhere, spread))
    step = make_step(squares, Linear(), tx)
    got, metrics = step(state, frozen, batch)
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
    for got_leaf, want_leaf in zip(got.trainable["w"], want.trainable["w"], strict=True):
        np.testing.assert_allclose(got_leaf, want_leaf, rtol=1e-6, atol=1e-6)
    step(got, frozen, batch)
    assert step._cache_size() == 1


def test_errors_say_what_to_do():
    tx = optax.sgd(0.1)
    state, frozen, batch = start(tx)
    with pytest.raises(ValueError, match="accumulate=0 must be at least 1"):
        make_step(squares, Linear(), tx, accumulate=0)
    with pytest.raises(ValueError, match=r"clip=0\.0 must be positive; None turns clipping off"):
        make_step(squares, Linear(), tx, clip=0.0)
    with pytest.raises(ValueError, match=r"accumulate=4, but batch\['weight'\] has shape \(8,\).*4 micro-batches"):
        make_step(squares, Linear(), tx, accumulate=4)(state, frozen, batch)
    with pytest.raises(ValueError, match=r"the loss reports \['grad_norm'\].*rename"):
        make_step(lambda *args: (squares(*args)[0], {"grad_norm": jnp.float32(0)}), Linear(), tx)(state, frozen, batch)
    with pytest.raises(TypeError, match=r"make a typed one with jax\.random\.key"):
        init_state(jax.random.PRNGKey(0), state.trainable, tx)
    widening = Controller(lambda t: jnp.int32(0), lambda s: None, lambda g, old, new, s: (new, s.astype(jnp.float32)))
    with pytest.raises(TypeError, match=r"state\.control from int32\[\] into float32\[\].*must keep shape and dtype"):
        make_step(squares, Linear(), tx, widening)(state._replace(control=jnp.int32(0)), frozen, batch)


def test_what_a_step_keeps_is_decided_by_one_array_for_each_shape():
    """Of three arrays of one shape and one of another, and Adam's two moments of each: two predicates for twelve
    selections, and no second one in a call of several steps. What is split over a mesh keeps the scalar."""
    trainable = {name: jnp.ones(shape) for name, shape in zip("abcd", ((3, 2), (3, 2), (3, 2), (4,)), strict=True)}

    class Sum(Linear):
        def bind(self, trainable, frozen, **_):
            return trainable

    def loss(bound, batch, key):
        return sum(jnp.sum((x - batch["x"]) ** 2) for x in bound.values()), {}

    tx = optax.adam(0.1)
    state = init_state(jax.random.key(0), trainable, tx)
    batch = {"x": jnp.arange(2.0)}
    one = make_update(loss, Sum(), tx, clip=None, together=True)
    many = make_step(loss, Sum(), tx, clip=None, steps_per_call=2)
    for fn, given in ((one, {"x": batch["x"][0]}), (many, batch)):
        selected = [e for e in jaxprs.equations(jax.make_jaxpr(fn)(state, {}, given))
                    if e.primitive.name == "select_n" and e.outvars[0].aval.shape in ((3, 2), (4,))]  # fmt: skip
        assert len(selected) == 12
        assert len({id(e.invars[0]) for e in selected}) == 2
        assert all(e.invars[0].aval.shape == e.outvars[0].aval.shape for e in selected)
    expected, opt_state = trainable, tx.init(trainable)
    for x in batch["x"]:
        grads = jax.tree.map(lambda p, x=x: 2 * (p - x), expected)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
    after, _ = many(state, {}, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after.trainable, expected)
    split = make_update(loss, Sum(), tx, clip=None, together=True, shardings=jax.tree.map(
        lambda _: NamedSharding(Mesh(np.array(jax.devices()[:1]), "d"), PartitionSpec()), after))  # fmt: skip
    assert not [e for e in jaxprs.equations(jax.make_jaxpr(split)(after, {}, {"x": batch["x"][0]}))
                if e.primitive.name == "select_n" and e.invars[0].aval.shape in ((3, 2), (4,))]  # fmt: skip


@pytest.mark.parametrize(("most", "expected"), [(None, [7]), (2, [4, 3]), (1, [2, 2, 3])])
def test_so_many_arrays_at_a_time(most, expected):
    found = _joined([jnp.zeros(2), jnp.zeros((2, 1)), jnp.zeros(3)], most=most)
    assert [x.size for x in found] == expected
