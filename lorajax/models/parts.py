"""A parameter from a checkpoint straight onto a mesh: every process reads what its devices hold, a part at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

Index = tuple[slice, ...]


def read_part(tensors: Mapping[str, Any], name: str, form: str, index: Index) -> np.ndarray:
    """`to_ours(tensors[name], form)[index]`, of which only that part is read where the mapping can (`tensors.part`).

    form: see `lorajax.models.checkpoint.Tensor`.
    """
    order: tuple[int, ...]
    if form == "linear":
        theirs, order = index[::-1], (1, 0)
    elif form == "conv":
        n = len(index)
        theirs, order = (index[-1], index[-2], *index[:-2]), (*range(2, n), 1, 0)
    else:
        theirs, order = index, tuple(range(len(index)))
    lazy = getattr(tensors, "part", None)
    part = lazy(name, theirs) if callable(lazy) else np.asarray(tensors[name])[theirs]
    return part.transpose(order)


def stacked_part(tensors: Mapping[str, Any], names: Sequence[Any], form: str, index: Index) -> np.ndarray:
    """The same of a parameter with a leading axis for each level of nesting in `names`."""
    if isinstance(names, str):
        return read_part(tensors, names, form, index)
    return np.stack([stacked_part(tensors, name, form, index[1:]) for name in names[index[0]]])


def onto(sharding: jax.sharding.Sharding, shape: tuple[int, ...], dtype: Any, read: Any) -> jax.Array:
    """The global array whose parts are ``read(index)``, of `shape` and `dtype`. At most one part is in host memory."""
    holders: dict[Any, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        full = tuple(slice(*s.indices(n)) for s, n in zip(index or (), shape, strict=True))
        holders.setdefault(tuple((s.start, s.stop) for s in full), []).append((device, full))
    pieces = []
    for held in holders.values():
        part = np.asarray(read(held[0][1])).astype(dtype)
        copies = [jax.device_put(part, device) for device, _ in held]
        jax.block_until_ready(copies)
        pieces += copies
        del part
    if not pieces:
        raise ValueError(f"no device of this process holds a part of an array of {math.prod(shape)} elements")
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)
