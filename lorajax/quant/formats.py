"""Formats: how a row of a frozen weight becomes codes and scales of its blocks, and back.

A format sees an array (stack..., rows..., n), float32, whose blocks run along the last dimension; `stack` leading
dimensions are separate matrices. Codes have its shape (two 4-bit codes in a byte, the first in the high half), and
each array of scales has one number for each block. NF4, FP4 and Int8 are bit-compatible with bitsandbytes, Q8_0 and
Q4_1 with llama.cpp, but for scales that are quantised as well (`lorajax.quant.dynamic`).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorajax.quant import dynamic

SECOND = 256
"""How many scales share one second scale in double quantisation."""


@dataclass(frozen=True)
class Format(abc.ABC):
    """bits: of a code. block: how many elements share a scale, 0 for a whole row."""

    bits: ClassVar[int] = 4
    block: int = 64

    @abc.abstractmethod
    def encode(self, w: jax.Array, stack: int = 0) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """(codes, scales) of w."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array, scales: tuple[jax.Array, ...], dtype: Any = jnp.float32,
               *tables: jax.Array) -> jax.Array:
        """w as the codes say, computed in float32, as `dtype`. tables: read in place of `tables`."""

    def tables(self) -> tuple[np.ndarray, ...]:
        """The arrays in which `decode` looks values up."""
        return ()

    def lead(self, codes: jax.Array, scales: tuple[jax.Array, ...]) -> int:
        """How many leading dimensions all arrays have in common."""
        return codes.ndim - 1

    def single(self, scales: tuple[jax.Array, ...]) -> tuple[Format, tuple[jax.Array, ...]]:
        """The format and scales without double quantisation, for the same values."""
        return self, scales

    def check(self, n: int) -> None:
        """Raises ValueError if rows of `n` elements are no whole blocks."""
        block = self.block or n
        if block < 1 or block % 2 * (self.bits == 4):
            raise ValueError(f"block={self.block}: a block is a positive, even number of elements; bitsandbytes has "
                             f"powers of two from 32")
        if n % block or n * self.bits % 8:
            fits = [b for b in range(min(block, n), 1, -1) if n % b == 0 and b % 2 == 0]
            way = f"block={fits[0]} fits" if fits else "no even block fits"
            raise ValueError(f"block={self.block} does not divide its rows of {n} elements, and no block goes beyond a "
                             f"row: {way}, or leave this weight out of the quantisation")


def blocks_of(w: jax.Array, block: int) -> jax.Array:
    """(..., n) as (..., n / block, block); block 0 is n."""
    return w.reshape(*w.shape[:-1], -1, block or w.shape[-1])


def pack4(codes: jax.Array) -> jax.Array:
    """(..., n) uint8 codes below 16 -> (..., n / 2), the first of two in the high half."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def unpack4(codes: jax.Array, block: int, value: Callable[[jax.Array], jax.Array], dtype: Any) -> jax.Array:
    """`value(codes (..., n / block, block / 2))` of first and of second codes, in turn: (..., n) of `dtype`.

    Two numbers of 16 bits are written as one word: a thread of XLA's GPU kernel then reads 4 bytes and writes 16."""
    pairs = blocks_of(codes, block // 2)
    first, second = (value(c).astype(dtype) for c in (pairs >> 4, pairs & 15))
    if first.dtype.itemsize == 2:
        low, high = (lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) for x in (first, second))
        both = lax.bitcast_convert_type(low | (high << 16), dtype)
    else:
        both = jnp.stack([first, second], axis=-1)
    return both.reshape(*codes.shape[:-1], -1)


@dataclass(frozen=True)
class Table4(Format):
    """Four bits, the nearest of 16 values times the block's largest magnitude. double: those float32 scales are
    quantised as well, less their mean over the matrix, to 8 bits in blocks of 256 (QLoRA, arXiv 2305.14314, section 3):
    4.127 bits for an element in place of 4.5."""

    double: bool = True
    table: ClassVar[np.ndarray]
    """The value of each code."""

    def encode(self, w: jax.Array, stack: int = 0) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Codes (..., n / 2); scales (absmax,) or (its codes, second scales (stack..., m), mean (stack...))."""
        scaled, absmax = dynamic.normalised(blocks_of(w, self.block))
        order = np.argsort(self.table, kind="stable").astype(np.uint8)
        index = dynamic.nearest(scaled, self.table[order])
        if not np.array_equal(order, np.arange(16)):
            index = jnp.asarray(order)[index]
        codes = pack4(index.reshape(w.shape))
        if not self.double:
            return codes, (absmax,)
        flat = absmax.reshape(*absmax.shape[:stack], -1)
        mean = jnp.mean(flat, axis=-1)
        eight, second = dynamic.encode(flat - mean[..., None], SECOND)
        return codes, (eight.reshape(absmax.shape), second, mean)

    def tables(self) -> tuple[np.ndarray, ...]:
        """The values of codes, and those of the scales' codes."""
        return (self.table, dynamic.dynamic_map()) if self.double else (self.table,)

    def decode(self, codes: jax.Array, scales: tuple[jax.Array, ...], dtype: Any = jnp.float32,
               *tables: jax.Array) -> jax.Array:
        """table[code] times the scale of its block. Scales that are quantised as well get a kernel of their own: with
        them in that of the codes, which then wait, a weight of 14336 x 4096 took a fifth longer on an H200."""
        table, *of_scales = tables or self.tables()
        _, (absmax,) = self.single(scales, *of_scales)
        if self.double:
            absmax = lax.optimization_barrier(absmax)
        return unpack4(codes, self.block, lambda c: dynamic.look_up(c, table) * absmax[..., None], dtype)

    def lead(self, codes: jax.Array, scales: tuple[jax.Array, ...]) -> int:
        """The second scales and the mean have the stack's dimensions only."""
        return scales[-1].ndim if self.double else codes.ndim - 1

    def single(self, scales: tuple[jax.Array, ...], *tables: Any) -> tuple[Format, tuple[jax.Array, ...]]:
        """One float32 scale for each block. tables: the dynamic map, if it is there already."""
        if not self.double:
            return self, scales
        eight, second, mean = scales
        ahead, one = [1] * (eight.ndim - mean.ndim), math.prod(eight.shape[mean.ndim:])
        each = jnp.repeat(second, SECOND, axis=-1)[..., :one].reshape(eight.shape)
        values = tables[0] if tables else dynamic.dynamic_map()
        absmax = dynamic.look_up(eight, values) * each + mean.reshape(*mean.shape, *ahead)
        return replace(self, double=False), (absmax,)


