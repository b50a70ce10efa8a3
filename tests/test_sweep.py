"""Grids, and which of their runs share a program."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import glue_folder, model_folder

from experiments import members
from experiments.sweep import by_itself, plan
from lorajax import build, config
from lorajax.sweep import chain, each, fixed, groups, launch, load_study, part, product, words, zipit


def test_grids() -> None:
    assert each("lr", [1, 2]) == [{"lr": 1}, {"lr": 2}]
    assert product(each("a", [1, 2]), each("b", [3, 4]), fixed(c=5)) == [
        {"a": 1, "b": 3, "c": 5}, {"a": 1, "b": 4, "c": 5}, {"a": 2, "b": 3, "c": 5}, {"a": 2, "b": 4, "c": 5}]
    assert zipit(each("a", [1, 2]), each("b", [3, 4])) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert chain(fixed(a=1), each("a", [2, 3])) == [{"a": 1}, {"a": 2}, {"a": 3}]
    with pytest.raises(config.ConfigError, match=r"grids of one length, these have 2, 1 trials.*product"):
        zipit(each("a", [1, 2]), fixed(b=1))
    with pytest.raises(config.ConfigError, match="two grids set a"):
        product(fixed(a=1), fixed(a=2, b=3))


def test_a_trial_is_a_command_line() -> None:
    trial = {"config": "lora", "arg.task": "rte", "arg.rank": 4, "lr": 2e-3, "seed": 3}
    assert words(trial) == ["--config=configs/lora.py:task=rte,rank=4", "--config.lr=0.002", "--config.seed=3"]
    one = launch(trial)
    assert (one.config.variant.rank, one.config.lr, one.config.seed) == (4, 2e-3, 3)
    assert one.name == config.parse(words(trial)).name == "lora,rank=4,task=rte,lr=0.002"
    with pytest.raises(config.ConfigError, match="names no config"):
        words({"lr": 1})
    with pytest.raises(config.ConfigError, match=r"--config.ler.*did you mean 'lr'"):
        launch({"config": "lora", "ler": 1})


def test_runs_that_differ_in_numbers_alone_share_a_program() -> None:
    grid = product(each("config", ["lora"]), each("arg.rank", [4, 8]), each("lr", [1e-3, 2e-3]), each("seed", [0, 1]))
    launches = [launch(trial) for trial in grid]
    found = groups(launches, ["lr", "seed", "weight_decay"], size=3)
    assert [len(g.launches) for g in found] == [3, 1, 3, 1]
    assert [g.differ for g in found] == [("lr", "seed"), (), ("lr", "seed"), ()]
    assert {g.launches[0].config.variant.rank for g in found[:2]} == {4}
    assert len(groups(launches, ["lr", "seed", "variant.rank", "args.rank"], size=8)) == 1
    with pytest.raises(config.ConfigError, match=r"no key 'sed'.*did you mean 'seed'"):
        groups(launches, ["sed"], 1)
    with pytest.raises(config.ConfigError, match="a pack of 0 runs"):
        groups(launches, ["lr"], 0)


@pytest.mark.parametrize(("trial", "sizes"), [
    ({"config": "lora"}, [4]),
    ({"config": "lora_plus"}, [4]),
    ({"config": "lora_fa"}, [4]),
    ({"config": "lora_pro"}, [2, 2]),  # counts ranks where it inverts
    ({"config": "riemannian"}, [2, 2]),
    ({"config": "pissa"}, [2, 2]),  # A0 and B0 stay at the run's rank
    ({"config": "pissa", "variant.fold": True}, [1, 1, 1, 1]),  # each has a base of its own
    ({"config": "eva"}, [1, 1, 1, 1]),
])  # fmt: skip
def test_what_a_program_takes_together(trial: dict[str, object], sizes: list[int]) -> None:
    grid = product(fixed(**trial), each("arg.rank", [2, 4]), each("seed", [0, 1]))
    groups = plan([launch(one, workdir="runs", resume=True) for one in grid], 8)
    assert sorted(len(g.launches) for g in groups) == sorted(sizes)


def test_a_further_rule_that_reads_data_makes_a_run_of_its_own() -> None:
    c = launch({"config": "lora"}).config.copy_and_resolve_references()
    assert not by_itself(c)
    with c.unlocked():
        c.also = {"first": {"paths": "qv", "name": "lora", "initializer": {"name": "eva"}}}
    assert by_itself(c)


def test_slices_cover_a_study_once() -> None:
    trials = list(range(10))
    slices = [part(trials, f"{i}/3") for i in range(3)]
    assert sorted(trial for one in slices for trial in one) == trials
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
    for bad in ("3/3", "1", "a/b", "-1/2", "1/0"):
        with pytest.raises(config.ConfigError, match="is not i/n"):
            part(trials, bad)


def test_studies() -> None:
    trials = load_study("configs/studies/rank_sweep.py")
    assert len(trials) == 2 * 7 * 3 * 3
    assert len({tuple(sorted(t.items())) for t in trials}) == len(trials)
    scales = {launch(t).config.variant.alpha / (8**0.5 if launch(t).config.variant.rslora else 8)
              for t in trials if t["arg.rank"] == 8}
    assert max(scales) - min(scales) < 1e-6
    with pytest.raises(config.ConfigError, match="is not a study"):
        load_study("configs/lora.py")


FAIR = {"lora", "lora_plus", "lora_fa", "dora", "adalora", "dylora", "sora", "vera", "pissa", "olora", "milora", "loha",
        "full", "head"}  # fmt: skip


def test_the_fair_study_packs_the_rates_and_seeds_of_each_method() -> None:
    assert len(load_study("configs/studies/fair_glue.py")) == 15 * 8 * 5 * 5
    launches = [launch(t, workdir="runs", resume=True) for t in load_study("configs/studies/fair_glue.py:task=rte")]
    assert {one.name.partition(",")[0] for one in launches} == FAIR
    assert len({(*one.said.items(), one.name) for one in launches}) == 15 * 8
    highest = {name: max(one.config.lr for one in launches if one.name.partition(",")[0] == name) for name in FAIR}
    assert {name for name, lr in highest.items() if lr != 3.2e-2} == {"vera", "head"}  # best at the edge, measured
    assert highest["vera"] == highest["head"] == 3.2e-1
    found = plan(launches, 0)
    assert [len(group.launches) for group in found] == [40] * 15
    assert {group.differ for group in found} == {("lr", "seed")}
    # What is no part of a method is the same for all; the rate is the method's, not the head's.
    shared = ("steps", "batch", "max_length", "shapes", "dropout", "head_dropout", "weight_decay", "warmup",
              "schedule", "eval_every", "accumulate", "label_smoothing", "neftune", "pooling")  # fmt: skip
    for key in shared:
        assert len({getattr(one.config, key) for one in launches}) == 1, key
    assert {one.config.head_lr for one in launches if one.name[:4] != "head"} == {1e-3}
    assert {one.config.head_lr for one in launches if one.name[:4] == "head"} == {0.0}
    assert {one.config.variant.get("dropout", 0.0) for one in launches} == {0.0}
    assert {build.total_steps(one.config, per_epoch) for one in launches for per_epoch in (78, 4210)} == {600}


def test_the_fair_study_trains_one_head_everywhere(tmp_path: Path) -> None:
    """Its matrix and its bias alike: LoRA+'s released groups would give the bias 16 times the rate."""
    model, data = model_folder(tmp_path / "model"), glue_folder(tmp_path / "data")
    trials = [t for t in load_study(f"configs/studies/fair_glue.py:task=sst2,model={model}") if t["seed"] == 0]
    moved = {}
    for trial in (t for t in trials if t["lr"] == 1e-3):
        c = launch(trial | {"data": str(data), "max_length": 8, "examples": 16}).config
        begun = members.prepared(c)
        parts = members.maker(c, begun, c.steps)({})
        trainable, _ = jax.eval_shape(parts.adapt.init, jax.random.key(0), begun.model.variables)
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), trainable)
        with jax.numpy_dtype_promotion("standard"):
            tx = optax.with_extra_args_support(parts.tx)
            _, state = tx.update(ones, tx.init(ones), ones)  # warm-up begins with 0
            updates, _ = tx.update(ones, state, ones)
        heads = jax.tree.leaves({path: updates[path] for path in begun.model.fresh})
        moved[launch(trial).name] = [float(x) for head in heads for x in np.ravel(head)]
    assert len(moved) == 15
    want = next(iter(moved.values()))
    assert np.ptp(want) == 0
    assert want[0] < 0
    assert all(np.allclose(one, want, rtol=1e-5, atol=0) for one in moved.values()), moved


