"""Optimizer states in 8 bits, block by block (Dettmers et al., arXiv 2110.02861), as bitsandbytes' 8-bit Adam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from lorajax.core import compat
from lorajax.quant import dynamic

SIGNED: Mapping[str, bool] = {"mu": True, "nu": False, "trace": True}
"""Fields of optax states that are stored in 8 bits -> whether their map has negative values."""


class Eight(NamedTuple):
    """codes: uint8, in the array's shape. scales: (blocks,) float32, of `block` elements of the flattened array."""

    codes: jax.Array
    scales: jax.Array


def eight_bit(tx: optax.GradientTransformation, block: int = 256,
              smallest: int = 4096) -> optax.GradientTransformationExtraArgs:
    """`tx`, whose moments (`SIGNED`) are held as 8-bit codes of the dynamic maps between steps, and computed with in
    float32: a quarter of their memory. The step itself is that of `tx`.

    block: elements that share a scale. smallest: arrays of fewer elements stay as they are (4096 in bitsandbytes).
    """
    if block < 2 or smallest < 0:
        raise ValueError(f"block={block}, smallest={smallest}: a block has two elements or more, and smallest is not "
                         f"negative; bitsandbytes has 256 and 4096")
    inner = optax.with_extra_args_support(tx)

    def pack(state: Any) -> Any:
        def one(path: Any, x: Any) -> Any:
            signed = field_of(path)
            if signed is None or x.size < smallest or not jnp.issubdtype(x.dtype, jnp.floating):
                return x

            def encode(x: jax.Array) -> Eight:
                codes, scales = dynamic.encode(x.reshape(-1).astype(jnp.float32), block, signed)
                return Eight(codes.reshape(x.shape), scales)

            places: Any = (compat.place(x), PartitionSpec())
            return compat.automatic(encode, Eight(*places), x)

        return jax.tree_util.tree_map_with_path(one, state)

    def unpack(state: Any) -> Any:
        def one(path: Any, x: Any) -> Any:
            if not isinstance(x, Eight):
                return x

            def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
                return dynamic.decode(codes.reshape(-1), scales, block, bool(field_of(path))).reshape(codes.shape)

            return compat.automatic(decode, compat.place(x.codes), *x)

        return jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda x: isinstance(x, Eight))

    def init(params: Any) -> Any:
        return pack(jax.lax.optimization_barrier(inner.init(params)))  # or XLA encodes the zeros while it compiles

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, new = inner.update(updates, unpack(state), params, **extra)
        return updates, pack(new)

    return optax.GradientTransformationExtraArgs(init, update)


def field_of(path: Any) -> bool | None:
    """Whether the state at a tree path has a sign; None where it is no moment."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return next((SIGNED[name] for name in names if name in SIGNED), None)
