"""What each parameter is called in files of adapters, which go by the module names of `transformers`."""

from __future__ import annotations

import re
from typing import Any

from lorajax.models.checkpoint import Tensor, hf_names, layout


def adapter_names(config: Any, transformers: int = 5) -> dict[str, Tensor]:
    """Path of each parameter -> `Tensor`: its names (several where it is a stack of layers or experts, in the order of
    the stack) and how it lies in a file. For `lorajax.io.peft`; in the model's order.

    config: of the model as it runs, so with `scan_layers` paths are `params/layers/...`. transformers: the major
    version whose module names are wanted; adapters written with version 4 keep that version's names.
    """
    form, found = layout(config), dict[str, Tensor]()
    rules, forms = form.modules if transformers >= 5 else (), form.tensors
    for path, names in hf_names(config).items():
        names, fused = tuple(_renamed(name, rules) for name in names), forms[path].fused
        if fused is not None:
            named = tuple(form.prefix + name for name in fused.names)
            fused = fused._replace(names=named) if transformers >= 5 else None
        if getattr(config, "scan_layers", False):
            path_in_stack = re.sub(r"/layer_\d+/", "/layers/", path)
            before = found.get(path_in_stack, Tensor((), fused=fused and fused._replace(names=())))
            stacked = forms[path].stacked or path_in_stack != path
            fused = fused and fused._replace(names=(*before.fused.names, *fused.names))  # type: ignore[union-attr]
            found[path_in_stack] = Tensor((*before.names, *names), forms[path].form, stacked, fused)
        else:
            found[path] = Tensor(names, forms[path].form, forms[path].stacked, fused)
    return found


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    module, dot, kind = name.rpartition(".")
    for regex, replacement in rules:
        module = re.sub(regex, replacement, module)
    return module + dot + kind
