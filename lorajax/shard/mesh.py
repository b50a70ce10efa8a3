"""One description of a device mesh, from a laptop to a pod: how many devices each named axis has."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("trial", "data", "fsdp", "tensor")
"""Outermost first, so that `tensor`, which communicates most, joins neighbouring devices. trial: runs that share
nothing. data: rows of a batch. fsdp: rows of a batch, and a part of every weight, gathered where it is used. tensor:
columns or rows of a weight, which stay where they are."""
BATCH = ("data", "fsdp")
"""The axes over which the rows of a batch are spread."""


class MeshError(ValueError):
    """Sizes that do not fit the devices, or an array that does not fit the sizes."""


def sizes_of(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Devices of every axis of `AXES`: `sizes` with 1 for what it leaves out, -1 resolved to the rest of `count`.

    Raises MeshError for another axis, for two -1, and for sizes that do not fit.
    """
    for name, size in sizes.items():
        if name not in AXES:
            near = difflib.get_close_matches(name, AXES, n=1, cutoff=0.0)[0]
            raise MeshError(f"a mesh has no axis {name!r}: did you mean {near!r}? There are: {', '.join(AXES)}")
        if not isinstance(size, int | np.integer) or (size < 1 and size != -1):
            raise MeshError(f"mesh.{name}={size!r} is no number of devices: give 1 or more, or -1 for the rest")
    full = {name: int(sizes.get(name, 1)) for name in AXES}
    open_ = [name for name, size in full.items() if size == -1]
    known = math.prod(size for size in full.values() if size != -1)
    said = " x ".join(f"{name} {size}" for name, size in full.items() if size != 1) or "data 1"
    if len(open_) > 1:
        raise MeshError(f"mesh {said}: only one axis can be -1, the rest of the devices; give {open_[0]} a size")
    if open_:
        if count % known:
            raise MeshError(f"mesh {said}: {known} does not divide {count} devices; the nearest that does is "
                            f"{_nearest_divisor(known, count)}")
        full[open_[0]] = count // known
    elif known > count:
        raise MeshError(f"mesh {said} takes {known} devices and there are {count}: make an axis smaller, or -1 for "
                        f"what is there")
    return full


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of `sizes` (see `sizes_of`) over `devices`, by default all; None if that is one device of one process.

    A mesh smaller than the machine takes the first devices. With several processes it must take all of them: MeshError
    says which sizes would.
    """
    there = list(jax.devices() if devices is None else devices)
    full = sizes_of(sizes, len(there))
    count = math.prod(full.values())
    processes = len({device.process_index for device in there})
    if processes > 1 and count < len(there):
        raise MeshError(f"the mesh takes {count} of {len(there)} devices, and {processes} processes must use all of "
                        f"theirs: make one axis -1, for example --config.mesh.data=-1")
    if count == 1:
        return None
    shape, types = tuple(full[name] for name in AXES), (AxisType.Auto,) * len(AXES)
    if count < len(there) or devices is not None:
        return Mesh(np.asarray(there[:count]).reshape(shape), AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, axis_types=types)  # lays axes along the machine's own topology


def _nearest_divisor(size: int, count: int) -> int:
    return min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - size))
