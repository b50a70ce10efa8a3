"""A quantised weight: one pytree node of packed codes and scales that stands where the array was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lorajax.core import compat
from lorajax.core.packed import Packed, changed
from lorajax.quant.formats import FORMATS, Format, describe


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized(Packed):
    """codes, scales: what `format` made of the weight with its dimensions in `order`, the last ones merged to rows.

    order: the weight's dimensions as they are stored: stacks of matrices, then the dimensions of the rows, then those
      along which blocks run. With (1, 0), the default for a matrix (in, out), blocks run along the inputs of one output
      unit, in the order that torch's (out, in) weight has in bitsandbytes.
    inner: sizes of the dimensions along which blocks run, but the first of them. dtype: of the array it stands for.
    together: (mesh, mesh axes of the codes' last dimensions) of `gathered`; None: where they lie.

    All that is static holds for a slice of a stack or a stack of these too: shapes are those of the stored arrays.
    """

    codes: jax.Array
    scales: tuple[jax.Array, ...]
    format: Format = field(metadata={"static": True})
    order: tuple[int, ...] = field(metadata={"static": True})
    inner: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    together: tuple[Any, tuple[Any, ...]] | None = field(default=None, metadata={"static": True})

    @property
    def stored(self) -> tuple[int, ...]:
        """The sizes of the dimensions in stored order."""
        n = self.codes.shape[-1] * 8 // self.format.bits
        return (*self.codes.shape[:-1], n // math.prod(self.inner), *self.inner)

    @property
    def dims(self) -> tuple[int, ...]:
        """`order`, where a scan took leading dimensions away or stacking added some."""
        extra = self.codes.ndim + len(self.inner) - len(self.order)
        if extra >= 0:
            return (*range(extra), *[d + extra for d in self.order])
        rest = self.order[-extra:]
        return tuple(sorted(rest).index(d) for d in rest)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        return tuple(self.stored[k] for k in np.argsort(self.dims))

    @property
    def stacked(self) -> int:
        """How many of the stored dimensions are a stack of separate matrices, as far as the scales tell."""
        return self.lead if self.format != self.format.single(self.scales)[0] else 0

    @property
    def lead(self) -> int:
        """How many of the stored dimensions every stored array has."""
        return self.format.lead(self.codes, self.scales)

    def tables(self) -> tuple[np.ndarray, ...]:
        """See `Packed.tables`."""
        return self.format.tables() or super().tables()

    def dense(self, *tables: jax.Array) -> jax.Array:
        """The array: decoded in float32, cast to `dtype`. tables: see `Packed.dense`."""
        with compat.within(compat.explicit_mesh(self.codes)):  # a lookup with an `out_sharding` runs on another
            if tables and not self.format.tables():
                return _dense(changed(self, *tables))
            return _dense(self, *tables)

    def single(self) -> Quantized:
        """The same values without double quantisation, so that every array has the dimensions of the rows too."""
        form, scales = self.format.single(self.scales)
        return replace(self, scales=scales, format=form)

    def specs(self, entries: Sequence[Any], sizes: Any) -> Quantized:
        """See `Packed.specs`. Second scales and means, 1/16384 of the elements, are on every device."""
        along = PartitionSpec(*self._along([*entries, *[None] * (self.ndim - len(entries))], sizes))
        return jax.tree.map(lambda x: along if len(x.shape) == self.codes.ndim else PartitionSpec(), self)

    def shardings(self, mesh: Any, spec: Sequence[Any]) -> Quantized:
        """The weight's tree of NamedShardings where `spec` is that of the array: what `jax.device_put` takes."""
        return jax.tree.map(lambda one: NamedSharding(mesh, one), self.specs(spec, mesh.shape),
                            is_leaf=lambda x: isinstance(x, PartitionSpec))

    def rows(self) -> Packed | None:
        """See `Packed.rows`."""
        if self.dims[0] != 0:
            return None
        return self if self.lead >= 1 else self.single() if self.single().lead >= 1 else None

    def follow(self, eqn: Any, operands: Sequence[Any]) -> Packed | None:
        """See `Packed.follow`: transposes, narrowing casts, and what picks from leading stored dimensions."""
        rule = FOLLOW.get(eqn.primitive.name)
        return None if rule is None else rule(self, eqn.params, *operands)

    def placed(self, entries: Sequence[Any], sizes: Any) -> tuple[Packed, Any]:
        """See `Packed.placed`."""
        plain, spec = replace(self.single(), together=None), PartitionSpec(*self._along(entries, sizes))
        return plain, jax.tree.map(lambda _: spec, plain)

    def gathering(self, mesh: Any, entries: Sequence[Any]) -> Quantized:
        """See `Packed.gathering`."""
        if mesh is None:
            return replace(self, together=None)
        along = self._along([*entries, *[None] * (self.ndim - len(entries))], mesh.shape)
        return replace(self, together=(mesh, tuple(along)))

    def gathered(self) -> Quantized:
        """See `Packed.gathered`. Second scales and means are whole everywhere."""
        if self.together is None:
            return self
        mesh, entries = self.together[0], self.together[1][-self.codes.ndim:]  # a scan takes leading ones
        rest = [PartitionSpec.UNCONSTRAINED] * (self.codes.ndim - len(entries))
        at = NamedSharding(mesh, PartitionSpec(*rest, *entries))
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, at) if x.ndim == self.codes.ndim else x,
                            replace(self, together=None))

    def _along(self, entries: Sequence[Any], sizes: Any) -> list[Any]:
        """The mesh axes of the codes' dimensions. ValueError where they would cut a block."""
        along, last = [entries[d] for d in self.dims], self.codes.ndim - 1
        names = along[last] if isinstance(along[last], tuple) else (along[last],)
        split = math.prod(sizes[name] for name in names if name is not None)
        n = self.codes.shape[-1] * 8 // self.format.bits
        block = self.format.block or n
        if any(entry is not None for entry in along[last + 1:]) or n % (split * block):
            raise ValueError(f"a quantised weight {self.shape} sharded as {tuple(entries)}: its rows of {n} elements "
                             f"would be cut inside a block of {block}: shard another dimension, or fewer ways")
        return along[:last + 1]

    def picked(self, at: Sequence[int], change: Any, gone: bool) -> Quantized | None:
        """`change(array, its axis, the weight's dimension)` for the weight's dimensions `at`, made in every stored
        array; None if one of them is no leading dimension. gone: whether the dimensions disappear."""
        me, where = self, {d: self.dims.index(d) for d in at}
        if max(where.values(), default=0) >= me.lead:
            me = self.single()
        if max(where.values(), default=0) >= me.lead:
            return None

        def one(x: jax.Array) -> jax.Array:
            for d, axis in sorted(where.items(), key=lambda item: -item[1]):
                x = change(x, axis, d)
            return x

        order, together = me.dims, me.together
        if gone:
            rest = [d for d in order if d not in at]
            order = tuple(sorted(rest).index(d) for d in rest)
        if together is not None:
            start = me.codes.ndim - len(together[1])
            left = [PartitionSpec.UNCONSTRAINED if i + start in where.values() else entry
                    for i, entry in enumerate(together[1]) if not gone or i + start not in where.values()]
            together = (together[0], tuple(left))
        return replace(me, codes=one(me.codes), scales=tuple(map(one, me.scales)), order=order, together=together)


