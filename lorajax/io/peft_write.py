"""An adapter as PEFT's folder: every module by its full name, ranks and scales by exact patterns."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorajax.core.adapt import Adapt, Frozen
from lorajax.core.sites import by_path
from lorajax.core.variant import Full, Variant
from lorajax.io import peft_parameters
from lorajax.io.folders import replaced
from lorajax.io.peft_biases import of_b, unscaled
from lorajax.io.peft_config import CONFIG
from lorajax.io.peft_layout import Form
from lorajax.io.peft_methods import PLAIN, Method, method_of, one_block_size
from lorajax.io.peft_names import PREFIX, Directory, Names, tied, to_theirs
from lorajax.io.peft_read import TOKENS, WEIGHTS
from lorajax.io.peft_wholes import written
from lorajax.io.subtracted import joined, redone
from lorajax.io.tensors import AdapterError, write_tensors
from lorajax.variants.ia3 import IA3
from lorajax.variants.lora import LoRA
from lorajax.variants.trainable_tokens import TrainableTokens

EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules of which PEFT also saves the base weight when an adapter targets them."""


Replication = Sequence[Sequence[int]]
"""PEFT's `layer_replication`: [start, end) of the base's layers, in the order of the model's."""


class Content(NamedTuple):
    """settings, tensors: of the two files. exact: (path, leaf) -> the tensors that hold that array of the adapter as it
    is, in the order of the site's stack; arrays not in it cannot be had back from these files alone."""

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]
    exact: dict[tuple[str, str], list[str]]


def write(folder: str | os.PathLike[str], adapt: Adapt, trainable: Mapping[str, Any], frozen: Frozen, names: Names, *,
          base: str | None = None, task_type: str | None = None, convert: bool = True,
          embeddings: bool = True, replication: Replication = (), params: Any = None,
          lora_bias: bool = False) -> Path:
    """Writes what PEFT's `from_pretrained` loads on the same base, and returns the folder; one that is there is
    replaced, and a failure leaves it as it was.

    names: path -> row, see `lorajax.io.peft_names.Named`. base: `base_model_name_or_path` of the file; task_type:
    PEFT's (such as 'SEQ_CLS'), not needed for loading. convert: an adapter whose start is taken off again (PiSSA,
    OLoRA, ...) becomes a plain LoRA of twice the rank, which needs no decomposition of the base; False writes PEFT's
    own form of PiSSA and OLoRA. embeddings: whether to repeat the base weight of adapted embeddings, as PEFT does.
    replication: the ranges that the model's layers were made of (`lorajax.models.replicate_layers`). Trained tokens of
    a table with a tied head are written once; of tokens alone PEFT has a copy for the head, whose lack it reports, and
    which it ties all the same. params: the base, for biases. With it, those that PEFT's IA3 merely scales are left
    out, as PEFT does, and copies are written that PEFT has of a whole module's. lora_bias: a trained bias of an adapted
    layer is written as PEFT's `lora_B.bias`, not as a whole (it needs `params`; what was read of such a file is the
    same but for rounding).

    Raises AdapterError if PEFT has no such method, or not this mixture of methods or options; it names the way out.
    """
    found = content(adapt, trainable, frozen, names, base=base, task_type=task_type, convert=convert,
                    embeddings=embeddings, replication=replication, params=params, lora_bias=lora_bias)
    with replaced(folder) as part:
        write_content(part, found)
    return Path(folder)


def write_content(folder: Path, found: Content) -> None:
    """Both files, into a folder that is there."""
    write_tensors(folder / WEIGHTS, found.tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(found.settings, indent=2, sort_keys=True) + "\n")