@pytest.mark.parametrize(("study", "runs", "programs"), [
    ("rank_sweep", 126, 2), ("dylora_ranks", 10 * 15, 4), ("adalora_budget", 2 * 3 * 15, 4),
    ("adalora_budget.py:watch", 3, 3), ("targets", 5 * 20, 3)])  # fmt: skip
def test_studies_of_findings(study: str, runs: int, programs: int) -> None:
    spec = f"configs/studies/{study}" if ".py" in study else f"configs/studies/{study}.py"
    launches = [launch(trial, workdir="runs", resume=True) for trial in load_study(spec)]
    assert len(launches) == runs
    assert len(plan(launches, 0)) == programs
    smoke = load_study(spec + (",smoke" if ":" in spec else ":smoke"))
    assert 0 < len(smoke) <= 8
    assert all(launch(trial).config.steps <= 8 for trial in smoke)


def test_why_a_run_is_alone() -> None:
    alone = {"eva": "it reads data before it starts", "relora": "it restarts", "lora": "", "pissa": "", "full": ""}
    for name, reason in alone.items():
        assert by_itself(launch({"config": name}).config) == reason
    assert by_itself(launch({"config": "pissa", "variant.fold": True}).config) == "it rewrites the base"
    assert by_itself(launch({"config": "o_lora", "earlier.folders": "x"}).config) == "it adds to earlier adapters"
