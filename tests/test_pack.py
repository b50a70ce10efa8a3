"""A packed run gives the numbers of the same run alone; what stands still or diverges touches no other."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lorajax as lj
from lorajax import control, optim
from lorajax.core.adapt import Frozen
from lorajax.train.pack import Parts, make_packed_eval, make_packed_step, pack, unpack, widen
from lorajax.train.step import init_state, make_step
from lorajax.variants import AdaLoRA, DoRA, VeRA

STEPS = 50
RUNS = [{"lr": 1e-2, "alpha": 4.0, "decay": 0.0, "seed": 0}, {"lr": 3e-3, "alpha": 8.0, "decay": 0.1, "seed": 1},
        {"lr": 3e-2, "alpha": 16.0, "decay": 0.01, "seed": 2}]  # fmt: skip
rng = np.random.default_rng(0)
PARAMS = {"up": jnp.float32(rng.normal(size=(8, 16)) / 3), "down": jnp.float32(rng.normal(size=(16, 4)) / 4)}
DATA = np.float32(rng.normal(size=(STEPS, 6, 8)))
TARGET = np.float32(rng.normal(size=(STEPS, 6, 4)))
METHODS: dict[str, Any] = {
    "lora": lambda alpha: lj.LoRA(rank=4, alpha=alpha, dropout=0.1),
    "dora": lambda alpha: DoRA(of=lj.LoRA(rank=4, alpha=alpha)),
    "adalora": lambda alpha: AdaLoRA(rank=4, alpha=alpha),
    "vera": lambda alpha: VeRA(rank=4),
}


def apply(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


SITES = lj.sites(apply, PARAMS, DATA[0])


def parts(method: str, values: Any) -> Parts:
    """The parts of one run, from numbers that may be traced."""
    adapt = lj.adapt(SITES, [(".*", METHODS[method](values["alpha"]))])
    schedule = optim.warmup_schedule(values["lr"], STEPS, 0.1)
    tx = optim.lora_plus(schedule, 4.0, labels=adapt.labels, weight_decay=values["decay"])
    budget = control.adalora(adapt, total_steps=STEPS, target_rank=2, t_final=20) if method == "adalora" else None

    def loss(bound: Any, batch: Any, key: jax.Array) -> Any:
        return jnp.mean(jnp.square(lj.lift(apply)(bound, batch["x"]) - batch["y"])), {}

    return Parts(loss, adapt, tx, budget or control.identity())


def batch(run: dict[str, Any], step: int) -> Any:
    rows = np.random.default_rng(run["seed"]).permutation(STEPS)
    return {"x": DATA[rows[step]], "y": TARGET[rows[step]]}


def member(method: str, run: dict[str, Any]) -> Any:
    made = parts(method, run)
    trainable, frozen = made.adapt.init(jax.random.key(run["seed"]), PARAMS)
    frozen = frozen._replace(base=PARAMS)
    return init_state(jax.random.key(run["seed"] + 100), trainable, made.tx, made.controller), frozen, run


@functools.cache
def alone(method: str, index: int, steps: int = STEPS) -> Any:
    run = RUNS[index]
    made, (state, frozen, _) = parts(method, run), member(method, run)
    step, losses = make_step(made.loss, made.adapt, made.tx, made.controller), []
    for i in range(steps):
        state, metrics = step(state, frozen, batch(run, i))
        losses.append(float(metrics["loss"]))
    return state, np.array(losses)


def together(method: str, runs: list[dict[str, Any]], active: Any = None, place: Any = lambda x: x) -> Any:
    step = make_packed_step(lambda values: parts(method, values))
    packed, losses = place(pack([member(method, run) for run in runs])), []
    on = jnp.ones(len(runs), bool)
    for i in range(STEPS):
        batches = jax.tree.map(lambda *xs: np.stack(xs), *[batch(run, i) for run in runs])
        packed, metrics = step(packed, place(batches), place(on if active is None else active(i)))
        losses.append(metrics["loss"])
    return packed, np.array(losses).T


def close(got: Any, want: Any, rtol: float = 1e-4) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5 + 1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_run_is_the_run_alone(method: str) -> None:
    packed, losses = together(method, RUNS)
    for i in range(len(RUNS)):
        state, want = alone(method, i)
        np.testing.assert_allclose(losses[i], want, rtol=1e-5, atol=1e-6)
        close(unpack(packed.state.trainable, i), state.trainable)
        if method == "adalora":
            kept = unpack(packed.state.control, i).kept
            assert jax.tree.all(jax.tree.map(np.array_equal, kept, state.control.kept))
    assert np.ptp(losses[:, -1]) > 1e-3


def test_a_run_that_stops_or_diverges_touches_no_other() -> None:
    bad = [*RUNS, {"lr": 1e30, "alpha": 4.0, "decay": 0.0, "seed": 3}]
    packed, losses = together("lora", bad, active=lambda i: jnp.array([True, i < 10, True, True]))
    for i in (0, 2):
        np.testing.assert_allclose(losses[i], alone("lora", i)[1], rtol=1e-5, atol=1e-6)
    stopped = unpack(packed.state, 1)
    assert int(stopped.step) == 10
    close(stopped.trainable, alone("lora", 1, steps=10)[0].trainable)
    diverged = unpack(packed.state, 3)
    assert int(diverged.step) < STEPS
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(diverged.trainable))


def test_a_lower_rank_is_the_same_run_in_a_wider_array() -> None:
    low = {"lr": 1e-2, "alpha": 4.0, "decay": 0.1, "seed": 5}
    run = parts("lora", low | {"alpha": 2.0})  # alpha / rank is 2 / 4 in the pack and 1 / 2 alone
    state, frozen, _ = member("lora", low)
    narrow = jax.tree.map(lambda x: x, state.trainable)
    narrow = {p: a._replace(A=a.A[:, :2], B=a.B[:2]) for p, a in narrow.items()}
    wide = {p: widen(a, run.adapt.plan[p].leaves, 4) for p, a in narrow.items()}
    assert wide["up"].A.shape == state.trainable["up"].A.shape
    start = init_state(state.key, wide, run.tx, run.controller)
    step = make_packed_step(lambda values: parts("lora", values))
    packed = pack([(start, frozen, low | {"alpha": 2.0}), member("lora", low)])
    small = lj.adapt(SITES, [(".*", lj.LoRA(rank=2, alpha=1.0, dropout=0.1))])
    single, tx = make_step(run.loss, small, run.tx), run.tx
    state = init_state(state.key, narrow, tx)
    for i in range(20):
        batches = jax.tree.map(lambda x: np.stack([x, x]), batch(low, i))
        packed, metrics = step(packed, batches, jnp.ones(2, bool))
        state, want = single(state, frozen, batch(low, i))
        np.testing.assert_allclose(metrics["loss"][0], want["loss"], rtol=1e-5)
    trained = unpack(packed.state.trainable, 0)
    close({p: a._replace(A=a.A[:, :2], B=a.B[:2]) for p, a in trained.items()}, state.trainable)
    assert not any(a.A[:, 2:].any() or a.B[2:].any() for a in trained.values())


def test_evaluation_of_all_runs_on_one_batch() -> None:
    def louder(state: Any, by: float) -> Any:
        return state._replace(trainable=jax.tree.map(lambda x: x + by, state.trainable))

    members = [(louder(s, 0.1 * (i + 1)), f, v) for i, (s, f, v) in enumerate(member("lora", run) for run in RUNS)]
    evaluate = make_packed_eval(lambda bound, x: lj.lift(apply)(bound, x), lambda v: parts("lora", v))
    got = evaluate(pack(members), DATA[0])
    for i, (state, frozen, run) in enumerate(members):
        want = apply(parts("lora", run).adapt.merge(state.trainable, frozen), DATA[0])
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-5)


def test_the_base_is_held_once_and_the_runs_spread_over_devices_without_talking() -> None:
    runs = [{**RUNS[i % 3], "seed": i} for i in range(8)]
    mesh = jax.make_mesh((8,), ("trial",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(tree: Any) -> Any:
        if hasattr(tree, "common"):
            return type(tree)(put(tree.state, "trial"), put(tree.common), *put((tree.own, tree.values), "trial"))
        return put(tree, "trial")

    def put(tree: Any, *axis: str) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axis)))

    spread, losses = together("lora", runs, place=place)
    np.testing.assert_allclose(losses, together("lora", runs)[1], rtol=1e-5, atol=1e-6)
    assert spread.state.trainable["up"].A.sharding.spec[0] == "trial"
    assert {x.shape for x in spread.common.base.values()} == {(8, 16), (16, 4)}
    step = make_packed_step(lambda values: parts("lora", values))
    batches = jax.tree.map(lambda *xs: jnp.stack(xs), *[batch(run, 0) for run in runs])
    spread_batches, active = put((batches, jnp.ones(8, bool)), "trial")
    program = step.jitted.lower(spread.state, spread[1:], spread_batches, active)
    text = program.compile().as_text()
    assert not [word for word in ("all-reduce", "all-gather", "collective-permute", "all-to-all") if word in text]


def test_members_that_cannot_share_a_program() -> None:
    one, other = member("lora", RUNS[0]), member("lora", RUNS[1])
    with pytest.raises(ValueError, match="share one frozen base"):
        pack([one, (other[0], Frozen(jax.tree.map(jnp.copy, other[1].base), other[1].aux), other[2])])
    adapter = other[0].trainable["up"]
    short = other[0]._replace(trainable={**other[0].trainable, "up": adapter._replace(A=adapter.A[:, :2])})
    with pytest.raises(ValueError, match="adapters of the same shapes"):
        pack([one, (short, *other[1:])])
