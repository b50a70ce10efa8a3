"""A study end to end on a tiny model: packed runs leave what the same runs leave alone, and resume exactly."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import glue_folder, model_folder

from experiments import glue, packed, programs, sweep
from lorajax import config
from lorajax.sweep import launch, load_study
from lorajax.train.run import EXIT_INTERRUPTED

STUDY = '''
from ml_collections import ConfigDict
from lorajax.sweep import each, fixed, product, zipit, chain

def get_config(arg=None):
    where = fixed(**{{"arg.task": "sst2", "arg.model": "{model}", "data": "{data}", "max_length": 16, "batch": 8,
                     "eval_batch": 16, "log_every": 1, "shapes": 2, "dropout": 0.1, "probe": False}})
    lora = product(each("config", ["lora"]), each("arg.rank", [2, 3]),
                   zipit(each("lr", [1e-2, 3e-2]), each("seed", [0, 1]), each("variant.dropout", [0.1, 0.0]),
                         each("epochs", [2.0, 1.5]), each("warmup", [0.06, 0.2]),
                         each("schedule", ["linear", "cosine"])))
    bad = fixed(**{{"config": "lora", "arg.rank": 2, "lr": 1e30, "seed": 2, "epochs": 2.0}})
    trials = product(where, chain(lora, bad, {more}))
    return ConfigDict({{"trials": trials}})
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> Any:
    root = tmp_path_factory.mktemp("study")
    model, data = model_folder(root / "model"), glue_folder(root / "data")
    more = 'fixed(**{"config": "full", "epochs": 2.0})'
    (root / "study.py").write_text(STUDY.format(model=model, data=data, more=more))
    return root


@pytest.fixture(scope="module")
def runs(files: Any) -> Path:
    sweep.main([f"--config={files / 'study.py'}", f"--workdir={files / 'packed'}"])
    return files / "packed"


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_packed_run_leaves_what_the_run_alone_leaves(files: Any, runs: Path) -> None:
    summaries = sorted(runs.rglob("summary.json"))
    assert len(summaries) == 5
    packed = [s for s in summaries if "packed_with" in s.read_text()]
    assert len(packed) == 4
    assert {json.loads(s.read_text())["steps"] for s in packed} == {12, 16}  # each as long as it asks for
    for folder in (summary.parent for summary in packed):  # its own dropout, which the program has as a number
        files_ = folder / "config.json", folder / "adapter" / "adapter_config.json"
        asked, left = (json.loads(file.read_text()) for file in files_)
        assert left["lora_dropout"] == asked["config"]["variant"]["dropout"]
    for summary in (packed[0], packed[-1]):
        folder = summary.parent
        c = json.loads((folder / "config.json").read_text())["config"]
        words = [f"--config=configs/lora.py:task=sst2,model={files / 'model'},rank={c['variant']['rank']}",
                 f"--config.variant.dropout={c['variant']['dropout']}",
                 *[f"--config.{k}={c[k]}" for k in ("data", "max_length", "batch", "eval_batch", "epochs", "log_every",
                                                     "shapes", "dropout", "probe", "lr", "seed", "warmup",
                                                     "schedule")]]  # fmt: skip
        glue.main([*words, f"--workdir={files / 'alone'}"])
        alone = files / "alone" / folder.relative_to(runs)
        assert {p.name for p in folder.iterdir()} - {".lock"} >= {"config.json", "metrics.jsonl", "adapter"}
        got, want = rows(folder), rows(alone)
        assert len(got) > 12
        assert [row.keys() for row in got] == [row.keys() for row in want]
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4, atol=1e-6)
        ours, theirs = json.loads(summary.read_text()), json.loads((alone / "summary.json").read_text())
        assert ours["scores"] == theirs["scores"]
        assert 0.5 < ours["memory"] / theirs["memory"] < 2  # what the run would need alone
        for key in ("best_step", "trainable_parameters", "name", "seed", "steps"):
            assert ours[key] == theirs[key]


def test_a_diverged_run_is_recorded_and_the_others_finish(runs: Path) -> None:
    (failed,) = runs.rglob("failed.json")
    assert "not finite" in failed.read_text()
    assert failed.parent.name == "seed=2"


def test_what_is_finished_is_skipped(files: Any, runs: Path, capsys: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("summary.json")}
    sweep.main([f"--config={files / 'study.py'}", f"--workdir={runs}"])
    out = capsys.readouterr().out
    assert "6 runs, 6 of them finished; 0 to train in 0 programs" in out
    assert before == {p: p.stat().st_mtime_ns for p in runs.rglob("summary.json")}


def test_an_interrupted_pack_goes_on_as_if_it_had_not_been(files: Any, runs: Path, monkeypatch: Any) -> None:
    cut = files / "cut"
    study = files / "short.py"
    study.write_text((files / "study.py").read_text().replace(', fixed(**{"config": "full", "epochs": 2.0})', ""))
    counted = []
    real = packed.score

    def stopping(*args: Any) -> Any:
        counted.append(1)
        if len(counted) == 1:
            import os
            import signal
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(packed, "score", stopping)
    with pytest.raises(SystemExit) as left:
        sweep.main([f"--config={study}", f"--workdir={cut}"])
    assert left.value.code == EXIT_INTERRUPTED
    assert not list(cut.rglob("summary.json"))
    sweep.main([f"--config={study}", f"--workdir={cut}"])
    for summary in cut.rglob("summary.json"):
        folder = summary.parent
        whole = runs / folder.relative_to(cut)
        assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        assert json.loads(summary.read_text())["scores"] == json.loads((whole / "summary.json").read_text())["scores"]
    shutil.rmtree(cut)


def test_the_plan_comes_first_and_mistakes_are_named(files: Any, capsys: Any) -> None:
    sweep.main([f"--config={files / 'study.py'}", f"--workdir={files / 'none'}", "--dry-run", "--slice=0/2"])
    out = capsys.readouterr().out
    assert "3 runs, 0 of them finished; 3 to train in" in out
    assert not list((files / "none").rglob("*"))
    with pytest.raises(config.ConfigError, match=r"unknown flag --pak: did you mean '--pack'"):
        sweep.main(["--pak=3"])
    with pytest.raises(config.ConfigError, match="no study given"):
        sweep.main([])


@pytest.fixture(scope="module")
def sora(files: Any) -> Path:
    """Two runs of a rate next to nothing, so that the first evaluation stays the best, while gates go in every step."""
    trial = {"config": "sora", "arg.task": "sst2", "arg.model": str(files / "model"), "arg.targets": "qv",
             "data": str(files / "data"), "max_length": 16, "batch": 8, "eval_batch": 16, "epochs": 1.0, "shapes": 1,
             "dropout": 0.0, "eval_every": 2, "lr": 1e-9, "controller.times_lr": False, "controller.threshold": 0.1}
    study = files / "sora.py"
    study.write_text("from ml_collections import ConfigDict\nfrom lorajax.sweep import each, fixed, product\n"
                     "def get_config(arg=None):\n"
                     f"    return ConfigDict({{'trials': product(fixed(**{trial!r}), each('seed', [0, 1]))}})\n")
    sweep.main([f"--config={study}", f"--workdir={files / 'sora'}"])
    return files / "sora"


def test_what_a_packed_run_reports_is_of_its_best_step(sora: Path) -> None:
    summaries = list(sora.rglob("summary.json"))
    assert len(summaries) == 2
    for file in summaries:
        summary = json.loads(file.read_text())
        kept = {row["step"]: row["eval/ranks_kept"] for row in rows(file.parent) if "eval/ranks_kept" in row}
        assert summary["packed_with"] == 1
        assert summary["best_step"] == 2
        assert summary["ranks_kept"] == kept[2] > kept[8]


def test_a_pack_that_fails_is_tried_run_by_run(files: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    tried = []

    def train(group: Any, stop: Any, *_: Any) -> None:
        tried.append(len(group.launches))
        if len(group.launches) > 2 and not tried[:-1]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        if len(group.launches) > 1 or group.launches[0].config.seed == 2:
            raise ZeroDivisionError("by that run")

    monkeypatch.setattr(sweep, "train", train)
    sweep.main([f"--config={files / 'study.py'}", f"--workdir={tmp_path}"])
    assert tried[:3] == [5, 2, 1]
    assert tried.count(1) == 6
    (failed,) = tmp_path.rglob("failed.json")
    assert failed.parent.name == "seed=2"
    assert "by that run" in failed.read_text()
    sweep.main([f"--config={files / 'study.py'}", f"--workdir={tmp_path}", "--dry-run"])
    assert "1 of the finished ones failed; a run whose failed.json is deleted" in capsys.readouterr().out


def test_compiling_ahead_changes_no_number(files: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Programs made in threads, one for two packs of the same shapes, and results written while the next pack trains:
    the same bytes as one after the other."""
    study, data = files / "ahead.py", files / "data"
    text = STUDY.format(model=files / "model", data=data, more="").replace(f'"data": "{data}", ', "")
    study.write_text(text.replace("chain(lora, bad, )", f'each("data", ["{data}", "{data}/"]), lora'))
    made: list[int] = []
    real = programs.make_program

    def counted(*args: Any) -> Any:
        made.append(len(args[1]))
        return real(*args)

    monkeypatch.setattr(programs, "make_program", counted)
    for ahead in (2, 0):
        sweep.main([f"--config={study}", f"--workdir={tmp_path / str(ahead)}", f"--ahead={ahead}"])
    assert made == [4, 4]  # once for both packs
    found = sorted((tmp_path / "2").rglob("metrics.jsonl"))
    assert len(found) == 8
    for file in found:
        folder, other = file.parent, tmp_path / "0" / file.parent.relative_to(tmp_path / "2")
        for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
            assert (folder / name).read_bytes() == (other / name).read_bytes()
        assert (folder / "summary.json").exists()
    lines = sorted(file.read_text() for file in found)
    assert lines[::2] == lines[1::2]


