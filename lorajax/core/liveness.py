"""What a program holds at its fullest, beside its arguments and results: from its jaxpr, nothing is compiled.

A compiler stores no array that it can make where it is read. An array counts as stored if a kernel makes it (a product,
a convolution, an attention, a loop) or a reduction does, if a kernel or the barrier of `jax.checkpoint` reads it, or if
several operations read it and it is smaller than what it is made of. All else is elementwise, made again by each of its
readers, and keeps alive the stored arrays that it comes from. What is stored lives from the kernel that makes it, or
from before its first reader if it is elementwise, to its last reader. Kernels run in the program's order.

So XLA fuses in the programs that it compiles for an H100: a producer into all of its readers or into none, and not
where they would read more for it; what is made of the same arrays is one kernel with several results. Not counted:
copies in another layout, and room that the kernels of libraries ask for. README, "On several GPUs", has a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from lorajax.core import compat

KERNELS = ("dot_", "ragged_dot", "conv_general", "scan", "while", "cond", "shard_map", "pallas_call", "sort", "top_k",
           "approx_top_k", "fft", "cum", "scatter", "random_bits", "threefry", "reduce_window", "select_and_",
           "cholesky", "qr", "householder", "lu", "svd", "eig", "triangular", "erf", "lgamma", "digamma")
"""Operations that do not fuse, by how their names begin. The last ones are elementwise, of dozens of operations."""
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "arg")
LAYOUT = ("reshape", "squeeze", "expand_dims", "transpose", "copy", "name", "stop_gradient", "reduce_precision",
          "optimization_barrier", "sharding_constraint")  # fmt: skip
CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat")
LOOPS = ("scan", "while", "cond")


def size(x: Any) -> int:
    """Bytes of an array, or of its shape and dtype; of a key 8."""
    if not hasattr(x, "dtype"):  # a token
        return 0
    wide = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.dtype(x.dtype).itemsize
    return math.prod(x.shape) * wide


def total(tree: Any) -> int:
    """Bytes of a tree of arrays, or of their shapes and dtypes."""
    return sum(map(size, jax.tree.leaves(tree)))


def fullest(jaxpr: Any) -> list[Any]:
    """The avals of the arrays that are alive where a program needs most, arguments and results not among them."""
    flat = _Flat()
    results = flat.run(jaxpr, [_Array(v.aval, outside=True) for v in compat.open_jaxpr(jaxpr).invars])
    for array in results:
        array.stored = array.outside = True
    return _fullest(_scheduled(_stored(_needed(flat.steps))))


@dataclass(eq=False)
class _Array:
    """outside: an argument or a result. stored: kept in memory. of: the stored arrays that it is made of. same: the
    array whose memory it is, behind a barrier."""

    aval: Any
    outside: bool = False
    stored: bool = False
    needed: int = 0
    of: tuple[_Array, ...] = ()
    same: _Array | None = None


class _Step(NamedTuple):
    """One operation. given: of what it reads, what its results may take the place of. within: what it needs inside."""

    kind: str
    reads: Sequence[_Array]
    makes: Sequence[_Array]
    given: Sequence[_Array] = ()
    within: Sequence[Any] = ()


class _Flat:
    """The operations of a program, calls inlined, layout left out."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []

    def run(self, jaxpr: Any, inputs: Sequence[_Array]) -> list[_Array]:
        jaxpr = compat.open_jaxpr(jaxpr)
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        env |= {v: _Array(v.aval, outside=True) for v in jaxpr.constvars}
        for eqn in jaxpr.eqns:
            given = [env.get(a) if not isinstance(a, compat.Literal) else None for a in eqn.invars]
            env.update(zip(eqn.outvars, self.step(eqn, given), strict=True))
        return [_Array(a.aval, outside=True) if isinstance(a, compat.Literal) else env[a] for a in jaxpr.outvars]

    def step(self, eqn: Any, inputs: Sequence[_Array | None]) -> list[_Array]:
        name, reads = eqn.primitive.name, [x for x in inputs if x is not None]
        inner, barrier = compat.subjaxprs(eqn), name == "optimization_barrier"
        if barrier or (eqn.params.get("prevent_cse") and eqn.params.get("differentiated")):
            beyond = {x: _Array(x.aval, x.outside, same=x.same or x) for x in reads}
            self.steps.append(_Step("kernel", [*beyond], [*beyond.values()]))
            inputs = [x and beyond[x] for x in inputs]
            reads = [beyond[x] for x in reads]
        if name.startswith(LAYOUT) and len(reads) == len(eqn.outvars):
            return reads
        if name.startswith(CALLS) and inner:
            whole = [x or _Array(a.aval) for x, a in zip(inputs, eqn.invars, strict=True)]
            return self.run(inner[0], whole)
        makes = [_Array(v.aval) for v in eqn.outvars]
        kind = "kernel" if name.startswith(KERNELS) else "reduction" if name.startswith(REDUCTIONS) else "elementwise"
        given: Sequence[_Array] = ()
        if name == "scan":
            consts, carries = compat.scan_counts(eqn)
            given = [x for x in inputs[consts:consts + carries] if x is not None]
        within = max((fullest(x) for x in inner if name in LOOPS), key=total, default=[])
        self.steps.append(_Step(kind, reads, makes, given, within))
        return makes


