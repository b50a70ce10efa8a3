"""MoLoRA: a mixture of LoRA experts with a router for every token (Zadouri et al., arXiv 2309.05444), and its gates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.kaiming import kaiming

ROUTERS = ("softmax", "sigmoid", "arrow")


class MoLoRAAdapter(NamedTuple):
    """A: (experts, in, rank). B: (experts, rank, out). G: (in, experts), the router."""

    A: jax.Array
    B: jax.Array
    G: jax.Array


@dataclass(frozen=True)
class MoLoRA(Variant):
    """``y = x W + s sum_e p_e(x) (x A_e) B_e``, ``p(x) = softmax(x G)`` and ``s = alpha / rank`` (arXiv 2309.05444,
    with LoRA as the expert): every token mixes the experts, which is a merge in parameter space per token.

    experts: n (the paper 10 to 15). rank: r of each (4). alpha: numerator of the scale; the paper states none, ours
    makes s = 1. router: how logits become weights,
      - ``softmax``: of x G / temperature;
      - ``sigmoid``: each expert's own gate between 0 and 1, a gated sum;
      - ``arrow``: softmax of |x G| / temperature (arXiv 2405.11157), where column e of G is the direction
        in which expert e acts most: routing without training, see `lorajax.compose.arrow`.
    top_k: weigh only the k largest, by the softmax over these (0: all, as in the paper); the others cost no less here.
    temperature: of the softmax.
    dropout: of the input of A, in training only; the router reads the input undropped.

    A and G start uniform on +-1/sqrt(in), B at 0. A fair comparison is one LoRA of rank n r. No one weight does the
    same for all tokens: `merge` refuses, and so do convolutions and lookup tables. A loss that balances the experts:
    `lorajax.variants.balance`.
    """

    rank: int = 4
    experts: int = 10
    alpha: float | jax.Array = 4.0
    router: str = "softmax"
    top_k: int = 0
    temperature: float = 1.0
    dropout: float = 0.0

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("experts", "in", "rank")),
        "B": Leaf("b", ("experts", "rank", "out")),
        "G": Leaf("router", ("in", "experts")),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[MoLoRAAdapter, jax.Array]:
        """Returns (A, B, G), and `w` itself."""
        n_in, n_out = w.shape
        key_a, key_g = jax.random.split(key)
        a = kaiming(key_a, (self.experts, n_in, self.rank), n_in)
        b = jnp.zeros((self.experts, self.rank, n_out))
        return MoLoRAAdapter(a, b, kaiming(key_g, (n_in, self.experts), n_in)), w

    def factors(self, adapter: MoLoRAAdapter, w: Any) -> Factors:
        """a = the experts' A side by side, b = their B one below the other, s, and the router."""
        a = jnp.swapaxes(adapter.A, 0, 1).reshape(adapter.A.shape[1], -1)
        b = adapter.B.reshape(-1, adapter.B.shape[-1])
        return Factors(a=a, b=b, s=self.alpha / self.rank, router=adapter.G)

    @property
    def gate(self) -> Callable[[jax.Array, jax.Array], jax.Array]:  # type: ignore[override]
        """(..., experts * rank): p_e times the components of expert e; weights in float32."""
        return _gate(self.router, self.top_k, self.temperature)

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for no experts, an unknown router, a top_k that is no number of them, no temperature."""
        super().check(n_in, n_out)
        if self.experts < 1:
            raise ValueError(f"experts={self.experts} is below 1: give at least one")
        if self.router not in ROUTERS:
            raise ValueError(f"router={self.router!r} is unknown; there are {', '.join(ROUTERS)}")
        if not 0 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} is outside 0..{self.experts}, the number of experts; 0: all")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")


def probabilities(logits: jax.Array, router: str, top_k: int, temperature: float) -> jax.Array:
    """(..., experts) float32 weights: 0 for experts beyond the top k; among equals the first count."""
    logits = logits.astype(jnp.float32)
    logits = jnp.abs(logits) if router == "arrow" else logits
    if top_k and top_k < logits.shape[-1]:
        order = jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1, stable=True)
        logits = jnp.where(order < top_k, logits, -jnp.inf)
    return jax.nn.sigmoid(logits) if router == "sigmoid" else jax.nn.softmax(logits / temperature, axis=-1)


@functools.cache
def _gate(router: str, top_k: int, temperature: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """One function for equal settings, so that equal layers share a program."""
    def gate(routed: jax.Array, hidden: jax.Array) -> jax.Array:
        p = probabilities(routed, router, top_k, temperature).astype(hidden.dtype)
        parts = hidden.reshape(*hidden.shape[:-1], p.shape[-1], -1)
        return (p[..., :, None] * parts).reshape(hidden.shape)

    return gate
