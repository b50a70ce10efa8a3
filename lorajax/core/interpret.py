"""Evaluates a jaxpr on values some of which are bound weights.

An equation without a bound operand is bound again as it is. Control flow and calls are rebuilt with JAX's public
functions around the evaluation of their inner jaxpr. Where no rule applies, that one operand is merged and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lorajax.core import compat, contract, gated_kernel, siblings, structure
from lorajax.core.bound import RANK, Bound, Factor, dense, is_bound
from lorajax.core.gated import WIDEST, Gates, Waiting
from lorajax.core.layerwise import layerwise
from lorajax.core.packed import is_packed
from lorajax.core.siblings import Siblings
from lorajax.core.structure import Decline

Report = Callable[[str, str, str, str], None]
"""Called with (path, operation, source line, reason) for every weight that had to be merged."""


class Interpreter:
    """One evaluation: where to report, which weights are unpacked `once` (`lorajax.core.layerwise`), with which
    `kernels` (`lorajax.core.gated`), and the jitted layers already rebuilt (identical layers share one)."""

    def __init__(self, report: Report, once: str = "", kernels: str = ""):
        self.report, self.once, self.kernels = report, once, kernels
        self.jitted: dict[int, tuple[Any, Any]] = {}
        self.around: list[Any] = []
        """The equations that the current one stands in, outermost first."""
        self.depth = 0
        """Loops and jitted functions around the current equation: what stands inside one is traced once anyway."""

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Results of a jaxpr, open or closed; bound weights may be among `args` and among the results."""
        jaxpr = compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        stack = compat.name_stack()

        together, gates, makers = Siblings(jaxpr), Gates(jaxpr, self.kernels), dict[Any, Any]()

        def read(atom):
            return atom.val if isinstance(atom, compat.Literal) else env[atom]

        def evaluate(eqn):
            values, hidden = [read(atom) for atom in eqn.invars], list[Any]()
            with compat.scope(eqn, stack):
                if any(isinstance(v, Waiting) for v in values):
                    results = opened(eqn, values)
                elif not any(map(is_bound, values)):
                    results = compat.bind(eqn, values)
                else:
                    if eqn.primitive.name == "dot_general" and not is_bound(values[0]):
                        fn = siblings.products if self.depth else siblings.shared
                        values[0], *hidden = together.ahead(eqn, values[0], weight, fn)
                        hidden = [*hidden, True] if id(eqn) in gates.products else hidden
                    results = self.apply(eqn, values, *hidden)
            env.update(zip(eqn.outvars, results, strict=True))

        def opened(eqn, values):
            """What reads a product that waits: a silu hands it on; a gate is one kernel if both its sides wait, which
            makes x A of the next product too, else they are added up."""
            if id(eqn) in gates.silus:
                return values
            side, reader = gates.sides[id(eqn)]
            gate, up = values[side], values[1 - side]
            if not (isinstance(gate, Waiting) and isinstance(up, Waiting)):
                gate = jax.nn.silu(contract.added(gate)) if isinstance(gate, Waiting) else gate
                return [gate * (contract.added(up) if isinstance(up, Waiting) else up)]
            node, a = None if reader is None else weight(reader.invars[1]), None
            if isinstance(node, Bound) and len(node.terms) == 1:
                (_, contracted), _ = reader.params["dimension_numbers"]
                f = siblings.first(node.terms[0], contracted)
                a = None if f is None or f.size(RANK) > WIDEST else f.spread((*contracted, RANK))
            z, h = (gated_kernel.gated if self.depth else gated_kernel.shared)(gate, up, a, self.kernels)
            if h is not None:
                together.made[id(reader)] = siblings.Ahead(z, (h,))
            return [z]

        def weight(atom):
            """The weight that a later equation reads, whose way there (casts, layout) is gone now; None for data."""
            if isinstance(atom, compat.Literal) or atom in env:
                return read(atom)
            if not makers:
                makers.update((v, e) for e in jaxpr.eqns if e.primitive.name in structure.RULES for v in e.outvars)
            if atom not in makers or not all(is_bound(weight(a)) for a in makers[atom].invars):
                return None
            evaluate(makers[atom])
            return env[atom]

        for eqn in jaxpr.eqns:
            if not eqn.outvars or eqn.outvars[0] not in env:
                evaluate(eqn)
        return [read(atom) for atom in jaxpr.outvars]

    def closed(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        return self.run(jaxpr, compat.constants(jaxpr), args)

    def inside(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """`closed`, for the body of a loop or of a jitted function."""
        self.depth += 1
        try:
            return self.closed(jaxpr, args)
        finally:
            self.depth -= 1

    def apply(self, eqn: Any, values: Sequence[Any], *hidden: Any) -> Sequence[Any]:
        """One equation with at least one bound operand. hidden: of `contract.dot_general`."""
        name = eqn.primitive.name
        try:
            if name in FLOW:
                self.around.append(eqn)
                try:
                    return FLOW[name](self, eqn, values)
                finally:
                    self.around.pop()
            rules = structure.RULES if name in structure.RULES else contract.RULES if self.depth else contract.SHARED
            if name not in rules:
                raise Decline("no rule for this primitive")
            result = rules[name](compat.Operation(eqn.primitive, tuple(eqn.params.items())), *values, *hidden)
            return [_settle(r) for r in (result if isinstance(result, list) else [result])]
        except Decline as why:
            return compat.bind(eqn, [self.merge(v, eqn, str(why)) for v in values])

    def line(self, eqn: Any) -> str:
        """The user's source line of an equation; of the call around it, where the equation is in a library."""
        return next(filter(None, map(compat.where, (eqn, *reversed(self.around)))), "an unknown line")

    def merge(self, value: Any, eqn: Any, why: str) -> Any:
        """A bound weight as a dense array, reported; any other value as it is. `eqn` None: the function returns it."""
        if not is_bound(value):
            return value
        name, line = (eqn.primitive.name, self.line(eqn)) if eqn else ("return", "the end of the function")
        if any(term.key is not None for term in value.terms):
            raise ValueError(f"{value.path}: its adapter has dropout, but `{name}` at {line} needs the merged weight "
                             f"({why}), which no input dropout fits: set dropout=0 for this path")
        if any(term.gate is not None for term in value.terms):
            raise ValueError(f"{value.path}: its adapter weighs its rank components per token, but `{name}` at {line} "
                             f"needs one merged weight ({why}): give this path a variant without a router")
        if any(f.many is not None for f in value.factors()):
            raise ValueError(f"{value.path}: each row of the batch has its own adapter, but `{name}` at {line} needs "
                             f"one merged weight ({why}): leave this path out of the rules, or run each adapter alone")
        self.report(str(value.path), name, line, why)
        return dense(value)

    def sliceable(self, node: Any, eqn: Any) -> Any:
        """The weight of a scanned node; a packed one stays packed where its stored arrays have dimension 0."""
        rows = node.w.rows() if is_packed(node.w) else node.w
        if rows is None:
            self.report(str(node.path), "scan", self.line(eqn),
                        "a quantised weight in an order that no scan can slice")
        return node.w.dense() if rows is None else rows


def _settle(value: Any) -> Any:
    """A weight that slicing left with a factor along no dimension is a vector: no larger dense than its factors."""
    if is_bound(value) and value.ndim <= 1 and all(
            t.a is None or t.b is None or t.a.dims == (RANK,) or t.b.dims == (RANK,) for t in value.terms) and any(
            t.a is not None and t.only is None for t in value.terms):
        return dense(value)
    return value


def _barrier(self: Interpreter, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    return lax.optimization_barrier(list(values))  # over the leaves of the nodes as well


def _call(self: Interpreter, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    (inner,) = compat.subjaxprs(eqn)
    return self.closed(inner, values)


def _jit(self: Interpreter, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    inner = eqn.params["jaxpr"]
    if compat.shardings_given(eqn) or getattr(eqn.params["inline"], "value", eqn.params["inline"]) is True:
        return self.closed(inner, values)
    if id(inner) not in self.jitted:
        def body(*args):
            return self.inside(inner, args)
        body.__name__ = eqn.params["name"]
        self.jitted[id(inner)] = (jax.jit(body, keep_unused=eqn.params["keep_unused"]), inner)
    return self.jitted[id(inner)][0](*values)


def _remat(self: Interpreter, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    inner, policy = eqn.params["jaxpr"], eqn.params["policy"]
    full = policy in (None, jax.checkpoint_policies.nothing_saveable)

    def body(*args):
        return self.closed(inner, layerwise(args, self.once) if full else args)

    return jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=policy)(*values)


def _loop(values: list[Any], carried: range, attempt: Callable[[list[Any]], Any], merge: Callable[[Any, str], Any]):
    """Runs a loop with carried weights bound; merges those that the body does not hand on as they came."""
    while True:
        try:
            return attempt(values)
        except _Changed as changed:
            index = carried[changed.slot]
            values[index] = merge(values[index], "the loop changes the weight that it carries")


class _Changed(Exception):
    """A loop body returned something else than a bound weight of the same layout in a carried slot."""

    def __init__(self, slot: int):
        self.slot = slot


def _handed_on(before: Sequence[Any], after: list[Any], merge: Callable[[Any], Any]) -> list[Any]:
    """Carry results that match the carry: bound where it was bound, dense elsewhere."""
    for slot, (old, new) in enumerate(zip(before, after, strict=True)):
        if is_bound(old) and _form(old) != _form(new):
            raise _Changed(slot)
        if not is_bound(old):
            after[slot] = merge(new)
    return after


def _form(value: Any) -> Any:
    return jax.tree.structure(value), [jnp.shape(x) for x in jax.tree.leaves(value)]


def _scan(self: Interpreter, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    p = eqn.params
    n_consts, n_carry = compat.scan_counts(eqn)

    def attempt(values):
        consts, carry, xs = values[:n_consts], values[n_consts:n_consts + n_carry], values[n_consts + n_carry:]
        rows = [_Rows(self, eqn, x) for x in xs]

        def body(carry, sliced):
            out = self.inside(p["jaxpr"], [*consts, *carry, *[r.put(s) for r, s in zip(rows, sliced, strict=True)]])
            done = _handed_on(carry, out[:n_carry], lambda v: self.merge(v, eqn, "a loop returns it"))
            return done, list(map(_plain, out[n_carry:]))

        carry, ys = lax.scan(body, carry, [r.sliced for r in rows], length=p["length"], reverse=p["reverse"],
                             unroll=p["unroll"])
        return [*carry, *[_stacked(y) for y in ys]]

    return _loop(list(values), range(n_consts, n_consts + n_carry), attempt,
                 lambda v, why: self.merge(v, eqn, why))


class _Rows:
    """A scanned operand: the leaves that run along dimension 0 are sliced, the others (a shared A) stay outside."""

    def __init__(self, run: Interpreter, eqn: Any, x: Any):
        self.node = x if is_bound(x) else None
        self.sliced = x
        if is_bound(x):
            self.sliced = (run.sliceable(x, eqn), [_lead(f) if 0 in f.dims else None for f in x.factors()])

    def put(self, sliced: Any) -> Any:
        """The operand inside the body, from this iteration's slices."""
        if self.node is None:
            return sliced
        w, first = sliced
        rows = iter(first)

        def change(f):
            row = next(rows)
            if row is None:
                return structure.rename(f, {d: d - 1 for d in f.dims})
            dims = [d for d in f.dims if d != 0]
            many = f.many and f.many._replace(axis=f.many.axis - (f.dims.index(0) < f.many.axis))
            return structure.rename(Factor(row, tuple(dims), None, many, f.at), {d: d - 1 for d in dims})

        return self.node.map(w, change)


def _lead(f: Factor) -> Any:
    """The stored array with the weight's dimension 0 in front. Of many adapters all are in it still."""
    array = f.stored if f.shape is None else jnp.reshape(f.stored, f.shape)
    axis = f.dims.index(0)
    axis += f.many is not None and axis >= f.many.axis
    return lax.transpose(array, [axis, *[i for i in range(array.ndim) if i != axis]])


def _plain(y: Any) -> Any:
    """A node whose factors are stored in their own shape, as what slices, stacks or shards them needs."""
    return y.map(y.w, lambda f: Factor(f.array, f.dims)) if is_bound(y) else y


def _stacked(y: Any) -> Any:
    """A bound weight that every iteration returned: its leaves have a new dimension 0."""
    if not is_bound(y):
        return y
    return y.map(y.w, lambda f: Factor(f.array, (0, *[d if d == RANK else d + 1 for d in f.dims])))


def _while(self: Interpreter, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]

    def attempt(values):
        cond_consts, body_consts, init = values[:n_cond], values[n_cond:n_cond + n_body], values[n_cond + n_body:]

        def body(carry):
            out = self.inside(p["body_jaxpr"], [*body_consts, *carry])
            return _handed_on(carry, out, lambda v: self.merge(v, eqn, "a loop returns it"))

        return lax.while_loop(lambda carry: self.inside(p["cond_jaxpr"], [*cond_consts, *carry])[0], body, list(init))

    return _loop(list(values), range(n_cond + n_body, len(values)), attempt,
                 lambda v, why: self.merge(v, eqn, why))


def _cond(self: Interpreter, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    def branch(jaxpr):
        return lambda *args: [self.merge(v, eqn, "a branch returns it") for v in self.closed(jaxpr, args)]

    index, *operands = values
    return lax.switch(index, [branch(j) for j in eqn.params["branches"]], *operands)


def _shard_map(self: Interpreter, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    p = eqn.params
    values = list(map(_plain, values))

    def spec(i, full):
        value = values[i]
        if not is_bound(value):
            return full
        entries = [*full, *[None] * (value.ndim - len(full))]
        if is_packed(value.w):
            w, full = value.w.placed(entries, p["mesh"].shape)
            values[i] = value.map(w, lambda f: f)
        return value.map(full, lambda f: Factor(PartitionSpec(*[None if d == RANK else entries[d] for d in f.dims]),
                                                 f.dims))

    def body(*args):
        return [self.merge(v, eqn, "a shard_map returns it") for v in self.closed(p["jaxpr"], args)]

    in_specs = tuple(spec(i, full) for i, full in enumerate(p["in_specs"]))
    mapped = jax.shard_map(body, mesh=p["mesh"], in_specs=in_specs, out_specs=list(p["out_specs"]),
                           check_vma=p["check_vma"], axis_names=compat.manual_axes(eqn))
    return mapped(*values)


def _custom(self: Interpreter, eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    raise Decline("a custom derivative takes the weight")


FLOW: dict[str, Callable[[Interpreter, Any, Sequence[Any]], Sequence[Any]]] = {
    "jit": _jit, "pjit": _jit, "closed_call": _call, "core_call": _call, "checkpoint": _remat, "remat2": _remat,
    "optimization_barrier": _barrier, "scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map,
    "custom_jvp_call": _custom, "custom_vjp_call": _custom, "custom_vjp_call_jaxpr": _custom,
}
