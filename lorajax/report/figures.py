"""Figures of a study: methods side by side, the rate that each wants, scores against ranks, budgets over a training.

Each function returns a `matplotlib.figure.Figure`; `save` writes those that the runs have something to show for.
matplotlib is an extra: ``pip install 'lorajax[plots]'``.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorajax.report.runs import Result
from lorajax.report.scores import Cell, by_rate, cells, grouped, standings, usual

INK, ACCENT, PALE = "#34495e", "#c0392b", "#9fb3c8"
LINES = ("#1f6f8b", "#c0392b", "#6a994e", "#8e5ea2", "#d08c1d", "#34495e")


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Any, Any]:
    """(figure, array of axes (rows, columns)) in the style of all. ModuleNotFoundError says what to install."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib, which is not installed: pip install 'lorajax[plots]' "
                                  "(tables and CSV do without)") from error  # fmt: skip

    class Shown(Figure):
        """A figure that a notebook shows as the last value of a cell."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, dpi=110)
            return file.getvalue()

    figure = Shown(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(length=2, labelsize=8)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def comparison(table: Sequence[Cell], reference: str = "") -> Any:
    """Mean, 95 % confidence interval and the seeds of every method on every task, in the order of mean rank, best on
    top; the line is the reference's mean."""
    tasks = list(dict.fromkeys(cell.task for cell in table))
    reference = reference or usual(cell.method for cell in table)
    order = [s.method for s in standings(table, reference)][::-1]
    at = {(cell.task, cell.method): cell for cell in table}
    figure, axes = canvas(max(6.4, 2.2 + 2.1 * len(tasks)) + _room(order), 0.9 + 0.27 * len(order), 1, len(tasks),
                          sharey=True)  # fmt: skip
    for ax, task in zip(axes[0], tasks, strict=True):
        if (task, reference) in at:
            ax.axvline(100 * at[task, reference].mean, color=ACCENT, linewidth=0.9, alpha=0.7)
        for y, name in enumerate(order):
            if (task, name) not in at:
                continue
            cell, color = at[task, name], ACCENT if name == reference else INK
            ax.plot([100 * x for x in cell.scores.values()], [y] * len(cell.scores), "o", color=PALE, markersize=3)
            if not math.isnan(cell.low):
                ax.plot([100 * cell.low, 100 * cell.high], [y, y], color=color, linewidth=1.3)
            ax.plot(100 * cell.mean, y, "o", color=color, markersize=4.5)
        _keep_in_view(ax, [at[task, name] for name in order if (task, name) in at])
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("score, %", fontsize=8)
    axes[0, 0].set_yticks(range(len(order)), order)
    axes[0, 0].set_ylim(-0.6, len(order) - 0.4)
    figure.suptitle("mean, 95 % interval, seeds; each method at its own rate, chosen on the other seeds", fontsize=9)
    return figure


def _room(names: Sequence[str]) -> float:
    """Inches for what the longest name has beyond the 25 letters that a figure has room for."""
    return 0.075 * max(0, max(map(len, names)) - 25)


def _keep_in_view(ax: Any, mine: Sequence[Cell]) -> None:
    """Intervals of two or three seeds can be far wider than all there is to see: the axis holds scores, not these."""
    seen = [100 * x for cell in mine for x in cell.scores.values()]
    margin = 0.1 * (max(seen) - min(seen)) + 0.2
    ax.set_xlim(min(seen) - margin, max(seen) + margin)


