"""Between the sites of a model and the names in PEFT's files, which are those of `transformers`' modules."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lorajax.core.sites import Sites
from lorajax.io.tensors import AdapterError

PREFIX = "base_model.model."


class Named(Protocol):
    """What a model says of one parameter; `lorajax.models.adapter_names` returns path -> such a row.

    names: of its tensors in a checkpoint, several where it is a stack of layers or experts, in C order of the stack.
    form: 'same', 'linear' ((out, in) there, (in, out) here) or 'conv' ((out, in, *window), here (*window, in, out)).
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def form(self) -> str: ...


Names = Mapping[str, Named]


class Place(NamedTuple):
    """Where a tensor belongs: our path, which (`at`) matrix of its stack, and how the weight itself lies in a file."""

    path: str
    at: int
    form: str


class Directory:
    """Tensor names and module names -> places. Of several tables the first is the one written by, all are read by."""

    def __init__(self, names: Names | Sequence[Names]) -> None:
        tables = [names] if isinstance(names, Mapping) else list(names)
        self.first = tables[0]
        self.tensors: dict[str, Place] = {}
        for table in tables:
            for path, row in table.items():
                for i, name in enumerate(row.names):
                    self.tensors.setdefault(name, Place(path, i, row.form))

    @property
    def modules(self) -> dict[str, Place]:
        """Module -> place of its weight."""
        return {name.removesuffix(".weight"): place for name, place in self.tensors.items() if name.endswith(".weight")}

    def written(self, path: str) -> tuple[str, ...]:
        """The names of a parameter. AdapterError if the table has none."""
        if path not in self.first:
            raise AdapterError(f"names has no row for {path}: give the model's own table, "
                               f"lorajax.models.adapter_names(config), or add the row")
        return self.first[path].names

    def modules_of(self, path: str) -> list[str]:
        """The modules whose weights a site holds."""
        names = self.written(path)
        if not all(name.endswith(".weight") for name in names):
            raise AdapterError(f"{path} is {names[0]!r}, no weight of a module: PEFT has no adapter for it")
        return [name.removesuffix(".weight") for name in names]

    def unknown(self, name: str, known: Iterable[str]) -> str:
        """' (nearest: ...)' for an error about a name."""
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
        return f" (the nearest name in this model is {near[0]!r})" if near else ""


def tied(sites: Sites, path: str | None = None) -> str:
    """'' unless the parameter (None: any) is a table of embeddings and the head: then what PEFT does about it, for an
    error."""
    found = [p for p, site in sites.items() if {use.op for use in site.uses} >= {"lookup", "matmul"}]
    if not found or path not in (None, *found):
        return ""
    return (f": {path or found[0]} is this model's table and its head, of which PEFT adapts one without the other; "
            f"give both their own weights by lorajax.models.untied(config, variables)")


def to_theirs(x: np.ndarray, form: str) -> np.ndarray:
    """One whole weight of ours as it lies in a file."""
    if form == "linear":
        return x.T
    return x.transpose(-1, -2, *range(x.ndim - 2)) if form == "conv" else x


def to_ours(y: np.ndarray, form: str) -> np.ndarray:
    """The inverse."""
    if form == "linear":
        return y.T
    return y.transpose(*range(2, y.ndim), 1, 0) if form == "conv" else y


def stack(parts: Sequence[np.ndarray], shape: tuple[int, ...], what: str) -> np.ndarray:
    """The matrices of one site in our layout, put along its stack dimensions; AdapterError if `shape` differs."""
    x: Any = np.stack(parts) if len(parts) > 1 or (parts[0].ndim < len(shape)) else parts[0]
    shapes = {part.shape for part in parts}
    if len(shapes) > 1 or x.size != int(np.prod(shape)) or (x.ndim == len(shape) and x.shape != tuple(shape)):
        raise AdapterError(f"{what} is {' and '.join(map(str, shapes))} in our layout, expected {tuple(shape)}")
    return x.reshape(shape)
