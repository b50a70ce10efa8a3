"""The experiment end to end on a tiny model: results, files, errors, and runs that are killed and go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file
from tiny import glue_folder, model_folder

import lorajax as lj
from experiments import glue
from lorajax import build, config
from lorajax import start as start_module
from lorajax.data.feed import ahead
from lorajax.io import adapter
from lorajax.models import adapter_names
from lorajax.optim import offload
from lorajax.shard import hosts
from lorajax.train.run import Run, RunError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return model_folder(root / "model"), glue_folder(root / "data")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Programs are compiled once for all tests here, and nothing is left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        before = jax.config.jax_compilation_cache_dir
        yield
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def words(files, workdir, name="adalora", arg="", *more, task="sst2"):
    model, data = files
    return [
        f"--config=configs/{name}.py:task={task},model={model}{arg}", f"--config.data={data}", f"--workdir={workdir}",
        "--config.max_length=16", "--config.batch=8", "--config.shapes=1", "--config.epochs=2", "--config.log_every=1",
        "--config.dropout=0", "--config.lr=1e-2", "--config.head_lr=1e-2", "--config.study=tiny", *more,
    ]  # fmt: skip


def folder(workdir):
    (found,) = Path(workdir).glob("tiny/*/seed=*")
    return found


def rows(workdir):
    return [json.loads(line) for line in (folder(workdir) / "metrics.jsonl").read_text().splitlines()]


def test_batches_made_ahead_are_all_there_and_in_order():
    assert list(ahead(lambda step: step * step, range(0, 10, 2))) == [(0, 0), (2, 4), (4, 16), (6, 36), (8, 64)]
    assert list(ahead(str, range(1))) == [(0, "0")]
    assert list(ahead(str, range(0))) == []


def test_a_run_leaves_results_and_an_adapter(files, tmp_path, capsys):
    args = ("adalora", ",rank=2,targets=qv", "--config.shapes=2")
    glue.main(words(files, tmp_path, *args))
    out = capsys.readouterr().out
    run = folder(tmp_path)
    assert run.parent.name.startswith("adalora,model=")
    assert all(word in out for word in ("params/layer_0/attention/query/kernel", "AdaLoRA", "16 in all"))
    for name in ("majority class", "head on the frozen encoder", "this run (best, step "):
        assert out.count(name) == 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 16
    assert summary["ranks_kept"] <= 2 * 4
    assert {"validation", "train"} == set(rows_of_labels(files))
    labels = rows_of_labels(files)
    most = int(labels["train"].mean() > 0.5)
    assert summary["baselines"]["majority class"]["accuracy"] == pytest.approx(np.mean(labels["validation"] == most))
    evaluations = [row for row in rows(tmp_path) if "eval/accuracy" in row]
    assert [row["step"] for row in evaluations] == [8, 16]
    assert summary["scores"]["accuracy"] == {r["step"]: r["eval/accuracy"] for r in evaluations}[summary["best_step"]]
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 17))
    assert json.loads((run / "config.json").read_text())["config"]["args"]["rank"] == 2
    assert list(run.glob("events.*"))

    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A"].shape == (3, 16)
    record = json.loads((run / "adapter" / "lorajax_adapter.json").read_text())
    site = record["sites"]["params/layer_0/attention/query/kernel"]
    assert (site["variant"], site["rank"], site["alpha"]) == ("adalora", 3, 16.0)
    assert record["sites"]["params/classifier/kernel"] == {"variant": "full"} and record["peft"] is True
    assert record["base"] == json.loads((run / "config.json").read_text())["fingerprints"]["base"]

    glue.main(words(files, tmp_path, *args))
    assert "finished already" in capsys.readouterr().out


def rows_of_labels(files):
    read = {split: pq.read_table(files[1] / "sst2" / f"{split}.parquet") for split in ("train", "validation")}
    return {split: np.asarray(table["label"]) for split, table in read.items()}


def test_it_learns(files, tmp_path):
    """The label is the mood of two words of a sentence: far above the majority after a few epochs."""
    data = glue_folder(tmp_path / "data", train=400, validation=100)
    glue.main(words((files[0], data), tmp_path / "runs", "full", "", "--config.epochs=6"))
    summary = json.loads((folder(tmp_path / "runs") / "summary.json").read_text())
    assert summary["baselines"]["majority class"]["accuracy"] < 0.65
    assert summary["scores"]["accuracy"] > 0.9


def test_regression(files, tmp_path):
    glue.main(words(files, tmp_path, "lora", ",rank=2,targets=qv", "--config.accumulate=2", task="stsb"))
    summary = json.loads((folder(tmp_path) / "summary.json").read_text())
    assert set(summary["scores"]) == set(summary["baselines"]["majority class"]) == {"pearson", "spearman"}
    assert summary["baselines"]["majority class"]["pearson"] == 0.0


def test_several_steps_in_a_call_take_the_same_steps(files, tmp_path):
    """One padded length, so that both see the same arrays; only the order of some sums may differ."""
    args = ("adalora", ",rank=2,targets=qv", "--config.probe=false")
    glue.main(words(files, tmp_path / "one", *args))
    glue.main(words(files, tmp_path / "four", *args, "--config.steps_per_call=4"))
    one = {row["step"]: row["loss"] for row in rows(tmp_path / "one") if "loss" in row}
    four = {row["step"]: row["loss"] for row in rows(tmp_path / "four") if "loss" in row}
    assert sorted(four) == [4, 8, 12, 16]
    np.testing.assert_allclose([four[s] for s in four], [one[s] for s in four], rtol=1e-5)


def test_states_in_the_hosts_memory_take_the_same_steps(files, tmp_path):
    """Where the optimizer's state lies is no part of a shape: its programs are compiled for the arrays themselves."""
    try:
        offload.require()
    except ValueError as error:
        pytest.skip(str(error))
    for name in ("adamw", "adamw_paged"):
        glue.main(words(files, tmp_path / name, "lora", ",rank=2,targets=qv", "--config.probe=false",
                        f"--config.optimizer.name={name}"))  # fmt: skip
    one, other = (rows(tmp_path / name) for name in ("adamw", "adamw_paged"))
    assert [row["step"] for row in one] == [row["step"] for row in other]
    losses = [[row["loss"] for row in found if "loss" in row] for found in (one, other)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_signal_saves_and_the_same_command_goes_on(files, tmp_path, monkeypatch, capsys):
    args = ("adalora", ",rank=2,targets=qv", "--config.probe=false")
    glue.main(words(files, tmp_path / "whole", *args))
    log = Run.log

    def terminated(self, step, values, *, prefix=""):
        log(self, step, values, prefix=prefix)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", terminated)
    with pytest.raises(SystemExit) as left:
        glue.main(words(files, tmp_path / "cut", *args))
    assert left.value.code == 75
    assert "SIGTERM: saved at step 6 of 16" in capsys.readouterr().out  # a step is logged while the next one runs
    assert not (folder(tmp_path / "cut") / "summary.json").exists()
    monkeypatch.setattr(Run, "log", log)
    glue.main(words(files, tmp_path / "cut", *args))
    same(tmp_path / "whole", tmp_path / "cut")


def test_a_notice_is_asked_for_at_every_step(files, tmp_path, monkeypatch, capsys):
    """Also where every step is saved: SIGTERM reaches several processes no other way."""
    asked = []
    monkeypatch.setattr(hosts, "leaving", lambda: asked.append(0) or len(asked) == 3)
    with pytest.raises(SystemExit) as left:
        glue.main(words(files, tmp_path, "lora", ",rank=2,targets=qv", "--config.probe=false", "--config.save_every=1"))
    assert left.value.code == 75
    assert "a preemption notice: saved at step 3 of 16" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "targets"), [("eva", "all-linear"), ("pissa", "qv"), ("ranks", "qv")])