def content(adapt: Adapt, trainable: Mapping[str, Any], frozen: Frozen, names: Names, *, base: str | None = None,
            task_type: str | None = None, convert: bool = True, embeddings: bool = True,
            replication: Replication = (), params: Any = None, lora_bias: bool = False) -> Content:
    """What `write` writes."""
    directory, before = Directory(names), {} if params is None else by_path(params)[0]
    adapters: dict[str, tuple[Variant, Any, bool]] = {}
    for path, choice in adapt.plan.items():
        if not isinstance(choice, TrainableTokens) and (reason := tied(adapt.sites, path)):
            raise AdapterError(f"the rules adapt {path}{reason}, or keep lorajax's own format")
        if not isinstance(choice, Full):
            halves = zip(trainable[path], frozen.aux.get(path, trainable[path]), strict=True)
            adapter = type(trainable[path])(*[other if x is None else x for x, other in halves])
            adapters[path] = joined(choice, adapter, convert)
            if choice.statistic and choice.statistic.of == "quantization":
                raise AdapterError(f"{path}: {choice} corrects a quantised base that PEFT's file does not hold, and on "
                                   f"another one it is wrong: serve what merge returned, or write "
                                   f"lorajax.compose.as_lora's result for exactly this base")
    tokens = {path: v for path, (v, _, _) in adapters.items() if isinstance(v, TrainableTokens)}
    beside = tokens if len(tokens) < len(adapters) else {}
    kind, method = _one_method({path: variant for path, (variant, _, _) in adapters.items() if path not in beside})
    if beside and kind != "LORA":
        raise AdapterError(f"{next(iter(beside))} has trained tokens, which PEFT has alone or beside LoRA, not beside "
                           f"{kind}: write that as a plain LoRA (lorajax.compose.plain) first")
    tensors: dict[str, np.ndarray] = {}
    exact: dict[tuple[str, str], list[str]] = {}
    rows: dict[str, tuple[str, Variant]] = {}
    biases, done = dict[str, np.ndarray](), set[str]()
    stacked: dict[str, tuple[LoRA, Any]] = {}
    for path, (v, x, _) in adapters.items():
        if getattr(names.get(path), "fused", None):
            if not isinstance(v, LoRA) or v.initial.subtracts:
                raise AdapterError(f"{path} stacks experts, for which PEFT has plain LoRA only: {PLAIN}")
            stacked[path] = v, x
    more, parameters = peft_parameters.write(stacked, names, adapt.sites)
    tensors |= more
    for path, (variant, adapter, changed) in adapters.items():
        if path in stacked:
            continue
        modules, site = directory.modules_of(path), adapt.sites[path]
        rows |= {module: (path, variant) for module in modules}
        if isinstance(variant, IA3) and variant.side == "out" and f"{modules[0]}.bias" in directory.tensors:
            place = directory.tensors[f"{modules[0]}.bias"].path
            bias = np.asarray(trainable[place].w if place in trainable else frozen.base[place])
            done |= {f"{module}.bias" for module in modules}
            before_it = np.asarray(before[place]) if place in before else None
            biases |= unscaled(modules, np.asarray(adapter.l_out), bias, before_it)
        for leaf, row in variant.leaves.items():
            x = getattr(adapter, leaf)
            if x is None or not row.peft or row.shared:
                continue
            form, shape = Form(row.peft, row.axes, site, variant), x.shape[len(site.stack_shape) :]
            keys = [f"{PREFIX}{module}.{TOKENS if path in beside else form.name}" for module in modules]
            parts = np.asarray(x).reshape(-1, *shape)
            tensors |= {key: form.to_peft(part) for key, part in zip(keys, parts, strict=True)}
            if not changed:
                exact[path, leaf] = keys
        if embeddings and not tokens and any(module.split(".")[-1] in EMBEDDINGS for module in modules):
            parts = np.asarray(frozen.base[path]).reshape(len(modules), *site.shape[len(site.stack_shape) :])
            tensors |= {f"{PREFIX}{module}.base_layer.weight": to_theirs(part, directory.first[path].form)
                        for module, part in zip(modules, parts, strict=True)}
    for slot, arrays in frozen.shared.items():
        for leaf, x in arrays.items():
            exact[slot, leaf] = [f"base_model.{adapt.slots[slot].variant.leaves[leaf].peft}"]
            tensors[exact[slot, leaf][0]] = np.asarray(x).T
    settings = _settings(kind, method, {module: v for module, (path, v) in rows.items() if path not in beside},
                         directory, parameters, {module: adapt.sites[path].n_in for module, (path, _) in rows.items()})
    if beside:
        of = {module: list(v.tokens) for module, (path, v) in rows.items() if isinstance(v, TrainableTokens)}
        settings["trainable_token_indices"] = of
    tensors |= {f"{PREFIX}{module}.base_layer.bias": x for module, x in biases.items()}
    if lora_bias:
        own = {module: row for module, row in rows.items() if row[0] not in beside}
        if params is None:
            raise AdapterError("lora_bias=True needs params, the base: what is written is what was added to its biases")
        tensors |= {f"{PREFIX}{module}.lora_B.bias": x
                    for module, x in of_b(own, adapt, trainable, before, directory).items()}
        done |= {f"{module}.bias" for module in own}
        settings["lora_bias"] = True
    settings |= written(adapt, trainable, frozen, directory, set(rows), method, tensors, exact, done, before)
    if kind == "TRAINABLE_TOKENS" and settings.pop("modules_to_save"):
        raise AdapterError("PEFT's trainable tokens train no whole weights beside them, LoRA's do: add a LoRA to the "
                           "rules, or keep lorajax's own format")
    if replication:
        settings["layer_replication"] = [list(layers) for layers in replication]
    settings |= {"base_model_name_or_path": base, "task_type": task_type}
    starts = {redone(variant) for variant, _, _ in adapters.values()}
    if starts != {None}:
        if len(starts) > 1:
            raise AdapterError(f"PEFT has one start for all modules, this adapter has {starts}: leave convert=True")
        settings["init_lora_weights"] = starts.pop()
    return Content(settings, tensors, exact)