@dataclass(frozen=True)
class NF4(Table4):
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314, section 3 and appendix E): quantiles of a normal distribution."""

    table: ClassVar[np.ndarray] = np.array([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)


@dataclass(frozen=True)
class FP4(Table4):
    """4-bit float of bitsandbytes: a sign, two bits of exponent and one of mantissa, over 12."""

    table: ClassVar[np.ndarray] = np.array(
        [0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)


@dataclass(frozen=True)
class Int8(Format):
    """Eight bits, one float32 scale for each output unit: how LLM.int8() (arXiv 2208.07339, section 3) stores a weight.
    Activations are not quantised: the product is in the compute dtype."""

    bits: ClassVar[int] = 8
    block: int = 0

    def encode(self, w: jax.Array, stack: int = 0) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Codes (..., n) int8, round(127 w / absmax); scales (absmax,)."""
        blocks = blocks_of(w, self.block)
        absmax = jnp.max(jnp.abs(blocks), axis=-1)
        codes = jnp.round(blocks * (1 / jnp.maximum(absmax, dynamic.TINY) * 127)[..., None])
        return codes.astype(jnp.int8).reshape(w.shape), (absmax,)

    def decode(self, codes: jax.Array, scales: tuple[jax.Array, ...], dtype: Any = jnp.float32,
               *tables: jax.Array) -> jax.Array:
        """code absmax / 127."""
        values = blocks_of(codes.astype(jnp.float32), self.block) * (scales[0] * (1 / 127))[..., None]
        return values.reshape(codes.shape).astype(dtype)


@dataclass(frozen=True)
class Q8_0(Format):
    """llama.cpp's Q8_0: ``d code`` with an int8 code and a float16 d for 32 elements."""

    bits: ClassVar[int] = 8
    block: int = 32

    def encode(self, w: jax.Array, stack: int = 0) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Codes (..., n) int8, scales (d,)."""
        blocks = blocks_of(w, self.block)
        d = jnp.max(jnp.abs(blocks), axis=-1) / 127
        x = blocks * jnp.where(d == 0, 0.0, 1 / d)[..., None]
        codes = jnp.sign(x) * jnp.floor(jnp.abs(x) + 0.5)  # halves away from 0, as C's roundf
        return codes.astype(jnp.int8).reshape(w.shape), (d.astype(jnp.float16),)

    def decode(self, codes: jax.Array, scales: tuple[jax.Array, ...], dtype: Any = jnp.float32,
               *tables: jax.Array) -> jax.Array:
        """d code."""
        values = blocks_of(codes.astype(jnp.float32), self.block) * scales[0].astype(jnp.float32)[..., None]
        return values.reshape(codes.shape).astype(dtype)


@dataclass(frozen=True)
class Q4_1(Format):
    """llama.cpp's Q4_1: ``d code + m`` with a 4-bit code and float16 d and m for 32 elements. (The two codes of a byte
    are neighbours here, and half a block apart in a file.)"""

    block: int = 32

    def encode(self, w: jax.Array, stack: int = 0) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Codes (..., n / 2), scales (d, m)."""
        blocks = blocks_of(w, self.block)
        least = jnp.min(blocks, axis=-1)
        d = (jnp.max(blocks, axis=-1) - least) / 15
        codes = jnp.clip(jnp.floor((blocks - least[..., None]) * jnp.where(d == 0, 0.0, 1 / d)[..., None] + 0.5), 0, 15)
        return pack4(codes.astype(jnp.uint8).reshape(w.shape)), (d.astype(jnp.float16), least.astype(jnp.float16))

    def decode(self, codes: jax.Array, scales: tuple[jax.Array, ...], dtype: Any = jnp.float32,
               *tables: jax.Array) -> jax.Array:
        """d code + m."""
        d, m = (x.astype(jnp.float32)[..., None] for x in scales)
        return unpack4(codes, self.block, lambda c: c.astype(jnp.float32) * d + m, dtype)


FORMATS: dict[str, type[Format]] = {"nf4": NF4, "fp4": FP4, "int8": Int8, "q8_0": Q8_0, "q4_1": Q4_1}
"""Name -> format, as configs call it."""


def describe(form: Any) -> str:
    """The format's row of `FORMATS`."""
    return next(name for name, cls in FORMATS.items() if type(form) is cls)