def _transpose(w: Quantized, p: Any) -> Quantized:
    new = {old: i for i, old in enumerate(p["permutation"])}
    return replace(w, order=tuple(new[d] for d in w.dims))


def _convert(w: Quantized, p: Any) -> Quantized | None:
    old, new = jnp.dtype(w.dtype), jnp.dtype(p["new_dtype"])
    narrower = jnp.issubdtype(new, jnp.floating) and new.itemsize < old.itemsize and old == jnp.float32
    return replace(w, dtype=new) if narrower or new == old else None


def _squeeze(w: Quantized, p: Any) -> Quantized | None:
    return w.picked(p["dimensions"], lambda x, axis, d: lax.squeeze(x, [axis]), gone=True)


def _slice(w: Quantized, p: Any) -> Quantized | None:
    start, limit, strides = p["start_indices"], p["limit_indices"], p["strides"] or (1,) * w.ndim
    cut = [d for d in range(w.ndim) if (start[d], limit[d], strides[d]) != (0, w.shape[d], 1)]
    return w.picked(cut, lambda x, axis, d: lax.slice_in_dim(x, start[d], limit[d], strides[d], axis), gone=False)


def _dynamic_slice(w: Quantized, p: Any, *starts: Any) -> Quantized | None:
    sizes = p["slice_sizes"]
    cut = [d for d in range(w.ndim) if sizes[d] != w.shape[d]]
    return w.picked(cut, lambda x, axis, d: lax.dynamic_slice_in_dim(x, starts[d], sizes[d], axis), gone=False)


