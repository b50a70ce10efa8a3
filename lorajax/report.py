"""Runs on disk to tables: mean and spread over seeds, tuned rates that do not leak, paired tests, ranks, cost.

    python -m lorajax.report runs/glue [--csv FILE] [--metric NAME]

A run is a folder with `config.json` and `summary.json`. A cell is what one method got on one task; methods are told
apart by `method` (the config file with its structure, without task and rate) and compared at the rate that was best for
each. The rate is chosen on one half of the seeds and scored on the other, and the halves then swap, so that a method
with more rates to choose from gains nothing by chance alone.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Result(NamedTuple):
    """One finished run. score: of the task's headline metric, at the best evaluation. cost: seconds."""

    task: str
    method: str
    lr: float
    seed: int
    score: float
    parameters: int
    seconds: float


class Cell(NamedTuple):
    """One method on one task. scores: seed -> score at the rate chosen without that seed. rates: how often each lr was
    chosen. low, high: 95 % confidence interval of the mean (Student's t over seeds; nan for one seed)."""

    task: str
    method: str
    scores: dict[int, float]
    rates: dict[float, int]
    mean: float
    deviation: float
    low: float
    high: float
    parameters: int
    seconds: float


def read(folder: str | Path, metric: str = "") -> list[Result]:
    """Every finished run below `folder`. metric: '' for each task's headline. ValueError if there is none."""
    found = []
    for path in sorted(Path(folder).rglob("summary.json")):
        summary = json.loads(path.read_text())
        settings = json.loads((path.parent / "config.json").read_text())["config"]
        name = metric or summary["headline"]
        if name not in summary["scores"]:
            raise ValueError(f"{path} has no metric {name!r}; it has {', '.join(sorted(summary['scores']))}")
        found.append(Result(summary["task"], method(summary["name"]), float(settings["lr"]), int(settings["seed"]),
                            float(summary["scores"][name]), int(summary["trainable_parameters"]),
                            float(summary["seconds"])))
    if not found:
        raise ValueError(f"no finished run below {folder}: a run is finished when its folder has a summary.json")
    return found


def method(name: str) -> str:
    """A run's name without what does not make a method: task, learning rate, data folder."""
    return _without(name, "task", "lr", "data")


def _without(name: str, *keys: str) -> str:
    return ",".join(part for part in name.split(",") if part.partition("=")[0] not in keys)


def cells(results: Iterable[Result]) -> list[Cell]:
    """The table's cells, tasks and methods in order of appearance. Runs of several models are several methods."""
    runs = list(results)
    models = {tuple(part for part in run.method.split(",") if part.startswith("model=")) for run in runs}
    grouped: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for run in runs:
        grouped[run.task, run.method if len(models) > 1 else _without(run.method, "model")].append(run)
    return [_cell(task, name, runs) for (task, name), runs in grouped.items()]


def _cell(task: str, name: str, runs: Sequence[Result]) -> Cell:
    by_rate: dict[float, dict[int, float]] = defaultdict(dict)
    for run in runs:
        by_rate[run.lr][run.seed] = run.score
    seeds = sorted({run.seed for run in runs})
    halves = (seeds[::2], seeds[1::2])
    scores: dict[int, float] = {}
    rates = dict.fromkeys(by_rate, 0)
    for score_on, choose_on in (halves, halves[::-1]):
        choose_on = choose_on or score_on  # one seed: nothing to choose on but itself
        tried = [lr for lr in by_rate if any(s in by_rate[lr] for s in score_on)] or list(by_rate)
        chosen = max(tried, key=lambda lr: _mean([by_rate[lr][s] for s in choose_on if s in by_rate[lr]]))
        rates[chosen] += len(score_on)
        scores |= {seed: by_rate[chosen][seed] for seed in score_on if seed in by_rate[chosen]}
    values = np.array(list(scores.values()))
    deviation = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    reach = stats.t.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values)) if len(values) > 1 else math.nan
    mean = float(values.mean())
    return Cell(task, name, scores, {lr: n for lr, n in rates.items() if n}, mean, deviation, mean - reach,
                mean + reach, runs[0].parameters, float(np.mean([run.seconds for run in runs])))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else -math.inf


