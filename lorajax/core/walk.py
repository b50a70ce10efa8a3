"""An abstract walk over a jaxpr: which operation consumes each weight, along which axes, and what flows where.

Nothing is computed. Two kinds of value are followed: a `View` of a param leaf (its dimensions, each with the axes of
the leaf that it came from) until an operation consumes it, and an `Activation` (which consumptions it came from).
The dataflow is what tells a query from a key and a head from a hidden layer, whatever their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lorajax.core import compat
from lorajax.core.structure import groups


class View(NamedTuple):
    """A param leaf on its way to its consumer. dims[i]: the leaf's axes that dimension i came from."""

    path: str
    dims: tuple[tuple[int, ...], ...]
    beside: tuple[str, ...] = ()
    """Further leaves, laid out alike, that were concatenated or stacked with this one."""


class Use(NamedTuple):
    """One consumption of a leaf: op (`matmul`, `conv`, `lookup`), the axes contracted (or looked up) and kept."""

    op: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]


@dataclass(eq=False)
class Product:
    """A product of two activations (attention scores, attention output): where its operands came from."""

    left: frozenset[Any]
    right: frozenset[Any]
    mixes_values: bool = False
    """Whether it is the second product of an attention, weights times values."""


class Activation(NamedTuple):
    """Data. sources: the weight consumptions (paths) and Products that reach it with no other in between.
    marks[i]: (Product, side) if dimension i is a free dimension of that product's operand."""

    sources: frozenset[Any] = frozenset()
    marks: tuple[Any, ...] = ()
    data: bool = False
    """Whether the function's inputs had a part in it; if not it is made of params and constants alone."""


NOTHING = Activation()


@dataclass
class Findings:
    """What the walk saw. feeds: path -> set of source sets that its input had."""

    uses: dict[str, dict[Use, None]] = field(default_factory=dict)
    others: dict[str, dict[str, None]] = field(default_factory=dict)
    roles: dict[str, set[str]] = field(default_factory=dict)
    feeds: dict[str, set[frozenset[Any]]] = field(default_factory=dict)
    consumed: set[Any] = field(default_factory=set)
    results: list[frozenset[Any]] = field(default_factory=list)


def walk(jaxpr: Any, values: Sequence[Any]) -> Findings:
    """Follows `values` (a View or an Activation per input) through a jaxpr."""
    found = Findings()
    walker = Walker(found)
    for value in walker.run(jaxpr, values):
        found.results.append(value.sources if isinstance(value, Activation) else frozenset())
    return found


