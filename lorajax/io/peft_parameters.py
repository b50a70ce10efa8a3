"""PEFT's LoRA on parameters that stack experts (`target_parameters`): one pair of tensors for all experts of a layer.

In a file A is (experts * r, in) and B (out, r * experts), the expert its fastest axis. A module with several adapted
parameters nests them: the first that is registered is innermost, `<module>.base_layer.lora_A.weight`. What is one
parameter there, side by side along out, may be several of ours (gate and up).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lorajax.core.sites import Sites
from lorajax.io.peft_config import Config
from lorajax.io.peft_names import PREFIX, Names, stack
from lorajax.io.tensors import AdapterError
from lorajax.variants.lora import LoRA

A, B = "lora_A.weight", "lora_B.weight"


class Part(NamedTuple):
    """Which of our parameters a part of theirs is, and which (`at`) layer of its stack."""

    path: str
    at: int
    part: int
    parts: int


def fused(names: Names) -> dict[str, list[Part]]:
    """Parameter of `transformers` -> its parts, in the order in which a module registers its parameters."""
    found: dict[str, list[Part]] = {}
    for path, row in names.items():
        where: Any = getattr(row, "fused", None)
        for at, name in enumerate(where.names if where else ()):
            found.setdefault(name, []).append(Part(path, at, where.part, where.parts))
    return found


def split(held: dict[str, dict[str, str]], config: Config, names: Names) -> dict[str, dict[str, str]]:
    """Takes what belongs to such parameters out of `held`, module -> suffix -> tensor: parameter -> the same."""
    table, found = fused(names), {}
    asked = config.names("target_parameters") or []
    for module in {name.rpartition(".")[0] for name in table}:
        targets = [p for p in table if p.startswith(f"{module}.") and config.matches(asked, p)]
        for depth, parameter in enumerate(reversed(targets)):
            key = module + depth * ".base_layer"
            if key not in held:
                raise AdapterError(f"{config.file}: target_parameters names {parameter}, and the file has no tensors "
                                   f"for it. Download or write it again")
            found[parameter] = held.pop(key)
    for name in asked:
        if not any(config.matches([name], parameter) for parameter in (*found, *(f"{m}.weight" for m in held))):
            raise AdapterError(f"{config.file}: target_parameters names {name!r}, which is no parameter of this model "
                               f"that the file has tensors for; with experts there are {', '.join(table) or 'none'}")
    return found


def read(found: Mapping[str, Mapping[str, str]], tensors: Mapping[str, np.ndarray], config: Config, names: Names,
         sites: Sites) -> tuple[dict[str, LoRA], dict[str, dict[str, np.ndarray]]]:
    """path -> variant and path -> leaf -> array of ours, from what `split` found."""
    table, choices = fused(names), dict[str, LoRA]()
    parts: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for parameter, keys in found.items():
        rank = int(config.by_module("r", 8, "rank_pattern", parameter))
        lora = LoRA(rank, config.by_module("lora_alpha", 8, "alpha_pattern", parameter),
                    config.get("use_rslora", False, bool))
        if set(keys) != {A, B}:
            raise AdapterError(f"{config.file}: {parameter} has {sorted(keys)}; it needs {A} and {B}")
        a, b = tensors[keys[A]], tensors[keys[B]]
        for path, at, part, count in table[parameter]:
            site = sites[path]
            experts = site.stack_shape[-1]
            want = (experts * rank, site.n_in), (count * site.n_out, rank * experts)
            if (a.shape, b.shape) != want:
                raise AdapterError(f"tensors of {parameter} have shapes {a.shape} and {b.shape}, expected {want[0]} "
                                   f"and {want[1]}")
            mine = b.reshape(count, site.n_out, rank, experts)[part]
            parts.setdefault(path, {})[at] = (a.reshape(experts, rank, -1).transpose(0, 2, 1), mine.transpose(2, 1, 0))
            if choices.setdefault(path, lora) != lora:
                raise AdapterError(f"{path} stacks layers that {config.file} adapts differently: load the model with "
                                   f"scan_layers=False")
    arrays = {}
    for path, of in parts.items():
        site = sites[path]
        if len(of) * site.stack_shape[-1] != math.prod(site.stack_shape):
            raise AdapterError(f"{path} stacks layers of which the file adapts {len(of)}: load the model with "
                               f"scan_layers=False")
        arrays[path] = {leaf: stack([of[i][j] for i in range(len(of))] if len(site.stack_shape) > 1 else [of[0][j]],
                                    (*site.stack_shape, *of[0][j].shape[1:]), f"{path}.{leaf}")
                        for j, leaf in enumerate("AB")}
    return choices, arrays


def write(adapters: Mapping[str, tuple[LoRA, Any]], names: Names, sites: Sites,
          ) -> tuple[dict[str, np.ndarray], dict[str, LoRA]]:
    """(tensors, parameter -> the LoRA that it has) of the sites that are parts of such parameters.

    Parts with one A and one scale share the pair; others stand side by side at the sum of their ranks, which is exact.
    """
    table, tensors, made = fused(names), dict[str, np.ndarray](), dict[str, LoRA]()
    written = {p: parts for p, parts in table.items() if any(part.path in adapters for part in parts)}
    for parameter, parts in written.items():
        each = {x.part: _one(*adapters[x.path], sites[x.path], x.at) for x in parts if x.path in adapters}
        (lora, a, _), *others = each.values()
        outs = [sites[x.path].n_out for x in sorted(parts, key=lambda x: x.part)]
        experts, n_in, _ = a.shape
        if any(other.scale != lora.scale or not np.array_equal(x, a) for other, x, _ in others):
            rank = sum(x.shape[2] for _, x, _ in each.values())
            scale = float(lora.scale)
            lora = LoRA(rank, scale * (math.sqrt(rank) if lora.rslora else rank), lora.rslora)
            a, at = np.concatenate([x for _, x, _ in each.values()], 2), 0
            for part, (other, x, b) in each.items():
                wide = np.zeros((experts, rank, b.shape[2]), b.dtype)
                wide[:, at:at + x.shape[2]] = b * np.float32(float(other.scale) / scale)
                each[part], at = (other, x, wide), at + x.shape[2]
        rank = a.shape[2]
        bs = [each[i][2] if i in each else np.zeros((experts, rank, n), a.dtype) for i, n in enumerate(outs)]
        module = parameter.rpartition(".")[0]
        after = [p for p in written if p.startswith(f"{module}.")]
        key = PREFIX + module + (len(after) - 1 - after.index(parameter)) * ".base_layer"
        tensors[f"{key}.{A}"] = a.transpose(0, 2, 1).reshape(experts * rank, n_in)
        tensors[f"{key}.{B}"] = np.concatenate(bs, 2).transpose(2, 1, 0).reshape(sum(outs), rank * experts)
        made[parameter] = lora
    return tensors, made


def _one(lora: LoRA, adapter: Any, site: Any, at: int) -> tuple[LoRA, np.ndarray, np.ndarray]:
    """The LoRA and its A (experts, in, rank) and B (experts, rank, out) in one layer."""
    a, b = (np.asarray(x) for x in (adapter.A, adapter.B))
    return (lora, a[at], b[at]) if len(site.stack_shape) > 1 else (lora, a, b)