def test_a_resumed_run_takes_its_start_from_its_folder(files, tmp_path, monkeypatch, name, targets):
    """It reads no data again and decomposes nothing again; ranks that were redistributed are as they were."""
    args = (name, f",rank=2,targets={targets}", "--config.probe=false", "--config.calibrate.batches=2")
    glue.main(words(files, tmp_path / "whole", *args))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut = folder(tmp_path / "cut")
    (cut / "summary.json").unlink()
    for step in sorted(int(path.name) for path in (cut / "checkpoints").iterdir())[1:]:
        shutil.rmtree(cut / "checkpoints" / str(step))
    shutil.rmtree(cut / "adapter")

    def refuse(*_, **__):
        raise AssertionError("done again")

    monkeypatch.setattr(start_module, "calibrate", refuse)
    monkeypatch.setattr(start_module.control, "importance", refuse)
    monkeypatch.setattr(jax.numpy.linalg, "svd", refuse)
    glue.main(words(files, tmp_path / "cut", *args))
    same(tmp_path / "whole", tmp_path / "cut")
    record = json.loads((cut / "adapter" / "lorajax_adapter.json").read_text())["sites"]
    loras = {path: site for path, site in record.items() if site["variant"] == "lora"}
    ranks = {path: site["rank"] for path, site in loras.items()}
    if name == "eva":
        assert sum(ranks.values()) == 2 * 12
        assert len(set(ranks.values())) > 1
        assert {site["alpha"] / site["rank"] for site in loras.values()} == {8.0}
        assert set(adapter.plan(cut / "adapter")) == set(record)
    elif name == "ranks":
        assert sum(ranks.values()) == 2 * 4
        assert len(set(ranks.values())) > 1
    else:
        assert set(ranks.values()) == {2}
        saved, began = (load_file(cut / name / "lorajax_adapter.safetensors") for name in ("adapter", "start"))
        path = next(iter(ranks))
        np.testing.assert_array_equal(saved[f"{path}.A0"], began[f"{path}.A"])