class Standing(NamedTuple):
    """One method over all tasks. rank: mean over the tasks of its place (1 is best, ties share). difference: mean of
    its scores minus the reference's, same task and seed. p: of the paired t-test of that (nan below two pairs)."""

    method: str
    rank: float
    difference: float
    p: float
    pairs: int


def standings(table: Sequence[Cell], reference: str) -> list[Standing]:
    """Methods by mean rank, each against `reference` by a paired test over (task, seed).

    Only tasks that every method has count for ranks. ValueError if no cell is of the reference.
    """
    methods = list(dict.fromkeys(cell.method for cell in table))
    if reference not in methods:
        raise ValueError(f"reference={reference!r} has no run; there are {', '.join(methods)}")
    at = {(cell.task, cell.method): cell for cell in table}
    tasks = [t for t in dict.fromkeys(cell.task for cell in table) if all((t, m) in at for m in methods)]
    places = {t: stats.rankdata([-at[t, m].mean for m in methods]) for t in tasks}
    out = []
    for i, name in enumerate(methods):
        pairs = [(at[t, name].scores[s], score) for t in dict.fromkeys(c.task for c in table)
                 if (t, name) in at and (t, reference) in at
                 for s, score in at[t, reference].scores.items() if s in at[t, name].scores]
        ours, theirs = np.array(pairs).T if pairs else (np.zeros(0), np.zeros(0))
        tested = len(pairs) > 1 and np.ptp(ours - theirs) > 0
        p = float(stats.ttest_rel(ours, theirs).pvalue) if tested else math.nan
        rank = float(np.mean([places[t][i] for t in tasks])) if tasks else math.nan
        out.append(Standing(name, rank, float(np.mean(ours - theirs)) if pairs else math.nan, p, len(pairs)))
    return sorted(out, key=lambda s: s.rank)


def markdown(table: Sequence[Cell], reference: str = "") -> str:
    """Two tables: scores in percent, mean and deviation over seeds with the rate chosen most often; and standings."""
    tasks = list(dict.fromkeys(cell.task for cell in table))
    methods = list(dict.fromkeys(cell.method for cell in table))
    at = {(cell.task, cell.method): cell for cell in table}
    lines = [f"| method | {' | '.join(tasks)} | parameters | seconds |", "|---" * (len(tasks) + 3) + "|"]
    for name in methods:
        mine = [at[t, name] for t in tasks if (t, name) in at]
        row = [_score(at[t, name]) if (t, name) in at else "" for t in tasks]
        seconds = np.mean([cell.seconds for cell in mine])
        lines.append(f"| {name} | {' | '.join(row)} | {mine[0].parameters:,} | {seconds:.0f} |")
    reference = reference or methods[0]
    order = standings(table, reference)
    lines += ["", f"| method | mean rank | against {reference} | p (paired t-test) | pairs |", "|---" * 5 + "|"]
    lines += [f"| {s.method} | {s.rank:.2f} | {100 * s.difference:+.2f} | {s.p:.3f} | {s.pairs} |" for s in order]
    return "\n".join(lines)


def _score(cell: Cell) -> str:
    rate = max(cell.rates, key=lambda lr: cell.rates[lr])
    return f"{100 * cell.mean:.1f} ± {100 * cell.deviation:.1f} ({rate:g}, n={len(cell.scores)})"


def write_csv(results: Iterable[Result], path: str | Path) -> None:
    """One row a run."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Result._fields)
        writer.writerows(results)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    flags: dict[str, Any] = {"--csv": "", "--metric": "", "--reference": ""}
    words, folder = list(argv), ""
    while words:
        name, given, text = words.pop(0).partition("=")
        if name not in flags:
            if name.startswith("-") or folder:
                raise SystemExit(f"error: unexpected {name!r}: give one folder of runs, and {', '.join(flags)}")
            folder = name
            continue
        flags[name] = text if given else words.pop(0) if words else ""
    try:
        results = read(folder or "runs", flags["--metric"])
        if flags["--csv"]:
            write_csv(results, flags["--csv"])
        print(markdown(cells(results), flags["--reference"]))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
