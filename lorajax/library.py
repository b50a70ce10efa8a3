"""Many adapters of one base in folders, and the few that are in use on the device, in one form: one program for all.

    library = AdapterLibrary("adapters", adapt, params, budget=1 << 30)   # adapt: e.g. LoRA(rank=16) at all targets
    library.add("sst2", trained, trainable, frozen, metrics={"accuracy": 0.91})
    library.prefetch("rte")                                               # in the background
    logits = step(library.get("sst2"), library.frozen, batch)             # jitted once, whatever the adapter

On disk an adapter is ``<folder>/<name>/<version>/``, a folder of `lorajax.io.adapter` with its metrics beside it. It
appears by one rename when it is complete, so no reader, in this process or another, sees half of one; a version never
changes afterwards. Several processes may read and write at once.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.compose.gathered import Pair, stacked
from lorajax.compose.plain import as_lora
from lorajax.compose.svd import compress
from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.adapt import adapt as make_adapt
from lorajax.core.fingerprint import fingerprint
from lorajax.core.sites import by_path
from lorajax.core.variant import Full, FullAdapter
from lorajax.io import adapter
from lorajax.io.peft_names import Names
from lorajax.io.tensors import AdapterError, read_json
from lorajax.variants.lora import LoRA, LoRAAdapter

ENTRY = "lorajax_library.json"
GONE, PART = ".gone-", ".part-"
ABANDONED = 24 * 3600
"""Seconds after which a version that was never finished is a killed writer's, and goes with the next `add`."""
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
LONGEST = 200
"""Bytes of a name: file systems take 255, and what is written beside it has a longer one."""


def is_name(name: str) -> bool:
    """Whether a folder may be called so."""
    return NAME.fullmatch(name) is not None and len(name.encode()) <= LONGEST


class Entry(NamedTuple):
    """One version of one adapter. base: fingerprint of what it was trained on. metrics: as they were given."""

    name: str
    version: int
    base: str
    metrics: Mapping[str, Any]
    folder: Path

    @property
    def id(self) -> str:
        """name@version."""
        return f"{self.name}@{self.version}"


class _Held(NamedTuple):
    """An adapter on the device, or on its way there."""

    future: Future[dict[str, Any]]
    size: int


