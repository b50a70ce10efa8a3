"""HydraLoRA: one A, several B, and a router that mixes them for every token (Tian et al., arXiv 2404.19245)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.kaiming import kaiming


class HydraLoRAAdapter(NamedTuple):
    """A: (in, rank). B: (heads, rank, out). G: (in, heads), the router."""

    A: jax.Array
    B: jax.Array
    G: jax.Array


@dataclass(frozen=True)
class HydraLoRA(Variant):
    """``y = x W + s sum_i p_i(x) (x A) B_i``, ``p(x) = softmax(x G)`` and ``s = alpha / rank`` (arXiv 2404.19245):
    the router sees every token by itself, all heads act (none is cut off), and no loss balances them, as in the
    released code.

    rank: r of each head (8; the released script 4). heads: n, the number of B (the paper takes it from a clustering of
    the data, 3 or 4; the released script has 4, its code's default is 2). alpha: numerator of the scale (the script's
    32).
    dropout: of the input of A, in training only; the router reads the input undropped.

    A and G start uniform on +-1/sqrt(in), every B at 0. The heads cost ``n r out`` multiplications per token and x A is
    formed once. There is no one weight that does the same for all tokens: `merge` refuses, and so do convolutions and
    lookup tables, which have no tokens to route.
    """

    rank: int = 8
    heads: int = 3
    alpha: float | jax.Array = 32.0
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank"), peft="lora_A.weight"),
        "B": Leaf("b", ("heads", "rank", "out"), peft="lora_B.weight"),
        "G": Leaf("router", ("in", "heads"), peft="lora_route.weight"),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[HydraLoRAAdapter, jax.Array]:
        """Returns (A, B, G), and `w` itself."""
        n_in, n_out = w.shape
        key_a, key_g = jax.random.split(key)
        a, g = kaiming(key_a, (n_in, self.rank), n_in), kaiming(key_g, (n_in, self.heads), n_in)
        return HydraLoRAAdapter(a, jnp.zeros((self.heads, self.rank, n_out)), g), w

    def factors(self, adapter: HydraLoRAAdapter, w: Any) -> Factors:
        """a = A, b = the heads one below the other, s, and the router."""
        b = adapter.B.reshape(self.heads * self.rank, -1)
        return Factors(a=adapter.A, b=b, s=self.alpha / self.rank, router=adapter.G)

    @staticmethod
    def gate(routed: jax.Array, hidden: jax.Array) -> jax.Array:
        """(..., heads * rank): p_i x A for each head i; the softmax in float32."""
        p = jax.nn.softmax(routed.astype(jnp.float32), axis=-1).astype(hidden.dtype)
        return (p[..., :, None] * hidden[..., None, :]).reshape(*hidden.shape[:-1], -1)

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for less than one head."""
        super().check(n_in, n_out)
        if self.heads < 1:
            raise ValueError(f"heads={self.heads} is below 1: give at least one B")
