"""The packed weights of a rematerialised layer: unpacked together, and some once for two passes.

All look their values up in the same arrays, which go through one barrier with the layer's input: none is unpacked
sooner, and XLA unpacks those of equal size that read one array in one kernel.

`packed.product` unpacks a weight for each pass. Where a layer is computed again to be differentiated that is twice in a
row, and what the recomputation unpacked can wait for the backward pass (`once`): less to unpack, for the dense form of
these weights of one layer. From the forward pass to the backward one it keeps nothing, as a rematerialised layer does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorajax.core import compat
from lorajax.core.bound import is_bound
from lorajax.core.packed import Packed, is_packed


@jax.tree_util.register_pytree_node_class
class Layerwise(Packed):
    """The packed weight `of`, unpacked with the arrays `given` in place of its own (`Packed.tables`)."""

    tied = True

    def __init__(self, of: Packed, given: tuple[jax.Array, ...], once: bool):
        self.of, self.given, self.once = of, given, once

    def tree_flatten(self):
        return (self.of, self.given), self.once

    @classmethod
    def tree_unflatten(cls, once, children):
        return cls(children[0], children[1], once)

    def dense(self, *tables: jax.Array) -> jax.Array:
        return self.of.dense(*(tables or self.given))

    def follow(self, eqn: Any, operands: Sequence[Any]) -> Packed | None:
        found = self.of.follow(eqn, operands)
        return None if found is None else Layerwise(found, self.given, self.once)

    def gathered(self) -> Packed:
        return Layerwise(self.of.gathered(), self.given, self.once)

    def loose(self) -> Packed:
        return self.of

    def rows(self) -> Packed | None:
        return self.of.rows()

    def placed(self, entries: Sequence[Any], sizes: Any) -> tuple[Packed, Any]:
        return self.of.placed(entries, sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def dtype(self) -> Any:
        return self.of.dtype


def layerwise(values: Sequence[Any], once: str) -> list[Any]:
    """`values`, what a rematerialised layer is given, with its packed weights `Layerwise`. once: a regular expression
    of the paths of those that the backward pass does not unpack again; "" is none."""
    data = [v for v in values if not is_bound(v) and jnp.issubdtype(jnp.result_type(v), jnp.floating)]
    if not data:
        return list(values)
    x = lax.stop_gradient(max(data, key=jnp.size))

    def mine(v: Any) -> bool:  # not one that lies on a mesh otherwise than x does: a barrier takes no others
        return is_bound(v) and is_packed(v.w) and not v.w.tied and (
            {compat.varying(x)} == set(map(compat.varying, jax.tree.leaves(v.w))))

    tables = {id(table): table for v in values if mine(v) for table in v.w.tables()}
    if not tables:
        return list(values)
    waited, _ = lax.optimization_barrier(({name: compat.vary(jnp.asarray(t), x) for name, t in tables.items()}, x))

    def tied(v: Any) -> Any:
        given = tuple(waited[id(table)] for table in v.w.tables())
        kept = bool(once) and re.fullmatch(once, str(v.path)) is not None
        return v.map(Layerwise(v.w, given, kept), lambda f: f)

    return [tied(v) if mine(v) else v for v in values]