def test_what_goes_wrong_ahead_or_behind_takes_nothing_down(files: Any, tmp_path: Path, monkeypatch: Any,
                                                            capsys: Any) -> None:
    words = [f"--config={files / 'study.py'}", f"--workdir={tmp_path}"]
    with pytest.raises(SystemExit) as left:
        sweep.main([*words, "--minutes=1e-9"])
    assert left.value.code == EXIT_INTERRUPTED
    assert not list(tmp_path.rglob("seed=*"))

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("in a thread")

    alone = []
    monkeypatch.setattr(programs, "make_program", broken)
    monkeypatch.setattr(glue, "main", alone.append)
    sweep.main([*words, "--ahead=1"])
    assert "5 runs together: ZeroDivisionError: in a thread; now 1 at a time" in capsys.readouterr().out
    assert len(alone) == 6

    trials = load_study(str(files / "study.py"))
    launches = [launch(trial, workdir=str(tmp_path), resume=True) for trial in trials]
    written = sweep.Written()
    written.later(sweep.plan(launches, 5)[0], broken)
    written.all()
    assert len(list(tmp_path.rglob("failed.json"))) == 5


def test_numbers_alone(sora: Path, tmp_path: Path) -> None:
    study = sora.parent / "two.py"
    study.write_text((sora.parent / "sora.py").read_text())
    sweep.main([f"--config={study}", f"--workdir={tmp_path}", "--adapters=false"])
    for file in tmp_path.rglob("summary.json"):
        want = sora / file.relative_to(tmp_path)
        mine, whole = (json.loads(f.read_text()) for f in (file, want))
        assert {k: mine[k] for k in mine if k != "seconds"} == {k: whole[k] for k in whole if k != "seconds"}
        assert not (file.parent / "adapter").exists()
        assert (want.parent / "adapter").exists()


