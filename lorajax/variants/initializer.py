"""How LoRA's A and B start: the interface, and the starts that read neither the weight nor data."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Statistic
from lorajax.variants.kaiming import kaiming

Rounded = Callable[[jax.Array], jax.Array]
"""A matrix (in, out) float32 to what quantisation makes of it."""


@dataclass(frozen=True)
class Initializer(abc.ABC):
    """A start of LoRA. Concrete ones are frozen dataclasses whose fields are their hyperparameters."""

    subtracts: ClassVar[bool] = False
    """Whether ``s A B`` of the start is taken off the weight, so that training begins at the pretrained function."""

    @abc.abstractmethod
    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """(A, B), (in, rank) and (rank, out), for a weight `w` (in, out) float32 and the scale `s` of A B.

        stats: the state of `statistic` at the end of the data, None if that is None.
        """

    def statistic(self, rank: int) -> Statistic | None:
        """What `start` reads of the data, collected by `lorajax.calibrate`; None if it reads none."""
        return None

    def before_quantizing(self, w: jax.Array, rank: int, s: Any, rounded: Rounded) -> tuple[jax.Array, Any]:
        """See `Variant.before_quantizing`."""
        return w, None

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        """Raises ValueError (value, limit, remedy) if this start cannot fit an (n_in, n_out) weight."""
        return


@dataclass(frozen=True)
class Kaiming(Initializer):
    """A ~ U(+-1/sqrt(in)), which is torch's ``kaiming_uniform_(a=sqrt(5))``; B = 0 (loralib, PEFT)."""

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        return kaiming(key, (w.shape[0], rank), w.shape[0]), jnp.zeros((rank, w.shape[1]))


@dataclass(frozen=True)
class Gaussian(Initializer):
    """A ~ N(0, 1/rank^2); B = 0 (PEFT; the LoRA paper says Gaussian without a width)."""

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        return jax.random.normal(key, (w.shape[0], rank)) / rank, jnp.zeros((rank, w.shape[1]))


