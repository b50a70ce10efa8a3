"""The adapters in a folder, as they are there at the moment: what is put there is found, what is taken away is gone.

``<folder>/<name>/`` is a PEFT folder, or one of `lorajax.io.adapter` (a run's ``adapter/``); or it holds versions, as
`lorajax.library.AdapterLibrary` writes them. Put a folder there by renaming it, so that nobody sees half of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.adapt import adapt as make_adapt
from lorajax.core.sites import Sites
from lorajax.io import adapter, peft
from lorajax.io.peft_names import Names
from lorajax.io.tensors import AdapterError, read_json
from lorajax.library import AdapterLibrary, Entry, is_name
from lorajax.variants.lora import LoRA

FILES = ("adapter_config.json", "adapter_model.safetensors", adapter.RECORD, adapter.OWN)


class Found(NamedTuple):
    """An adapter as it is now; the same folder written again is another. base: of a library's version, its
    fingerprint, else ''. version: a library's, else when the files were written, in nanoseconds."""

    name: str
    version: int
    base: str
    folder: Path


class Shelf:
    """folder: of adapters. sites, params: the base. names: PEFT's for it (`lorajax.models.adapter_names`). base: its
    fingerprint, None for that of `params`."""

    def __init__(self, folder: str | os.PathLike[str], sites: Sites, params: Any, names: Names, *,
                 base: str | None = None):
        self.folder, self.names = Path(folder), names
        form = make_adapt(sites, [("|".join(sites), LoRA(rank=1))])
        self.library = AdapterLibrary(folder, form, params, base=base)

    def list(self) -> Sequence[Found]:
        """The newest version of every adapter, by name."""
        plain = [self._plain(folder) for folder in sorted(self.folder.glob("[!.]*"))]
        return sorted([found for found in plain if found] + [_found(entry) for entry in self.library.search()])

    def find(self, name: str) -> Found:
        """The adapter 'name', its newest version, or 'name@version'. ValueError naming those there are where it is none
        of them, AdapterError for a damaged record."""
        found = self._plain(self.folder / name) if is_name(name) else None
        if found is not None:
            return found
        try:
            return _found(self.library.find(name))
        except AdapterError:
            raise
        except ValueError:
            there = ", ".join(found.name for found in self.list()[:20])
            raise ValueError(f"no adapter {name!r}; there are: {there or 'none'}") from None

    def read(self, found: Found) -> tuple[Adapt, Mapping[str, Any], Frozen]:
        """(adapt, trainable, frozen). FileNotFoundError for one that is gone, ValueError for one that is damaged or was
        trained on another base, as far as its files say: PEFT's have no fingerprint, only names and shapes."""
        form, params, folder = self.library.adapt, self.library.params, found.folder
        if not folder.is_dir():
            raise FileNotFoundError(f"adapter {found.name!r} was removed")
        if found.base:
            return self.library.read(Entry(found.name, found.version, found.base, {}, folder))
        if (folder / adapter.RECORD).is_file():
            made = make_adapt(form.sites, adapter.rules(folder), form.dtype)
            whole = read_json(folder / adapter.RECORD).get("base") == self.library.base
            return made, *adapter.load(folder, made, params, base=self.library.base if whole else None)
        file = peft.read(folder, form.sites, self.names)
        made = make_adapt(form.sites, file.rules, form.dtype)
        return made, *peft.fill(file, *made.init(jax.random.key(0), params))

    def _plain(self, folder: Path) -> Found | None:
        """A folder without versions, which is not being written (`lorajax.io.folders`)."""
        if folder.suffix in (".part", ".old"):
            return None
        files = [folder / name for name in FILES]
        try:
            times = [file.stat().st_ctime_ns for file in files if file.is_file()]  # a copy may keep st_mtime
        except FileNotFoundError:  # removed at this moment
            return None
        return Found(folder.name, max(times), "", folder) if times else None


def _found(entry: Entry) -> Found:
    return Found(entry.name, entry.version, entry.base, entry.folder)
