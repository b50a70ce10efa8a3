"""The node that stands where a weight was: the frozen array with its adapters, by named dimensions.

A `Factor` names the dimension of the weight that each of its own dimensions runs along (`RANK` for the rank). So a
transposed, squeezed, scanned or split weight needs no bookkeeping about which side is in and which is out: the factors
are renamed along. With ``g`` the product of scales, a bound weight means

    W' = g W + sum over terms of s (sum_r a[..., r] b[..., r])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lorajax.core import compat
from lorajax.core.packed import unpacked

RANK = -1
"""The name of a factor's rank dimension; weight dimensions are named by their index 0, 1, ..."""


class Many(NamedTuple):
    """A factor holds those of many adapters, along its dimension `axis`; `fill` is the entry of no adapter."""

    axis: int
    fill: float


@jax.tree_util.register_pytree_node_class
class Factor:
    """`array` with a name per dimension: `dims[i]` is a dimension of the weight, or RANK.

    Pytree with the leaf `stored`, which has `array`'s elements in another shape if `shape` is given: reshaped where
    it is used, it costs a jitted or scanned layer one equation and not the model one per layer. With `many` (see
    `lorajax.core.bank`) `stored` and `shape` have one more dimension, and `array` is its entry `at`, a second leaf:
    picked where it is used, so that what flows through a model is the bank and not a copy per row.
    """

    __slots__ = ("at", "dims", "many", "shape", "stored")

    def __init__(self, stored: Any, dims: tuple[int, ...], shape: tuple[int, ...] | None = None,
                 many: Many | None = None, at: Any = None):
        self.stored, self.dims, self.shape, self.many, self.at = stored, dims, shape, many, at

    @property
    def array(self) -> Any:
        array = self.stored if self.shape is None else jnp.reshape(self.stored, self.shape)
        if self.many is None:
            return array
        if self.at is None:
            raise ValueError("a bank holds many adapters, and nothing says which one a row reads: run it by "
                             "lorajax.mixed(fn)(bank, index, ...)")
        return compat.pick(array, self.at, self.many.axis, fill_value=self.many.fill)

    def tree_flatten(self):
        return (self.stored, self.at), (self.dims, self.shape, self.many)

    @classmethod
    def tree_unflatten(cls, static, children):
        (stored, at), (dims, shape, many) = children, static
        return cls(stored, dims, shape, many, at)

    def astype(self, dtype) -> Factor:
        if self.stored.dtype == dtype:
            return self
        if self.many is not None:
            return Factor(self.array.astype(dtype), self.dims)
        return Factor(self.stored.astype(dtype), self.dims, self.shape)

    def size(self, dim: int) -> int:
        sizes = list(self.shape or self.stored.shape)
        if self.many is not None:
            del sizes[self.many.axis]
        return sizes[self.dims.index(dim)]

    def spread(self, dims: tuple[int, ...]) -> jax.Array:
        """The array transposed to the order of `dims`, with size 1 where it does not run along one of them."""
        order = [d for d in dims if d in self.dims]
        array = lax.transpose(self.array, [self.dims.index(d) for d in order])
        return lax.expand_dims(array, [i for i, d in enumerate(dims) if d not in self.dims])

    def times(self, other: Factor) -> Factor:
        """The product, along the dimensions of both, in this factor's dtype."""
        dims = (*[d for d in other.dims if d not in self.dims], *self.dims)
        return Factor(self.spread(dims) * other.astype(self.stored.dtype).spread(dims), dims)

    def __repr__(self):
        return f"Factor({self.shape or getattr(self.stored, 'shape', self.stored)}, dims={self.dims})"


@jax.tree_util.register_static
@dataclass(frozen=True)
class Number:
    """A Python number in a tree, known while tracing."""

    value: float


@jax.tree_util.register_static
@dataclass(frozen=True)
class Gate:
    """`Variant.gate` in a tree."""

    function: Callable[[jax.Array, jax.Array], jax.Array]