def _needed(steps: Sequence[_Step]) -> list[_Step]:
    """The steps that a result depends on; counts the readers of each array."""
    kept = []
    for step in reversed(steps):
        if any(x.needed or x.outside for x in step.makes):
            kept.append(step)
            for x in dict.fromkeys(step.reads):
                x.needed += 1
    return kept[::-1]


def _stored(steps: list[_Step]) -> list[_Step]:
    """Decides what is stored."""
    for step in steps:
        for x in step.reads if step.kind == "kernel" else ():
            x.stored = True
    for step in reversed(steps):
        if step.kind == "elementwise" and len(step.reads) == len(step.makes) == 1:
            (x,), (y,) = step.reads, step.makes
            if not y.stored and size(x.aval) <= size(y.aval):  # who reads a wider copy reads the narrow one
                x.needed += y.needed - 1
    for step in steps:
        found = _sources(step)
        for x in step.makes:
            x.of = found
            x.stored = x.stored or step.kind != "elementwise" or (
                x.needed > 1 and size(x.aval) < sum(size(y.aval) for y in found))
    return steps


def _scheduled(steps: Sequence[_Step]) -> list[_Step]:
    """Kernels and reductions in the program's order. What is elementwise is made before its first reader, and with it
    what else is as large, made of the same arrays and has all it is made of: one kernel with several results."""
    order: list[_Step] = []
    waiting = {x for step in steps for x in step.makes if x.stored}
    readers: dict[_Array, list[_Array]] = {}
    for step in steps:
        for x in step.makes if step.kind == "elementwise" else ():
            for y in x.of if x.stored and not x.outside else ():
                if not y.outside:
                    readers.setdefault(y, []).append(x)

    def there(x: _Array) -> bool:
        return not any(y in waiting for y in x.of)

    def make(needed: Sequence[_Array]) -> None:
        todo = [*needed]
        while todo:
            x = todo[-1]
            if x not in waiting:
                todo.pop()
            elif not there(x):
                todo += [y for y in x.of if y in waiting]
            else:
                makes = dict.fromkeys([x, *(z for y in x.of for z in readers.get(y, ()) if z in waiting and there(z)
                                            and z.aval.size == x.aval.size)])  # fmt: skip
                waiting.difference_update(makes)
                reads = tuple(dict.fromkeys(y for z in makes for y in z.of))
                order.append(_Step("elementwise", reads, [*makes], reads if len(makes) == 1 else ()))

    for step in steps:
        if step.kind == "elementwise":
            make([x for x in step.makes if x.outside])
        else:
            reads = _sources(step)
            make(reads)
            waiting.difference_update(step.makes)
            order.append(step._replace(reads=reads))
    return order


def _sources(step: _Step) -> tuple[_Array, ...]:
    """The stored arrays that it reads."""
    return tuple(dict.fromkeys(y for x in step.reads for y in ((x,) if x.stored or x.outside else x.of)))


def _fullest(order: Sequence[_Step]) -> list[Any]:
    last = {x.same or x: i for i, step in enumerate(order) for x in (*step.makes, *step.reads)}
    alive: dict[_Array, None] = {}
    most: list[Any] = []
    held = top = 0
    for i, step in enumerate(order):
        makes, reads, given = ([x.same or x for x in arrays] for arrays in (step.makes, step.reads, step.given))
        ends = {x for x in (*makes, *reads) if last[x] == i}
        wanted = [size(x.aval) for x in makes if x not in alive]
        for x in given:  # in its place
            if x in ends and x in alive and size(x.aval) in wanted:
                wanted.remove(size(x.aval))
                held -= size(x.aval)
                del alive[x]
        for x in makes:
            if x not in alive and not x.outside:
                alive[x] = None
                held += size(x.aval)
        inside = total(step.within)
        if held + inside > top:
            top, most = held + inside, [*(x.aval for x in alive), *step.within]
        for x in ends & alive.keys():
            held -= size(x.aval)
            del alive[x]
    return most
