"""Machines by name: how many devices, how much memory, what peak rate. From the vendors' data sheets, not measured."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from lorajax.shard.mesh import MeshError


class Machine(NamedTuple):
    """devices: as JAX counts them. memory: bytes of one. peak: bfloat16 FLOP/s of one, dense."""

    name: str
    devices: int
    memory: float
    peak: float


CHIPS: dict[str, tuple[float, float, int]] = {
    "v4": (32e9, 275e12, 2), "v5e": (16e9, 197e12, 1), "v5p": (95e9, 459e12, 2), "v6e": (32e9, 918e12, 1),
    "A100": (80e9, 312e12, 1), "H100": (80e9, 989e12, 1), "H200": (141e9, 989e12, 1), "B200": (180e9, 2250e12, 1),
}  # fmt: skip
"""Bytes, FLOP/s, and how often the number in a slice's name counts a chip: `v5p-64` has 64 cores, so 32 chips."""
NAMED = ("1xH100", "8xH100", "8xH200", "v5e-4", "v5e-16", "v5e-256", "v6e-8", "v5p-8", "v5p-64", "v5p-128")
"""What a plan that does not fit is compared with."""


def machine(name: str) -> Machine:
    """``8xH100`` is GPUs (any count), ``v5p-64`` a TPU slice. MeshError for another chip."""
    gpus, slice_ = re.fullmatch(r"(\d+)x(\w+)", name), re.fullmatch(r"(v\d\w*)-(\d+)", name)
    chip, number = (gpus[2], gpus[1]) if gpus else (slice_[1], slice_[2]) if slice_ else (name, "0")
    if chip not in CHIPS or int(number) < 1 or int(number) % CHIPS[chip][2]:
        near = difflib.get_close_matches(name, NAMED, n=1, cutoff=0.0)[0]
        raise MeshError(f"no machine {name!r}: did you mean {near!r}? A machine is NxGPU or a TPU slice's name, of "
                        f"{', '.join(CHIPS)}")
    memory, peak, cores = CHIPS[chip]
    return Machine(name, int(number) // cores, memory, peak)
