"""Functions of the table that name devices: shard_map, sharding constraints, explicit-axes meshes (8 CPU devices)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .case import Built, case, normal
from .models_raw import W, d, one


def auto() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def explicit() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def placed(value: jax.Array, *spec: Any) -> jax.Array:
    """`value` with its sharding part of its type, inside an explicit mesh."""
    return jax.device_put(value, NamedSharding(jax.sharding.get_mesh(), P(*spec)))


@case(W)
def shard_map_column() -> Built:
    fn = jax.shard_map(lambda w, x: jnp.tanh(x @ w), mesh=auto(), in_specs=(P(None, "model"), P("data")),
                       out_specs=P("data", "model"))
    return one(fn, d(8, 12), normal(6, 8))


@case(W)
def shard_map_row_psum() -> Built:
    fn = jax.shard_map(lambda w, x: lax.psum(x @ w, "model"), mesh=auto(), in_specs=(P("model"), P("data", "model")),
                       out_specs=P("data"))
    return one(fn, d(8, 12), normal(6, 8))


@case(W)
def shard_map_fsdp() -> Built:
    def body(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ lax.all_gather(w, "model", axis=0, tiled=True))

    fn = jax.shard_map(body, mesh=auto(), in_specs=(P("model"), P("data")), out_specs=P("data"), check_vma=False)
    return one(fn, d(8, 12), normal(6, 8))


@case(W)
def shard_map_manual_data() -> Built:
    """Only the data axis is manual; the weight is replicated over it."""
    fn = jax.shard_map(lambda w, x: jnp.tanh(x @ w), mesh=auto(), in_specs=(P(), P("data")), out_specs=P("data"),
                       axis_names={"data"})
    return one(jax.jit(fn), d(8, 12), normal(6, 8))


@case(W)
def sharding_constraint() -> Built:
    """Constraints on the weight and on the activation."""

    def constrain(value: jax.Array, *spec: Any) -> jax.Array:
        return lax.with_sharding_constraint(value, NamedSharding(auto(), P(*spec)))

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return constrain(x @ constrain(w, None, "model"), "data", "model")

    return one(fn, d(8, 12), normal(6, 8))


@case(W)
def jit_with_shardings() -> Built:
    """A jitted part with shardings of its own."""
    *given, out = [NamedSharding(auto(), spec) for spec in (P(None, "model"), P("data"), P("data", "model"))]
    return one(jax.jit(lambda w, x: jnp.tanh(x @ w), in_shardings=given, out_shardings=out), d(8, 12), normal(6, 8))


@case(W, mesh=explicit)
def explicit_column() -> Built:
    return one(lambda w, x: jnp.tanh(x @ w), placed(d(8, 12), None, "model"), placed(normal(6, 8), "data", None))


@case({"w": W["w"]._replace(in_axes=(1,), out_axes=(0,))}, mesh=explicit)
def explicit_transposed() -> Built:
    return one(lambda w, x: jnp.tanh(x @ w.T), placed(d(12, 8), "model", None), placed(normal(6, 8), "data", None))


@case(W, mesh=explicit)
def explicit_row() -> Built:
    """Row parallel: the contracted dimension is sharded, the output states its sharding."""
    return one(lambda w, x: jnp.einsum("bi,io->bo", x, w, out_sharding=P("data", None)),
               placed(d(8, 12), "model", None), placed(normal(6, 8), "data", "model"))


@case(W, mesh=explicit)
def explicit_fsdp() -> Built:
    return one(lambda w, x: jnp.tanh(x @ jax.sharding.reshard(w, P(None, None))),
               placed(d(8, 12), "model", None), placed(normal(6, 8), "data", None))