def test_packs_are_as_large_as_the_memory_allows(files: Any, capsys: Any) -> None:
    trials = load_study(str(files / "study.py"))
    launches = [launch(trial, workdir=str(files / "none"), resume=True) for trial in trials]
    known: dict[str, Any] = {}
    whole = sweep.plan(launches, 0, 1e12, known)
    assert [len(group.launches) for group in whole] == [5, 1]
    size = known[next(iter(known))].footprint
    for fits in (1, 2, 3, 5):
        limit = size.of(fits) + 0.5 * size.own
        *ranked, full = [len(group.launches) for group in sweep.plan(launches, 0, limit, known)]
        assert (max(ranked), sum(ranked), full) == (fits, 5, 1)
    assert [len(g.launches) for g in sweep.plan(launches, 4, size.of(1))] == [4, 1, 1]  # what was asked for goes first
    memory = f"--memory={size.of(2) / 2**30 * 1.01}"
    sweep.main([f"--config={files / 'study.py'}", f"--workdir={files / 'none'}", "--dry-run", memory])
    out = capsys.readouterr().out
    assert "6 to train in 4 programs" in out
    # Two of rank 2, two of rank 3, the one that diverges, full fine-tuning; in 2 lengths, for training and evaluation.
    assert "without compiling 16 programs at most" in out
    assert f"{size.of(2) / 2**30:.2f} GiB" in out


def test_a_study_ends_with_a_table_and_plots(files: Any, runs: Path) -> None:
    pytest.importorskip("matplotlib")
    there = runs / "reports" / "study"
    assert {path.name for path in there.iterdir()} >= {"table.md", "runs.csv", "comparison.png", "rates.png"}
    assert "| full,epochs=2.0 |" in (there / "table.md").read_text()
    with (there / "runs.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 5
    short, whole = "epochs=1.5,schedule=cosine,warmup=0.2", "epochs=2.0,variant.dropout=0.1"
    assert {row["method"] for row in found} == {"full,epochs=2.0", *[f"lora,rank={r},{rest}" for r in (2, 3)
                                                                     for rest in (short, whole)]}  # fmt: skip
