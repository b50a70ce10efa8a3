"""8-bit blockwise quantisation with the dynamic maps (Dettmers et al., arXiv 2110.02861, section 2): of NF4's scales,
where it is QLoRA's double quantisation, and of optimizer states. The maps are bitsandbytes' own; a code is that of the
nearest value, of which its kernel for CPUs takes a neighbour here and there (`tests/test_quant.py`)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.core import compat

TINY = float(np.finfo(np.float32).tiny)
"""What a block's largest magnitude counts at least, so that a block of zeros gets a scale."""


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The 256 values in [-1, 1] (signed) or [0, 1], ascending, float32: for i = 0..6 the middles of equal parts of
    [0.1, 1] times 10^(i - 6), of 2^i parts (unsigned 2^(i + 1)), on each side; and 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        ends = _parts(2**i if signed else 2 ** (i + 1))
        positive = np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        values += [*positive, *(-positive if signed else [])]
    values += [0.0] * (256 - len(values))
    return np.sort(np.asarray(values, np.float32))


def _parts(n: int) -> np.ndarray:
    """The ends of n equal parts of [0.1, 1] as torch.linspace rounds them: from either end to the middle."""
    low, high = np.float32(0.1), np.float32(1)
    step, i = np.float64((high - low) / np.float32(n)), np.arange(n + 1)
    return np.where(i < (n + 1) // 2, np.float64(low) + step * i, np.float64(high) - step * (n - i)).astype(np.float32)


def nearest(x: jax.Array, values: np.ndarray) -> jax.Array:
    """Index of the nearest of the ascending `values`, uint8; halfway between two it is the lower one's."""
    bounds = jnp.asarray((values[:-1] + values[1:]) / np.float32(2))
    method = "compare_all" if len(values) <= 16 else "scan"
    return jnp.searchsorted(bounds, x, side="left", method=method).astype(jnp.uint8)


def normalised(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(blocks / scale in [-1, 1], scale): the scale of a block, the last dimension, is its largest magnitude."""
    scale = jnp.max(jnp.abs(blocks), axis=-1)
    return jnp.clip(blocks * (1 / jnp.maximum(scale, TINY))[..., None], -1, 1), scale


def look_up(codes: jax.Array, values: np.ndarray | jax.Array) -> jax.Array:
    """values[codes], float32."""
    where = None if compat.explicit_mesh(codes) is None else jax.typeof(codes).sharding
    return jnp.asarray(values, jnp.float32).at[codes].get(mode="promise_in_bounds", out_sharding=where)


def encode(x: jax.Array, block: int, signed: bool = True) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) of the last dimension of `x` (..., n), float32, in blocks of `block`; the last one may be
    shorter. Codes (..., n) uint8, scales (..., ceil(n / block)) float32."""
    n = x.shape[-1]
    blocks = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % block)]).reshape(*x.shape[:-1], -1, block)
    scaled, scale = normalised(blocks)
    codes = nearest(scaled, dynamic_map(signed)).reshape(*x.shape[:-1], -1)
    return codes[..., :n], scale


def decode(codes: jax.Array, scales: jax.Array, block: int, signed: bool = True) -> jax.Array:
    """Inverse of `encode`, float32."""
    each = jnp.repeat(scales, block, axis=-1)[..., :codes.shape[-1]]
    return look_up(codes, dynamic_map(signed)) * each
