"""Safetensors files of adapters, from anywhere: read with every byte of the header checked, written atomically.

The header is read here and not by the library: what a damaged or hostile file can do is then one error class, and
nothing is allocated that the file does not hold. Nothing unpickles.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

MAX_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


class AdapterError(ValueError):
    """Files of an adapter that cannot be used: damaged, of another format, or of another model than the one asked
    for. The message names the file, what is wrong and the way out."""


def read_tensors(file: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(name -> array, the file's own metadata) of a safetensors file.

    Raises AdapterError for anything that is not one, whole: a pickle, a header that is too long or not JSON, a name
    given twice, an unknown dtype, shapes and offsets that do not add up to the file's size.
    """
    file = Path(file)
    if file.suffix in PICKLES:
        raise AdapterError(f"{str(file)!r} is a pickle, and loading one can run code: refused. Convert it where you "
                           f"trust it: safetensors.torch.save_file(torch.load(file, weights_only=True), name)")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise AdapterError(f"{str(file)!r} cannot be read: {error}") from error
    try:
        return _parse(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{str(file)!r} ({len(data)} bytes) is damaged, or not safetensors: {error}. "
                           f"Download or write it again") from error


def write_tensors(file: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes name -> array; names in sorted order, so that equal content gives equal bytes."""
    arrays = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    save_file({name: x.copy() if x.base is not None else x for name, x in arrays.items()}, file, dict(metadata))


def read_json(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file. AdapterError if it is missing, no JSON or no object."""
    file = Path(file)
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{str(file)!r} is not JSON ({error}): download or write it again") from error
    except OSError as error:
        raise AdapterError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{str(file)!r} holds a {type(content).__name__}, not an object")
    return content


def _parse(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if len(data) < 8:
        raise ValueError("it is shorter than the length of a header")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise ValueError(f"its header would have {length} bytes")
    header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("its metadata is no table of strings")
    body, end, found = memoryview(data)[8 + length :], 0, {}
    for name, row in sorted(header.items(), key=_start):
        dtype, shape, first, last = _row(name, row)
        size = math.prod(shape) * dtype.itemsize
        if first != end or last != first + size or last > len(body):
            raise ValueError(f"tensor {name!r} of {size} bytes is said to lie at {first}..{last}, expected from {end}")
        found[name] = np.frombuffer(body[first:last], dtype).reshape(shape)
        end = last
    if end != len(body):
        raise ValueError(f"its tensors end at byte {end} of {len(body)}")
    return {name: found[name] for name in header}, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is in its header twice")
    return dict(pairs)


def _start(item: tuple[str, Any]) -> tuple[int, int]:
    _, _, first, last = _row(*item)
    return first, last


def _row(name: str, row: Any) -> tuple[np.dtype[Any], list[int], int, int]:
    """(dtype, shape, first, last) of one entry of the header, checked by type."""
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name!r} is not dtype, shape and data_offsets")
    if not isinstance(row["dtype"], str) or row["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {row['dtype']!r}; known are {', '.join(DTYPES)}")
    for key, count in (("shape", None), ("data_offsets", 2)):
        numbers = row[key]
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{key} of {name!r} is {numbers!r}, not a list of sizes")
        if len(numbers) != count and count is not None:
            raise ValueError(f"{key} of {name!r} has {len(numbers)} numbers")
    if len(row["shape"]) > 32:
        raise ValueError(f"tensor {name!r} has {len(row['shape'])} dimensions")
    return DTYPES[row["dtype"]], row["shape"], *row["data_offsets"]