class AdapterLibrary:
    """See the module. Its methods may be called from several threads.

    folders: one or several; `add` writes to the first. adapt: the form that all adapters are given, LoRA of the largest
    rank at every site that any of them adapts, `Full` where any trains a weight. params: the base. budget: bytes of
    adapters on the device, None for no limit. base: fingerprint of the base, None for that of `params`. truncate: cut
    larger ranks by SVD in place of refusing them (a DoRA's or LoHa's update has any rank up to that of the weight).
    workers: background loads at a time.

    Raises ValueError for a form that has other variants than LoRA and Full, or LoRA with a start that changes weights.
    """

    def __init__(self, folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], adapt: Adapt, params: Any, *,
                 budget: int | None = None, base: str | None = None, truncate: bool = False, workers: int = 2):
        self.folders = [Path(f) for f in ([folders] if isinstance(folders, str | os.PathLike) else folders)]
        for path, choice in adapt.plan.items():
            if not isinstance(choice, Full) and (not isinstance(choice, LoRA) or choice.initial.subtracts):
                raise ValueError(f"{path} has {choice}: the common form of a library is LoRA(rank=<the largest>), and "
                                 f"Full() where an adapter trains a weight")
        self.adapt, self.params, self.truncate = adapt, params, truncate
        self.base = base or fingerprint(params)
        self.frozen = adapt.frozen(params, {})
        self.size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(adapt.shapes[0]))
        if budget is not None and budget < self.size:
            raise ValueError(f"budget={budget} bytes do not hold one adapter of {self.size} bytes: raise it, or lower "
                             f"the rank of the common form")
        self.budget = budget
        self._lock = threading.Lock()
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the least recently used first
        self._pinned: set[str] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="adapters")

    # On disk

    def list(self) -> Sequence[Entry]:
        """Every version of every adapter that is complete, by name and version. One whose record is damaged is left
        out; `find` says so of it."""
        found: dict[tuple[str, int], Entry] = {}
        for folder in reversed(self._versions("[!.]*")):  # the first folder wins
            with contextlib.suppress(AdapterError):
                if (entry := self._entry(folder)) is not None:
                    found[entry.name, entry.version] = entry
        return [found[key] for key in sorted(found)]

    def search(self, pattern: str = "*", where: Callable[[Entry], bool] | None = None) -> Sequence[Entry]:
        """The newest version of each adapter of this base whose name fits the shell pattern and that `where` takes."""
        newest = {e.name: e for e in self.list() if e.base == self.base}
        return [e for e in newest.values() if fnmatch.fnmatchcase(e.name, pattern) and (where is None or where(e))]

    def find(self, name: str) -> Entry:
        """The entry of 'name@version', or of the newest version of 'name'. ValueError naming the nearest if none, and
        AdapterError where its record is damaged; other adapters are not read."""
        wanted, _, version = name.partition("@")
        versions = self._versions(wanted) if is_name(wanted) else []
        for folder in sorted(versions, key=lambda folder: -int(folder.name)):
            if version in ("", folder.name) and (entry := self._entry(folder)) is not None:
                return entry
        entries = self.list()
        near = difflib.get_close_matches(name, [e.id for e in entries], n=1, cutoff=0.0)
        there = f"the nearest is {near[0]!r}" if near else "there is none yet"
        raise ValueError(f"no adapter {name!r} in {', '.join(map(str, self.folders))}: {there}")

    def add(self, name: str, adapt: Adapt, trainable: Mapping[str, Any], frozen: Any, *,
            metrics: Mapping[str, Any] | None = None, names: Names | None = None) -> Entry:
        """Writes a new version and returns its entry. adapt, trainable, frozen: as trained, any variant; names: as in
        `adapter.save`. metrics: what JSON can hold; arrays become numbers and lists. ValueError for a name that is no
        name of a folder, and for other metrics."""
        if not is_name(name):
            raise ValueError(f"name={name!r}: letters, digits and '_', '.', '+', '-', a letter or digit first, at most "
                             f"{LONGEST} bytes")
        told = _plain(metrics or {})
        home = self.folders[0] / name
        for left in home.glob(f"{PART}*"):
            with contextlib.suppress(FileNotFoundError):  # its writer has just renamed it
                if left.stat().st_mtime < time.time() - ABANDONED:
                    shutil.rmtree(left, ignore_errors=True)
        part = home / f"{PART}{uuid.uuid4().hex}"
        try:
            adapter.save(part, adapt, trainable, frozen, base=self.base, names=names)
            (part / ENTRY).write_text(json.dumps({"base": self.base, "metrics": told}, indent=1) + "\n")
            while True:
                version = max(self._last(folder / name) for folder in self.folders) + 1
                try:
                    os.rename(part, home / str(version))  # refused where another writer was first
                except OSError:
                    if not (home / str(version)).exists():
                        raise
                else:
                    break
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return Entry(name, version, self.base, told, home / str(version))

    def remove(self, name: str) -> None:
        """Takes 'name@version' (or the newest version of 'name') off the disk and the device. Its number is not given
        again, so what another process holds under it is never another adapter."""
        entry = self.find(name)
        gone = entry.folder.with_name(f"{GONE}{entry.version}")
        gone.mkdir(exist_ok=True)
        os.rename(entry.folder, gone / "adapter")
        shutil.rmtree(gone / "adapter", ignore_errors=True)
        with self._lock:
            self._pinned.discard(entry.id)
            self._held.pop(entry.id, None)

    # On the device

    def get(self, name: str) -> dict[str, Any]:
        """The adapter as `trainable` of the common form, on the device; loaded now if it is not there yet.

        Raises ValueError for an unknown name, and AdapterMismatch for another base, for sites that the common form does
        not adapt and ranks above its own.
        """
        return self.prefetch(name).result()

    def prefetch(self, name: str) -> Future[dict[str, Any]]:
        """Starts to load it, if it is not there, and returns at once; several calls load it once."""
        entry = self.find(name)
        with self._lock:
            held = self._held.get(entry.id)
            if held is None or (held.future.done() and held.future.exception() is not None):
                self._make_room(entry.id)
                held = _Held(self._pool.submit(self._load, entry), self.size)
                self._held[entry.id] = held
            self._held.move_to_end(entry.id)
        return held.future

    def pin(self, name: str) -> None:
        """Loads it and keeps it on the device."""
        entry = self.find(name)
        with self._lock:
            self._pinned.add(entry.id)
        try:
            self.get(entry.id)
        except Exception:
            self.unpin(entry.id)
            raise

    def unpin(self, name: str) -> None:
        """Lets 'name@version', or every version of 'name', go where others need its place."""
        with self._lock:
            self._pinned -= {id for id in self._pinned if name in (id, id.rpartition("@")[0])}

    @property
    def on_device(self) -> tuple[str, ...]:
        """What is held, the least recently used first."""
        with self._lock:
            return tuple(self._held)

    def close(self) -> None:
        """Waits for loads under way."""
        self._pool.shutdown()

    def _make_room(self, wanted: str) -> None:
        if self.budget is None:
            return
        self._held.pop(wanted, None)
        while (sum(held.size for held in self._held.values()) + self.size) > self.budget:
            out = next((id for id in self._held if id not in self._pinned), None)
            if out is None:
                raise ValueError(f"no room for {wanted}: {len(self._held)} pinned adapters of {self.size} bytes fill "
                                 f"the budget of {self.budget}: unpin one, or raise the budget")
            del self._held[out]  # its arrays live on where a caller still uses them

    def read(self, entry: Entry) -> tuple[Adapt, dict[str, Any], Frozen]:
        """(adapt, trainable, frozen) as it was trained, and nothing is kept. AdapterMismatch for another base."""
        if entry.base != self.base:
            raise adapter.AdapterMismatch(f"{entry.id} was trained on a base with fingerprint {entry.base}, this "
                                          f"library's is {self.base}: open it with the base it was trained on")
        made = make_adapt(self.adapt.sites, adapter.rules(entry.folder), self.adapt.dtype)
        return made, *adapter.load(entry.folder, made, self.params, base=self.base)

    def _load(self, entry: Entry) -> dict[str, Any]:
        return jax.device_put(self._common(entry, as_lora(*self.read(entry)).trainable))

    def _common(self, entry: Entry, trained: Mapping[str, Any]) -> dict[str, Any]:
        """In the common form: zeros where the adapter has nothing, the base where it trains no weight."""
        other = [p for p, x in trained.items()
                 if p not in self.adapt.plan or isinstance(self.adapt.plan[p], Full) != isinstance(x, FullAdapter)]
        if other:
            raise adapter.AdapterMismatch(f"{entry.id} adapts {other[0]}, and the common form of this library does "
                                          f"not, or otherwise: open the library with a form that covers it")
        base = by_path(self.params)[0]
        filled: dict[str, Any] = {}
        for path, like in self.adapt.shapes[0].items():
            choice, own = self.adapt.plan[path], trained.get(path)
            if isinstance(choice, Full):
                filled[path] = FullAdapter(jnp.asarray(base[path] if own is None else own.w, like.w.dtype))
                continue
            assert isinstance(choice, LoRA)
            if own is None:
                filled[path] = LoRAAdapter(*[jnp.zeros(x.shape, x.dtype) for x in like])
                continue
            if self.truncate and own.A.shape[-1] > choice.rank:
                flat = [x.reshape(-1, *x.shape[-2:]) for x in map(np.asarray, own)]
                pairs = [compress(Pair(a, b), choice.rank) for a, b in zip(*flat, strict=True)]
                own = LoRAAdapter(*stacked(self.adapt.sites[path], pairs))
            more = choice.rank - own.A.shape[-1]
            if more < 0:
                raise adapter.AdapterMismatch(f"{entry.id} has rank {own.A.shape[-1]} at {path}, the common form of "
                                              f"this library {choice.rank}: open it with that rank, or truncate=True")
            lead = [(0, 0)] * (own.A.ndim - 2)
            b = jnp.pad(own.B, [*lead, (0, more), (0, 0)]) / jnp.float32(choice.scale)
            filled[path] = LoRAAdapter(jnp.pad(own.A, [*lead, (0, 0), (0, more)]).astype(like.A.dtype),
                                       b.astype(like.B.dtype))
        return filled

    def _versions(self, name: str) -> Sequence[Path]:
        """The folders of all versions of a name, or of those that fit a shell pattern."""
        found = [file.parent for folder in self.folders for file in folder.glob(f"{name}/[0-9]*/{ENTRY}")]
        return [folder for folder in found if folder.name.isdigit()]

    @staticmethod
    def _last(home: Path) -> int:
        """The largest version that is or was there, 0 for none."""
        names = [x.name.removeprefix(GONE) for x in home.glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    @staticmethod
    def _entry(folder: Path) -> Entry | None:
        """None for one that was removed while it was read."""
        try:
            row = read_json(folder / ENTRY)
            if not row.keys() >= {"base", "metrics"}:
                raise AdapterError(f"{str(folder / ENTRY)!r} has no base or no metrics: write the adapter again")
        except AdapterError:
            if folder.exists():
                raise
            return None
        return Entry(folder.parent.name, int(folder.name), row["base"], row["metrics"], folder)


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a file will give back: numbers of JAX and NumPy as Python's."""
    def number(x: Any) -> Any:
        if isinstance(x, jax.Array | np.ndarray | np.generic):
            return np.asarray(x).tolist()
        raise ValueError(f"metrics hold a {type(x).__name__}, which JSON cannot: give numbers, strings, lists or dicts")

    return json.loads(json.dumps(dict(metrics), default=number))