def _gather(w: Quantized, p: Any, indices: jax.Array) -> Quantized | None:
    """Whole slices along one leading stored dimension, as rows of a table or layers of a stack are picked."""
    numbers, batch = p["dimension_numbers"], indices.ndim - 1
    me = w if w.lead >= 1 else w.single()
    first = me.dims[0]
    whole = all(size == w.shape[d] for d, size in enumerate(p["slice_sizes"]) if d != first)
    if (me.lead < 1 or tuple(numbers.start_index_map) != (first,) or tuple(numbers.collapsed_slice_dims) != (first,)
            or numbers.operand_batching_dims or not whole or p["fill_value"] not in (None, 0)
            or tuple(numbers.offset_dims) != tuple(range(batch, batch + w.ndim - 1))):
        return None

    def one(x: jax.Array, fill: Any) -> jax.Array:
        own = lax.GatherDimensionNumbers(offset_dims=tuple(range(batch, batch + x.ndim - 1)), collapsed_slice_dims=(0,),
                                         start_index_map=(0,))
        return lax.gather(x, indices, own, (1, *x.shape[1:]), mode=p["mode"], fill_value=fill,
                          unique_indices=p["unique_indices"], indices_are_sorted=p["indices_are_sorted"])

    rest = [d for d in me.dims if d != first]
    order = (*range(batch), *[sorted(rest).index(d) + batch for d in rest])
    together = me.together and (me.together[0], me.together[1][-(me.codes.ndim - 1):])
    return replace(me, codes=one(me.codes, 0), scales=tuple(one(x, p["fill_value"]) for x in me.scales), order=order,
                   together=together)


@jax.jit
def _dense(q: Quantized, *tables: jax.Array) -> jax.Array:
    w, dims = q.format.decode(q.codes, q.scales, q.dtype, *tables).reshape(q.stored), q.dims
    return w if dims == tuple(range(len(dims))) else lax.transpose(w, np.argsort(dims).tolist())


FOLLOW: dict[str, Callable[..., Packed | None]] = {
    "transpose": _transpose, "convert_element_type": _convert, "squeeze": _squeeze, "slice": _slice,
    "dynamic_slice": _dynamic_slice, "gather": _gather,
}


def quantize(w: Any, form: Format, order: Sequence[int] | None = None, run: int = 1, stack: int = 0) -> Quantized:
    """A weight of two dimensions or more, quantised.

    order: its dimensions as they are to be stored, by default with the last two exchanged, so that a matrix (in, out)
      has its blocks along the inputs; (0, 1) for one that is (out, in) already. run: how many of the last stored
      dimensions blocks run along. stack: how many of the first ones are a stack of separate matrices.

    Raises ValueError for a weight of one dimension, a dtype that is not float32, bfloat16 or float16, blocks that do
    not divide the rows, and numbers that are not finite, or too large for the scales (those of a traced weight cannot
    be seen).
    """
    if not isinstance(form, Format):
        raise ValueError(f"{form!r} is no format: give an instance such as NF4(), or "
                         f"lorajax.quant.FORMATS[name]() for one of {', '.join(FORMATS)}")
    w = jnp.asarray(w)
    if w.ndim < 2:
        raise ValueError(f"a weight of shape {w.shape} has no rows to quantise: biases, norms and other vectors "
                         f"stay as they are; leave them out")
    if w.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"a weight of dtype {w.dtype} is not quantised: cast it to float32, bfloat16 or float16 first")
    order = (*range(w.ndim - 2), w.ndim - 1, w.ndim - 2) if order is None else tuple(order)
    if sorted(order) != list(range(w.ndim)) or not 0 < run <= w.ndim - stack:
        raise ValueError(f"order={order}, run={run}, stack={stack} for a weight of shape {w.shape}: order names "
                         f"each of its dimensions once, and a row has at least one of them")
    sizes = [w.shape[d] for d in order]
    n = math.prod(sizes[w.ndim - run:])
    form.check(n)
    if not isinstance(w, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(w))):
        raise ValueError(f"a weight of shape {w.shape} has {int(jnp.sum(~jnp.isfinite(w)))} numbers that are not "
                         f"finite, which have no code: load the checkpoint again, or leave this weight out")

    def pack(w: Any) -> Quantized:
        codes, scales = _encode(form, w, order, (*sizes[:w.ndim - run], n), stack)
        return Quantized(codes, scales, form, order, tuple(sizes[w.ndim - run + 1:]), jnp.dtype(w.dtype))

    mesh = compat.explicit_mesh(w)
    places = None
    if mesh is not None:
        shapes = jax.eval_shape(pack, jax.ShapeDtypeStruct(w.shape, w.dtype))
        places = shapes.specs(compat.place(w), mesh.shape)
    made = compat.automatic(pack, places, w)
    if not isinstance(w, jax.core.Tracer) and not all(bool(jnp.all(jnp.isfinite(x))) for x in made.scales):
        raise ValueError(f"a weight of shape {w.shape} reaches {float(jnp.max(jnp.abs(w))):.2g}, for which "
                         f"{describe(form)} has no scale: take another format, or leave this weight out")
    return made


def _encoded(form: Format, w: jax.Array, order: tuple[int, ...], shape: tuple[int, ...], stack: int) -> Any:
    return form.encode(lax.transpose(w, order).astype(jnp.float32).reshape(shape), stack)


_encode = jax.jit(_encoded, static_argnums=(0, 2, 3, 4))