def _one_method(plan: Mapping[str, Variant]) -> tuple[str, Method]:
    found = {path: method_of(choice) for path, choice in plan.items()}
    kinds = sorted({row[0] for row in found.values() if row})
    strange = [path for path, row in found.items() if row is None]
    if strange:
        choice = plan[strange[0]]
        what = type(choice).__name__ + (f" of {type(choice.inner).__name__}" if choice.inner is not choice else "")
        raise AdapterError(f"{strange[0]} has a {what}, which PEFT does not have: {PLAIN}")
    if len(kinds) != 1:
        raise AdapterError(f"a PEFT folder holds one method, this adapter has {kinds or 'none'}: {PLAIN}")
    row = next(iter(found.values()))
    assert row is not None
    return row


def _settings(kind: str, method: Method, modules: Mapping[str, Variant], directory: Directory,
              parameters: Mapping[str, Variant], inputs: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json without the weights that are trained whole."""
    variants = {**modules, **parameters}
    common = {module: method.settings(variant) for module, variant in variants.items()}
    if parameters:  # where PEFT allows no dropout; it acts in training only
        common = {module: {**one, "lora_dropout": 0.0} for module, one in common.items()}
    if kind == "OFT":
        size = one_block_size({module: (v, inputs[module]) for module, v in modules.items()})  # type: ignore[misc]
        common = {module: one | size for module, one in common.items()}
    first, others = next(iter(common)), list(common)
    for module in others:
        if common[module] != common[first]:
            differ = sorted(key for key in common[first] if common[module].get(key) != common[first][key])
            raise AdapterError(f"{first} and {module} differ in {differ}, which PEFT has once for all modules: {PLAIN}")
    targets = _exactly(modules, directory)
    settings: dict[str, Any] = {"peft_type": kind, "inference_mode": True, "target_modules": targets}
    settings |= {"target_parameters": list(parameters)} if parameters else {}
    if method.rank:
        ranks = {module: variant.rank for module, variant in variants.items()}  # type: ignore[attr-defined]
        settings |= _by_module(method, method.rank, "rank_pattern", ranks)
    if method.alpha:
        alphas = {module: _alpha(variant.inner) for module, variant in variants.items()}
        settings |= _by_module(method, method.alpha, "alpha_pattern", alphas)
    if kind == "ADALORA":
        pruned = {m: v for m, v in variants.items() if getattr(v, "init_rank", None) not in (None, v.rank)}  # type: ignore[attr-defined]
        settings["rank_pattern"] = {f"{m}.lora_E": [i < v.rank for i in range(v.init_rank)]  # type: ignore[attr-defined]
                                    for m, v in pruned.items()} or None
    if kind == "IA3":
        settings["feedforward_modules"] = [m for m, v in variants.items() if v.side == "in"]  # type: ignore[attr-defined]
    return settings | common[first]


def _alpha(variant: Any) -> float:
    value = float(variant.alpha)
    return int(value) if value.is_integer() else value


def _by_module(method: Method, key: str, pattern: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The commonest value for all, the others by exact patterns."""
    common = Counter(values.values()).most_common(1)[0][0]
    other = {f"^{re.escape(module)}": value for module, value in values.items() if value != common}
    if other and pattern not in method.patterns:
        raise AdapterError(f"PEFT has one {key} for all modules of this method, this adapter has "
                           f"{sorted(set(values.values()))}: {PLAIN}")
    return {key: common} | ({pattern: other} if pattern in method.patterns else {})


def _exactly(modules: Mapping[str, Any], directory: Directory) -> list[str] | str:
    """Names that PEFT matches with these modules alone: a list, or a regex where a name ends another module's."""
    if any(other.endswith(f".{module}") for other in directory.modules.keys() - modules.keys() for module in modules):
        return "|".join(re.escape(module) for module in modules)
    return list(modules)
