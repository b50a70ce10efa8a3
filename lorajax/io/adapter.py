"""A trained adapter on disk: a folder with `adapter_model.safetensors` and `adapter_config.json`, complete or absent.

The arrays of a site lie under ``<site>.<field>``, as they are (no transposition): trained and frozen ones, so that the
folder and the base are all that is needed. The config names the variant and hyperparameters of each site, and the
fingerprint of the base that it belongs to.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from lorajax.core.variant import Full, Variant
from lorajax.variants import INITIALIZERS, NAMES
from lorajax.variants.initializer import Initializer

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class AdapterMismatch(ValueError):
    """The folder holds an adapter for another base, or of another shape, than the one asked for."""


def save(folder: str | Path, plan: Mapping[str, Any], trainable: Any, aux: Any = None, base: str = "") -> Path:
    """Writes the adapter atomically and returns its folder; one that is there already is replaced.

    plan: site path -> Variant or Full (`adapt.plan`). trainable, aux: what `adapt.init` returned or training made of it
    (`aux` is `frozen.aux`), site path -> NamedTuple of arrays. base: fingerprint of the base's weights.
    """
    folder = Path(folder)
    arrays = {name: np.asarray(x) for name, x in (_arrays(aux or {}) | _arrays(trainable)).items()}
    record = {"format": "lorajax", "version": 1, "base": base, "sites": _sites(plan)}
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: np.ascontiguousarray(x) for name, x in sorted(arrays.items())}, part / _WEIGHTS)
    (part / _CONFIG).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    if folder.exists():  # a folder cannot be replaced in one move; the new one is complete before the old one goes
        os.rename(folder, old)
    os.rename(part, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def load(folder: str | Path, trainable: Any, base: str = "") -> Any:
    """The saved arrays in the structure of `trainable` (arrays or ShapeDtypeStructs; None slots stay None).

    base: fingerprint that the adapter must belong to; '' does not ask. Raises AdapterMismatch with what differs.
    """
    folder = Path(folder)
    record = json.loads((folder / _CONFIG).read_text())
    if base and record["base"] != base:
        raise AdapterMismatch(f"{folder} was trained on a base with fingerprint {record['base']}, this base has "
                              f"{base}: load the base it was trained on")
    arrays = load_file(folder / _WEIGHTS)

    def pick(path: Any, like: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name not in arrays:
            raise AdapterMismatch(f"{folder} has no {name}; it has {', '.join(sorted(arrays)[:8])}, ...")
        if arrays[name].shape != like.shape:
            raise AdapterMismatch(f"{name} is {arrays[name].shape} in {folder}, asked for {like.shape}: "
                                  f"give the rule of this site the rank that was saved")
        return jax.numpy.asarray(arrays[name])

    return jax.tree_util.tree_map_with_path(pick, trainable)


def plan(folder: str | Path) -> dict[str, Any]:
    """site path -> Variant or Full of a saved adapter: what `save` was given as `plan`."""
    kinds = {**NAMES, "full": Full}
    starts = {cls.__name__: cls for cls in INITIALIZERS.values()}

    def made(value: Any) -> Any:
        if isinstance(value, dict) and value.get("start") in starts:
            return starts[value["start"]](**{name: x for name, x in value.items() if name != "start"})
        if not isinstance(value, dict) or "variant" not in value:
            return value
        if value["variant"] not in kinds:
            raise AdapterMismatch(f"{folder} holds a {value['variant']!r}; there are {', '.join(kinds)}")
        return kinds[value["variant"]](**{name: made(x) for name, x in value.items() if name != "variant"})

    return {path: made(site) for path, site in json.loads((Path(folder) / _CONFIG).read_text())["sites"].items()}


def _arrays(tree: Any) -> dict[str, Any]:
    """{'<site>.<field>': array}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _sites(plan: Mapping[str, Any]) -> dict[str, Any]:
    """site path -> {'variant': name, hyperparameter: value, ...}; a wrapped variant is such a dict too, a start
    with hyperparameters of its own is {'start': its class, hyperparameter: value, ...}."""
    names = {cls: name for name, cls in NAMES.items()} | {Full: "full"}

    def plain(value: Any) -> Any:
        if isinstance(value, Variant | Full):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"variant": names.get(type(value), type(value).__name__), **fields}
        if isinstance(value, Initializer):
            return {"start": type(value).__name__, **dataclasses.asdict(value)}
        return value.item() if isinstance(value, jax.Array | np.ndarray) else value

    return {path: plain(variant) for path, variant in plan.items()}
