"""Trains every run of a study, side by side where one program can: same base, stacked adapters.

    python -m experiments.sweep --config configs/studies/rank_sweep.py[:task=...] [--workdir=runs] [--pack=32]
                                [--slice=i/n] [--dry-run] [--trial=-1]
                                [--coordinator=host:port --processes=2 --process=0]

A run's folder is the one that `experiments.glue` would make of the same settings, and its numbers are the same. What is
finished is skipped, so the same command goes on after an interruption (exit code 75). pack: runs that train together
(0: up to 32; half as many when the device's memory is not enough). slice: this host's part of the study, for hosts that
share nothing. trial: devices among which the runs of a pack are shared out (-1: all), for one program on all devices of
one host or of several.
"""

import json
import time
import traceback
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import glue, packed
from experiments.packed import RANKS, folder_of, record
from lorajax import build, config, report, sweep
from lorajax.shard import hosts
from lorajax.train.compiled import compile_cache
from lorajax.train.run import EXIT_INTERRUPTED, stop_on_signal

# Numbers that may differ inside one program. Ranks may too where a run at a lower rank is the same run among zeros:
# with these methods and these optimizers, which look at every element alone.
NUMBERS = ("seed", "lr", "head_lr", "weight_decay", "variant.alpha", "variant.dropout", "optimizer.ratio")
RANKED, ELEMENTWISE = ("lora",), ("adamw", "lora_plus", "lora_fa")


def main(argv: list[str]) -> None:
    options = {"config": "", "workdir": "runs", "pack": 0, "slice": "0/1", "dry_run": False, "trial": 1, **hosts.FLAGS}
    asked = flags(argv, options)
    hosts.start(**{name: asked[name] for name in hosts.FLAGS})
    trials = sweep.part(sweep.load_study(asked["config"]), asked["slice"])
    if asked["trial"] != 1:
        trials = [trial | {"mesh.trial": asked["trial"]} for trial in trials]
    launches = [sweep.launch(trial, workdir=asked["workdir"], resume=True) for trial in trials]
    compile_cache()
    todo = [one for one in launches if not done(folder_of(one))]
    groups = plan(todo, asked["pack"])
    describe(launches, todo, groups)
    hosts.wait("plan")  # of what there is before anyone adds to it
    if asked["dry_run"]:
        return
    began, finished = time.monotonic(), 0
    with stop_on_signal() as stop:
        while groups and not stop:
            group = groups.pop(0)
            try:
                train(group, stop)
            except Exception as error:  # one run's mistake must not take the study down, nor its pack
                count = len(group.launches)
                if count > 1:
                    memory = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
                    size = count // 2 if memory else 1
                    print(f"{count} runs together: {type(error).__name__}: {str(error)[:200]}; now {size} at a time",
                          flush=True)
                    groups[:0] = sweep.groups(group.launches, group.differ, size)
                    continue
                failed(group.launches[0], error)
            if not stop:
                finished += len(group.launches)
                left = (time.monotonic() - began) / finished * (len(todo) - finished)
                print(f"{finished}/{len(todo)} runs, about {left / 60:.0f} minutes left", flush=True)
    if stop:
        print(f"{stop.signal}: the same command goes on", flush=True)
        raise SystemExit(EXIT_INTERRUPTED)
    table(launches)


def flags(argv: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    # The study's own flags; a study has no --config.KEY, its trials have.
    out, known = dict(defaults), {"--" + name.replace("_", "-"): name for name in defaults}
    words = list(argv)
    while words:
        name, given, text = words.pop(0).partition("=")
        if name not in known:
            there = ", ".join(known)
            raise config.ConfigError(f"unknown flag {name}{config.nearest(name, known)} There are: {there}")
        key = known[name]
        if isinstance(defaults[key], bool) and not given:
            text = "true"
        elif not given:
            if not words:
                raise config.ConfigError(f"{name} has no value: write {name}=VALUE")
            text = words.pop(0)
        out[key] = config.typed(name, text, defaults[key])
    if not out["config"]:
        raise config.ConfigError("no study given: add --config configs/studies/NAME.py")
    return out


def done(folder: Path) -> bool:
    return (folder / "summary.json").exists() or (folder / "failed.json").exists()


def by_itself(c: ConfigDict) -> bool:
    # What only a run of its own can do: read data before it starts, rewrite the base, restart, add to earlier adapters.
    choices: list[Any] = [build.variant(c), *(choice for _, choice in build.also(c))]
    reads = any(getattr(one, "statistic", None) is not None for one in choices) or c.ranks.budget > 0
    changes = any(getattr(one, "rewrites_weight", False) for one in choices)
    return reads or changes or bool(c.earlier.folders) or c.controller.name == "relora"


def widens(c: ConfigDict) -> bool:
    # Not with what counts ranks: a controller, an optimizer of whole matrices (the cut of LoRA-Pro's inverse), or
    # frozen copies of the start, which stay at their own rank.
    if c.variant.name not in RANKED or c.optimizer.name not in ELEMENTWISE or c.controller.name != "identity":
        return False
    method: Any = build.variant(c)
    return not method.initial.subtracts


def plan(launches: list[config.Launch], size: int) -> list[sweep.Group]:
    alone = [one for one in launches if by_itself(one.config)]
    ranked = [one for one in launches if one not in alone and widens(one.config)]
    rest = [one for one in launches if one not in alone and one not in ranked]
    size = size or 32
    return [*sweep.groups(ranked, (*NUMBERS, *RANKS), size), *sweep.groups(rest, NUMBERS, size),
            *sweep.groups(alone, (), 1)]  # fmt: skip


def describe(launches: list[Any], todo: list[Any], groups: list[sweep.Group]) -> None:
    print(f"{len(launches)} runs, {len(launches) - len(todo)} of them finished; {len(todo)} to train in {len(groups)} "
          f"programs")
    lost = [one for one in launches if (folder_of(one) / "failed.json").exists()]
    if lost:
        print(f"  {len(lost)} of the finished ones failed; a run whose failed.json is deleted is tried again")
    for group in groups:
        first = group.launches[0]
        differ = f" (differ in {', '.join(group.differ)})" if group.differ else ""
        print(f"  {len(group.launches):>4} x {first.name}{differ}")


def train(group: sweep.Group, stop: Any) -> None:
    if len(group.launches) > 1:
        return packed.train(group, stop)
    (one,) = group.launches
    try:
        glue.main([*one.words, f"--workdir={one.options['workdir']}"])
    except SystemExit as error:
        if error.code == EXIT_INTERRUPTED:
            stop.signal = stop.signal or "a signal"
        elif error.code not in (0, None):
            record(folder_of(one), str(error.code))


def failed(one: config.Launch, error: Exception) -> None:
    print(f"{one.name}: {type(error).__name__}: {error}", flush=True)
    if not isinstance(error, glue.EXPLAINED):  # those are the command's or the machine's: the next attempt may succeed
        record(folder_of(one), "".join(traceback.format_exception(error))[-4000:])


def table(launches: list[config.Launch]) -> None:
    # Mean and spread at each method's own best rate, then who failed and why.
    finished, lost = [], []
    for one in launches:
        folder = folder_of(one)
        if (folder / "summary.json").exists():
            finished += report.read(folder)
        elif (folder / "failed.json").exists():
            lost.append((one, json.loads((folder / "failed.json").read_text())["reason"]))
    if finished:
        print(report.markdown(report.cells(finished)))
    for one, reason in lost:
        print(f"failed: {one.name}, seed {one.config.seed}: {reason[-200:]}")


if __name__ == "__main__":
    hosts.run(main, glue.EXPLAINED)
