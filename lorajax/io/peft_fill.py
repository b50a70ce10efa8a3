"""What was read of a PEFT folder, put in place of an adapter's start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lorajax.core.adapt import Frozen
from lorajax.io.peft_read import Read
from lorajax.io.tensors import AdapterError


def fill(found: Read, trainable: Mapping[str, Any], frozen: Frozen) -> tuple[dict[str, Any], Frozen]:
    """`trainable, frozen` of `adapt.init`, with what was read in place of the start. What the file does not hold stays
    as `init` made it from the base (DoRA's norm of W, the start that PiSSA takes off again).

    Raises AdapterError for a path that is not adapted, another shape, or a base that the file contradicts.
    """
    trainable, aux = dict(trainable), dict(frozen.aux)
    for path, arrays in found.arrays.items():
        if path not in trainable:
            raise AdapterError(f"{path} is in the file, but no rule adapts it: use the rules that were read")
        for leaf, x in arrays.items():
            half = trainable if getattr(trainable[path], leaf, None) is not None else aux
            there = getattr(half.get(path), leaf, None)
            if there is None or there.shape != x.shape:
                raise AdapterError(f"{path}.{leaf} is {x.shape} in the file, asked for "
                                   f"{None if there is None else there.shape}: use the rules that were read")
            half[path] = half[path]._replace(**{leaf: jax.numpy.asarray(x, there.dtype)})
    for path, x in found.added.items():
        if path not in trainable or trainable[path].w.shape != x.shape:
            raise AdapterError(f"{path} is in the file, but no rule trains it: use the rules that were read")
        trainable[path] = trainable[path]._replace(w=trainable[path].w + jax.numpy.asarray(x, trainable[path].w.dtype))
    for path, x in found.scaled.items():
        if path not in trainable or trainable[path].w.shape != x.shape:
            raise AdapterError(f"{path} is scaled by the file, but no rule trains it: use the rules that were read")
        trainable[path] = trainable[path]._replace(w=trainable[path].w * jax.numpy.asarray(x, trainable[path].w.dtype))
    for path, w in found.base.items():
        if path in frozen.base and not _alike(np.asarray(frozen.base[path]), w):
            raise AdapterError(f"the file repeats the base's {path}, and this base has another one: load the base that "
                               f"the adapter was trained on (resized or trained embeddings belong to it)")
    frozen = frozen._replace(aux=aux)
    return trainable, _shared(found.shared, frozen) if found.shared or frozen.shared else frozen


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether they are the same but for the dtype that one of them was rounded to."""
    return np.array_equal(one.astype(other.dtype), other) or np.array_equal(one, other.astype(one.dtype))


def _shared(shared: Mapping[str, np.ndarray], frozen: Frozen) -> Frozen:
    """A slot reads the leading part of projections that were made for larger sites too."""
    if len(frozen.shared) != 1:
        raise AdapterError(f"the file holds one set of shared projections, the model has {len(frozen.shared)}")
    ((name, arrays),) = frozen.shared.items()
    found = {}
    for leaf, there in arrays.items():
        x = shared.get(leaf)
        if x is None or x.ndim != there.ndim or any(n < m for n, m in zip(x.shape, there.shape, strict=True)):
            raise AdapterError(f"the shared projection {leaf} is {None if x is None else x.shape} in the file, and the "
                               f"model needs at least {there.shape}")
        found[leaf] = jax.numpy.asarray(x[tuple(slice(m) for m in there.shape)], there.dtype)
    return frozen._replace(shared={name: found})
