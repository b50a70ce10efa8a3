"""A frozen weight that is stored as something else than one array (quantised), where a model reads the array.

What is here knows no format: a `Packed` says how it is unpacked and which layout operations its stored arrays can
follow. Every other operation waits in a `View` and is done when the weight is unpacked, at its use; the backward pass
unpacks it once more, so that no dense copy of it lives from one to the other.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.core import compat

ZERO = np.zeros((), np.uint8)
"""What codes are changed by to wait for something: by nothing."""


class Packed(abc.ABC):
    """A pytree node that stands for an array of `shape` and `dtype`; concrete ones are registered with JAX."""

    dtype: Any
    """Of the array that it stands for."""
    tied: bool = False
    """Whether it waits for its layer's input (`lorajax.core.layerwise`)."""
    once: bool = False
    """Whether, moreover, the backward pass reads what the recomputation before it unpacked."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""

    @abc.abstractmethod
    def dense(self, *tables: jax.Array) -> jax.Array:
        """The array. tables: arrays to be read in place of those of `tables`, which they equal."""

    def tables(self) -> tuple[np.ndarray, ...]:
        """The constants that unpacking it reads."""
        return (ZERO,)

    def follow(self, eqn: Any, operands: Sequence[Any]) -> Packed | None:
        """This weight after a layout operation on it, without unpacking it; None where that cannot be."""
        return None

    def rows(self) -> Packed | None:
        """The same weight, every stored array of which runs along dimension 0 in its own dimension 0, so that a scan
        can slice it; None where that cannot be."""
        return None

    def placed(self, entries: Sequence[Any], sizes: Any) -> tuple[Packed, Any]:
        """(the same weight, its pytree of PartitionSpecs) where mesh axes `entries` (one per dimension) shard it by
        hand; sizes: mesh axis -> size. ValueError where they would cut a block in two."""
        raise ValueError(f"{type(self).__name__} of shape {self.shape} cannot be sharded by hand along {entries}")

    def specs(self, entries: Sequence[Any], sizes: Any) -> Packed:
        """The weight's tree of PartitionSpecs where mesh axes `entries` (one per dimension) shard it; sizes as in
        `placed`. ValueError where they would cut a block in two."""
        raise ValueError(f"{type(self).__name__} of shape {self.shape} cannot be sharded along {tuple(entries)}")

    def gathering(self, mesh: Any, entries: Sequence[Any]) -> Packed:
        """The same weight, which lies on `mesh` (None: on one device); `gathered` brings it to mesh axes `entries`, one
        per dimension. Itself where that cannot be."""
        return self

    def gathered(self) -> Packed:
        """The weight as a product reads it: its stored arrays where `gathering` said, not yet unpacked."""
        return self

    def loose(self) -> Packed:
        """The same weight, waiting for nothing."""
        return self

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def unpacked(w: Any) -> Any:
    """The array that `w` is or stands for."""
    return w.dense() if isinstance(w, Packed) else w


@jax.tree_util.register_pytree_node_class
class View(Packed):
    """A packed weight and the layout operations that are still to be done on the array it stands for.

    steps: (operation, which result of it) each; operands: what the operations read beside the weight, one tuple each.
    """

    def __init__(self, of: Packed, steps: tuple[tuple[Any, int], ...], operands: tuple[tuple[Any, ...], ...]):
        self.of, self.steps, self.operands = of, steps, operands

    def tree_flatten(self):
        return (self.of, self.operands), self.steps

    @classmethod
    def tree_unflatten(cls, steps, children):
        return cls(children[0], steps, children[1])

    @property
    def tied(self) -> bool:  # type: ignore[override]
        return self.of.tied

    @property
    def once(self) -> bool:  # type: ignore[override]
        return self.of.once

    def loose(self) -> Packed:
        return View(self.of.loose(), self.steps, self.operands)

    def tables(self) -> tuple[np.ndarray, ...]:
        return self.of.tables()

    def dense(self, *tables: jax.Array) -> jax.Array:
        w = self.of.dense(*tables)
        for (operation, result), operands in zip(self.steps, self.operands, strict=True):
            w = compat.bind(operation, [w, *operands])[result]
        return w

    def gathered(self) -> Packed:
        return View(self.of.gathered(), self.steps, self.operands)

    def _like(self) -> Any:
        return jax.eval_shape(View.dense, self)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._like().shape

    @property
    def dtype(self) -> Any:
        return self._like().dtype


def moved(eqn: Any, w: Any, *operands: Any) -> list[Any]:
    """The results of a layout operation on a weight; a packed one stays packed."""
    if not isinstance(w, Packed):
        return list(compat.bind(eqn, [w, *operands]))
    followed = w.follow(eqn, operands)
    if followed is not None:
        return [followed]
    operation = compat.Operation(eqn.primitive, tuple(eqn.params.items()))
    of, steps, before = (w.of, w.steps, w.operands) if isinstance(w, View) else (w, (), ())
    like = jax.eval_shape(lambda w, *operands: compat.bind(operation, [w, *operands]),
                          jax.ShapeDtypeStruct(w.shape, w.dtype), *operands)
    return [View(of, (*steps, (operation, i)), (*before, operands)) for i in range(len(like))]


def product(fn: Callable[..., jax.Array], w: Any, x: jax.Array, *sizes: jax.Array) -> jax.Array:
    """``fn(w, x, *sizes)``, linear in x. A packed weight is unpacked when x is there and no sooner, or a compiler may
    unpack all layers first; and once more for the derivative, which is that by x alone, so that what lives between the
    passes is the packed weight.

    What ties an unpacking to x, or to the cotangent, is a zero that goes through a barrier with it, and by which the
    codes are changed. They go through none themselves, for what does has to be in memory of its own: a layer's codes
    are read where they lie in the stack. Between the two they are gathered, or a mesh would move unpacked weights.

    One that is `tied` to its layer's input waits for no other in the forward pass. What of such a one is unpacked
    `once`, the derivative reads as it is."""
    if not isinstance(w, Packed):
        return fn(w, x, *sizes)
    if w.once:
        return fn(jax.lax.stop_gradient(w.gathered().dense()), x, *sizes)
    zero = ZERO

    @jax.custom_jvp
    def now(w: Any, x: jax.Array, *sizes: jax.Array) -> jax.Array:
        one = {compat.varying(x)} == set(map(compat.varying, jax.tree.leaves(w)))  # a barrier takes no others
        if one and not w.tied:
            after, _ = jax.lax.optimization_barrier((compat.vary(zero, x), x))
            w = changed(w, after)
        return fn(w.gathered().dense(), x, *sizes)

    @now.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        w, _, *sizes = primals
        again = jax.checkpoint(lambda zero, w, dx, *sizes: fn(changed(w, zero).gathered().dense(), dx, *sizes),
                               prevent_cse=(True, False, True, *[True] * len(sizes)))  # what its barrier holds
        return now(*primals), again(zero, w.loose(), tangents[1], *sizes)

    return now(w, x, *sizes)


def changed(w: Any, by: jax.Array) -> Any:
    """Every code (what is of 8 bits) exclusive or `by`."""
    return jax.tree.map(lambda leaf: leaf ^ by.astype(leaf.dtype) if leaf.dtype in (jnp.uint8, jnp.int8) else leaf, w)