def same(one, two):
    """The metrics file and the adapter of two runs, byte for byte."""
    names = ["metrics.jsonl", *[f"adapter/{file.name}" for file in sorted((folder(one) / "adapter").iterdir())]]
    assert "adapter/lorajax_adapter.json" in names
    for name in names:
        assert (folder(one) / name).read_bytes() == (folder(two) / name).read_bytes(), name


def test_another_config_in_the_same_folder_is_refused(files, tmp_path):
    args = ("lora", ",rank=2,targets=qv", "--config.probe=false")
    glue.main(words(files, tmp_path, *args))
    (folder(tmp_path) / "summary.json").unlink()
    record = json.loads((folder(tmp_path) / "config.json").read_text())
    record["config"]["lr"] = 0.5
    (folder(tmp_path) / "config.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"config\.lr: 0\.5 then, 0\.01 now"):
        glue.main(words(files, tmp_path, *args))
    glue.main(words(files, tmp_path, *args, "--no-resume"))
    assert json.loads((folder(tmp_path) / "config.json").read_text())["config"]["lr"] == 0.01


@pytest.mark.parametrize("calls", [1, 4])
def test_a_step_that_is_not_finite_names_step_and_site(files, tmp_path, calls):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_bytes((files[0] / name).read_bytes())
    tensors = load_file(files[0] / "model.safetensors")
    (name,) = (n for n in tensors if n.endswith("encoder.layer.1.intermediate.dense.weight"))
    tensors[name][3, 5] = np.nan
    save_file(tensors, model / "model.safetensors")
    args = ("lora", ",rank=2,targets=qv", "--config.probe=false", f"--config.steps_per_call={calls}")
    with pytest.raises(SystemExit) as left:
        glue.main(words((model, files[1]), tmp_path / "runs", *args))
    said = str(left.value)
    assert "step 1 is not finite" in said
    assert "params/layer_1/ffn/up/kernel" in said
    assert "--config.lr" in said
    assert [path.name for path in (folder(tmp_path / "runs") / "checkpoints").iterdir()] == ["0"]


def test_the_adapter_folder_round_trips(files, tmp_path):
    c = config.parse(words(files, tmp_path, "lora", ",rank=2,targets=qv"), workdir="").config
    found = build.load_data(c)
    model = build.load_model(c, found.task, jax.random.key(0))
    sites = lj.sites(model.net.apply, model.variables, np.zeros((2, 4), np.int32))
    adapt = lj.adapt(sites, build.rules(c, model))
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(1), model.variables)
    for _ in range(2):  # also over one that is there
        adapter.save(tmp_path / "a" / "adapter", adapt, trainable, frozen, base=model.fingerprint,
                     names=adapter_names(model.net.config))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["adapter"]
    assert {path.name for path in (tmp_path / "a" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lorajax_adapter.json"}
    read, _ = adapter.load(tmp_path / "a" / "adapter", adapt, model.variables, base=model.fingerprint)
    jax.tree.map(np.testing.assert_array_equal, read, trainable)


def test_a_typo_is_one_line_and_a_failure():
    command = [sys.executable, "-m", "experiments.glue", "--config", "configs/adalora.py:rnak=8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: unknown config argument 'rnak': did you mean 'rank'? "
        "There are: task, model, rank, targets, recipe, smoke"
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config=configs/lora.py:task=sst2", "--config.data=nowhere"], "nowhere is neither a folder nor a hub id"),
        (["--config=configs/lora.py:task=sst2,model=./nowhere", "--config.data={data}"], "folder './nowhere'"),
    ],
)
def test_a_missing_asset_is_an_error_that_helps(files, tmp_path, flags, said):
    done = start([flag.format(data=files[1]) for flag in flags] + [f"--workdir={tmp_path}"])
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert said in done.stderr


def environment():
    # One CPU device, as a user has it; the tests' own eight are a detail of theirs.
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


DIES = """
# Runs experiments.glue and dies by SIGKILL at the n-th call of a function: before it, after it, or inside it.
import os, signal, sys
place, count = sys.argv[1], int(sys.argv[2])
seen = [0]

def dies(owner, name, when, counts=lambda *args: True):
    inner = getattr(owner, name)
    def outer(*args, **kwargs):
        seen[0] += bool(counts(*args))
        if when == "before" and seen[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if when == "after" and seen[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, outer)

from experiments import glue
from lorajax.train.checkpoint import Checkpoints
from lorajax.train.run import Run
if place == "step":
    dies(glue.Watch, "add", "before")
elif place == "saving":        # right behind the start of a save in the background
    dies(Checkpoints, "save", "after")
elif place == "half-saved":    # arrays are written, the folder has not got its name yet
    for name in ("rename", "replace"):
        dies(os, name, "before", lambda source, *_: "/checkpoints/" in str(source))
elif place == "evaluated":     # metrics are written, the checkpoint is not
    dies(Checkpoints, "save", "before")
elif place == "adapter":
    dies(glue.adapter, "write_content", "after")
elif place == "end":
    dies(Run, "finish", "before")
glue.main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        [("step", 1)],
        [("step", 5), ("step", 6)],
        [("saving", 1), ("step", 3), ("saving", 2)],
        [("half-saved", 1), ("half-saved", 2)],
        [("evaluated", 2), ("end", 1)],
        [("adapter", 1)],
    ],
    ids=lambda kills: "+".join(f"{place}{count}" for place, count in kills),
)
def test_a_killed_run_goes_on_bit_for_bit(files, tmp_path, whole, kills):
    for place, count in kills:
        killed = start(words(files, tmp_path / "cut", *ARGS), DIES, place, str(count))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if place == "half-saved":
            assert list((folder(tmp_path / "cut") / "checkpoints").glob("*tmp*"))
        assert not (folder(tmp_path / "cut") / "summary.json").exists()
    done = start(words(files, tmp_path / "cut", *ARGS))
    assert done.returncode == 0, done.stderr
    same(whole, tmp_path / "cut")


ARGS = ("adalora", ",rank=2,targets=qv", "--config.save_every=3", "--config.eval_every=5",
        "--config.variant.dropout=0.1", "--config.dropout=0.1", "--config.epochs=3", "--config.shapes=2")  # fmt: skip


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The run that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    done = start(words(files, root, *ARGS))
    assert done.returncode == 0, done.stderr
    return root


def start(argv, *wrapper):
    command = [sys.executable, *(["-c", *wrapper] if wrapper else ["-m", "experiments.glue"]), *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment())
