"""ShareLoRA: one trained A for all layers, a B for each (Song et al., arXiv 2406.10785)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant
from lorajax.variants.kaiming import kaiming


class ShareLoRAAdapter(NamedTuple):
    """A: (in, rank), B: (rank, out); one of them, or both, in the slot of all sites and None in each."""

    A: jax.Array | None
    B: jax.Array | None


SHARED = {"a": ("A",), "b": ("B",), "ab": ("A", "B")}


@dataclass(frozen=True)
class ShareLoRA(Variant):
    """``W' = W + s A B`` with ``s = alpha / rank`` (arXiv 2406.10785), where sites share A, B or both, all trained.

    rank: r. alpha: numerator of the scale; a float, or a traced scalar when one program runs several values.
    share: ``a`` (the paper's best), ``b`` or ``ab``.
    group: name of the set of sites that share; sites of another group have arrays of their own. The paper shares over
    layers: give each kind of weight a rule and a group (query, value, ...). In one group, a site that is smaller than
    the largest reads the leading part.
    dropout: probability of dropping an input element on the branch through A, in training only.

    A starts uniform on +-1/sqrt(in), in the largest of the group; B at 0.
    """

    rank: int = 8
    alpha: float | jax.Array = 8.0
    share: str = "a"
    group: str = "all"
    dropout: float = 0.0

    @property
    def leaves(self) -> Mapping[str, Leaf]:  # type: ignore[override]
        """A and B, one or both of them shared."""
        shared = SHARED.get(self.share, ())
        return {"A": Leaf("a", ("in", "rank"), peft="lora_A.weight", shared="A" in shared),
                "B": Leaf("b", ("rank", "out"), peft="lora_B.weight", shared="B" in shared)}

    @property
    def slot(self) -> str:
        """Of this group; what shares other arrays or has another rank has a slot of its own."""
        return f"share-{self.share}-{self.rank}-{self.group}"

    def init_shared(self, key: jax.Array, n_in: int, n_out: int) -> dict[str, jax.Array]:
        """What `share` says of A and B."""
        arrays = start(key, n_in, n_out, self.rank)
        return {name: arrays[name] for name in SHARED[self.share]}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[ShareLoRAAdapter, jax.Array]:
        """The arrays that are not shared, and `w` itself."""
        arrays = start(key, w.shape[0], w.shape[1], self.rank)
        return ShareLoRAAdapter(**{name: None if self.leaves[name].shared else x for name, x in arrays.items()}), w

    def factors(self, adapter: ShareLoRAAdapter, w: Any) -> Factors:
        """a = A, b = B, and s."""
        return Factors(a=adapter.A, b=adapter.B, s=self.alpha / self.rank)

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown `share`, and for a group whose name cannot be part of an array's."""
        super().check(n_in, n_out)
        if self.share not in SHARED:
            raise ValueError(f"share={self.share!r} is unknown; there are {', '.join(SHARED)}")
        if "." in self.group or "/" in self.group:
            raise ValueError(f"group={self.group!r} has a '.' or '/': it becomes part of the name of a saved array")


def start(key: jax.Array, n_in: int, n_out: int, rank: int) -> dict[str, jax.Array]:
    """A ~ U(+-1/sqrt(in)), B = 0."""
    return {"A": kaiming(key, (n_in, rank), n_in), "B": jnp.zeros((rank, n_out))}
