"""Trains every run of a study, side by side where one program can: same base, stacked adapters.

    python -m experiments.sweep --config configs/studies/rank_sweep.py[:task=...] [--workdir=runs] [--pack=32]
                                [--memory=GiB] [--slice=i/n] [--dry-run] [--trial=-1] [--minutes=9]
                                [--adapters=false] [--ahead=6]
                                [--coordinator=host:port --processes=2 --process=0]

A run's folder is the one that `experiments.glue` would make of the same settings, and its numbers are the same. What is
finished is skipped, so the same command goes on after an interruption (exit code 75). The plan comes first, with an
estimate of time and memory; tables and plots come last, also under <workdir>/reports. pack: runs that train together
(0: as many as the estimate says fit, up to 64; half as many when the memory is not enough after all). memory:
of a device, where not all of it is ours (0: what the device says, 9/10 of it). slice: this host's part of the study,
for hosts that share nothing. trial: devices among which the runs of a pack are shared out (-1: all), for one program on
all devices of one host or of several. minutes: begins no pack that would not be done by then, and exits with 75.
adapters: false leaves numbers alone. ahead: threads that compile the next packs' programs meanwhile (-1: 6, on a CPU
none).
"""

import importlib.util
import json
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import glue, packed
from experiments.estimate import SHARE, Estimate, compiles, estimate, matmul_rate
from experiments.members import LENGTH, RANKS, folder_of, record
from experiments.programs import Programs
from lorajax import build, config, report, sweep
from lorajax.shard import hosts
from lorajax.train.compiled import PRESETS, compile_cache, compiler_flags
from lorajax.train.footprint import device_bytes
from lorajax.train.run import EXIT_INTERRUPTED, stop_on_signal

MOST = 64  # runs in one program: twice as many were no faster on an H200 with a small encoder
# Numbers that may differ inside one program. Ranks may too where a run at a lower rank is the same run among zeros:
# with these methods and these optimizers, which look at every element alone.
NUMBERS = ("seed", "lr", "head_lr", "weight_decay", "variant.alpha", "variant.dropout", "optimizer.ratio")
RANKED, ELEMENTWISE = ("lora",), ("adamw", "lora_plus", "lora_fa")
TIMELESS = ("identity", "dylora")  # controllers that do not ask how long the run is: its length may differ too


def main(argv: list[str]) -> None:
    began = time.monotonic()
    options = {"config": "", "workdir": "runs", "pack": 0, "memory": 0.0, "slice": "0/1", "dry_run": False, "trial": 1,
               "minutes": 0.0, "adapters": True, "ahead": -1, "xla": "none", **hosts.FLAGS}
    asked = flags(argv, options)
    compiler_flags(config.choose("xla", asked["xla"], PRESETS))
    hosts.start(**{name: asked[name] for name in hosts.FLAGS})
    trials = sweep.part(sweep.load_study(asked["config"]), asked["slice"])
    if asked["trial"] != 1:
        trials = [trial | {"mesh.trial": asked["trial"]} for trial in trials]
    launches = [sweep.launch(trial, workdir=asked["workdir"], resume=True) for trial in trials]
    compile_cache()
    todo = [one for one in launches if not done(folder_of(one))]
    known: dict[str, Estimate] = {}
    limit = asked["memory"] * 2**30 or 0.9 * (device_bytes() or 0)
    groups = plan(todo, asked["pack"], 1024.0 * hosts.agreed(int(limit / 1024)), known)
    describe(launches, todo, groups, known)
    hosts.wait("plan")  # of what there is before anyone adds to it
    if asked["dry_run"]:
        return
    workers = asked["ahead"] if asked["ahead"] >= 0 else 0 if jax.default_backend() == "cpu" else 6
    programs, written = Programs(0 if hosts.several() else workers, asked["adapters"]), Written()
    finished, took = 0, 0.0
    with stop_on_signal() as stop:
        while groups and not stop:
            if asked["minutes"] and time.monotonic() - began + 2 * took > 60 * asked["minutes"]:
                stop.signal = f"{asked['minutes']:g} minutes"
                break
            programs.ahead(groups)
            group, start = groups.pop(0), time.monotonic()
            try:
                train(group, stop, programs, written)
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
                finished, took = finished + len(group.launches), time.monotonic() - start
                left = (time.monotonic() - began) / finished * (len(todo) - finished)
                print(f"{finished}/{len(todo)} runs, these in {took:.1f} s, about {left / 60:.0f} minutes left",
                      flush=True)
        written.all()
    programs.close()
    if stop:
        print(f"{stop.signal}: the same command goes on", flush=True)
        raise SystemExit(EXIT_INTERRUPTED)
    if hosts.writes():
        finish(launches, Path(asked["workdir"]) / "reports" / label(asked["config"]))


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


