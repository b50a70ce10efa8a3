"""Biases of adapted layers that PEFT has otherwise than as trained weights: scaled with IA3's output, or B's own.

Here they are the base's bias, which trains. Only the base tells what an adapter added to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorajax.core.adapt import Adapt
from lorajax.core.variant import Variant
from lorajax.io.peft_methods import PLAIN
from lorajax.io.peft_names import Directory
from lorajax.io.tensors import AdapterError
from lorajax.variants.lora import LoRA


def unscaled(modules: list[str], scales: np.ndarray, bias: np.ndarray,
             base: np.ndarray | None) -> dict[str, np.ndarray]:
    """Module -> its bias divided by IA3's scales: PEFT multiplies the whole output by them, lorajax the weight. None of
    them where `base` is known and is all that was scaled."""
    bias, by = bias.astype(np.float32), scales.astype(np.float32).reshape(bias.shape)
    if base is not None and np.array_equal(bias, base.astype(np.float32) * by):
        return {}
    if not by.all():
        raise AdapterError(f"PEFT's IA3 scales the bias of {modules[0]} too, and one of its scales is 0, which no bias "
                           f"survives: {PLAIN}")
    return dict(zip(modules, (bias / by).reshape(len(modules), -1), strict=True))


def of_b(rows: Mapping[str, tuple[str, Variant]], adapt: Adapt, trainable: Mapping[str, Any], base: Mapping[str, Any],
         directory: Directory) -> dict[str, np.ndarray]:
    """Module -> the bias of its B: what was added to the base's bias, over the scale; 0 where none trains."""
    found = {}
    for module, (path, variant) in rows.items():
        if not isinstance(variant, LoRA):
            raise AdapterError(f"{path} is adapted by {type(variant).__name__}, and PEFT has lora_bias with LoRA only")
        width, place = adapt.sites[path].n_out, directory.tensors.get(f"{module}.bias")
        found[module] = np.zeros(width, np.float32)
        if place is not None and place.path in trainable:
            added = np.asarray(trainable[place.path].w, np.float64) - np.asarray(base[place.path], np.float64)
            found[module] = (added.reshape(-1, width)[place.at] / float(variant.scale)).astype(np.float32)
    return found