def rates(results: Sequence[Result], reference: str = "") -> Any:
    """Which learning rate each method wants: points lost against the method's own best rate (mean over seeds), and a
    dot at that rate; the line is the reference's best. Grey: no run came through."""
    runs = grouped(results)
    tasks, methods = (list(dict.fromkeys(key[i] for key in runs)) for i in (0, 1))
    reference = reference or usual(methods)
    grid = sorted({run.lr for run in results})
    figure, axes = canvas(2.4 + _room(methods) + (0.8 + 0.19 * len(grid)) * len(tasks), 1.5 + 0.26 * len(methods), 1,
                          len(tasks), sharey=True)  # fmt: skip
    image = None
    for ax, task in zip(axes[0], tasks, strict=True):
        means = np.full((len(methods), len(grid)), np.nan)
        for i, name in enumerate(methods):
            for lr, scores in by_rate(runs.get((task, name), [])).items():
                means[i, grid.index(lr)] = 100 * np.mean(list(scores.values()))
        lost = np.stack([row - np.max(row, where=~np.isnan(row), initial=-np.inf) for row in means])
        image = ax.imshow(np.ma.masked_invalid(lost), aspect="auto", cmap="viridis", vmin=-10, vmax=0)
        ax.set_facecolor("#dddddd")
        ax.grid(visible=False)
        for i, row in enumerate(means):
            if not np.isnan(row).all():
                ax.plot(np.nanargmax(row), i, "o", color="white", markeredgecolor="black", markersize=5)
        if reference in methods and not np.isnan(means[methods.index(reference)]).all():
            ax.axvline(np.nanargmax(means[methods.index(reference)]), color=ACCENT, linewidth=1, alpha=0.8)
        ax.set_title(task, fontsize=10)
        step = -(-len(grid) // 4)
        ax.set_xticks(range(0, len(grid), step), [f"{lr:.0e}".replace("e-0", "e-") for lr in grid[::step]])
        ax.set_xlabel("learning rate", fontsize=8)
    axes[0, 0].set_yticks(range(len(methods)), methods)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=40)
    bar.set_label("points against the method's best rate", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def against_rank(results: Sequence[Result]) -> Any:
    """Score against rank, a panel a task and a line for each scale or method; each point at its own rate. A run that
    was scored at several ranks (DyLoRA) is one line by itself, dashed. Where ranks are pruned or grown (AdaLoRA), the
    average that is left counts."""
    lines: dict[tuple[str, str], dict[int, Cell]] = defaultdict(dict)
    whole: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for run in results:
        whole[run.task, _line(run)].append(run)
    for (task, name), runs in whole.items():
        if not runs[0].views:
            for rank in sorted({_rank(run) for run in runs}):
                mine = [run._replace(method=name) for run in runs if _rank(run) == rank]
                lines[task, name][rank] = cells(mine)[0]
    tasks = list(dict.fromkeys(task for task, _ in whole))
    names = list(dict.fromkeys(name for _, name in whole))
    color = dict(zip(names, LINES * (1 + len(names) // len(LINES)), strict=False))
    figure, axes = canvas(max(5.6, 0.6 + 3.6 * len(tasks)), 3.1, 1, len(tasks))
    for ax, task in zip(axes[0], tasks, strict=True):
        for name in names:
            points = _of_views(whole.get((task, name), []), name) or lines.get((task, name), {})
            if not points:
                continue
            x = sorted(points)
            mean, spread = (np.array([100 * getattr(points[r], key) for r in x]) for key in ("mean", "deviation"))
            style = "--" if whole[task, name][0].views else "-"
            ax.plot(x, mean, style, marker="o", color=color[name], markersize=4, linewidth=1.5, label=name)
            spread = np.nan_to_num(spread)
            ax.fill_between(x, mean - spread, mean + spread, color=color[name], alpha=0.15, linewidth=0)
        ax.set_xscale("log", base=2)
        ticks = sorted({r for (t, _), points in lines.items() if t == task for r in points})
        ticks = ticks or sorted({r for n in names for r in _of_views(whole.get((task, n), []), n)})
        ax.set_xticks(ticks, [str(r) for r in ticks])
        ax.set_xlabel("rank", fontsize=9)
        ax.set_title(task, fontsize=10)
    axes[0, 0].set_ylabel("score, %", fontsize=9)
    axes[0, -1].legend(fontsize=8, frameon=False)
    figure.suptitle("mean and deviation over seeds, the rate chosen per rank on the other seeds", fontsize=9)
    return figure


def _line(run: Result) -> str:
    """The method without its rank; where rank-stabilised and plain scales meet, the scale."""
    name = ",".join(p for p in run.method.split(",") if p.partition("=")[0] not in ("rank", "variant.alpha"))
    if "variant.rslora=" in name:
        return name.replace("variant.rslora=True", "alpha / sqrt(r)").replace("variant.rslora=False", "alpha / r")
    return name


def _rank(run: Result) -> int:
    return run.settings.get("controller.target_rank") or run.settings["variant.rank"]


def _of_views(runs: Sequence[Result], name: str) -> dict[int, Cell]:
    """rank -> cell of runs that were scored at several ranks, at the rate that is best at the highest."""
    if not runs or not all(run.views for run in runs):
        return {}
    rate, found = cells([run._replace(method=name) for run in runs])[0].rate, {}
    for view in runs[0].views:
        if match := re.fullmatch(r"rank_(\d+)", view):
            mine = [run._replace(method=name, score=run.views[view]) for run in runs if run.lr == rate]
            found[int(match[1])] = cells(mine)[0]
    return found


def against_parameters(table: Sequence[Cell]) -> Any:
    """What a method costs and gives: mean and 95 % interval against the parameters that it trains; methods of equal
    parameters stand side by side around them."""
    tasks = list(dict.fromkeys(cell.task for cell in table))
    methods = list(dict.fromkeys(cell.method for cell in table))
    color = dict(zip(methods, LINES * (1 + len(methods) // len(LINES)), strict=False))
    form = {name: "osD^v"[i // len(LINES) % 5] for i, name in enumerate(methods)}
    figure, axes = canvas(2.6 + _room(methods) + 3.3 * len(tasks), 3.3, 1, len(tasks))
    for ax, task in zip(axes[0], tasks, strict=True):
        mine = [cell for cell in table if cell.task == task]
        span = max(cell.parameters for cell in mine) / min(cell.parameters for cell in mine)
        apart = min(0.025, 0.03 * math.log(span))
        for cell in mine:
            alike = [one.method for one in mine if one.parameters == cell.parameters]
            x = cell.parameters * math.exp(apart * (alike.index(cell.method) - (len(alike) - 1) / 2))
            if not math.isnan(cell.low):
                ax.plot([x, x], [100 * cell.low, 100 * cell.high], color=color[cell.method])
            ax.plot(x, 100 * cell.mean, form[cell.method], color=color[cell.method], label=cell.method)
        ax.set_xscale("log")
        ax.set_xlabel("trained parameters", fontsize=9)
        ax.set_title(task, fontsize=10)
    axes[0, 0].set_ylabel("score, %", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, frameon=False)
    return figure


def kept_ranks(folder: str | Path) -> Any:
    """The ranks that every adapted matrix of one run keeps, over its training. ValueError where the run logged none."""
    file = Path(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if any(key.startswith("eval/rank/") for key in row)]
    if not rows:
        raise ValueError(f"{file} has no `eval/rank/...`: only runs whose controller keeps ranks (AdaLoRA) log them")
    paths = sorted((key for key in rows[0] if key.startswith("eval/rank/")), key=_natural)
    return budget(np.array([[row[path] for row in rows] for path in paths]), [path[10:] for path in paths],
                  [row["step"] for row in rows])  # fmt: skip


def budget(kept: np.ndarray, names: Sequence[str], steps: Sequence[int]) -> Any:
    """Ranks as a heat map: kept (matrices, times), the names of the matrices, the steps of the times."""
    short = [re.sub(r"params/|/kernel|layers?_?(?=\d)", "", name).replace("/", " ") for name in names]
    figure, axes = canvas(6.6, 1.2 + 0.17 * len(names))
    ax = axes[0, 0]
    image = ax.imshow(kept, aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
    ax.grid(visible=False)
    ax.set_yticks(range(len(names)), short, fontsize=7)
    every = max(1, len(steps) // 8)
    ax.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
    ax.set_xlabel("step", fontsize=9)
    for i, last in enumerate(kept[:, -1]):
        ax.text(len(steps) - 0.35, i, f"{int(last)}", va="center", fontsize=7)
    bar = figure.colorbar(image, ax=ax, pad=0.05, aspect=40)
    bar.set_label("ranks kept", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _watched(run: Result) -> bool:
    """Whether the run logged its ranks more than once."""
    file = Path(run.folder) / "metrics.jsonl"
    return bool(run.folder) and file.exists() and file.read_text().count('"eval/ranks_kept"') > 1 and (
        '"eval/rank/' in file.read_text())


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def save(results: Sequence[Result], folder: str | Path, reference: str = "") -> list[Path]:
    """Writes the figures that `results` have something to show for, as PNG; returns their paths."""
    table = cells(results)
    made = {"comparison": comparison(table, reference)}
    if len({run.lr for run in results}) > 1:
        made["rates"] = rates(results, reference)
    scored_at_ranks = any(name.startswith("rank_") for run in results for name in run.views)
    if scored_at_ranks or len({_line(run) for run in results}) < len({run.method for run in results}):
        made["ranks"] = against_rank([run for run in results if run.settings.get("variant.rank")])
    if len({cell.parameters for cell in table}) > 1:
        made["parameters"] = against_parameters(table)
    best: dict[tuple[str, str], Result] = {}
    for run in results:
        key = run.task, run.method
        if _watched(run) and (key not in best or run.score > best[key].score):
            best[key] = run
    for (task, name), run in best.items():
        made[f"budget-{task}-{re.sub(r'[^A-Za-z0-9.=+-]+', '-', name)}"] = kept_ranks(run.folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in made.items():
        paths.append(Path(folder) / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths
