"""The one file for what JAX does not promise: reading and re-binding jaxpr equations, on JAX 0.10 to 0.12.

Everything else in lorajax uses documented JAX functions. Used here: `jax.extend.core` (extend tier), and the attributes
`eqn.params`, `eqn.ctx`, `primitive.get_bind_params`, which `jax.core.eval_jaxpr` itself relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Literal as Literal
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def open_jaxpr(jaxpr: Any) -> Any:
    """The equations of a jaxpr, closed or open (JAX 0.12 has one class for both)."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def constants(jaxpr: Any) -> Sequence[Any]:
    """The constants of a closed jaxpr; empty for an open one."""
    return getattr(jaxpr, "consts", ())


def subjaxprs(eqn: Any) -> list[Any]:
    """Every jaxpr among an equation's parameters, in order."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(open_jaxpr(item), "eqns"):
                found.append(item)
    return found


class Operation(NamedTuple):
    """An equation's primitive and parameters, hashable; stands for the equation in a rule."""

    primitive: Any
    items: tuple[tuple[str, Any], ...]

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.items)


def bind(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Runs one equation, unchanged, on new operand values. Always returns a list of results."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # older JAX returned (functions, params)
        functions, params = params
        values = [*functions, *values]
    out = eqn.primitive.bind(*values, **params)
    return out if eqn.primitive.multiple_results else [out]


@contextmanager
def scope(eqn: Any, stack: Any):
    """Names and source lines of the original program, and the settings it was traced under."""
    info = eqn.source_info
    with source_info_util.user_context(info.traceback, name_stack=stack + info.name_stack), eqn.ctx.manager:
        yield


def name_stack() -> Any:
    """The name stack at this point of the trace."""
    return source_info_util.current_name_stack()


def where(eqn: Any) -> str:
    """`file:line (function)` of the user's line that made the equation."""
    return source_info_util.summarize(eqn.source_info)


def scan_counts(eqn: Any) -> tuple[int, int]:
    """(constants, carries) of a scan equation. Read off the shapes, since the parameters that say so changed in 0.11:
    a scanned operand has one dimension more outside than inside, constants and carries have the same."""
    inner = open_jaxpr(eqn.params["jaxpr"])
    scanned = _trailing(eqn.invars, inner.invars)
    stacked = _trailing(eqn.outvars, inner.outvars)
    carries = len(eqn.outvars) - stacked
    return len(eqn.invars) - scanned - carries, carries


def _trailing(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    count = 0
    for out, ins in zip(reversed(outer), reversed(inner), strict=True):
        if len(out.aval.shape) != len(ins.aval.shape) + 1:
            break
        count += 1
    return count


def manual_axes(eqn: Any) -> Any:
    """The mesh axes that a shard_map equation makes manual."""
    return eqn.params["newly_manual_axes"] if "newly_manual_axes" in eqn.params else eqn.params["manual_axes"]


def shardings_given(eqn: Any) -> bool:
    """Whether a jit equation has shardings or donation of its own, which re-jitting its body would lose."""
    given = [*eqn.params["in_shardings"], *eqn.params["out_shardings"]]
    return any(eqn.params["donated_invars"]) or any(type(s).__name__ != "UnspecifiedValue" for s in given)


def triton_gpu() -> bool:
    """Whether programs are compiled for an NVIDIA GPU on which Triton multiplies in 16 bits (Ampere and later)."""
    device = jax.devices()[0]
    return jax.default_backend() == "gpu" and "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8.0


def explicit_mesh(*arrays: Any) -> jax.sharding.AbstractMesh | None:
    """The mesh of the first array that lives on one with explicit axes (sharding in types), or None."""
    for array in arrays:
        mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def within(mesh: Any) -> Any:
    """A context in which `mesh` is that of the program; none where it is None."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh)


def automatic(fn: Callable[..., Any], places: Any, *arrays: Any) -> Any:
    """``fn(*arrays)``, of trees; on a mesh with explicit axes XLA places what is inside, and `places`, a tree of
    PartitionSpecs, says where the result lies. For what regroups dimensions, whose sharding has no name then."""
    mesh = explicit_mesh(*jax.tree.leaves(arrays))
    if mesh is None:
        return fn(*arrays)
    at = jax.tree.map(lambda spec: NamedSharding(mesh, spec), places, is_leaf=lambda x: isinstance(x, PartitionSpec))
    with within(mesh):
        return jax.sharding.auto_axes(fn, out_sharding=at)(*arrays)


def whole(tree: Any) -> Any:
    """Arrays that live on a mesh with explicit axes, on every device, as decompositions take them; others as they
    are."""
    def one(x: Any) -> Any:
        mesh = explicit_mesh(x)
        return x if mesh is None else jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(one, tree)


def pick(array: jax.Array, index: jax.Array, axis: int, fill_value: Any) -> jax.Array:
    """array[index] along an axis, `fill_value` where that is out of range. What is left of the array lies as before."""
    mesh = explicit_mesh(array, index)
    if mesh is None:
        return jnp.take(array, index, axis=axis, mode="fill", fill_value=fill_value)
    entries = list(place(array))
    del entries[axis]
    at = (*[slice(None)] * axis, index)
    return array.at[at].get(mode="fill", fill_value=fill_value, out_sharding=named(mesh, entries))


def beside(like: Any, axis: int, tree: Any) -> Any:
    """Arrays whose dimension 0 is `axis` of `like`, where that lies, if it is on a mesh with explicit axes."""
    mesh = explicit_mesh(like)
    at = None if mesh is None else NamedSharding(mesh, PartitionSpec(place(like)[axis]))
    return tree if at is None else jax.tree.map(lambda x: jax.sharding.reshard(x, at), tree)


def varying(array: Any) -> frozenset[str]:
    """The manual mesh axes along which an array differs, inside shard_map."""
    return getattr(getattr(jax.typeof(array), "mat", None), "varying", frozenset())


def manual() -> bool:
    """Whether this is inside shard_map."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def vary(array: Any, as_in: Any) -> Any:
    """An array that is the same everywhere, of the type of one that differs along the axes of `as_in`."""
    return jax.lax.pcast(array, tuple(varying(as_in)), to="varying") if varying(as_in) else array


def place(array: Any) -> PartitionSpec:
    """The PartitionSpec in an array's type, padded to its dimensions."""
    spec = jax.typeof(array).sharding.spec
    return PartitionSpec(*spec, *[None] * (len(jax.typeof(array).shape) - len(spec)))


def einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """``x, y -> result`` at the highest precision. On a mesh with explicit axes a dimension of the result is placed as
    it was in x or y: a contracted dimension that is sharded in both would otherwise be an error."""
    mesh = explicit_mesh(x, y)
    if mesh is None:
        return jnp.einsum(spec, x, y, precision="highest")
    inputs, out = spec.split("->")
    places: dict[str, Any] = {}
    for letters, array in zip(inputs.split(","), (x, y), strict=True):
        places |= {letter: entry for letter, entry in zip(letters, place(array), strict=True) if entry is not None}
    sharding = named(mesh, [places.get(letter) for letter in out])
    return jnp.einsum(spec, x, y, precision="highest", out_sharding=sharding)


def named(mesh: Any, entries: Iterable[Any]) -> NamedSharding:
    """NamedSharding of `entries`, dropping a mesh axis that an earlier dimension already uses."""
    used: set[Any] = set()
    spec = []
    for entry in entries:
        names = entry if isinstance(entry, tuple) else (entry,)
        fresh = entry is not None and not used.intersection(names)
        used.update(names if fresh else ())
        spec.append(entry if fresh else None)
    return NamedSharding(mesh, PartitionSpec(*spec))
