"""Grids of runs: which configs with which settings, and which of them one program can train side by side.

A trial is a dict: `config` (a file of configs/, without its folder and ending), `arg.NAME` for what stands after the
colon of ``--config``, any other key for a dotted flag. So every trial is a command line, and a study trains nothing
that could not be trained alone:

    product(each("config", ["lora", "dora"]), each("lr", [3e-4, 1e-3]), each("seed", range(5)))
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lorajax.config import ConfigError, Launch, flatten, load, nearest, parse

Trial = dict[str, Any]


def each(key: str, values: Iterable[Any]) -> list[Trial]:
    """One trial for each value of one key."""
    return [{key: value} for value in values]


def fixed(**settings: Any) -> list[Trial]:
    """A single trial."""
    return [settings]


def product(*grids: Sequence[Trial]) -> list[Trial]:
    """Every combination, the last grid fastest. ConfigError if two grids set one key."""
    return [_merged(trials) for trials in itertools.product(*grids)]


def zipit(*grids: Sequence[Trial]) -> list[Trial]:
    """First with first, second with second. ConfigError if the grids differ in length."""
    if len({len(grid) for grid in grids}) > 1:
        sizes = ", ".join(str(len(grid)) for grid in grids)
        raise ConfigError(f"zipit takes grids of one length, these have {sizes} trials: use product for combinations")
    return [_merged(trials) for trials in zip(*grids, strict=True)]


def chain(*grids: Sequence[Trial]) -> list[Trial]:
    """One grid after the other."""
    return [trial for grid in grids for trial in grid]


def _merged(trials: Sequence[Trial]) -> Trial:
    out: Trial = {}
    for trial in trials:
        if twice := sorted(out.keys() & trial.keys()):
            raise ConfigError(f"two grids set {', '.join(twice)}: set each key in one of them")
        out |= trial
    return out


def words(trial: Mapping[str, Any], folder: str = "configs") -> list[str]:
    """The command line of a trial: what `experiments.glue` takes."""
    if "config" not in trial:
        raise ConfigError(f"the trial {dict(trial)} names no config: add each('config', ['lora', ...]) to the grid")
    args = ",".join(f"{key[4:]}={value}" for key, value in trial.items() if key.startswith("arg."))
    flags = {key: value for key, value in trial.items() if key != "config" and not key.startswith("arg.")}
    spec = f"{folder}/{trial['config']}.py" + (f":{args}" if args else "")
    return [f"--config={spec}", *[f"--config.{key}={value}" for key, value in sorted(flags.items())]]


def load_study(spec: str) -> list[Trial]:
    """The trials of ``FILE[:arg]``: what its `get_config(arg)` returns under `trials`, each once."""
    found = load(spec)
    trials = found.get("trials")
    if not trials:
        raise ConfigError(f"{spec} is not a study: its get_config returns no `trials`; see configs/studies/")
    unique = {json.dumps(dict(t), sort_keys=True, default=str): dict(t) for t in trials}
    return list(unique.values())


def launch(trial: Mapping[str, Any], **options: Any) -> Launch:
    """The parsed command line of a trial. options: the experiment's own flags."""
    return parse(words(trial), **options)


class Group(NamedTuple):
    """Runs that one program can train side by side. differ: dotted keys whose values are numbers of each run's own."""

    launches: tuple[Launch, ...]
    differ: tuple[str, ...]


def groups(launches: Sequence[Launch], packable: Iterable[str], size: int) -> list[Group]:
    """Launches that differ in nothing but `packable` keys, at most `size` together, in the order of their first runs.

    A packable key that is the same in a whole group stays a constant of its program.
    """
    if size < 1:
        raise ConfigError(f"a pack of {size} runs: give at least 1")
    packable = set(packable)
    alike: dict[str, list[Launch]] = {}
    for one in launches:
        flat = flatten(one.config)
        unknown = {key for key in packable if "." not in key} - flat.keys()
        if unknown:
            raise ConfigError(f"no key {sorted(unknown)[0]!r} in a config{nearest(sorted(unknown)[0], flat)}")
        rest = {key: value for key, value in flat.items() if key not in packable}
        alike.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(one)
    out = []
    for members in alike.values():
        for start in range(0, len(members), size):
            part = members[start:start + size]
            flats = [flatten(one.config) for one in part]
            differ = sorted(k for k in packable if len({json.dumps(f.get(k), default=str) for f in flats}) > 1)
            out.append(Group(tuple(part), tuple(differ)))
    return out


def part(trials: Sequence[Any], text: str) -> list[Any]:
    """``i/n``: every n-th trial from the i-th (counted from 0), for one of n hosts that share nothing."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 0 <= int(index) < int(count)):
        raise ConfigError(f"--slice={text!r} is not i/n with 0 <= i < n, such as 0/4")
    return list(trials[int(index)::int(count)])
