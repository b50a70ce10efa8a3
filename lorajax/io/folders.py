"""A folder that is complete or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to write into; on leaving it takes the place of `folder`, unless an error left it."""
    folder = Path(folder)
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if folder.exists():  # a folder cannot be replaced in one move; the new one is complete before the old one goes
        os.rename(folder, old)
    os.rename(part, folder)
    shutil.rmtree(old, ignore_errors=True)