class Term(NamedTuple):
    """One adapter on one weight; every part may be None.

    a, b: low-rank factors. g: scale of the weight (DoRA, IA3), along its out or in dimensions.
    key, rate: dropout of the input of this adapter; `key` runs along stack dimensions only. s: scale of a b.
    e: scale of the rank components, along RANK and perhaps stack dimensions. o: scale of a b along its out dimensions.
    router, gate: ``gate(x router, x a)`` takes the place of x a; `router` runs along the in dimensions and RANK, which
    here counts what it chooses among. given: what takes the place of x router, (rows, n) flat along RANK, behind stack
    dimensions; the rows are those of x.
    tap: an array of zeros along the in dimensions and RANK (size in + 3) that changes nothing: its gradient is what the
    weight's inputs X were in a matmul, [X^T X | sum of rows | number of rows | largest |X|]. seen: weights of the rows,
    0 for padding, in the shape of the leading dimensions of X.
    only: bool (tokens,), the tokens of the row that this adapter acts on (`lorajax.core.mixed`).
    bare: b without g, which is in b as well: g W + a b = g (W + a bare).
    """

    a: Factor | None = None
    b: Factor | None = None
    g: Factor | None = None
    key: Factor | None = None
    rate: Factor | None = None
    s: Number | None = None
    e: Factor | None = None
    o: Factor | None = None
    router: Factor | None = None
    given: Factor | None = None
    gate: Gate | None = None
    tap: Factor | None = None
    seen: Factor | None = None
    only: Any = None
    bare: Factor | None = None

    def folded(self) -> Term:
        """The same term with e and o multiplied into b, for where there is no activation to multiply."""
        b = self.b
        for scale in (self.e, self.o):
            b = b if b is None or scale is None else b.times(scale)
        return self._replace(b=b, e=None, o=None)

    def scaled(self, x: jax.Array) -> jax.Array:
        """x, some part of a product with a and b, times s."""
        return x if self.s is None else x * jnp.asarray(self.s.value, x.dtype)


class Name(str):
    """A path that does not take part in equality, so that identical layers share one compiled function."""

    __slots__ = ()

    def __eq__(self, other):
        return isinstance(other, Name)

    def __ne__(self, other):
        return not isinstance(other, Name)

    def __hash__(self):
        return 0


@jax.tree_util.register_pytree_with_keys_class
class Bound:
    """A weight of shape S (`w`, an array or a `Packed`) with `terms`, at `path`. A pytree node; `lift(fn)` accepts it
    where `fn` reads the array."""

    __slots__ = ("path", "terms", "w")

    def __init__(self, w: Any, terms: tuple[Term, ...], path: str = ""):
        self.w, self.terms, self.path = w, terms, Name(path)

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("w"), self.w), (key("terms"), self.terms)), self.path

    def tree_flatten(self):
        return (self.w, self.terms), self.path

    @classmethod
    def tree_unflatten(cls, path, children):
        return cls(children[0], children[1], path)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def dtype(self):
        return self.w.dtype

    @property
    def ndim(self) -> int:
        return len(self.w.shape)

    def factors(self) -> list[Factor]:
        """Every Factor of every term."""
        return [f for term in self.terms for f in term if isinstance(f, Factor)]

    def map(self, w: Any, change) -> Bound:
        """A node with weight `w` and `change` applied to each Factor."""
        def each(term: Term) -> Term:
            return term._replace(**{k: change(f) for k, f in term._asdict().items() if isinstance(f, Factor)})

        return Bound(w, tuple(map(each, self.terms)), self.path)

    def __repr__(self):
        return f"Bound({str(self.path)!r}, {self.w.shape}, terms={self.terms})"


def is_bound(x: Any) -> bool:
    return isinstance(x, Bound)


def wide(dtype: Any) -> Any:
    """float32, or float64 for that: what sums are taken in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def product(a: Factor, b: Factor, ndim: int) -> jax.Array:
    """sum_r a b, spread over `ndim` weight dimensions (size 1 where neither runs)."""
    both = [d for d in a.dims if d in b.dims and d != RANK]
    free_a = [d for d in a.dims if d not in b.dims]
    free_b = [d for d in b.dims if d not in a.dims]
    numbers = (((a.dims.index(RANK),), (b.dims.index(RANK),)),
               (tuple(a.dims.index(d) for d in both), tuple(b.dims.index(d) for d in both)))
    return Factor(lax.dot_general(a.array, b.array, numbers), (*both, *free_a, *free_b)).spread(tuple(range(ndim)))


def dense(node: Bound) -> jax.Array:
    """W' as one array of the weight's shape and dtype, summed in float32 or better. Dropout is not part of it.

    Raises ValueError for an adapter with a router or for some tokens, which no one weight stands for.
    """
    if any(term.gate is not None for term in node.terms):
        raise ValueError(f"{node.path}: its adapter weighs rank components per token, so no merged weight equals it: "
                         f"keep the weight bound, or train a variant without a router here")
    if any(term.only is not None for term in node.terms):
        raise ValueError(f"{node.path}: its adapters act on some tokens only, so no merged weight equals them")
    every = tuple(range(node.ndim))
    compute = wide(node.dtype)
    w = unpacked(node.w).astype(compute)
    scales = [term.g.astype(compute).spread(every) for term in node.terms if term.g is not None]
    if len(scales) == 1:
        w = w * scales[0]
    elif scales:  # each adapter's scale is relative to the weight: g - 1 adds up
        w = w * sum((g - 1 for g in scales), jnp.ones((), compute))
    for term in map(Term.folded, node.terms):
        if term.a is not None and term.b is not None:
            w = w + term.scaled(product(term.a.astype(compute), term.b.astype(compute), node.ndim))
    return w.astype(node.dtype)
