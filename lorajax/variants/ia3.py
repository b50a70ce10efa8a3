"""IA3: trained scales of a layer's outputs or inputs, and nothing else (Liu et al., arXiv 2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.rules import Rule
from lorajax.core.variant import Factors, Leaf, Variant


class IA3Adapter(NamedTuple):
    """l_out: (out,), or l_in: (in,); the other one is None."""

    l_out: Any
    l_in: Any


@dataclass(frozen=True)
class IA3(Variant):
    """``W' = W diag(l)`` on keys and values, ``W' = diag(l) W`` on the product that reads the feed-forward's inside.

    Paper: arXiv 2205.05638, section 3.3: l_k * K, l_v * V and l_ff * gelu(x W1), l = 1 at the start. A bias is not
    scaled: the models of the paper have none. PEFT scales the output of its layer, bias included, so its files are
    read with a bias that is scaled and trains, and written with one that is divided by l (`lorajax.io.peft`).

    side: ``out`` scales the outputs (keys, values), ``in`` the inputs (the second product of a feed-forward block).
    `rules` gives each role its side.
    """

    side: str = "out"

    leaves: ClassVar[Mapping[str, Leaf]] = {
        "l_out": Leaf("scale", ("out",), peft="ia3_l"),
        "l_in": Leaf("scale", ("in",), peft="ia3_l"),
    }

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[IA3Adapter, jax.Array]:
        """Returns l = 1 on `side`, and `w` itself."""
        outer = self.side == "out"
        return IA3Adapter(jnp.ones(w.shape[1]) if outer else None, None if outer else jnp.ones(w.shape[0])), w

    def factors(self, adapter: IA3Adapter, w: jax.Array) -> Factors:
        """g = l_out or g_in = l_in."""
        return Factors(g=adapter.l_out, g_in=adapter.l_in)

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown side."""
        super().check(n_in, n_out)
        if self.side not in ("out", "in"):
            raise ValueError(f"side={self.side!r} is unknown; there are out (keys, values) and in (feed-forward)")


def rules(outputs: str = r".*/(key|value|k_proj|v_proj|k|v)/kernel",
          inputs: str = r".*/(down|down_proj|wo|fc2)/kernel") -> list[Rule]:
    """The paper's placement: regexes of the keys and values, and of the products that read a feed-forward's inside."""
    return [(outputs, IA3("out")), (inputs, IA3("in"))]
