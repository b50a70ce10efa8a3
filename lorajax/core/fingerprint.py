"""A cheap content fingerprint of a parameter tree: which base was an adapter trained on?"""

from __future__ import annotations

import hashlib
import math
import sys
from typing import Any

import jax
import numpy as np

SAMPLES = 1024
"""Elements read per leaf; a leaf of at most this many elements is read whole."""
FETCHED = 1 << 22
"""A leaf of at most this many elements is sampled on the host: to fetch it takes less than to compile a program that
samples it on its device, one for each shape."""
_GOLDEN = 0x9E3779B97F4A7C15


def fingerprint(tree: Any) -> str:
    """Fingerprint of a pytree of arrays: 'lj1:' and 32 hex digits.

    The sha256 of, for every leaf in order of its path: path ('params/layer_0/...'), shape, dtype, and the bytes of up
    to `SAMPLES` elements, spread over the leaf by multiples of the golden ratio (so no row or column length aliases).
    The same on every device, host and JAX version; numpy and JAX arrays of equal content agree; large device
    arrays are sampled on their device. None leaves do not count. Cost: a few milliseconds per leaf, whatever its size.

    It tells bases apart and notices a leaf that was trained, cast, quantised or re-initialised. It is not proof against
    a change to a few elements of a large leaf, nor against intent; a per-layer and a stacked tree of one model differ.
    Errors: TypeError for a leaf without shape and dtype.
    """
    digest = hashlib.sha256()
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"fingerprint takes arrays; {name!r} is a {type(leaf).__name__}")
        rows.append((name, leaf))
    for name, leaf in sorted(rows, key=lambda row: row[0]):
        header = f"{name}\0{'x'.join(map(str, leaf.shape))}\0{np.dtype(leaf.dtype).name}\0"
        digest.update(header.encode())
        digest.update(_sample(leaf))
    return "lj1:" + digest.hexdigest()[:32]


def _sample(leaf: Any) -> bytes:
    """Little-endian bytes of the sampled elements."""
    size = math.prod(leaf.shape)
    here = getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated
    if size <= SAMPLES and here:
        elements = np.asarray(leaf).reshape(-1)
    else:
        few = size <= SAMPLES  # a part of it may be on another host: read it as a large one is
        flat = list(range(size)) if few else [((k * _GOLDEN) % 2**64 * size) >> 64 for k in range(SAMPLES)]
        index = tuple(axis.astype(np.int32) for axis in np.unravel_index(flat, leaf.shape))
        sharding = getattr(leaf, "sharding", None)
        if here and size <= FETCHED:
            elements = np.asarray(leaf)[index]
        elif isinstance(sharding, jax.sharding.NamedSharding):  # also on an explicit-sharding mesh, on several hosts
            everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
            elements = np.asarray(leaf.at[index].get(out_sharding=everywhere))
        else:
            elements = np.asarray(leaf[index])
    if elements.dtype.byteorder == ">" or (elements.dtype.byteorder == "=" and sys.byteorder == "big"):
        elements = elements.byteswap()
    return elements.tobytes()
