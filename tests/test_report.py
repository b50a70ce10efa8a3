"""Tables of runs: numbers against NumPy and SciPy by hand; no rate is chosen on a seed that it is scored on."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lorajax.report import Result, cells, figures, into, markdown, method, read, setting, standings
from lorajax.report.__main__ import main


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
    text = markdown([cell])
    assert "| 70.0 (2, n=1) |" in text
    assert "| lora | 1.00 | +0.00 | - | - | 1 |" in text
    assert "nan" not in text


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
    assert "| dora | 1.00 | +10.00 | - | - | 2 |" in out  # the two differences are equal: no test
    columns = (tmp_path / "all.csv").read_text().splitlines()[0]
    assert columns == "task,method,lr,seed,score,parameters,seconds,memory,device,date,folder"
    assert read(tmp_path, "f1")[0].score == 0.5
    with pytest.raises(ValueError, match="no metric 'f2'; it has accuracy, f1"):
        read(tmp_path, "f2")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/summary.json").write_text('{"task": ')
    with pytest.raises(ValueError, match="half: summary.json or config.json is no whole JSON"):
        read(tmp_path)
    (tmp_path / "half/summary.json").unlink()
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


def test_a_rate_at_which_runs_diverge_is_not_chosen_for_the_seeds_that_came_through() -> None:
    # At rate 2 seed 1 diverged, so that its half has one score, a high one; rate 1 has both.
    runs = [run("rte", "lora", 1.0, s, 0.6) for s in range(4)]
    runs += [run("rte", "lora", 2.0, s, 0.9) for s in (0, 2, 3)]
    (cell,) = cells(runs)
    assert cell.scores == {0: 0.6, 2: 0.6, 3: 0.9}  # seeds 0, 2 at the choice of 1, 3; these at that of 0, 2: rate 2
    assert cell.rates == {1.0: 2, 2.0: 2}
    assert cell.missing == 1
    assert "90.0" not in markdown([cell])
    assert "n=3, 1 missing" in markdown([cell])


def test_false_discoveries_are_counted_over_all_methods() -> None:
    base = np.array([0.6, 0.62, 0.64, 0.61])
    gains = {"one": [0.01, 0.012, 0.008, 0.011], "two": [0.02, -0.01, 0.015, 0.0], "three": [0.0, 0.01, -0.01, 0.004]}
    rows = {"lora": base} | {name: base + gain for name, gain in gains.items()}
    table = cells([run("rte", name, 1.0, s, x) for name, row in rows.items() for s, x in enumerate(row)])
    found = {s.method: s for s in standings(table, "lora")}
    p = np.array([found[name].p for name in gains])
    order = np.argsort(p)
    adjusted = np.empty(3)
    adjusted[order] = np.minimum.accumulate((p[order] * 3 / np.arange(1, 4))[::-1])[::-1]  # Benjamini and Hochberg
    np.testing.assert_allclose([found[name].adjusted for name in gains], np.minimum(adjusted, 1))
    assert math.isnan(found["lora"].adjusted)


def test_methods_are_told_apart_by_what_was_said(tmp_path: Path) -> None:
    said = [{"task": "rte", "recipe": "fair", "lr": 0.1}, {"recipe": "fair", "variant.rslora": True, "lr": 0.1}]
    for i, settings in enumerate(said):
        folder(tmp_path, f"lora,cut-{i}", 0.1, 0, 0.5)  # a long name is cut and ends in a hash
        file = tmp_path / f"lora,cut-{i}" / "seed=0" / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"said": settings, "memory": 2**21,
                                                                   "device": "GPU", "date": "2026-01-02"}))
    results = read([tmp_path / "lora,cut-0", tmp_path / "lora,cut-1"])
    assert [r.method for r in results] == ["lora", "lora,variant.rslora=True"]
    assert setting(results) == "GPU; 2026-01-02; 2 runs"
    assert "| lora | 50.0 (0.1, n=1) | 12 | 3 | 2 |" in markdown(cells(results))


def test_a_section_of_a_document_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- results:fair -->\nold\n<!-- /results:fair -->\nafter\n<!-- results:x -->\n")
    into(page, "fair", "new\n\n")
    assert page.read_text() == ("before\n<!-- results:fair -->\nnew\n<!-- /results:fair -->\nafter\n"
                                "<!-- results:x -->\n")  # fmt: skip
    for missing in ("none", "x"):  # no markers; no end
        with pytest.raises(ValueError, match=rf"no section '{missing}' .*its sections: fair, x"):
            into(page, missing, "new")
    page.write_text(page.read_text() * 2)
    with pytest.raises(ValueError, match="between one <!-- results:fair -->"):
        into(page, "fair", "new")


def test_the_command_writes_into_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        folder(tmp_path / "runs", "lora,lr=0.001", 1e-3, seed, 0.6)
    page = tmp_path / "README.md"
    page.write_text("<!-- results:fair -->\n<!-- /results:fair -->\n")
    main([str(tmp_path / "runs"), f"--into={page}", "--section=fair"])
    assert "| lora | 60.0 ± 0.0 (0.001, n=2) | 12 | 3 |" in page.read_text()
    assert "Measured on: device not known; no date; 2 runs." in page.read_text()
    assert capsys.readouterr().out.startswith("| method |")
    with pytest.raises(SystemExit, match="--section=NAME go together"):
        main([str(tmp_path / "runs"), f"--into={page}"])
    with pytest.raises(SystemExit, match="--csv has no value"):
        main([str(tmp_path / "runs"), "--csv"])


def study() -> list[Result]:
    """Two methods, two tasks, ranks 1 to 4, three rates and three seeds, and a DyLoRA; scores by a formula."""
    rows = []
    for task in ("rte", "cola"):
        for name, shift in (("lora", 0), ("lora,variant.rslora=True,variant.alpha=5.6", 1)):
            for rank in (1, 2, 4):
                for k, lr in enumerate((1e-4, 1e-3, 1e-2)):
                    for seed in range(3):
                        score = 0.5 + 0.02 * math.log2(rank) - 0.05 * (k - 1 - shift * 0.5) ** 2 + 0.003 * seed
                        part = "" if rank == 4 else f",rank={rank}"
                        rows.append(Result(task, name.replace("lora", "lora" + part, 1), lr, seed, score, 100 * rank,
                                           1.0, settings={"variant.rank": rank}))
        views = {f"rank_{r}": 0.5 + 0.01 * r for r in range(1, 5)}
        rows += [Result(task, "dylora", 1e-3, seed, 0.54, 400, 1.0, settings={"variant.rank": 4}, views=views)
                 for seed in range(3)]
    return rows


def test_figures_show_the_numbers_of_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = figures.against_rank(study())
    ax = figure.axes[0]
    drawn = {line.get_label(): line for line in ax.get_lines()}
    assert set(drawn) == {"lora", "lora,alpha / sqrt(r)", "dylora"}
    np.testing.assert_allclose(drawn["lora"].get_xdata(), [1, 2, 4])
    np.testing.assert_allclose(drawn["lora"].get_ydata(), [100 * (0.5 + 0.02 * r + 0.003) for r in (0, 1, 2)])
    np.testing.assert_allclose(drawn["dylora"].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(drawn["dylora"].get_ydata(), [51, 52, 53, 54])
    assert drawn["dylora"].get_linestyle() == "--"
    # One task alone: the plain scale has its name too, what was pruned stands at what is left, the title has room.
    runs = [r._replace(method=r.method if "rslora" in r.method else r.method + ",variant.rslora=False")
            for r in study() if r.task == "rte" and r.method != "dylora"]
    pruned = {"variant.rank": 3, "controller.target_rank": 2}
    runs += [Result("rte", "adalora,rank=2", 1e-3, seed, 0.6, 300, 1.0, settings=pruned) for seed in range(3)]
    figure = figures.against_rank(runs)
    drawn = {line.get_label(): line.get_xdata() for line in figure.axes[0].get_lines()}
    assert set(drawn) == {"lora,alpha / r", "lora,alpha / sqrt(r)", "adalora"} and list(drawn["adalora"]) == [2]
    figure.canvas.draw()
    title = figure.get_suptitle() and figure._suptitle.get_window_extent()
    assert title.x0 > 0 and title.x1 < figure.bbox.width
    ax = figures.against_parameters(cells(r for r in study() if r.task == "rte")).axes[0]
    drawn = {line.get_label(): float(line.get_xdata()[0]) for line in ax.get_lines() if "lora" in line.get_label()}
    assert len(set(drawn.values())) == 7  # equal parameters hide nobody
    np.testing.assert_allclose(sorted(drawn.values()), [100, 100, 200, 200, 400, 400, 400], rtol=0.03)
    lost = figures.rates([r for r in study() if r.method == "lora" and r.task == "rte"]).axes[0].get_images()[0]
    np.testing.assert_allclose(lost.get_array(), [[-5, 0, -5]], atol=1e-9)
    places = [text.get_text() for text in figures.comparison(cells(study()), "lora").axes[0].get_yticklabels()]
    table = cells(study())
    assert places == [s.method for s in standings(table, "lora")][::-1]
    written = figures.save(study(), tmp_path)
    assert [path.name for path in written] == ["comparison.png", "rates.png", "ranks.png", "parameters.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_budget_over_a_training(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"step": 5, "loss": 1.0}, {"step": 10, "eval/rank/params/layer_10/ffn/kernel": 4,
             "eval/rank/params/layer_2/ffn/kernel": 3}, {"step": 20, "eval/rank/params/layer_10/ffn/kernel": 1,
             "eval/rank/params/layer_2/ffn/kernel": 2}]  # fmt: skip
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    ax = figures.kept_ranks(tmp_path).axes[0]
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), [[3, 2], [4, 1]])  # layer 2 before layer 10
    assert [text.get_text() for text in ax.texts] == ["2", "1"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["2 ffn", "10 ffn"]
    file.write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match="no `eval/rank/"):
        figures.kept_ranks(tmp_path)


def test_without_matplotlib_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lorajax\[plots\]'"):
        figures.canvas(1, 1)