class Walker:
    def __init__(self, found: Findings):
        self.found = found

    def run(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        jaxpr = compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = dict.fromkeys(jaxpr.constvars, NOTHING)
        env.update(zip(jaxpr.invars, values, strict=True))

        def read(atom):
            return NOTHING if isinstance(atom, compat.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            results = self.step(eqn, [read(a) for a in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def step(self, eqn: Any, values: list[Any]) -> list[Any]:
        name, p = eqn.primitive.name, eqn.params
        if name == "scan":
            return self.scan(eqn, values)
        if name == "while":
            n, m = p["cond_nconsts"], p["body_nconsts"]
            return self.loop(p["body_jaxpr"], values[n:n + m], values[n + m:], [])
        if name == "cond":
            outs = [self.run(branch, values[1:]) for branch in p["branches"]]
            return [joined(*column) for column in zip(*outs, strict=True)]
        inner = compat.subjaxprs(eqn)
        if inner and len(compat.open_jaxpr(inner[0]).invars) == len(values):
            return self.run(inner[0], values)
        views = [i for i, v in enumerate(values) if isinstance(v, View)]
        if not views:
            return self.activation(eqn, values)
        if name in CONSUMERS and views in ([1], [0]):
            consumed = getattr(self, CONSUMERS[name])(eqn, values, views[0])
            if consumed is not None:
                return [consumed]
        if views == [0] and name in LAYOUT:
            moved = layout(eqn, values[0])
            if moved is not None:
                return moved
        if name in ("mul", "div") and len(views) == 1 and len(getattr(eqn.invars[1 - views[0]].aval, "shape", ())) == 0:
            return [values[views[0]]]
        if name == "optimization_barrier":
            return values
        for i in views:
            self.found.others.setdefault(values[i].path, {})[name] = None
        made = None if any(isinstance(v, Activation) and v.data for v in values) else composed(eqn, values)
        if made is not None:
            return [made]
        return self.activation(eqn, [NOTHING if isinstance(v, View) else v for v in values])

    def scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        n, m = compat.scan_counts(eqn)
        xs = []
        for v in values[n + m:]:
            xs.append(View(v.path, v.dims[1:], v.beside) if isinstance(v, View)
                      else Activation(v.sources, v.marks[1:], v.data))
        out = self.loop(eqn.params["jaxpr"], values[:n], values[n:n + m], xs)
        return out[:m] + [View(v.path, ((), *v.dims), v.beside) if isinstance(v, View)
                          else Activation(v.sources, (), v.data) for v in out[m:]]

    def loop(self, body: Any, consts: list[Any], carry: list[Any], xs: list[Any]) -> list[Any]:
        """Twice, since what an iteration hands on may feed the next."""
        out: list[Any] = []
        for _ in range(2):
            out = self.run(body, [*consts, *carry, *xs])
            carry = [joined(a, b) for a, b in zip(carry, out, strict=False)]
        return [*carry, *out[len(carry):]]

    def consume(self, view: View, use: Use, data: Activation) -> bool:
        """Records one consumption; False if the leaf does not act as a matrix there."""
        if not use.in_axes or not use.out_axes or set(use.in_axes).intersection(use.out_axes):
            return False
        self.found.consumed.update(data.sources)
        for path in (view.path, *view.beside):
            self.found.uses.setdefault(path, {})[use] = None
            self.found.feeds.setdefault(path, set()).add(data.sources)
            if any(isinstance(s, Product) and s.mixes_values for s in data.sources) and len(data.sources) == 1:
                self.found.roles.setdefault(path, set()).add("output")
        return True

    def dot(self, eqn: Any, values: list[Any], side: int) -> Activation | None:
        view, data = values[side], values[1 - side]
        contracted, batch = _numbers(eqn, side)
        taken = {*contracted, *batch}
        use = Use("matmul", _axes(view, contracted), _axes(view, [d for d in range(len(view.dims)) if d not in taken]))
        ok = self.consume(view, use, data)
        return Activation(frozenset([view.path, *view.beside]), (), data.data) if ok else None

    def ragged(self, eqn: Any, values: list[Any], side: int) -> Activation | None:
        view, numbers = values[side], eqn.params["ragged_dot_dimension_numbers"]
        contracted = numbers.dot_dimension_numbers[0][1]
        kept = [d for d in range(len(view.dims)) if d not in (*contracted, *numbers.rhs_group_dimensions)]
        use = Use("matmul", _axes(view, contracted), _axes(view, kept))
        ok = side == 1 and self.consume(view, use, values[0])
        return Activation(frozenset([view.path, *view.beside]), (), values[0].data) if ok else None

    def conv(self, eqn: Any, values: list[Any], side: int) -> Activation | None:
        view, (out, *window) = values[side], eqn.params["dimension_numbers"].rhs_spec
        use = Use("conv", _axes(view, window), _axes(view, [out]))
        ok = side == 1 and self.consume(view, use, values[0])
        return Activation(frozenset([view.path, *view.beside]), (), values[0].data) if ok else None

    def gather(self, eqn: Any, values: list[Any], side: int) -> Any:
        view, p = values[side], eqn.params["dimension_numbers"]
        if side != 0 or not set(p.start_index_map).issubset(p.collapsed_slice_dims) or p.operand_batching_dims:
            return None
        rest = [d for d in range(len(view.dims)) if d not in p.collapsed_slice_dims]
        batch = [i for i in range(len(eqn.outvars[0].aval.shape)) if i not in p.offset_dims]
        if len(rest) > 1 or not batch:  # a layer or an expert picked out of a stack
            names = dict(zip(p.offset_dims, rest, strict=True))
            dims = tuple(view.dims[names[i]] if i in names else () for i in range(len(names) + len(batch)))
            return View(view.path, dims, view.beside)
        use = Use("lookup", _axes(view, p.start_index_map), _axes(view, rest))
        return Activation(frozenset([view.path, *view.beside]), (), True) if self.consume(view, use, NOTHING) else None

    def activation(self, eqn: Any, values: list[Activation]) -> list[Any]:
        """Data through an operation without weights."""
        sources = frozenset().union(*[v.sources for v in values])
        if eqn.primitive.name == "dot_general":
            return [self.product(eqn, *values)]
        if eqn.primitive.name.startswith("dot_product_attention_fwd"):  # cuDNN's, of jax.nn.dot_product_attention
            return self.fused(eqn, *values[:3])
        data = any(v.data for v in values)
        return [Activation(sources, _marks(eqn, values, out), data) for out in eqn.outvars]

    def fused(self, eqn: Any, query: Activation, key: Activation, value: Activation) -> list[Any]:
        """An attention in one operation: its result, and what its backward pass needs."""
        for role, operand in (("query", query), ("key", key), ("value", value)):
            self.found.consumed.update(operand.sources)
            for path in operand.sources:
                if isinstance(path, str):
                    self.found.roles.setdefault(path, set()).add(role)
        made = Product(query.sources | key.sources, value.sources, mixes_values=True)
        data = query.data or key.data or value.data
        return [Activation(frozenset([made]), (), data) for _ in eqn.outvars]

    def product(self, eqn: Any, left: Activation, right: Activation) -> Activation:
        """A product of activations. softmax(q k) v shows as two of them, the second contracting the keys' dimension."""
        made = Product(left.sources, right.sources)
        for side, (scores, value) in enumerate(((left, right), (right, left))):
            contracted, _ = _numbers(eqn, side)
            marks = [scores.marks[d] for d in contracted if d < len(scores.marks) and scores.marks[d]]
            if len(marks) == 1 and all(isinstance(s, str) for s in value.sources) and value.sources:
                before, keys_left = marks[0]
                keys, queries = (before.left, before.right) if keys_left else (before.right, before.left)
                for role, sources in (("key", keys), ("query", queries), ("value", value.sources)):
                    for path in sources:
                        if isinstance(path, str):
                            self.found.roles.setdefault(path, set()).add(role)
                made.mixes_values = True
        self.found.consumed.update(left.sources | right.sources)
        (contract_l, batch_l), (contract_r, batch_r) = _numbers(eqn, 0), _numbers(eqn, 1)
        shapes = [len(v.aval.shape) for v in eqn.invars]
        marks_out: list[Any] = [None] * len(batch_l)
        marks_out += [(made, True)] * (shapes[0] - len(contract_l) - len(batch_l))
        marks_out += [(made, False)] * (shapes[1] - len(contract_r) - len(batch_r))
        return Activation(frozenset([made]), tuple(marks_out), left.data or right.data)


def composed(eqn: Any, values: Sequence[Any]) -> View | None:
    """A weight made of params and constants alone: normalised, padded, concatenated or stacked."""
    views = [(v, atom.aval.shape) for v, atom in zip(values, eqn.invars, strict=True) if isinstance(v, View)]
    shape = eqn.outvars[0].aval.shape
    if len(eqn.outvars) > 1 or len(shape) < 2:
        return None
    name, (first, _) = eqn.primitive.name, views[0]
    beside = tuple(v.path for v, _ in views[1:] if v.dims == first.dims and v.path != first.path)
    if name == "stack":
        axis = eqn.params["axis"]
        return View(first.path, (*first.dims[:axis], (), *first.dims[axis:]), beside)
    if name in ("concatenate", "pad"):
        return View(first.path, first.dims, beside)
    return next((v for v, before in views if before == shape), None)


def joined(*values: Any) -> Any:
    """The value of a variable that several branches or iterations write."""
    views = [v for v in values if isinstance(v, View)]
    if len(views) == len(values) and all(v == views[0] for v in views):
        return views[0]
    data = [v for v in values if isinstance(v, Activation)] or [NOTHING]
    return Activation(frozenset().union(*[v.sources for v in data]), data[0].marks, any(v.data for v in data))


def _numbers(eqn: Any, side: int) -> tuple[Sequence[int], Sequence[int]]:
    contracted, batch = eqn.params["dimension_numbers"]
    return contracted[side], batch[side]


def _axes(view: View, dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({axis for d in dims for axis in view.dims[d]}))


def layout(eqn: Any, view: View) -> list[View] | None:
    """Views after a layout operation; None where it is none for a weight."""
    name, p, dims = eqn.primitive.name, eqn.params, view.dims
    shape = eqn.invars[0].aval.shape
    if name == "transpose":
        dims = tuple(dims[d] for d in p["permutation"])
    elif name == "squeeze":
        dims = tuple(x for d, x in enumerate(dims) if d not in p["dimensions"])
    elif name == "broadcast_in_dim":
        into = dict(zip(p["broadcast_dimensions"], dims, strict=True))
        dims = tuple(into.get(d, ()) for d in range(len(p["shape"])))
    elif name == "reshape":
        made: list[tuple[int, ...]] = [()] * len(p["new_sizes"])
        for left, right in groups(shape, p["new_sizes"]):
            merged = tuple(axis for d in left for axis in dims[d])
            wide = [d for d in right if p["new_sizes"][d] > 1] or list(right)[:1]
            for d in wide:
                made[d] = tuple(dict.fromkeys(merged))
        dims = tuple(made)
    elif name == "dynamic_slice":
        kept = [d for d, size in enumerate(p["slice_sizes"]) if size > 1]
        if len(kept) <= 1 < len([s for s in shape if s > 1]):
            return None
    elif name == "convert_element_type" and not np.issubdtype(np.dtype(p["new_dtype"]), np.inexact):
        if str(p["new_dtype"]) != "bfloat16" and "float" not in str(p["new_dtype"]):
            return None
    return [View(view.path, dims, view.beside) for _ in eqn.outvars]


def _marks(eqn: Any, values: list[Activation], out: Any) -> tuple[Any, ...]:
    """Which dimensions of a result are still a free dimension of a Product's operand."""
    name, p = eqn.primitive.name, eqn.params
    shape = getattr(out.aval, "shape", ())
    marked = [(v.marks, atom.aval.shape) for v, atom in zip(values, eqn.invars, strict=True) if any(v.marks)]
    if not marked:
        return ()
    marks, before = marked[0]
    if name == "transpose":
        return tuple(marks[d] for d in p["permutation"])
    if name == "squeeze":
        return tuple(m for d, m in enumerate(marks) if d not in p["dimensions"])
    if name == "broadcast_in_dim":
        into = dict(zip(p["broadcast_dimensions"], marks, strict=True))
        return tuple(into.get(d) for d in range(len(shape)))
    if name == "reshape":
        made: list[Any] = [None] * len(shape)
        for left, right in groups(before, shape):
            one = {marks[d] for d in left if marks[d]}
            for d in right:
                made[d] = next(iter(one)) if len(one) == 1 else None
        return tuple(made)
    if name.startswith("reduce_") and "axes" in p:
        return tuple(m for d, m in enumerate(marks) if d not in p["axes"])
    return marks if len(shape) == len(before) else ()


LAYOUT = {"transpose", "squeeze", "broadcast_in_dim", "reshape", "slice", "dynamic_slice", "split", "rev", "copy",
          "convert_element_type", "copy_p", "pvary", "pcast", "mesh_cast", "sharding_constraint", "reshard", "neg",
          "all_gather", "all_gather_invariant"}
CONSUMERS = {"dot_general": "dot", "conv_general_dilated": "conv", "gather": "gather",
             "ragged_dot_general": "ragged", "ragged_dot": "ragged"}
