"""VeRA: vectors on frozen random matrices that all layers share (Kopiczko et al., arXiv 2310.11454, equation 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant


class VeRAAdapter(NamedTuple):
    """A: (in, rank), B: (rank, out), frozen, shared by all sites. d: (rank,), b: (out,), the diagonals of Lambda."""

    A: jax.Array
    B: jax.Array
    d: jax.Array
    b: jax.Array


@dataclass(frozen=True)
class VeRA(Variant):
    """``W' = W + A diag(d) B diag(b)`` (arXiv 2310.11454, equation 2), no alpha and no 1/r.

    rank: r; may exceed the sides of the weight, since d and b are all that trains. d_initial: the start of d; b starts
    at 0, so VeRA starts as the identity (the paper: 0.1; its ablation also 1 and 1e-7).
    projection_key: seed of A and B. They are uniform with the bounds sqrt(6/in) and sqrt(6/r) (He's, as in PEFT; the
    paper: Kaiming), where in is the largest of all sites: as in PEFT, a smaller site reads the leading part. The run's
    key does not enter: adapters of one projection_key have one projection, whatever else differs. JAX's generator
    draws the same everywhere, but not what torch's does: PEFT's projections come from its files.
    save_projection: whether a saved adapter holds A and B; if not, `init` draws them again.
    dropout: probability of dropping an input element on the branch through A, in training only.

    d and b act on activations: no product with A or B is formed per layer, and A and B get no gradient. The paper
    trains the vectors at ten to a hundred times LoRA's learning rate; weight decay hurts them.
    """

    rank: int = 256
    d_initial: float = 0.1
    projection_key: int = 0
    save_projection: bool = True
    dropout: float = 0.0

    any_rank: ClassVar[bool] = True
    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank"), peft="vera_A", trainable=False, shared=True),
        "B": Leaf("b", ("rank", "out"), peft="vera_B", trainable=False, shared=True),
        "d": Leaf("vector", ("rank",), peft="vera_lambda_d"),
        "b": Leaf("vector", ("out",), peft="vera_lambda_b"),
    }

    @property
    def slot(self) -> str:
        """Of all VeRA sites with this rank and projection_key."""
        return f"vera-{self.rank}-{self.projection_key}"

    @property
    def redraws(self) -> bool:
        """By save_projection."""
        return not self.save_projection

    def init_shared(self, key: jax.Array, n_in: int, n_out: int) -> dict[str, jax.Array]:
        """A and B from projection_key."""
        key_a, key_b = jax.random.split(jax.random.key(self.projection_key))
        bound_a, bound_b = math.sqrt(6 / n_in), math.sqrt(6 / self.rank)
        return {"A": jax.random.uniform(key_a, (n_in, self.rank), minval=-bound_a, maxval=bound_a),
                "B": jax.random.uniform(key_b, (self.rank, n_out), minval=-bound_b, maxval=bound_b)}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[VeRAAdapter, jax.Array]:
        """d = d_initial, b = 0, and `w` itself."""
        return VeRAAdapter(None, None, jnp.full(self.rank, self.d_initial), jnp.zeros(w.shape[1])), w  # type: ignore[arg-type]

    def factors(self, adapter: VeRAAdapter, w: Any) -> Factors:
        """a = A, e = d, b = B, o = b."""
        return Factors(a=adapter.A, e=adapter.d, b=adapter.B, o=adapter.b)
