"""SoRA: LoRA with a gate per rank that a proximal step sparsifies (Ding et al., arXiv 2311.11696, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.lora import LoRA


class SoRAAdapter(NamedTuple):
    """A: (in, rank). g: (rank,), the gate. B: (rank, out)."""

    A: jax.Array
    g: jax.Array
    B: jax.Array


@dataclass(frozen=True)
class SoRA(Variant):
    """``W' = W + s A diag(g) B`` with ``s = alpha / rank`` (arXiv 2311.11696, equation 1 of this page).

    A as LoRA's (uniform on +-1/sqrt(in)), B = 0, and g ~ N(0, 1) as in the released code: it starts as the identity.
    The work is done elsewhere: `lorajax.control.sora` shrinks g after every optimizer step, equation 2 of this page,

        g <- T_xi(g - step of Adam),  T_xi(v) = sign(v) max(|v| - xi, 0),  xi = learning rate * lambda,

    `lorajax.optim.sora` gives the gate an Adam of its own, and `lorajax.control.compact` folds g into A and drops the
    ranks whose gate is 0, which leaves plain LoRA. A gate at 0 may come back while training lasts.

    rank: r before sparsifying (the paper's r_max, 8 in the scripts); s stays tied to it. alpha: numerator of s.
    l1: weight of a further loss term ``l1 * mean |g|`` over all gates, by gradient (the released code's sparse_lambda,
    default 1e-3 there; the paper has the proximal step alone, which is the default here).
    dropout: probability of dropping an input element on the branch through A, in training only.
    """

    rank: int = 8
    alpha: float | jax.Array = 16.0
    l1: float | jax.Array = 0.0
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank")),
        "g": Leaf("gate", ("rank",)),
        "B": Leaf("b", ("rank", "out")),
    }

    @property
    def scale(self) -> float | jax.Array:
        """s, the number in front of A diag(g) B."""
        return self.alpha / self.rank

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[SoRAAdapter, jax.Array]:
        """Returns (A, g, B) with B = 0, and `w` itself."""
        key_a, key_g = jax.random.split(key)
        (a, b), _ = LoRA(rank=self.rank).init(key_a, w)
        return SoRAAdapter(a, jax.random.normal(key_g, (self.rank,)), b), w

    def factors(self, adapter: SoRAAdapter, w: jax.Array) -> Factors:
        """a = A diag(g), b = B, and s."""
        return Factors(a=adapter.A * adapter.g[None, :], b=adapter.B, s=self.scale)

    def penalty(self, adapter: SoRAAdapter, share: float) -> jax.Array:
        """l1 * the mean of |g| over the model (its matrices weigh alike, whatever their ranks)."""
        return self.l1 * share * jnp.mean(jnp.abs(adapter.g))
