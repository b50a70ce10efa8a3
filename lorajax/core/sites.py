"""`sites(fn, params, *args)`: every weight of a model that could be adapted, found in one abstract trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from lorajax.core.packed import Packed, is_packed
from lorajax.core.walk import Activation, Findings, Product, Use, View, walk

ATTENTION = frozenset({"query", "key", "value", "output"})


@dataclass(frozen=True)
class Site:
    """One param leaf that a matmul, convolution or lookup consumes.

    in_axes, out_axes: the axes contracted (looked up) and kept by its first use; the matrix that a variant sees is
    (in, out), each side flattened in the leaf's own order. stack_axes: all others (scanned layers, experts).
    uses: every distinct use; a tied embedding has a lookup and a matmul. roles: what the dataflow shows it to be,
    among `query`, `key`, `value`, `output` (attention), `ffn`, `embedding`, `head`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    uses: tuple[Use, ...]
    roles: frozenset[str] = frozenset()
    other_uses: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        return self.uses[0].op

    @property
    def in_axes(self) -> tuple[int, ...]:
        return self.uses[0].in_axes

    @property
    def out_axes(self) -> tuple[int, ...]:
        return self.uses[0].out_axes

    @property
    def stack_axes(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.shape)) if i not in self.in_axes and i not in self.out_axes)

    def extent(self, axes: tuple[int, ...]) -> int:
        """Number of elements along `axes`."""
        return int(np.prod([self.shape[i] for i in axes]))

    @property
    def n_in(self) -> int:
        return self.extent(self.in_axes)

    @property
    def n_out(self) -> int:
        return self.extent(self.out_axes)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.stack_axes)


@dataclass(frozen=True)
class Sites(Mapping[str, Site]):
    """The adaptable weights by path, and every leaf of the param tree (`leaves`), also those that are no site."""

    found: Mapping[str, Site]
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    tree: Any = field(repr=False)
    trace: tuple[Callable[..., Any], list[Any]] = field(repr=False)
    """The traced function of (weights, inputs), and the shapes of its inputs, for later estimates."""

    def __getitem__(self, path: str) -> Site:
        return self.found[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def stacked(self, pattern: str, *axes: int) -> Sites:
        """These sites, with `axes` taken for stack axes where the whole path matches the regex `pattern`.

        For what the trace cannot tell: an ensemble whose members all read one unbatched input looks like one wide
        matrix. Raises ValueError if nothing matches or an axis is none of the site's.
        """
        found = dict(self.found)
        for path, site in self.items():
            if re.fullmatch(pattern, path):
                if not set(axes) <= set(range(len(site.shape))):
                    raise ValueError(f"{path} has shape {site.shape}: axes {axes} are not all among its dimensions")
                uses = tuple(Use(u.op, tuple(a for a in u.in_axes if a not in axes),
                                 tuple(a for a in u.out_axes if a not in axes)) for u in site.uses)
                found[path] = replace(site, uses=uses)
        if found == self.found:
            raise ValueError(f"no site matches {pattern!r} with another axis than its stack axes; there are "
                             f"{', '.join(list(self)[:3])}")
        return replace(self, found=found)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("path", "shape", "op", "in", "out", "stack", "role")]
        for site in self.values():
            for i, use in enumerate(site.uses):
                stack = tuple(a for a in range(len(site.shape)) if a not in use.in_axes and a not in use.out_axes)
                rows.append((site.path if i == 0 else "  also", _dims(site.shape) if i == 0 else "", use.op,
                             _dims(use.in_axes), _dims(use.out_axes), _dims(stack),
                             " ".join(sorted(site.roles)) if i == 0 else ""))
        return table(rows)


def _dims(xs: tuple[int, ...]) -> str:
    return ",".join(map(str, xs))


def table(rows: list[tuple[str, ...]]) -> str:
    """Left-aligned columns; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def path_of(keys: Any) -> str:
    """`/`-joined tree keys; the `value` of a Flax metadata box or variable is not part of the name."""
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name in ("value", "raw_value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], Any]:
    """(path -> leaf in tree order, treedef). A packed weight is one leaf. ValueError if two leaves share a path."""
    one = is_packed if is_leaf is None else lambda x: is_packed(x) or is_leaf(x)
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=one)
    named = {path_of(keys): leaf for keys, leaf in flat}
    if len(named) != len(flat):
        raise ValueError("two leaves of the params tree have one path: rename a key")
    return named, treedef


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct, Packed))


def sites(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Finds the adaptable weights of ``fn(params, *args, **kwargs)`` from one abstract trace: no FLOPs, no memory.

    fn: any JAX function, for example a Flax `model.apply`. params: pytree of arrays, quantised weights or
    `jax.ShapeDtypeStruct`s (for Linen, the whole variables dict that `apply` takes). args: likewise, or what is static.
    """
    named, tree = by_path(params)
    for path, leaf in named.items():
        if not _is_array(leaf):
            raise TypeError(f"params leaf {path!r} is a {type(leaf).__name__}, not an array")
    rest, rest_tree = jax.tree.flatten((args, kwargs))
    arrays = [i for i, x in enumerate(rest) if _is_array(x)]

    def call(weights, inputs):
        filled = list(rest)
        for i, x in zip(arrays, inputs, strict=True):
            filled[i] = x
        args, kwargs = jax.tree.unflatten(rest_tree, filled)
        return fn(jax.tree.unflatten(tree, weights), *args, **kwargs)

    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in named.items()}
    inputs = [jax.ShapeDtypeStruct(rest[i].shape, rest[i].dtype) for i in arrays]
    jaxpr = jax.make_jaxpr(call)(list(shapes.values()), inputs)
    views = [View(path, tuple((i,) for i in range(len(s.shape)))) for path, s in shapes.items()]
    seen = walk(jaxpr, [*views, *[Activation(data=True)] * len(inputs)])
    roles = _roles(seen)
    found = {path: Site(path, s.shape, s.dtype, tuple(seen.uses[path]), frozenset(roles.get(path, ())),
                        tuple(seen.others.get(path, ())))
             for path, s in shapes.items() if path in seen.uses}
    return Sites(found, shapes, tree, (call, inputs))


def _roles(seen: Findings) -> dict[str, set[str]]:
    """Roles by dataflow. A head's output reaches the function's results and no further product; a feed-forward weight
    reads nothing but other weights' outputs, or is read by such a one."""
    op = {path: next(iter(uses)).op for path, uses in seen.uses.items()}
    roles = {path: set(seen.roles.get(path, ())) for path in op}
    for path in op:
        if op[path] == "lookup":
            roles[path].add("embedding")
    for sources in seen.results:
        if sources and all(not isinstance(s, Product) and s not in seen.consumed for s in sources):
            for path in sources:
                if op[path] == "matmul":
                    roles[path].add("head")
    plain = {path for path in op if op[path] == "matmul" and not roles[path]}
    for path in plain:
        for sources in seen.feeds[path]:
            if sources and sources <= plain:
                roles[path].add("ffn")
                for before in sources:
                    roles[before].add("ffn")
    return roles
