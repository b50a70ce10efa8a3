"""A trained adapter on disk: PEFT's folder where PEFT has the method, and a record from which it reloads exactly.

    adapter.save(folder, adapt, trainable, frozen, names=adapter_names(model.config))
    adapt = lj.adapt(sites, adapter.rules(folder))
    trainable, frozen = adapter.load(folder, adapt, params)

`lorajax_adapter.json` names the variant and hyperparameters of each site, the fingerprint of the base, where each array
lies, and the sha256 of each file. An array lies in PEFT's `adapter_model.safetensors` if that holds it as it is, else
(arrays that PEFT does not have, methods that it does not have) in `lorajax_adapter.safetensors`, in our layout.

The fingerprint reads a thousand elements of each leaf, spread over it, so that a 70B base costs what a small one does
(`lorajax.core.fingerprint`); the files of the adapter itself are hashed whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.fingerprint import fingerprint
from lorajax.core.rules import Rule
from lorajax.core.sites import by_path
from lorajax.core.variant import Full, Variant
from lorajax.io.folders import replaced
from lorajax.io.peft_layout import Form
from lorajax.io.peft_names import Names, to_ours
from lorajax.io.peft_read import WEIGHTS
from lorajax.io.peft_write import content, write_content
from lorajax.io.records import choice_of, described, differing
from lorajax.io.registry import sha256
from lorajax.io.tensors import AdapterError, read_json, read_tensors, write_tensors

RECORD, OWN = "lorajax_adapter.json", "lorajax_adapter.safetensors"


class AdapterMismatch(AdapterError):
    """The folder holds an adapter for another base, or of another variant or shape, than the one asked for."""


def save(folder: str | os.PathLike[str], adapt: Adapt, trainable: Mapping[str, Any], frozen: Frozen, *,
         base: str | None = None, names: Names | None = None, task_type: str | None = None) -> Path:
    """Writes the adapter and returns its folder; one that is there already is replaced, complete or not at all.

    trainable, frozen: what `adapt.init` returned or training made of it. base: fingerprint to
    record, None for that of the weights that stay frozen, whatever the head. names: what the
    base's parameters are called in PEFT (`lorajax.models.adapter_names`); with it the folder is one that PEFT loads, if
    PEFT has the method, and the record says why if it has not.
    """
    held, reason, theirs = {}, "no names were given", None
    if names is not None:
        try:
            theirs = content(adapt, trainable, frozen, names, task_type=task_type, embeddings=False)
            held, reason = theirs.exact, ""
        except AdapterError as error:
            reason = str(error)
    arrays: dict[str, Any] = {}
    where: dict[str, Any] = {}
    for half in (adapt.kept(frozen), trainable):
        for path, adapter in half.items():
            fields = adapter if isinstance(adapter, Mapping) else adapter._asdict()
            for leaf, x in fields.items():
                if x is None:
                    continue
                keys = held.get((path, leaf))
                form = names[path].form if names is not None and keys and leaf == "w" else None
                where[f"{path}.{leaf}"] = {"tensors": keys, "form": form} if keys else None
                if not keys:
                    arrays[f"{path}.{leaf}"] = np.asarray(x)
    with replaced(folder) as part:
        if theirs is not None:
            write_content(part, theirs)
        if arrays or theirs is None:
            write_tensors(part / OWN, arrays, {"format": "lorajax"})
        base = base or fingerprint(_kept(adapt, frozen.base))
        record = {"format": "lorajax", "version": 2, "base": base, "peft": reason or True, "arrays": where,
                  "sites": {path: described(choice) for path, choice in adapt.plan.items()},
                  "sha256": {file.name: sha256(file) for file in sorted(part.iterdir())}}
        (part / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return Path(folder)


def plan(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Site path -> the Variant or Full that it was trained with. AdapterError for one that this version has not."""
    file = Path(folder) / RECORD
    try:
        return {path: choice_of(row) for path, row in _record(folder)["sites"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{str(file)!r} describes a variant that this version does not have: {error}") from error


def rules(folder: str | os.PathLike[str]) -> list[Rule]:
    """`plan` as rules for `lorajax.adapt`, one for each site."""
    return [(re.escape(path), choice) for path, choice in plan(folder).items()]


def load(folder: str | os.PathLike[str], adapt: Adapt, params: Any, *, base: str | None = None,
         allow_mismatch: bool = False, part: bool = False) -> tuple[dict[str, Any], Frozen]:
    """(trainable, frozen) as they were saved, on the base `params`, bit for bit.

    base: the fingerprint, if `save` was given one. allow_mismatch: load all the same where the base or a variant
    is another one, as long as the shapes agree. part: the rules may adapt some of the sites only, and the others stay
    unread.

    Raises AdapterMismatch, naming both sides, for another base, variant, hyperparameter or shape, and AdapterError for
    damaged files.
    """
    folder = Path(folder)
    record = _record(folder)
    shapes, frozen = adapt.shapes
    if not allow_mismatch:
        have = base or fingerprint(_kept(adapt, {p: x for p, x in by_path(params)[0].items() if p in frozen.base}))
        if record["base"] != have:
            raise AdapterMismatch(f"{folder} was trained on a base with fingerprint {record['base']}, this base has "
                                  f"{have}: load the base it was trained on, or say allow_mismatch=True")
        there = {path: row for path, row in record["sites"].items() if path in adapt.plan or not part}
        if difference := differing(there, {path: described(choice) for path, choice in adapt.plan.items()}):
            raise AdapterMismatch(f"{folder}: {difference}: use adapter.rules(folder), or say allow_mismatch=True")
    files: dict[str, np.ndarray] = {}
    for name in (WEIGHTS, OWN):
        if (folder / name).exists():
            files |= read_tensors(folder / name)[0]
            if record["sha256"].get(name) != sha256(folder / name):
                raise AdapterError(f"{str(folder / name)!r} is not the file that was saved (its sha256 differs)")

    def filled(half: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for path, like in half.items():
            fields = like if isinstance(like, Mapping) else like._asdict()
            new = {leaf: x if x is None else _array(f"{path}.{leaf}", x, record, files, adapt, folder)
                   for leaf, x in fields.items()}
            made[path] = new if isinstance(like, Mapping) else type(like)(**new)
        return made

    return filled(shapes), adapt.frozen(params, filled(adapt.kept(frozen)))


def _kept(adapt: Adapt, base: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the base that are what the checkpoint holds."""
    changed = {path for path, choice in adapt.plan.items() if isinstance(choice, Variant) and choice.rewrites_weight}
    return {path: x for path, x in base.items() if path not in changed}


def _array(name: str, like: Any, record: Mapping[str, Any], files: Mapping[str, np.ndarray], adapt: Adapt,
           folder: Path) -> jax.Array:
    if name not in record["arrays"]:
        raise AdapterMismatch(f"{folder} has no {name}; it has {', '.join(sorted(record['arrays'])[:6])}, ...")
    row = record["arrays"][name]
    keys = row["tensors"] if row else [name]
    absent = [key for key in keys if key not in files]
    if absent:
        raise AdapterError(f"{folder} has no tensor {absent[0]!r}, though its record names it")
    x = files[keys[0]]
    if row:
        path, _, leaf = name.rpartition(".")
        choice, parts = adapt.plan.get(path), [files[key] for key in keys]
        if choice is None:  # a shared projection
            parts = [part.T for part in parts]
        elif isinstance(choice, Full):
            parts = [to_ours(part, row["form"]) for part in parts]
        else:
            place = choice.leaves[leaf]
            parts = [Form(place.peft or "", place.axes, adapt.sites[path], choice).from_peft(part) for part in parts]
        x = np.stack(parts) if len(parts) > 1 else parts[0]
        x = x.reshape(like.shape) if x.size == np.prod(like.shape) else x
    if x.shape != like.shape:
        raise AdapterMismatch(f"{name} is {x.shape} in {folder}, asked for {like.shape}: give the rule of this site "
                              f"the rank that was saved")
    return jax.numpy.asarray(x)


def _record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    file = Path(folder) / RECORD
    if not file.exists():
        raise AdapterError(f"{str(folder)!r} has no {RECORD}, so lorajax did not write it: read it "
                           f"with lorajax.io.peft")
    record = read_json(file)
    kinds = {"base": str, "arrays": dict, "sites": dict, "sha256": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    if wrong or record.get("version") != 2:
        raise AdapterError(f"{str(file)!r} is no record of this version: {wrong or record.get('version')}")
    return record

