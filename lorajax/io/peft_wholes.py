"""The tensors of a PEFT file that are no adapter's, read and written: whole weights, biases, copies of the base; shared
projections are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.sites import Sites
from lorajax.core.variant import Full, Variant
from lorajax.io.peft_methods import PLAIN, Method
from lorajax.io.peft_names import PREFIX, Directory, stack, tied, to_ours, to_theirs
from lorajax.io.tensors import AdapterError
from lorajax.variants.lora import LoRA


def wholes(rest: Mapping[str, str], tensors: Mapping[str, np.ndarray], sites: Sites, directory: Directory,
           method: Method, choices: Mapping[str, Variant | None]) -> tuple[dict[str, np.ndarray], ...]:
    """Whole weights that were trained, weights of the base, what is added to biases, and shared arrays."""
    trained: dict[str, dict[int, np.ndarray]] = {}
    repeated: dict[str, dict[int, np.ndarray]] = {}
    slots = {f"base_model.{row.peft}": leaf for leaf, row in method.variant().leaves.items() if row.shared}
    biases: dict[str, dict[int, np.ndarray]] = {}
    shared = {}
    for name, key in rest.items():
        if name in slots:
            shared[slots[name]] = tensors[key].T
            continue
        if ".original_module." in name:
            continue  # the base's, which PEFT's bias='all' catches too
        once = re.sub(r"\.modules_to_save\.(default\.)?", ".", name)
        if once != name and once in rest:
            if not np.array_equal(tensors[rest[once]], tensors[key]):
                raise AdapterError(f"tensors {key!r} and {rest[once]!r} are one weight, and differ")
            continue
        plain = once.replace(".base_layer.", ".").replace(".lora_B.bias", ".bias")
        if plain not in directory.tensors and name.endswith(".lora_B.bias"):
            if not tensors[key].any():
                continue
            raise AdapterError(f"tensor {key!r}: this layer of the base has no bias to which it could be added; give "
                               f"the model one of zeros (query_bias=True of a Llama), and its checkpoint too")
        if plain not in directory.tensors:
            raise AdapterError(f"tensor {key!r}: this model has no place for it"
                               f"{directory.unknown(plain, directory.tensors)}{tied(sites)}")
        place = directory.tensors[plain]
        if name.endswith(".lora_B.bias"):
            of = directory.tensors.get(plain.removesuffix("bias") + "weight", place).path
            inner = getattr(choices.get(of), "inner", None)
            if not isinstance(inner, LoRA):
                raise AdapterError(f"tensor {key!r}: there is no LoRA beside it")
            biases.setdefault(place.path, {})[place.at] = np.float32(inner.scale) * tensors[key]
            continue
        into = repeated if name.endswith(".base_layer.weight") else trained
        into.setdefault(place.path, {})[place.at] = to_ours(tensors[key], place.form)

    def whole(found: dict[str, dict[int, np.ndarray]]) -> dict[str, np.ndarray]:
        made = {}
        for path, parts in found.items():
            if path not in sites.leaves:
                raise AdapterError(f"{path} is named by the table of names, but the model has no such parameter")
            size = int(np.prod(sites.leaves[path].shape))
            if sorted(parts) != list(range(len(parts))) or parts[0].size * len(parts) != size:
                raise AdapterError(f"{path}: the file holds {len(parts)} of its matrices, of shape {parts[0].shape} in "
                                   f"our layout; this model has {sites.leaves[path].shape}")
            made[path] = stack([parts[i] for i in range(len(parts))], sites.leaves[path].shape, path)
        return made

    return whole(trained), whole(repeated), whole(biases), shared


def written(adapt: Adapt, trainable: Mapping[str, Any], frozen: Frozen, directory: Directory, targets: set[str],
            method: Method, tensors: dict[str, np.ndarray], exact: dict[tuple[str, str], list[str]],
            done: set[str], before: Mapping[str, Any]) -> dict[str, Any]:
    """Weights that are trained whole: as `modules_to_save`, or by a bias mode. Adds their tensors, but for those that
    are `done`. before: the base, of which PEFT has copies under bias='all'."""
    fulls = [path for path, choice in adapt.plan.items() if isinstance(choice, Full)
             and not done.issuperset(directory.written(path))]
    names = {name: path for path in fulls for name in directory.written(path)}
    known = {name for row in directory.first.values() for name in row.names}
    biases = {name for name in names if name.endswith(".bias")}
    modules = {name.rpartition(".")[0] for name in names.keys() - biases}
    loose = {name for name in biases if name.rpartition(".")[0] not in modules}
    saved = _outermost(modules, names.keys(), known)
    inside = {name for name in known if any(name.startswith(f"{module}.") for module in saved)}
    loose -= inside
    every = {name for name in known - inside if name.endswith(".bias")}
    of_targets = {f"{module}.bias" for module in targets} & known
    mode = "none" if not loose else "all" if loose == every else method.bias if loose == of_targets else ""
    hidden = sorted(name for name in loose if name.rpartition(".")[0] in targets)
    if hidden and not method.bias:
        raise AdapterError(f"{names[hidden[0]]} trains, and PEFT has no mode of this method in which a target's bias "
                           f"does: {PLAIN}")
    if hidden and not mode:  # PEFT trains all of a kind: the others are written as the base has them
        mode = method.bias if loose <= of_targets else "all"
    if loose and (not mode or not method.bias):
        saved = _outermost(modules | {name.rpartition(".")[0] for name in loose}, names.keys(), known)
        mode = "none"
        inside = {name for name in known if any(name.startswith(f"{module}.") for module in saved)}
    others = every if mode == "all" else of_targets if mode == method.bias else set()
    clash = sorted(module for module in targets if any(f"{module}.".startswith(f"{outer}.") for outer in saved))
    if clash:
        raise AdapterError(f"{clash[0]} has an adapter and is inside a module that is trained whole, which PEFT does "
                           f"not have: {PLAIN}")
    for path, row in directory.first.items():
        wanted = [name for name in row.names if name in names or name in inside or name in others - done]
        if not wanted:
            continue
        whole = np.asarray(trainable[path].w if path in fulls else frozen.base[path])
        parts = whole if len(row.names) > 1 else [whole]
        parts = np.reshape(parts, (len(row.names), *whole.shape[whole.ndim - _ndim(whole, row.names) :]))
        keys = []
        for name, part in zip(row.names, parts, strict=True):
            module, _, kind = name.rpartition(".")
            keys.append(PREFIX + (f"{module}.base_layer.{kind}" if module in targets else name))
            tensors[keys[-1]] = to_theirs(part, row.form)
            outer = next((m for m in saved if name.startswith(f"{m}.")), "")
            if mode == "all" and outer and kind == "bias" and path in before:
                inner = name[len(outer) :]
                copies = ("modules_to_save" + ".default" * (inner != ".bias"), "original_module")
                copy = np.reshape(np.asarray(before[path]), (len(row.names), *part.shape))[row.names.index(name)]
                tensors |= {f"{PREFIX}{outer}.{c}{inner}": x
                            for c, x in zip(copies, (tensors[keys[-1]], copy), strict=True)}
            if kind == "running_mean":  # PEFT asks for a batch norm's counter too
                tensors[f"{PREFIX}{module}.num_batches_tracked"] = np.zeros((), np.int64)
        if path in fulls:
            exact[path, "w"] = keys
    return {"modules_to_save": saved or None} | ({"bias": mode} if method.bias else {})


def _ndim(whole: np.ndarray, names: tuple[str, ...]) -> int:
    """Dimensions of one part of a parameter that may stack several tensors."""
    if len(names) == 1:
        return whole.ndim
    leading = next(i for i in range(whole.ndim + 1) if math.prod(whole.shape[:i]) == len(names))
    return whole.ndim - leading


def _outermost(modules: set[str], trained: Any, known: set[str]) -> list[str]:
    """The modules, or the outermost parents of theirs that are trained as a whole."""
    found = set()
    for module in modules:
        parts = module.split(".")
        parents = (".".join(parts[: i + 1]) for i in range(len(parts)))
        whole = (p for p in parents if all(name in trained for name in known if name.startswith(f"{p}.")))
        found.add(next(whole, module))
    return sorted(found)
