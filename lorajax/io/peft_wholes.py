"""The tensors of a PEFT file that are no adapter's: whole weights, biases, shared projections, copies of the base."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from lorajax.core.sites import Sites
from lorajax.core.variant import Variant
from lorajax.io.peft_methods import Method
from lorajax.io.peft_names import Directory, stack, tied, to_ours
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
