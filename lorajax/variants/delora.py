"""DeLoRA: rank-1 terms of unit norm and one trained strength (arXiv 2503.18225)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.kaiming import kaiming


class DeLoRAAdapter(NamedTuple):
    """A: (in, rank). B: (rank, out). lam: (), the strength. norm: (in,), ||W|| of each input's row, fixed. A0, B0: the
    fixed first A and B of the official start, None otherwise."""

    A: jax.Array
    B: jax.Array
    lam: jax.Array
    norm: jax.Array
    A0: Any
    B0: Any


@dataclass(frozen=True)
class DeLoRA(Variant):
    """``W' = W + (lam / rank) diag(norm) sum_i a_i b_i / (|a_i| |b_i|)``, with a_i, b_i columns of A, rows of B.

    Paper: arXiv 2503.18225, Delta W = (lambda ||W|| / r) B Xi A with Xi = diag(1 / |b_i| |a_i|). Each term has norm 1,
    so that lam bounds the update; norm = ||W|| per input is computed once and kept with the adapter.

    rank: r. strength: where lam starts (PEFT: 15; the official GLUE script 12 or 4, learnt at 3e-3).
    initializer: ``zero_b`` (PEFT): A uniform on +-1/sqrt(in), B = 0; ``residual`` (official code): A and B random, and
    the update that they start with is subtracted for good, from copies A0, B0 that do not train.
    floor: least norm to divide by (PEFT: 1e-4). Below it a norm counts as constant, as torch's clamp has it: the
    gradient at B = 0 is finite, and 1/floor times LoRA's. dropout: of the branch's input.
    """

    rank: int = 8
    strength: float = 15.0
    initializer: str = "zero_b"
    floor: float = 1e-4
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank"), peft="delora_A"),
        "B": Leaf("b", ("rank", "out"), peft="delora_B"),
        "lam": Leaf("lambda", (), peft="delora_lambda"),
        "norm": Leaf("norm", ("in",), peft="delora_w_norm", trainable=False),
        "A0": Leaf("a", ("in", "rank"), trainable=False),
        "B0": Leaf("b", ("rank", "out"), trainable=False),
    }

    @property
    def behind(self) -> str:  # type: ignore[override]
        """The copies of the ``residual`` start."""
        return "copies" if self.initializer == "residual" else ""

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[DeLoRAAdapter, jax.Array]:
        """Returns (A, B, lam, norm) and, for ``residual``, copies of A and B; and `w` itself."""
        (n_in, n_out), r = w.shape, self.rank
        key_a, key_b = jax.random.split(key)
        a, b = kaiming(key_a, (n_in, r), n_in), jnp.zeros((r, n_out))
        lam, norm = jnp.full((), self.strength, jnp.float32), jnp.sqrt(jnp.sum(jnp.square(w), 1))
        if self.initializer == "zero_b":
            return DeLoRAAdapter(a, b, lam, norm, None, None), w
        b = kaiming(key_b, (r, n_out), r)  # torch's fan in of a (out, r) array
        return DeLoRAAdapter(a, b, lam, norm, jnp.copy(a), jnp.copy(b)), w

    def factors(self, adapter: DeLoRAAdapter, w: jax.Array) -> Factors:
        """a: unit columns times norm; b: unit rows times lam / rank; minus the start, if one is subtracted."""
        a, b = self._unit(adapter.A, 0), self._unit(adapter.B, 1) * (adapter.lam / self.rank)
        if adapter.A0 is not None:
            first = self._unit(adapter.B0, 1) * (self.strength / self.rank)
            a, b = jnp.concatenate([a, self._unit(adapter.A0, 0)], 1), jnp.concatenate([b, -first], 0)
        return Factors(a=a * adapter.norm[:, None], b=b)

    def _unit(self, x: jax.Array, axis: int) -> jax.Array:
        """x over its norm along `axis`, or over `floor` where that is larger; differentiable at 0."""
        squared = jnp.sum(jnp.square(x), axis, keepdims=True)
        long = squared > self.floor**2
        return x / jnp.where(long, jnp.sqrt(jnp.where(long, squared, 1.0)), self.floor)

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown initializer, or a floor that is not positive."""
        super().check(n_in, n_out)
        if self.initializer not in ("zero_b", "residual"):
            raise ValueError(f"initializer={self.initializer!r} is unknown; there are zero_b and residual")
        if not self.floor > 0:
            raise ValueError(f"floor={self.floor} is not positive, and norms of 0 are divided by it: use 1e-4")
