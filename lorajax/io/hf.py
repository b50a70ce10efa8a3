"""A pretrained model's folder in the Hugging Face layout: config.json and safetensors, one file or sharded.

Tensors are read one at a time, when they are asked for. Pickled weights (`.bin`, `.pt`) are refused: loading them can
run code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with numpy, for safetensors)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint(NamedTuple):
    """config: the dictionary of config.json; tensors: name -> array, read lazily."""

    config: dict[str, Any]
    tensors: Tensors


class Tensors(Mapping[str, np.ndarray]):
    """Tensors of one or more safetensors files as a read-only mapping; `tensors[name]` reads that tensor alone.

    bfloat16 and float8 tensors have the `ml_dtypes` numpy dtypes.
    """

    def __init__(self, where: Mapping[str, Path]) -> None:
        self._where = dict(where)

    def __getitem__(self, name: str) -> np.ndarray:
        with safe_open(self._where[name], framework="np") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`tensors[name][index]`, of which only that part is read."""
        with safe_open(self._where[name], framework="np") as file:
            return file.get_slice(name)[index]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        with safe_open(self._where[name], framework="np") as file:
            return tuple(file.get_slice(name).get_shape())


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Opens a folder with config.json and model.safetensors, or model.safetensors.index.json and its shards.

    Reads the config and the headers; checks that each file is whole and that index and shards name the same tensors.
    Errors: FileNotFoundError (no folder, no config, no weights, a shard missing) and ValueError (pickled weights, a
    truncated or damaged file, a shard outside the folder, index and shards that disagree); each names the file and
    the way out. A hub id is not a folder: `lorajax.io.assets.resolve` turns names into folders.
    """
    folder = Path(folder)
    if folder.suffix in PICKLES:
        raise ValueError(_pickled(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; a model is a folder with {CONFIG} and {WEIGHTS}")
    config_file = folder / CONFIG
    if not config_file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {CONFIG}; it holds {_listing(folder)}")
    config = _read_json(config_file)
    if (folder / INDEX).is_file():
        return Checkpoint(config, Tensors(_sharded(folder)))
    weights = folder / WEIGHTS
    if weights.is_file():
        return Checkpoint(config, Tensors(dict.fromkeys(_names(weights), weights)))
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ValueError(_pickled(pickles[0]))
    raise FileNotFoundError(f"{str(folder)!r} has neither {WEIGHTS} nor {INDEX}; it holds {_listing(folder)}")


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes a folder that `open_checkpoint` and `transformers` load; all of it appears at once, or nothing.

    config: the dictionary of config.json. tensors: name -> array (`lorajax.models.params_to_hf`), read one shard at a
    time; shards of at most `shard_bytes` (a larger tensor has one to itself) where one file would be larger.
    Error: FileExistsError if the folder is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{str(folder)!r} exists already: remove it, or save elsewhere")
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in tensors:
        more = int(np.asarray(tensors[name]).nbytes)
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + more, total + more
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    where: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: np.ascontiguousarray(tensors[name]) for name in names}
        save_file(arrays, part / file, metadata={"format": "pt"})  # transformers asks for this word
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (part / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (part / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.rename(part, folder)
    return folder


def _sharded(folder: Path) -> dict[str, Path]:
    """Tensor name -> shard, with index and shards checked against each other."""
    index = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{str(folder / INDEX)!r} has no 'weight_map' (tensor name -> file name)")
    held: dict[str, str] = {}
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{str(folder / INDEX)!r} names the shard {shard!r}, which is not a safetensors file there"
            )
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"shard {shard!r} of {INDEX} is missing in {str(folder)!r}: download it again")
        for name in _names(folder / shard):
            if name in held:
                raise ValueError(f"tensor {name!r} is in two shards of {str(folder)!r}: {held[name]!r} and {shard!r}")
            held[name] = shard
    wrong = sorted(name for name in held.keys() | index.keys() if held.get(name) != index.get(name))
    if wrong:
        raise ValueError(f"{INDEX} and the shards of {str(folder)!r} disagree on {len(wrong)} tensors: {wrong[:8]}")
    return {name: folder / shard for name, shard in index.items()}


def _names(file: Path) -> list[str]:
    """Names in a safetensors file; opening it checks the header against the file's size."""
    try:
        with safe_open(file, framework="np") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise ValueError(
            f"{str(file)!r} ({size} bytes) is truncated or not safetensors ({error}): download it again"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds a {type(content).__name__}, not an object")
    return content


def _pickled(file: Path) -> str:
    return (
        f"{str(file)!r} is a pickle, and loading one can run code: refused. Use a revision of the model that has "
        f"{WEIGHTS}, or convert it where you trust it: "
        f"safetensors.torch.save_file(torch.load(file, weights_only=True), {WEIGHTS!r})"
    )


def _listing(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())[:12]
