"""Finished runs as rows: one row a run, whatever study it is of."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = MappingProxyType({})
WHERE = ("task", "lr", "data", "study", "smoke")
"""Settings that make no method: on what, at which rate, from where."""


class Result(NamedTuple):
    """One finished run.

    score: of the task's headline metric, at the best evaluation. memory: bytes of the compiled step, alone (0: not
    known). settings: the flat config. views: score of each further form of the adapter (DyLoRA's ranks). device, date:
    where and when it ran.
    """

    task: str
    method: str
    lr: float
    seed: int
    score: float
    parameters: int
    seconds: float
    memory: int = 0
    device: str = ""
    date: str = ""
    folder: str = ""
    settings: Mapping[str, Any] = NOTHING
    views: Mapping[str, float] = NOTHING


def read(folder: str | Path | Sequence[str | Path], metric: str = "") -> list[Result]:
    """Every finished run below `folder`, or below each of several. metric: '' for each task's headline.

    What all runs found have in common is left out of their methods' names. ValueError if there is none.
    """
    folders = [folder] if isinstance(folder, str | Path) else folder
    rows, names = [], []
    for path in sorted(path for one in folders for path in Path(one).rglob("summary.json")):
        try:
            summary, began = json.loads(path.read_text()), json.loads((path.parent / "config.json").read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.parent}: summary.json or config.json is no whole JSON ({error}): remove the run, "
                             f"and train it again") from error
        settings = _flat(began["config"])
        headline = metric or summary["headline"]
        if headline not in summary["scores"]:
            raise ValueError(f"{path} has no metric {headline!r}; it has {', '.join(sorted(summary['scores']))}")
        names.append(_parts(summary))
        views = {name: float(row[headline]) for name, row in summary.get("views", {}).items()}
        jax = began.get("versions", {}).get("jax", "")
        rows.append(Result(
            summary["task"], "", float(settings["lr"]), int(settings["seed"]), float(summary["scores"][headline]),
            int(summary["trainable_parameters"]), float(summary["seconds"]), int(summary.get("memory", 0)),
            ", JAX ".join(filter(None, (summary.get("device", ""), jax))), summary.get("date", ""), str(path.parent),
            settings, views))  # fmt: skip
    if not rows:
        raise ValueError(f"no finished run below {', '.join(map(str, folders))}: a run is finished when its folder has "
                         f"a summary.json")
    return [row._replace(method=name) for row, name in zip(rows, _told_apart(names), strict=True)]


def method(name: str) -> str:
    """A run's name without what does not make a method: task, learning rate, data folder."""
    return ",".join(part for part in name.split(",") if part.partition("=")[0] not in WHERE)


def write_csv(results: Iterable[Result], path: str | Path) -> None:
    """One row a run, the settings without those that are the same for all."""
    runs = list(results)
    seen = Counter(json.dumps(item, default=str) for run in runs for item in run.settings.items())
    keys = sorted({key for run in runs for key, value in run.settings.items()
                   if seen[json.dumps((key, value), default=str)] < len(runs)} - {"lr", "seed"})  # fmt: skip
    plain = [name for name in Result._fields if name not in ("settings", "views")]
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*plain, *keys])
        writer.writerows([*(getattr(run, name) for name in plain), *(run.settings.get(k, "") for k in keys)]
                         for run in runs)


def _parts(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The config file's name and what was set, each 'key=value'. A folder's name may be cut; `said` is whole."""
    if "said" not in summary:
        return tuple(method(summary["name"]).split(","))
    said = [f"{key}={_plain(value)}" for key, value in summary["said"].items() if key not in WHERE]
    return summary["name"].partition(",")[0], *said


def _told_apart(names: Sequence[tuple[str, ...]]) -> list[str]:
    common = set.intersection(*(set(name[1:]) for name in names))
    return [",".join(part for i, part in enumerate(name) if i == 0 or part not in common) for name in names]


def _plain(value: Any) -> str:
    return "+".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
