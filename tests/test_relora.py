"""ReLoRA: restarts keep the function, accumulate in float32, prune the moments, and survive a kill; its schedule."""

import math
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from test_glue import files, folder, own_cache, same, words  # noqa: F401

import lorajax as lj
from experiments import glue
from experiments.sweep import plan
from lorajax import optim
from lorajax.control import relora
from lorajax.control.relora import prune_moments
from lorajax.sweep import launch
from lorajax.train.run import Run
from lorajax.train.step import TrainState, init_state
from lorajax.variants import AdaLoRA, LoRA
from lorajax.variants.lora import LoRAAdapter

R = 2
WEIGHTS = {"q": (8, 6), "layers": (2, 6, 6), "head": (6, 3)}


def model(p: Any, x: jax.Array) -> jax.Array:
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ p["q"], p["layers"])
    return x @ p["head"]


def setting(dtype: Any = jnp.float32) -> tuple[Any, Any, Any, TrainState, Any]:
    """(adapt, params, frozen, state after some training, controller)."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))  # noqa: E731
    params = {name: (draw(*shape) / 2).astype(dtype) for name, shape in WEIGHTS.items()}
    adapt = lj.adapt(lj.sites(model, params, jnp.ones((2, 8), dtype)),
                     [("q", LoRA(rank=R, alpha=3)), ("layers", LoRA(rank=R, alpha=4)), ("head", lj.Full())])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    controller = relora(adapt, total_steps=40, every=10)
    state = init_state(jax.random.key(1), trainable, optim.adamw(1e-2), controller)
    filled = jax.tree.map(lambda x: draw(*x.shape), (state.trainable, state.opt_state[0].mu, state.opt_state[0].nu))
    adam = state.opt_state[0]._replace(mu=filled[1], nu=jax.tree.map(jnp.abs, filled[2]))
    state = state._replace(trainable=filled[0], opt_state=(adam, *state.opt_state[1:]))
    return adapt, params, frozen, state, controller


def dense(adapter: LoRAAdapter, s: float) -> np.ndarray:
    return s * np.float64(adapter.A) @ np.float64(adapter.B)


def test_a_restart_keeps_the_function_and_the_base() -> None:
    adapt, params, frozen, state, controller = setting()
    before = {name: np.array(x) for name, x in params.items()}
    x = jnp.float32(np.random.default_rng(1).normal(size=(5, 8)))
    f = lj.lift(model)
    restart = controller.restart
    assert restart is not None
    assert restart.every == 10
    expected = {"q": np.zeros((8, 6)), "layers": np.zeros((2, 6, 6))}
    starts = []
    for round_ in range(2):
        now = restart.rebase(frozen, state.control)
        out = f(adapt.bind(state.trainable, now), x)
        expected = {path: expected[path] + dense(state.trainable[path], s)
                    for path, s in (("q", 1.5), ("layers", 2.0))}
        new = jax.jit(restart.restart)(state)
        moved = restart.rebase(frozen, new.control)
        np.testing.assert_allclose(f(adapt.bind(new.trainable, moved), x), out, atol=1e-4)
        for path in expected:
            np.testing.assert_allclose(new.control.moved[path], expected[path], atol=1e-5)
            assert new.control.moved[path].dtype == jnp.float32
            assert not new.trainable[path].B.any()
            assert np.abs(new.trainable[path].A).max() <= 1 / math.sqrt(WEIGHTS[path][-2])
            starts.append(np.array(new.trainable[path].A))
        assert np.array_equal(new.trainable["head"].w, state.trainable["head"].w)
        assert int(new.control.restarts) == round_ + 1
        assert int(new.step) == int(state.step)
        filled = {path: LoRAAdapter(new.trainable[path].A, jnp.ones_like(new.trainable[path].B)) for path in expected}
        state = new._replace(trainable={**new.trainable, **filled})
    assert not np.array_equal(starts[0], starts[2])  # every restart draws anew, and so does every layer
    assert not np.array_equal(starts[1][0], starts[1][1])
    assert all(np.array_equal(before[name], params[name]) for name in params)
    assert frozen.base["q"] is params["q"] or np.array_equal(frozen.base["q"], params["q"])


def test_small_updates_add_up_over_a_bfloat16_base() -> None:
    """Each is below half a unit in the last place of the bfloat16 weight, which would swallow all of them."""
    _, params, frozen, state, controller = setting(jnp.bfloat16)
    assert controller.restart is not None
    small = {path: jax.tree.map(lambda x: jnp.full_like(x, 0.01), state.trainable[path]) for path in ("q", "layers")}
    restart = jax.jit(controller.restart.restart)
    for _ in range(100):
        state = restart(state._replace(trainable={**state.trainable, **small}))
    now = controller.restart.rebase(frozen, state.control).base["q"]
    assert now.dtype == jnp.bfloat16
    np.testing.assert_allclose(state.control.moved["q"], 100 * 1.5 * R * 1e-4, rtol=1e-3)
    np.testing.assert_allclose(np.float32(now), np.float32(params["q"]) + 0.03, atol=0.01)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("prune", ["magnitude", "random"])
def test_moments_of_a_and_b_are_pruned_and_no_others(prune: str, paired: bool) -> None:
    adapt, _, _, state, _ = setting()
    controller = relora(adapt, total_steps=40, every=10, prune=prune, ratio=0.75, paired=paired)
    assert controller.restart is not None
    new = controller.restart.restart(state)
    zeros, total = 0, 0
    for name in ("mu", "nu"):
        old, got = getattr(state.opt_state[0], name), getattr(new.opt_state[0], name)
        assert np.array_equal(old["head"].w, got["head"].w)
        for path, factor in (("q", "A"), ("q", "B"), ("layers", "A"), ("layers", "B")):
            x, y = np.array(getattr(old[path], factor)), np.array(getattr(got[path], factor))
            assert np.array_equal(y[y != 0], x[y != 0])
            zeros, total = zeros + (y == 0).sum(), total + y.size
            if prune == "magnitude":
                for i in np.ndindex(x.shape[:-2]):
                    keep = np.abs(x[i]) > np.quantile(np.abs(x[i]), 0.75)
                    if name == "mu" and paired:
                        second = np.array(getattr(state.opt_state[0].nu[path], factor))[i]
                        keep &= second > np.quantile(second, 0.75)
                    np.testing.assert_array_equal(y[i] != 0, keep)
            if name == "mu" and paired:  # no first moment without its second
                assert not np.any((y != 0) & (np.array(getattr(new.opt_state[0].nu[path], factor)) == 0))
    assert int(new.opt_state[0].count) == int(state.opt_state[0].count)
    assert 0.6 < zeros / total < (0.95 if paired else 0.85)


def test_pruning_finds_moments_inside_other_optimizers() -> None:
    adapt, _, _, state, _ = setting()
    for tx in (optim.NAMES["lora_plus"](1e-2, adapt=adapt, weight_decay=0.0),
               optax.chain(optim.adamw(1e-2), optim.freeze_ranks(adapt.plan))):
        opt_state = jax.tree.map(jnp.ones_like, tx.init(state.trainable))
        pruned = prune_moments(opt_state, ["q", "layers"], jax.random.key(0), "random", 1.0)
        gone = sum(int((x == 0).sum()) for x in jax.tree.leaves(pruned))
        assert gone == 2 * sum(x.size for path in ("q", "layers") for x in state.trainable[path])
    with pytest.raises(ValueError, match=r"keeps no moments of A and B that ReLoRA could prune: use 'adamw'"):
        prune_moments(optax.sgd(1e-2).init(state.trainable), ["q"], jax.random.key(0), "random", 0.9)


@pytest.mark.parametrize(("more", "words"), [
    ({"every": 40}, r"every=40 is 40 steps of a run of 40: it must be within the run"),
    ({"every": 0.001}, r"every=0.001 is 0 steps of a run of 40"),
    ({"prune": "all"}, r"prune='all' is unknown; there are 'magnitude' and 'random'"),
    ({"ratio": 1.5}, r"ratio=1.5 is the share of the moments that is zeroed: it must be in \[0, 1\]"),
])  # fmt: skip
def test_errors(more: Any, words: str) -> None:
    adapt = setting()[0]
    with pytest.raises(ValueError, match=words):
        relora(adapt, total_steps=40, **more)
    w = {"w": jnp.ones((4, 4))}
    ada = lj.adapt(lj.sites(lambda p, x: x @ p["w"], w, jnp.ones((2, 4))), [("w", AdaLoRA(rank=2))])
    with pytest.raises(ValueError, match=r"ReLoRA found no LoRA site; the rules made AdaLoRA"):
        relora(ada, total_steps=40)


def test_schedule_of_the_released_code() -> None:
    """Its numbers in plain Python: a global cosine to a tenth, linear climbs to the cosine's value at n * every."""
    total, first, every, again, peak = 1000, 100, 250, 20, 2.0
    schedule = optim.restart_schedule(peak, total, every, 0.1, 20)

    def released(t: int) -> float:
        cosine = lambda x: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * x / (total - first)))  # noqa: E731
        if t < first:
            return t / first
        if t % every < again:
            return t % every / again * cosine(t // every * every)
        return cosine(t - first)

    steps = [0, 50, 99, 100, 101, 249, 250, 251, 260, 269, 270, 499, 500, 510, 520, 750, 999]
    np.testing.assert_allclose([float(schedule(t)) for t in steps], [peak * released(t) for t in steps], rtol=1e-5)
    assert float(schedule(250)) == 0.0
    assert float(schedule(249)) > 1.5
    with pytest.raises(ValueError, match=r"restart_warmup=0.5 is 500 steps, but there is a restart every 250"):
        optim.restart_schedule(peak, total, every, 0.1, 0.5)


@pytest.mark.parametrize("name", ["relora", "ranks", "eva"])
def test_what_packs_cannot_do_runs_by_itself(name) -> None:
    """A pack neither restarts nor looks at gradients before it starts: its members would be other runs."""
    trials = [{"config": config, "seed": seed} for config in ("lora", name) for seed in (0, 1)]
    groups = plan([launch(trial, workdir="runs", resume=True) for trial in trials], 8)
    assert sorted((len(g.launches), {one.name for one in g.launches} == {name}) for g in groups) == [
        (1, True), (1, True), (2, False)]


@pytest.mark.parametrize(("name", "together"), [("lora", True), ("riemannian", False), ("lora_rite", False),
                                                ("reduce", False)])  # fmt: skip
def test_ranks_share_a_program_only_where_nothing_counts_them(name, together) -> None:
    trials = [{"config": name, "arg.rank": rank} for rank in (2, 4)]
    groups = plan([launch(trial, workdir="runs", resume=True) for trial in trials], 8)
    assert (len(groups) == 1) == together


def test_a_killed_run_goes_on_from_after_its_restart(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    """8 steps, restarts after 2, 4 and 6; killed after step 5. The exported weights hold the merged updates too."""
    args = ("relora", ",rank=2,targets=qv", "--config.probe=false", "--config.epochs=1")
    glue.main(words(files, tmp_path / "whole", *args))
    log = Run.log

    def terminated(self, step, values, *, prefix=""):
        log(self, step, values, prefix=prefix)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "log", terminated)
    with pytest.raises(SystemExit):
        glue.main(words(files, tmp_path / "cut", *args))
    monkeypatch.setattr(Run, "log", log)
    glue.main(words(files, tmp_path / "cut", *args))
    same(tmp_path / "whole", tmp_path / "cut")
    saved = load_file(folder(tmp_path / "cut") / "adapter" / "lorajax_adapter.safetensors")
    tensors = load_file(files[0] / "model.safetensors")
    (start,) = (x.T for name, x in tensors.items() if name.endswith("layer.0.attention.self.query.weight"))
    change = saved["params/layer_0/attention/query/kernel.w"] - start
    sigma = np.linalg.svd(change, compute_uv=False)
    assert sigma[3] > 1e-3  # of rank 2 each, several restarts make more
