"""The folder of one run: what was asked, what was measured, and whether it finished.

`metrics.jsonl` holds nothing that depends on the clock, so a run that was killed and resumed ends with the same bytes
as one that was not; times go to `timing.jsonl` and tensorboard. `summary.json` comes last: its presence = finished.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from lorajax.shard import hosts

EXIT_INTERRUPTED = 75
"""Exit code of a run that saved and left on a signal (EX_TEMPFAIL: start it again and it goes on)."""

_OWN = ("config.json", "metrics.jsonl", "timing.jsonl", "summary.json", "texts.json", "checkpoints", "start", "adapter")
_PACKAGES = ("lorajax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RunError(RuntimeError):
    """The run folder belongs to another run, or is in use."""


def run_folder(workdir: str | Path, study: str, name: str, seed: int) -> Path:
    """``<workdir>/<study>/<name>/seed=<seed>``; `name` is the config and its overrides, in one folder name."""
    for part in (study, name):
        if not part or part in (".", "..") or "/" in part or "\0" in part:
            raise ValueError(f"{part!r} cannot be the name of one folder: leave '/' out of it")
    return Path(workdir) / study / name / f"seed={seed}"


class Run:
    """An open run folder, locked against a second writer. Use as a context manager, or call `close`.

    config: what JSON can hold. fingerprints: name -> digest of what the run reads (base, data).
    ignore: dotted config keys that do not change the numbers (where to write, how often to print); a difference there
      is allowed on resume, any other is a RunError that names the key.
    Of several processes (`lorajax.shard.hosts`) process 0 locks and writes; the same calls in the others write nothing.
    fresh: forget what the folder holds of an earlier run instead of resuming it.

    resumed: whether the folder held this run already. changed: versions and devices that differ from those the run
    began with, a line each: allowed, but the numbers may then differ in the last bits.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any],
        *,
        fingerprints: Mapping[str, str] | None = None,
        ignore: Collection[str] = (),
        fresh: bool = False,
        tensorboard: bool = True,
    ):
        self.folder = Path(folder)
        self._tensorboard = tensorboard and hosts.writes()
        self._events: Any = None
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._told = deque[Future[None]]()
        self._step = 0
        self._metrics: Any = None
        self._timing: Any = None
        self._lock: Any = None
        self.resumed, self.changed = False, list[str]()
        opened = False
        try:
            if hosts.writes():
                self._open({"config": config, "fingerprints": fingerprints or {}, **environment()}, ignore, fresh)
            opened = True
        finally:
            if not opened:
                self.close()
            agreed = hosts.agreed(opened)
        if not agreed:
            raise RunError(f"process 0 could not open {self.folder}, and says why")

    def _open(self, asked: dict[str, Any], ignore: Collection[str], fresh: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        if fresh:
            self._forget()
        asked = json.loads(json.dumps(asked, allow_nan=False))
        path = self.folder / "config.json"
        self.resumed = path.exists()
        if self.resumed:
            try:
                began = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise RunError(f"{path} is no whole JSON ({error}): start anew with --no-resume, or under another name "
                               f"or seed") from error
            self.changed = _compare(began, asked, {f"config.{key}" for key in ignore}, path)
        else:
            write_json(path, asked)
        self._metrics = (self.folder / "metrics.jsonl").open("ab")
        self._timing = (self.folder / "timing.jsonl").open("a")

    @property
    def finished(self) -> bool:
        """Whether `finish` was called, in this process or an earlier one; of several processes, all must ask."""
        return bool(hosts.agreed((self.folder / "summary.json").exists()))

    @property
    def checkpoints(self) -> Path:
        """Where the run's `Checkpoints` live."""
        return self.folder / "checkpoints"

    def rewind(self, step: int) -> None:
        """Cuts metrics.jsonl behind the last line of `step`, the step of the restored checkpoint (0: start over).

        A torn last line goes too. Call it once after restoring, before the first `log`.
        """
        self._step = step
        if self._metrics is None:
            return
        with (self.folder / "metrics.jsonl").open("r+b") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                end += len(line)
            file.truncate(end)
        self._tell(lambda events: None, purge=step + 1)

    def log(self, step: int, values: Mapping[str, Any], *, prefix: str = "") -> None:
        """Appends ``{"step": step, prefix + name: value, ...}`` to metrics.jsonl (flushed) and to tensorboard.

        values: scalars (python, numpy, JAX) or strings, nothing that depends on the clock; NaN and infinities are
        written as null. Log a step before saving its checkpoint: only then is the line sure to outlive a kill.
        """
        if step < self._step:
            raise ValueError(f"metrics of step {step} after those of step {self._step}: rewind({step}) after a restore")
        self._step = step
        row = {prefix + name: _plain(value) for name, value in values.items()}
        if self._metrics is None:
            return
        self._metrics.write((json.dumps({"step": step, **row}, allow_nan=False) + "\n").encode())
        self._metrics.flush()
        self._scalars(step, row)

    def log_time(self, step: int, values: Mapping[str, Any]) -> None:
        """As `log`, for seconds, examples per second and the like: to timing.jsonl, which no resume cuts."""
        row = {name: _plain(value) for name, value in values.items()}
        if self._timing is None:
            return
        self._timing.write(json.dumps({"step": step, **row}) + "\n")
        self._timing.flush()
        self._scalars(step, {f"time/{name}": value for name, value in row.items()})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, atomically. The last thing a run does."""
        if hosts.writes():
            write_json(self.folder / "summary.json", summary)

    def close(self) -> None:
        """Closes the files and lets the next writer in; raises what went wrong with tensorboard's."""
        try:
            self._behind.shutdown()
            for told in self._told:
                told.result()
        finally:
            for file in (self._events, self._metrics, self._timing, self._lock):
                if file is not None:
                    file.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell(self, what: Callable[[Any], None], purge: int | None = None) -> None:
        """`what` of tensorboard's writer, in a thread, in order: to import tensorboardX takes seconds where PyTorch is
        installed, in which programs compile and train."""

        def told() -> None:
            if self._events is None:
                from tensorboardX import SummaryWriter

                self._events = SummaryWriter(str(self.folder), purge_step=purge, filename_suffix=f".{os.getpid()}")
            what(self._events)

        if self._tensorboard:
            while self._told and self._told[0].done():
                self._told.popleft().result()
            self._told.append(self._behind.submit(told))

    def _scalars(self, step: int, row: Mapping[str, Any]) -> None:
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float)}

        def add(events: Any) -> None:
            for name, value in scalars.items():
                events.add_scalar(name, value, step)

        self._tell(add)

    def _forget(self) -> None:
        for path in [self.folder / name for name in _OWN] + list(self.folder.glob("events.*")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class Stop:
    """Set by a signal, read by the loop. signal: its name, '' before it came. Truthy once it came."""

    signal: str = ""

    def now(self) -> bool:
        """Whether to save and leave at this step. With several processes all ask at every step, and all leave at the
        same one."""
        if hosts.leaving():
            self.signal = "a preemption notice"
        return bool(self)

    def __bool__(self) -> bool:
        return bool(self.signal)


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Inside, SIGTERM and SIGINT only set the flag: ``if stop: save and raise SystemExit(EXIT_INTERRUPTED)``.

    A second SIGINT raises KeyboardInterrupt. For the main thread. With several processes SIGTERM is JAX's preemption
    notice to all of them, see `Stop.now`, and SIGINT is as ever.
    """
    stop = Stop()

    def note(number: int, _: Any) -> None:
        if number == signal.SIGINT and stop:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number).name

    ours = () if hosts.several() else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in ours}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def environment() -> dict[str, Any]:
    """Versions, devices and git revision (None outside a repository; '-dirty' behind it if files were changed)."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    first = jax.devices()[0]
    devices = {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}
    return {"versions": versions, "devices": devices, "git": _git()}


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that `path` holds either its old content or all of the new one, also after a crash."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _lock(folder: Path) -> Any:
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise RunError(f"{folder} is in use by process {holder}: wait for it, or choose another folder") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _compare(began: Any, asked: Any, ignore: Collection[str], path: Path) -> list[str]:
    """Lines for what differs harmlessly; raises RunError for the rest."""
    old, new = _flat(began), _flat(asked)
    differ = [key for key in {**old, **new} if old.get(key, "absent") != new.get(key, "absent") and key not in ignore]
    lines = {key: f"{key}: {old.get(key, 'absent')!r} then, {new.get(key, 'absent')!r} now" for key in differ}
    fatal = [line for key, line in lines.items() if key.startswith(("config.", "fingerprints."))]
    if fatal:
        way_out = "restore them to resume it, or start a new run (another name or seed, or --no-resume)"
        raise RunError("\n  ".join([f"{path} is of a run with other settings:", *fatal, way_out]))
    return list(lines.values())


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else name).items()}


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _git() -> str | None:
    here = Path(__file__).resolve()
    ask = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*ask, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        describe = [*ask, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
