"""PEFT's folders read into rules and arrays.

Which modules are adapted is what the file holds tensors for; the settings say how, and every tensor and every setting
that changes the result is accounted for. Nothing unpickles.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorajax.core.rules import Rule
from lorajax.core.sites import Sites
from lorajax.core.variant import Full, Variant
from lorajax.io import peft_parameters
from lorajax.io.peft_config import INERT, Config
from lorajax.io.peft_layout import LOOKUP, Form
from lorajax.io.peft_methods import METHODS, REFUSED, Method
from lorajax.io.peft_names import PREFIX, Directory, Names, stack, tied
from lorajax.io.peft_wholes import wholes
from lorajax.io.tensors import AdapterError, read_tensors
from lorajax.variants.dora import DoRA
from lorajax.variants.trainable_tokens import TrainableTokens

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
ROWS = "trainable_tokens_delta"
TOKENS = f"token_adapter.{ROWS}"
"""Rows of a table that are trained, alone and beside another method."""
FLOATS = ("float16", "bfloat16", "float32", "float64")


class Read(NamedTuple):
    """rules: for `lorajax.adapt`. arrays: path -> leaf -> array in our layout, `Full`'s leaf is `w`. shared: leaf ->
    array that all sites share. base: path -> a weight of the base that the file repeats. added: path -> what is added
    to a bias of the base, which then trains in full (`lora_bias`: s times the file's). scaled: path -> what a bias is
    multiplied by, which then trains in full (PEFT's IA3 scales a layer's output with its bias, ours its weight).
    config: adapter_config.json.
    """

    rules: list[Rule]
    arrays: dict[str, dict[str, np.ndarray]]
    shared: dict[str, np.ndarray]
    base: dict[str, np.ndarray]
    added: dict[str, np.ndarray]
    config: dict[str, Any]
    scaled: dict[str, np.ndarray] = {}  # noqa: RUF012  (a field's default, never written to)


def read(folder: str | os.PathLike[str], sites: Sites, names: Names | Sequence[Names],
         replication: Sequence[Sequence[int]] = ()) -> Read:
    """Reads a folder for the model with these `sites`, whose parameters `names` gives the names of (path -> row, see
    `Named`; several tables if files may go by old and new module names). replication: the ranges of the base's layers
    that the model was made of (`lorajax.models.replicate_layers`), which have to be those of the file.

    Raises AdapterError, naming the file and the way out, for damaged or pickled files, for tensors that the model has
    no place for or whose shape does not fit, for modules that the settings target and the file does not hold, and for
    methods and settings that cannot be read faithfully.
    """
    config = Config.read(folder)
    wanted = config.get("layer_replication", [], list)
    if wanted != [list(layers) for layers in replication]:
        raise AdapterError(f"{config.file}: layer_replication={wanted}, and the model has {list(replication)}: make it "
                           f"by lorajax.models.replicate_layers(config, variables, {wanted}), and pass the same as "
                           f"replication")
    return parse(config, read_tensors(weights_file(folder))[0], sites, names)


def weights_file(folder: str | os.PathLike[str]) -> Path:
    """The safetensors file of a folder. AdapterError if there is only a pickle, or nothing."""
    file = Path(folder) / WEIGHTS
    if not file.exists() and (file.parent / PICKLED).exists():
        read_tensors(file.parent / PICKLED)  # refuses
    return file


def parse(config: Config, tensors: Mapping[str, np.ndarray], sites: Sites, names: Names | Sequence[Names]) -> Read:
    """`read` of a file's content."""
    method, directory = _method(config), Directory(names)
    held, rest = _sorted(config, tensors)
    stacked = peft_parameters.split(held, config, directory.first) if config.kind == "LORA" else {}
    rows = [tensors[of[ROWS]] for module, of in held.items() if ROWS in of and module in directory.modules]
    for module in held.keys() - directory.modules.keys():  # a head that is tied here has the rows of its table again
        if ROWS in held[module] and any(np.array_equal(tensors[held[module][ROWS]], x) for x in rows):
            del held[module]
    strange = sorted(held.keys() - directory.modules.keys())
    if strange:
        raise AdapterError(f"tensor {next(iter(held[strange[0]].values()))!r}: this model has no module {strange[0]!r}"
                           f"{directory.unknown(strange[0], directory.modules)}{tied(sites)}")
    there = {directory.modules[module] for module in held}  # a module may go by two names
    absent = sorted(m for m in config.targeted(directory.modules) - held.keys() if directory.modules[m] not in there)
    if absent:
        raise AdapterError(f"{config.file}: the settings target {len(absent)} modules that the file has no tensors "
                           f"for: {', '.join(absent[:4])}. Download or write it again")
    asked = config.get("trainable_token_indices", None, list, dict) or {}
    tables = {directory.modules[module] for module, suffixes in held.items() if ROWS in suffixes}
    named = list(asked) if isinstance(asked, dict) else []
    missing = [m for m, place in directory.modules.items() if place not in tables and config.matches(named, m)]
    if asked and (missing or not tables):
        raise AdapterError(f"{config.file}: trainable_token_indices={asked!r}, and the file does not hold the rows. "
                           f"Download or write it again")
    choices, arrays = _adapters(config, method, held, tensors, sites, directory)
    more, found = peft_parameters.read(stacked, tensors, config, directory.first, sites)
    choices, arrays = choices | more, arrays | found
    fulls, base, added, shared = wholes(rest, tensors, sites, directory, METHODS[config.kind], choices)
    for path in (*fulls, *(path for path, choice in choices.items() if not isinstance(choice, TrainableTokens))):
        if reason := tied(sites, path):
            raise AdapterError(f"{config.file} adapts {directory.first[path].names[0]}{reason}")
    scaled = _scaled(held, arrays, sites, directory) if config.kind == "IA3" else {}
    rules: list[Rule] = [(_either(paths), choice) for choice, paths in _grouped(choices)]
    rules += [(_either(fulls | added | scaled), Full())] if fulls or added or scaled else []
    if not rules:
        raise AdapterError(f"{config.file}: the file holds no adapter")
    return Read(rules, arrays | {path: {"w": w} for path, w in fulls.items()}, shared, base, added, config.settings,
                scaled)


def _method(config: Config) -> Method:
    """The row of the file's method, after the settings that it cannot have."""
    if config.kind in REFUSED:
        raise AdapterError(f"{config.file}: a {config.kind} adapter cannot be read faithfully: {REFUSED[config.kind]}. "
                           f"Convert it to plain LoRA where it was trained: peft.save_as_lora(folder, model, rank)")
    if config.kind not in METHODS:
        raise AdapterError(f"{config.file}: peft_type {config.kind!r} is none that lorajax has; it reads "
                           f"{', '.join(METHODS)}. Convert it to plain LoRA where it was trained: peft.save_as_lora")
    method = METHODS[config.kind]
    for key, value in config.settings.items():
        if key in method.neutral:
            allowed = (None, *method.neutral[key])
        elif key in INERT or key.endswith("_dropout"):
            continue
        else:
            allowed = (None, False, [], {}, "")
        if not any(value is x or (type(value) is type(x) and value == x) for x in allowed):
            raise AdapterError(f"{config.file}: {key}={value!r} is not supported and may change what the adapter "
                               f"computes; merge the adapter in PEFT, or convert it to plain LoRA (peft.save_as_lora)")
    return method


@functools.cache
def _suffixes(kind: str) -> dict[str, str]:
    """Suffix in a file -> the suffix in the leaf table, for what belongs to a module."""
    variant = METHODS[kind].variant()
    rows = {**variant.leaves, **(DoRA(variant).leaves if kind == "LORA" else {})}
    own = {row.peft: row.peft for row in rows.values() if row.peft and not row.shared}
    own |= {TOKENS: ROWS} if kind == "LORA" else {}
    return own | {LOOKUP[suffix]: suffix for suffix in own if suffix in LOOKUP}


def _sorted(config: Config, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(module -> suffix in the leaf table -> tensor, name without prefix -> tensor for the others)."""
    held: dict[str, dict[str, str]] = {}
    rest, suffixes = {}, _suffixes(config.kind)
    for key, x in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".num_batches_tracked"):
            continue  # a batch norm's counter, which computes nothing
        if x.dtype.name not in FLOATS:
            raise AdapterError(f"tensor {key!r} is {x.dtype.name}; an adapter's are {', '.join(FLOATS)}")
        if not np.isfinite(x).all():
            raise AdapterError(f"tensor {key!r} holds NaN or infinity: the training diverged, or the file is damaged")
        suffix = next((s for s in suffixes if name.endswith(f".{s}") and len(name) > len(s) + 1), None)
        if suffix is None:
            rest[name] = key
            continue
        module = name.removesuffix(f".{suffix}")
        if suffixes[suffix] in held.setdefault(module, {}):
            raise AdapterError(f"tensor {key!r} is in the file twice, with the prefix {PREFIX!r} and without")
        held[module][suffixes[suffix]] = key
    return held, rest


def _adapters(config: Config, method: Method, held: Mapping[str, Mapping[str, str]], tensors: Mapping[str, np.ndarray],
              sites: Sites, directory: Directory) -> tuple[dict[str, Variant | None], dict[str, dict[str, np.ndarray]]]:
    """path -> variant, path -> leaf -> array."""
    modules = directory.modules
    by_path: dict[str, dict[int, str]] = {}
    for module in held:
        by_path.setdefault(modules[module].path, {})[modules[module].at] = module
    choices: dict[str, Variant | None] = {}
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for path, found in by_path.items():
        if path not in sites:
            raise AdapterError(f"{found[min(found)]!r} is {path} here, which no matmul, convolution or lookup reads")
        site = sites[path]
        count = site.extent(site.stack_axes)
        if sorted(found) != list(range(count)):
            raise AdapterError(f"{path} stacks {count} matrices, and the file adapts {len(found)} of them: load the "
                               f"model with a tree for each layer (scan_layers=False)")
        own = METHODS["TRAINABLE_TOKENS"] if ROWS in held[found[min(found)]] else method
        variants = {_variant(config, own, found[i], site) for i in range(count)}
        if len(variants) > 1:
            raise AdapterError(f"{path} stacks {count} matrices, and the file adapts them differently "
                               f"({len(variants)} ranks or scales): load the model with scan_layers=False")
        (variant,) = variants
        choices[path] = variant
        if variant is None:
            continue
        shapes = _shapes(variant, site.n_in, site.n_out)
        arrays[path] = {}
        for leaf, row in variant.leaves.items():
            if not row.peft or row.shared or leaf not in shapes:
                continue
            form, parts = Form(row.peft, row.axes, site, variant), []
            for i in range(count):
                key = held[found[i]].get(row.peft)
                if key is None:
                    raise AdapterError(f"{config.file}: the file has no tensor {found[i]}.{form.name}")
                parts.append(_placed(form, tensors[key], shapes[leaf], key))
            arrays[path][leaf] = stack(parts, (*site.stack_shape, *shapes[leaf]), f"{path}.{leaf}")
        used = {row.peft for leaf, row in variant.leaves.items() if leaf in shapes}
        extra = sorted({key for module in found.values() for suffix, key in held[module].items() if suffix not in used})
        if extra:
            raise AdapterError(f"tensor {extra[0]!r} does not belong to a {type(variant).__name__} with these settings")
    return choices, arrays


def _scaled(held: Mapping[str, Any], arrays: Mapping[str, Mapping[str, np.ndarray]], sites: Sites,
            directory: Directory) -> dict[str, np.ndarray]:
    """Path of a bias -> IA3's scales of the output that it is added to, in the bias' shape."""
    found = {}
    for module in held:
        place, bias = directory.modules[module], directory.tensors.get(f"{module}.bias")
        scales = arrays[place.path].get("l_out")
        if scales is not None and bias is not None:
            found[bias.path] = scales.reshape(sites.leaves[bias.path].shape)
    return found


def _placed(form: Form, y: np.ndarray, shape: tuple[int, ...], key: str) -> np.ndarray:
    try:
        x = form.from_peft(y)
    except ValueError as error:
        raise AdapterError(f"tensor {key!r} has shape {y.shape}: {error}") from error
    if x.shape != shape:
        raise AdapterError(f"tensor {key!r} has shape {y.shape}, expected {form.to_peft(np.zeros(shape)).shape}. If it "
                           f"is the rank that differs: PEFT sorts rank_pattern when it saves, and the first match wins")
    return x


def _variant(config: Config, method: Method, module: str, site: Any) -> Variant | None:
    """The variant of one module, None for one pruned to rank 0. AdapterError if it cannot fit."""
    rank = 0.0 if method.rank is None else config.number(method.rank, 8)
    if "rank_pattern" in method.patterns:
        rank = config.by_module("r", 8, "rank_pattern", module)
    alpha = 0.0
    if method.alpha is not None:
        alpha = config.by_module(method.alpha, method.default_alpha, "alpha_pattern", module)
    if rank != int(rank):
        raise AdapterError(f"{config.file}: the rank of {module} is {rank}")
    variant = method.build(config, module, site, int(rank), alpha)
    if getattr(variant, "rank", 1) == 0 and config.kind == "ADALORA":
        return None
    try:
        variant.check(site.n_in, site.n_out)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{config.file}: {module} ({site.n_in}, {site.n_out}): {error}; to read it all the same, "
                           f"convert it where it was trained: peft.save_as_lora(folder, model, rank)") from error
    return variant


@functools.lru_cache(maxsize=4096)
def _shapes(variant: Variant, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    """leaf -> shape of the arrays that the adapter of one matrix has."""
    w = jax.ShapeDtypeStruct((n_in, n_out), np.float32)
    adapter = jax.eval_shape(lambda key, w: variant.init(key, w)[0], jax.random.key(0), w)
    return {leaf: x.shape for leaf, x in adapter._asdict().items() if x is not None}


def _grouped(choices: Mapping[str, Variant | None]) -> list[tuple[Variant | None, list[str]]]:
    """Choice -> its paths, in order of first appearance."""
    groups: dict[Variant | None, list[str]] = {}
    for path, choice in choices.items():
        groups.setdefault(choice, []).append(path)
    return list(groups.items())


def _either(paths: Any) -> str:
    return "|".join(re.escape(path) for path in paths)