@dataclass(frozen=True)
class Orthogonal(Initializer):
    """A = N1 Q1 / 10 and B = Q2^T N2 / 10, where Q1 and Q2 are the even and odd rows of one orthogonal (rank, rank):
    A B = 0 though neither is 0, so both get gradient at step 0 (PEFT)."""

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        key_q, key_a, key_b = jax.random.split(key, 3)
        q, _ = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank)))
        n1 = jax.random.normal(key_a, (w.shape[0], rank // 2))
        n2 = jax.random.normal(key_b, (rank // 2, w.shape[1]))
        return n1 @ q[0::2] / 10.0, q[1::2].T @ n2 / 10.0

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        if rank % 2:
            raise ValueError(f"rank={rank} is odd and initializer='orthogonal' splits the ranks into halves: "
                             f"use rank={rank + 1} or another initializer")


@dataclass(frozen=True)
class Embedding(Initializer):
    """A = 0 of (vocabulary, rank); B ~ N(0, 1): what `Kaiming` becomes on a lookup table (loralib, PEFT)."""

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((w.shape[0], rank)), jax.random.normal(key, (rank, w.shape[1]))


@dataclass(frozen=True)
class Both(Initializer):
    """A and B ~ U(+-magnitude/sqrt(in)) and s A B taken off the weight ("Init[AB]", arXiv 2602.04998's code).

    magnitude: of both, in units of Kaiming's bound.
    """

    magnitude: float = 1.0
    subtracts: ClassVar[bool] = True

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        bound, (key_a, key_b) = self.magnitude / math.sqrt(w.shape[0]), jax.random.split(key)
        return (jax.random.uniform(key_a, (w.shape[0], rank), minval=-bound, maxval=bound),
                jax.random.uniform(key_b, (rank, w.shape[1]), minval=-bound, maxval=bound))


class MeanGradient(NamedTuple):
    """total: (in, out), the sum of dL/dW over batches. batches: () their number."""

    total: jax.Array
    batches: jax.Array

    @property
    def mean(self) -> jax.Array:
        return self.total / jnp.maximum(self.batches, 1.0)


def mean_gradient() -> Statistic:
    """The mean of dL/dW over the batches."""
    return Statistic("gradient", init=lambda n_in, n_out: MeanGradient(jnp.zeros((n_in, n_out)), jnp.zeros(())),
                     update=lambda state, g: MeanGradient(state.total + g, state.batches + 1.0))


class Pair(NamedTuple):
    """A: (in, rank). B: (rank, out). Both were chosen when the weight was quantised."""

    A: jax.Array
    B: jax.Array


def quantization(rank: int) -> Statistic:
    """A and B of a start that is made when the weight is quantised."""
    def update(state: Any, seen: Any) -> Any:
        raise NotImplementedError("this start reads no batches: `lorajax.quant.Plan.start` makes it")

    def init(n_in: int, n_out: int) -> Pair:
        return Pair(jnp.zeros((n_in, rank)), jnp.zeros((rank, n_out)))

    return Statistic("quantization", init, update)


def svd(key: jax.Array, w: jax.Array, q: int, iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first q singular triplets of `w` (in, out): (in, q), (q,) descending, (q, out), with the signs of `signed`.

    iterations: 0 for the exact decomposition; n for a randomised one with n power iterations from a Gaussian (out, q)
    drawn from `key` (Halko et al., arXiv 0909.4061, algorithms 4.4 and 5.1), which is torch's ``svd_lowrank``.
    """
    if not iterations:
        u, values, vt = jnp.linalg.svd(w, full_matrices=False)
        return signed(u[:, :q], values[:q], vt[:q])
    basis, _ = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], q)))
    for _ in range(iterations):
        back, _ = jnp.linalg.qr(w.T @ basis)
        basis, _ = jnp.linalg.qr(w @ back)
    u, values, vt = jnp.linalg.svd(basis.T @ w, full_matrices=False)
    return signed(basis @ u, values, vt)


def signed(u: jax.Array, values: jax.Array, vt: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same triplets, each with the largest entry of its left vector positive (as scikit-learn's `svd_flip`): what a
    decomposition leaves open, and would otherwise settle by the last bit of what it is given. A start that takes the
    vectors of different triplets (LoRA-GA, LoRA-XS) trains by them."""
    sign = peaks(u)
    return u * sign[None, :], values, sign[:, None] * vt


def peaks(columns: jax.Array) -> jax.Array:
    """The sign of the entry of largest magnitude in each column: (columns,), 1 or -1."""
    at = jnp.argmax(jnp.abs(columns), axis=0, keepdims=True)
    return jnp.where(jnp.take_along_axis(columns, at, axis=0)[0] < 0, -1.0, 1.0)


def split(u: jax.Array, values: jax.Array, vt: jax.Array, s: Any) -> tuple[jax.Array, jax.Array]:
    """(A, B) = (u sqrt(values/s), sqrt(values/s) vt), so that ``s A B = u diag(values) vt``."""
    root = jnp.sqrt(values / s)
    return u * root[None, :], root[:, None] * vt


@dataclass(frozen=True)
class WithQuantization(Initializer):
    """A start whose A and B are made together with the quantised base, by `lorajax.quant.plan(...).start`.

    iterations: T, how often the weight is quantised. power: 0 for exact singular values, n for randomised ones with n
      power iterations, as `PiSSA` has them.
    """

    iterations: int = 5
    power: int = 0

    @abc.abstractmethod
    def before_quantizing(self, w: jax.Array, rank: int, s: Any, rounded: Rounded) -> tuple[jax.Array, Pair]:
        """What to quantise, and A and B."""

    def statistic(self, rank: int) -> Statistic:
        """A and B, made when the weight is quantised."""
        return quantization(rank)

    def start(self, key: jax.Array, w: jax.Array, rank: int, s: Any, stats: Any) -> tuple[jax.Array, jax.Array]:
        """Those."""
        return stats.A, stats.B

    def check(self, rank: int, n_in: int, n_out: int) -> None:
        """Raises ValueError for fewer than one iteration, and for a negative number of power iterations."""
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: {type(self).__name__} quantises at least once; the "
                             f"paper's code does 5")
        if self.power < 0:
            raise ValueError(f"power={self.power} is negative: 0 is the exact SVD, 4 a good randomised one")
