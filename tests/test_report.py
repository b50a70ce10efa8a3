"""Tables of runs: numbers against NumPy and SciPy by hand; no rate is chosen on a seed that it is scored on."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lorajax.report import Result, cells, main, markdown, method, read, standings


def run(task: str, name: str, lr: float, seed: int, score: float) -> Result:
    return Result(task, name, lr, seed, score, 10, 2.0)


def folder(root: Path, name: str, lr: float, seed: int, score: float, task: str = "rte") -> None:
    there = root / name / f"seed={seed}"
    there.mkdir(parents=True)
    (there / "config.json").write_text(json.dumps({"config": {"lr": lr, "seed": seed}}))
    summary = {"task": task, "headline": "accuracy", "scores": {"accuracy": score, "f1": 0.5}, "name": name,
               "trainable_parameters": 12, "seconds": 3.0}  # fmt: skip
    (there / "summary.json").write_text(json.dumps(summary))


def test_the_rate_is_chosen_on_the_other_half_of_the_seeds() -> None:
    # Seeds 0, 2 like rate 1; seeds 1, 3 like rate 2. Each half is scored at what the other half chose.
    runs = [run("rte", "lora", lr, seed, 0.9 if (lr == 1) == (seed % 2 == 0) else 0.5 + 0.01 * seed)
            for lr in (1.0, 2.0) for seed in range(4)]
    (cell,) = cells(runs)
    assert cell.scores == {0: 0.5, 2: 0.52, 1: 0.51, 3: 0.53}
    assert cell.rates == {2.0: 2, 1.0: 2}
    values = np.array(list(cell.scores.values()))
    assert cell.mean == pytest.approx(values.mean())
    assert cell.deviation == pytest.approx(np.sqrt(((values - values.mean()) ** 2).sum() / 3))
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert (cell.low, cell.high) == pytest.approx((low, high))


def test_one_seed_has_no_spread() -> None:
    (cell,) = cells([run("rte", "lora", 1.0, 0, 0.5), run("rte", "lora", 2.0, 0, 0.7)])
    assert cell.mean == 0.7
    assert math.isnan(cell.deviation)
    assert math.isnan(cell.low)


def test_standings_pair_tasks_and_seeds() -> None:
    scores = {("rte", "lora"): [0.6, 0.62, 0.64], ("rte", "dora"): [0.61, 0.65, 0.64],
              ("cola", "lora"): [0.3, 0.31, 0.29], ("cola", "dora"): [0.29, 0.33, 0.30]}  # fmt: skip
    table = cells([run(t, m, 1.0, s, x) for (t, m), row in scores.items() for s, x in enumerate(row)])
    first, second = standings(table, "lora")
    assert (first.method, first.rank, second.rank) == ("dora", 1.0, 2.0)
    ours = [*scores["rte", "dora"], *scores["cola", "dora"]]
    theirs = [*scores["rte", "lora"], *scores["cola", "lora"]]
    difference = np.array(ours) - np.array(theirs)
    t = difference.mean() / (difference.std(ddof=1) / math.sqrt(6))
    assert first.p == pytest.approx(2 * stats.t.sf(abs(t), 5))
    assert first.difference == pytest.approx(difference.mean())
    assert math.isnan(second.p)
    with pytest.raises(ValueError, match="reference='pissa' has no run; there are lora, dora"):
        standings(table, "pissa")


def test_runs_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, score in (("lora", 0.6), ("dora", 0.7)):
        for seed in range(2):
            folder(tmp_path, f"{name},task=rte,lr=0.001", 1e-3, seed, score + 0.02 * seed)
    main([str(tmp_path), f"--csv={tmp_path / 'all.csv'}", "--reference=lora"])
    out = capsys.readouterr().out
    assert "| lora | 61.0 ± 1.4 (0.001, n=2) | 12 | 3 |" in out
    assert "| dora | 1.00 | +10.00 | nan | 2 |" in out  # the two differences are equal: no test
    assert (tmp_path / "all.csv").read_text().splitlines()[0] == "task,method,lr,seed,score,parameters,seconds"
    assert read(tmp_path, "f1")[0].score == 0.5
    with pytest.raises(ValueError, match="no metric 'f2'; it has accuracy, f1"):
        read(tmp_path, "f2")
    with pytest.raises(ValueError, match="no finished run"):
        read(tmp_path / "nothing")
    with pytest.raises(SystemExit, match="unexpected '--cvs'"):
        main([str(tmp_path), "--cvs=x"])


def test_models_are_not_mixed() -> None:
    runs = [run("rte", name, 1.0, 0, score) for name, score in (("lora", 0.5), ("lora,model=base", 0.9))]
    assert [(c.method, c.mean) for c in cells(runs)] == [("lora", 0.5), ("lora,model=base", 0.9)]
    assert [c.method for c in cells(runs[1:])] == ["lora"]


def test_a_method_is_its_structure() -> None:
    assert method("lora,rank=4,task=rte,lr=0.002,variant.rslora=True") == "lora,rank=4,variant.rslora=True"
    assert markdown(cells([run("rte", "lora", 1.0, 0, 0.5)])).startswith("| method | rte | parameters | seconds |")