def by_itself(c: ConfigDict) -> str:
    # Why only a run of its own can do it; '' where a pack can.
    choices: list[Any] = [build.variant(c), *(choice for _, choice in build.also(c))]
    reasons = {
        "it reads data before it starts": c.ranks.budget > 0 or any(getattr(one, "statistic", None) for one in choices),
        "it rewrites the base": any(getattr(one, "rewrites_weight", False) for one in choices),
        "it adds to earlier adapters": bool(c.earlier.folders),
        "it restarts": c.controller.name == "relora",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def widens(c: ConfigDict) -> bool:
    # Not with what counts ranks: a controller, an optimizer of whole matrices (the cut of LoRA-Pro's inverse), or
    # frozen copies of the start, which stay at their own rank.
    if c.variant.name not in RANKED or c.optimizer.name not in ELEMENTWISE or c.controller.name != "identity":
        return False
    method: Any = build.variant(c)
    return not method.initial.subtracts


def packable(c: ConfigDict) -> tuple[str, ...]:
    # The keys in which a run may differ from the others of its pack, () where it trains by itself.
    if by_itself(c):
        return ()
    return (*NUMBERS, *(RANKS if widens(c) else ()), *(LENGTH if c.controller.name in TIMELESS else ()))


def plan(launches: list[config.Launch], size: int, limit: float = 0.0,
         known: dict[str, Estimate] | None = None) -> list[sweep.Group]:
    # size: 0 for as many as `limit` bytes hold, by the estimates in `known`, which is filled here.
    kinds: dict[tuple[str, ...], list[config.Launch]] = {}
    for one in launches:
        kinds.setdefault(packable(one.config), []).append(one)
    alone = kinds.pop((), [])
    found = [group for keys, those in kinds.items() for group in sweep.groups(those, keys, size or MOST)]
    if limit and not size:
        fits = [estimate(group, {} if known is None else known).fits(limit, MOST) for group in found]
        found = [part for group, n in zip(found, fits, strict=True)
                 for part in sweep.groups(group.launches, group.differ, n)]
    place = {id(one): i for i, one in enumerate(launches)}
    return sorted([*found, *sweep.groups(alone, (), 1)], key=lambda group: place[id(group.launches[0])])


def describe(launches: list[Any], todo: list[Any], groups: list[sweep.Group], known: dict[str, Estimate]) -> None:
    print(f"{len(launches)} runs, {len(launches) - len(todo)} of them finished; {len(todo)} to train in {len(groups)} "
          f"programs")
    lost = [one for one in launches if (folder_of(one) / "failed.json").exists()]
    if lost:
        print(f"  {len(lost)} of the finished ones failed; a run whose failed.json is deleted is tried again")
    if not groups:
        return
    found, rate = [estimate(group, known) for group in groups], SHARE * matmul_rate()
    seconds = [one.flops * len(group.launches) / rate / one.width for group, one in zip(groups, found, strict=True)]
    memory = [one.footprint.of(-(-len(group.launches) // one.width)) for group, one in zip(groups, found, strict=True)]
    for group, time_, bytes_ in zip(groups, seconds, memory, strict=True):
        first = group.launches[0]
        why = f" (alone: {reason})" if (reason := by_itself(first.config)) else ""
        differ = f" (differ in {', '.join(group.differ)})" if group.differ else ""
        print(f"  {len(group.launches):>4} x {first.name}{differ or why}: about {time_ / 60:.1f} minutes, "
              + (f"{bytes_ / 2**30:.2f} GiB" if bytes_ else "memory not known"))
    print(f"about {sum(seconds) / 60:.0f} minutes on {jax.devices()[0].device_kind}, without compiling "
          f"{compiles(groups, found)} programs at most; at most {max(memory) / 2**30:.2f} GiB at a time", flush=True)


def train(group: sweep.Group, stop: Any, programs: Programs, written: "Written") -> None:
    if len(group.launches) > 1:
        return packed.train(group, stop, programs, lambda job: written.later(group, job))
    (one,) = group.launches
    try:
        glue.main([*one.words, f"--workdir={one.options['workdir']}"])
    except SystemExit as error:
        if error.code == EXIT_INTERRUPTED:
            stop.signal = stop.signal or "a signal"
        elif error.code not in (0, None):
            record(folder_of(one), str(error.code))


class Written:
    # What packs leave is written while the next ones train, one pack at a time.
    def __init__(self) -> None:
        self.pool, self.waiting = ThreadPoolExecutor(1, thread_name_prefix="write"), list[Any]()

    def later(self, group: sweep.Group, job: Callable[[], None]) -> None:
        self.all()
        if hosts.several():  # all processes write together
            return job()
        self.waiting.append((group, self.pool.submit(job)))

    def all(self) -> None:
        while self.waiting:
            group, job = self.waiting.pop()
            if error := job.exception():
                for one in group.launches:
                    if not done(folder_of(one)):
                        failed(one, error)


def failed(one: config.Launch, error: BaseException) -> None:
    print(f"{one.name}: {type(error).__name__}: {error}", flush=True)
    if not isinstance(error, glue.EXPLAINED):  # those are the command's or the machine's: the next attempt may succeed
        record(folder_of(one), "".join(traceback.format_exception(error))[-4000:])


def label(spec: str) -> str:
    # Of a study with its arguments, fit for a folder.
    file, _, args = spec.partition(":")
    return ",".join(filter(None, (Path(file).stem, args.replace("/", "-"))))


def finish(launches: list[config.Launch], folder: Path) -> None:
    # Mean and spread at each method's own best rate, in a table and in plots; then who failed and why.
    there = [folder_of(one) for one in launches]
    if finished := [path for path in there if (path / "summary.json").exists()]:
        folder.mkdir(parents=True, exist_ok=True)
        results = report.read(finished)
        text = report.markdown(report.cells(results)) + f"\n\nMeasured on: {report.setting(results)}.\n"
        (folder / "table.md").write_text(text)
        report.write_csv(results, folder / "runs.csv")
        print(text)
        if importlib.util.find_spec("matplotlib"):
            from lorajax.report import figures

            made = [path.name for path in figures.save(results, folder)]
            print(f"{folder}: table.md, runs.csv, {', '.join(made)}")
        else:
            print(f"{folder}: table.md, runs.csv; no figures without matplotlib: pip install 'lorajax[plots]'")
    for one, path in zip(launches, there, strict=True):
        if (path / "failed.json").exists() and path not in finished:
            reason = json.loads((path / "failed.json").read_text())["reason"]
            print(f"failed: {one.name}, seed {one.config.seed}: {reason[-200:]}")


if __name__ == "__main__":
    hosts.run(main, glue.EXPLAINED)
