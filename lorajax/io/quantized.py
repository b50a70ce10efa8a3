"""A quantised base on disk: one safetensors file with the codes and scales, and how each weight is stored.

    quantized.save(file, params)
    params = quantized.load(file)

An array is one tensor by its path; a quantised weight is `<path>.codes` and `<path>.scales.<i>`. The file's metadata
holds the rest of it, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorajax.core.sites import by_path
from lorajax.io.tensors import AdapterError, read_tensors, write_tensors
from lorajax.quant import FORMATS, Quantized
from lorajax.quant.formats import describe

KEY = "lorajax_quantized"


def save(file: str | os.PathLike[str], params: Any) -> Path:
    """Writes a tree of nested dictionaries of arrays and quantised weights; the file appears whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    rows: dict[str, Any] = {}
    for path, w in by_path(params)[0].items():
        if not isinstance(w, Quantized):
            arrays[path] = np.asarray(w)
            continue
        arrays[f"{path}.codes"] = np.asarray(w.codes)
        arrays |= {f"{path}.scales.{i}": np.asarray(x) for i, x in enumerate(w.scales)}
        rows[path] = {"format": describe(w.format), "settings": dataclasses.asdict(w.format), "order": w.order,
                      "inner": w.inner, "dtype": jnp.dtype(w.dtype).name, "scales": len(w.scales)}
    file = Path(file)
    part = file.with_name(file.name + ".part")
    write_tensors(part, arrays, {KEY: json.dumps(rows, sort_keys=True)})
    os.replace(part, file)
    return file


def load(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The tree, bit for bit. AdapterError for a damaged file, and for one that `save` did not write."""
    arrays, metadata = read_tensors(file)
    if KEY not in metadata:
        raise AdapterError(f"{str(file)!r} is no quantised base that lorajax wrote: a model's own are read with "
                           f"lorajax.io.hf, and quantised with lorajax.quant")
    leaves: dict[str, Any] = {}
    try:
        for path, row in json.loads(metadata[KEY]).items():
            codes = jnp.asarray(arrays.pop(f"{path}.codes"))
            scales = tuple(jnp.asarray(arrays.pop(f"{path}.scales.{i}")) for i in range(row["scales"]))
            form = FORMATS[row["format"]](**row["settings"])
            order, inner = tuple(row["order"]), tuple(row["inner"])
            leaves[path] = Quantized(codes, scales, form, order, inner, jnp.dtype(row["dtype"]))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{str(file)!r} describes a weight that it does not hold, or that this version does not "
                           f"know ({error!r}): write it again") from error
    tree: dict[str, Any] = {}
    for path, leaf in {**{path: jnp.asarray(x) for path, x in arrays.items()}, **leaves}.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
