"""Products that read one input (query, key and value; gate and up): x A of all their adapters is one product.

So is what flows back through it, ``sum_i (dy_i B_i^T) A_i^T``, where each apart would write, read again and add an
array as large as x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lorajax.core import compat
from lorajax.core.bound import RANK, Bound, Factor, Term

WIDEST = 128
"""The most rank components of one product: past it there is little to gain, and A's that are one array (VeRA) would be
multiplied once for each."""


class Ahead(NamedTuple):
    """x, and for each term of a weight x a, rank last, or None where the term takes its own product."""

    x: jax.Array
    hidden: tuple[jax.Array | None, ...] | None


class Siblings:
    """The products of one jaxpr whose right operand is a weight, by the input that they read."""

    def __init__(self, jaxpr: Any):
        readers: dict[Any, list[Any]] = {}
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contracted, _), batch = eqn.params["dimension_numbers"]
                if not any(batch):
                    readers.setdefault((eqn.invars[0], tuple(contracted), eqn.params["precision"]), []).append(eqn)
        self.groups = {id(eqn): group for group in readers.values() if len(group) > 1 for eqn in group}
        self.made: dict[int, Ahead] = {}

    def ahead(self, eqn: Any, x: jax.Array, read: Callable[[Any], Any], fn: Callable[..., Any]) -> Ahead:
        """What the equation's product starts from. read: an operand's value. fn: `products`, or the same as a function
        that equal layers share."""
        group = self.groups.pop(id(eqn), [])
        nodes = {id(one): node for one in group if isinstance(node := read(one.invars[1]), Bound)}
        if len(nodes) > 1 and compat.explicit_mesh(x) is None:
            orders = {id(one): tuple(one.params["dimension_numbers"][0][1]) for one in group}
            firsts = {i: [first(term, orders[i]) for term in node.terms] for i, node in nodes.items()}
            ranks = [f.size(RANK) for found in firsts.values() for f in found if f is not None]
            for i in nodes:
                self.groups.pop(i, None)
            if len(ranks) > 1 and sum(ranks) <= WIDEST:
                (contracted, _), _ = eqn.params["dimension_numbers"]
                how = (tuple(contracted), eqn.params["precision"], tuple(orders[i] for i in nodes))
                self.made.update(zip(nodes, fn(how, x, [*firsts.values()]), strict=True))
        return self.made.pop(id(eqn), Ahead(x, None))


def first(term: Term, contracted: Sequence[int]) -> Factor | None:
    """The factor that x meets first, if x meets nothing else on the way: no dropout, no router, no bank."""
    if term.a is None or term.b is None or term.key is not None or term.gate is not None or term.only is not None:
        return None
    if term.o is not None and set(contracted).intersection(term.o.dims):
        return None
    for f in (term.a, term.b):
        if f.many is None and set(f.dims) == {*contracted, RANK}:
            return f
    return None


def products(how: Any, x: jax.Array, firsts: Sequence[Sequence[Factor | None]]) -> list[Ahead]:
    """x times each factor. how: (x's contracted dimensions, precision, each weight's contracted dimensions).

    Each weight has an x of its own, behind a barrier: XLA would otherwise copy small weights into one for a single
    product, and cut its result apart. The gradients by these are added one to the next, which a product does as it
    writes where the other summand is no product itself: so with the barriers, and for one pair only without them.
    """
    contracted, precision, orders = how
    each = [(f.astype(x.dtype), order) for found, order in zip(firsts, orders, strict=True) for f in found
            if f is not None]  # fmt: skip
    joined = jnp.concatenate([f.spread((*order, RANK)) for f, order in each], -1)
    lead = x.shape[:-1] if contracted == (x.ndim - 1,) else ()
    rows = x.reshape(-1, x.shape[-1]) if lead else x  # one dimension, as in `lorajax.core.labelled.meet`
    numbers = (((1,) if lead else contracted, tuple(range(len(contracted)))), ((), ()))
    h = lax.dot_general(rows, joined, numbers, precision=precision)
    h = h.reshape(*lead, -1) if lead else h
    ends = [sum(f.size(RANK) for f, _ in each[:i + 1]) for i in range(len(each) - 1)]
    parts, made = iter(jnp.split(h, ends, -1)), []
    for found in firsts:
        x = lax.optimization_barrier(x)
        made.append(Ahead(x, tuple(None if f is None else next(parts) for f in found)))
    return made


shared = jax.jit(products, static_argnums=0)
