"""LoRA: a trained low-rank update beside the frozen weight (Hu et al., arXiv 2106.09685, equation 3)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core import compat
from lorajax.core.variant import Factors, Leaf, Statistic, Variant
from lorajax.variants.corda import CorDA
from lorajax.variants.eva import EVA
from lorajax.variants.initializer import Both, Embedding, Gaussian, Initializer, Kaiming, Orthogonal, Rounded
from lorajax.variants.loftq import LoftQ
from lorajax.variants.lora_ga import LoRAGA
from lorajax.variants.lora_one import LoRAOne
from lorajax.variants.milora import MiLoRA
from lorajax.variants.olora import OLoRA
from lorajax.variants.pissa import PiSSA
from lorajax.variants.qpissa import QPiSSA

INITIALIZERS: Mapping[str, type[Initializer]] = {
    "kaiming": Kaiming, "gaussian": Gaussian, "orthogonal": Orthogonal, "embedding": Embedding, "both": Both,
    "pissa": PiSSA, "milora": MiLoRA, "olora": OLoRA, "eva": EVA, "corda": CorDA, "lora_ga": LoRAGA,
    "lora_one": LoRAOne, "loftq": LoftQ, "qpissa": QPiSSA,
}
"""Name -> start of LoRA. A new one gets a row here, its file, a row of the conformance table, and a config."""


class LoRAAdapter(NamedTuple):
    """A: (in, rank). B: (rank, out)."""

    A: jax.Array
    B: jax.Array


class StartedAdapter(NamedTuple):
    """Of a start that is taken off again. A, A0: (in, rank). B, B0: (rank, out). A0 and B0 are frozen."""

    A: jax.Array
    B: jax.Array
    A0: jax.Array
    B0: jax.Array


TRAINED = {"A": Leaf("a", ("in", "rank"), peft="lora_A.weight"), "B": Leaf("b", ("rank", "out"), peft="lora_B.weight")}
START = {"A0": Leaf("a0", ("in", "rank"), trainable=False), "B0": Leaf("b0", ("rank", "out"), trainable=False)}


@dataclass(frozen=True)
class LoRA(Variant):
    """``W' = W + s A B`` with ``s = alpha / rank`` (arXiv 2106.09685, equation 3 and section 4.1).

    rank: r. alpha: numerator of the scale; a float, or a traced scalar when one program runs several values.
    rslora: ``s = alpha / sqrt(rank)`` instead (arXiv 2312.03732, the rank-stabilised scale). At the same alpha this
    multiplies s by sqrt(rank): a fair comparison divides alpha by the square root of a reference rank.
    dropout: probability of dropping an input element on the branch through A, in training only.
    initializer: what the adapter starts from: a name in `INITIALIZERS`, or an instance with hyperparameters of its own,
    such as ``PiSSA(iterations=4)``. Each has its page.
      - A B = 0, the weight is left alone: kaiming (loralib, PEFT), gaussian (PEFT), orthogonal (PEFT), embedding
        (loralib, PEFT), eva (arXiv 2410.07170);
      - A B is taken off again: pissa (arXiv 2404.02948), milora (arXiv 2406.09044), olora (arXiv 2406.01775),
        corda (arXiv 2406.05223), lora_ga (arXiv 2407.05000), both (arXiv 2602.04998);
      - A B stays: lora_one (arXiv 2502.01235); loftq (arXiv 2310.08659) and qpissa (arXiv 2404.02948), which are made
        together with a quantised weight (`lorajax.quant`).
    fold: how A B is taken off. False: by frozen copies A0, B0, ``W' = W + s (A B - A0 B0)``: the base stays as it is
    and serves other adapters, at twice the rank in compute. True: from a copy of the weight, ``W - s A0 B0``, rounded
    to its dtype (PEFT): LoRA's speed, one more weight in memory if the base is needed elsewhere too. `dropout` acts on
    A0 B0 too where they are copies, so that the start stays the pretrained function; folded, on A B alone (PEFT).
    freeze_a: A gets no gradient (LoRA-FA, arXiv 2308.03303): the backward pass then keeps x A in place of x. Pair it
    with `lorajax.optim.lora_fa`, which gives A no optimizer state.
    """

    rank: int = 8
    alpha: float | jax.Array = 8.0
    rslora: bool = False
    dropout: float = 0.0
    initializer: str | Initializer = "kaiming"
    fold: bool = False
    freeze_a: bool = False

    @property
    def leaves(self) -> Mapping[str, Leaf]:  # type: ignore[override]
        """A and B; A0 and B0 where the start is taken off again."""
        return TRAINED | START if self.initial.subtracts else TRAINED

    @property
    def still(self) -> tuple[str, ...]:  # type: ignore[override]
        """A with `freeze_a`."""
        return ("A",) if self.freeze_a else ()

    @property
    def scale(self) -> float | jax.Array:
        """s, the number in front of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def initial(self) -> Initializer:
        """`initializer` as an instance. ValueError for an unknown name."""
        if isinstance(self.initializer, Initializer):
            return self.initializer
        if self.initializer not in INITIALIZERS:
            near = difflib.get_close_matches(str(self.initializer), INITIALIZERS, n=1)
            raise ValueError(f"initializer={self.initializer!r} is unknown; there are {', '.join(INITIALIZERS)}"
                             + (f"; did you mean {near[0]!r}?" if near else ""))
        return INITIALIZERS[self.initializer]()

    @property
    def statistic(self) -> Statistic | None:
        """What the initializer reads of the data."""
        return self.initial.statistic(self.rank)

    def before_quantizing(self, w: jax.Array, rounded: Rounded) -> tuple[jax.Array, Any]:
        """What the initializer makes of the matrix and of A and B."""
        with jax.default_matmul_precision("highest"):
            return self.initial.before_quantizing(w, self.rank, self.scale, rounded)

    @property
    def behind(self) -> str:  # type: ignore[override]
        """The copies that take the start off."""
        return "copies" if self.initial.subtracts and not self.fold else ""

    @property
    def rewrites_weight(self) -> bool:  # type: ignore[override]
        """Where the start is folded into the weight."""
        return self.fold and self.initial.subtracts

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[Any, jax.Array]:
        """Returns (A, B) or (A, B, A, B) by `initializer`, and `w`, from which s A0 B0 is taken with `fold`."""
        here, seen = compat.whole((w, stats))
        with jax.default_matmul_precision("highest"):
            a, b = self.initial.start(key, here, self.rank, self.scale, seen)
        if not self.initial.subtracts:
            return LoRAAdapter(a, b), w
        started = StartedAdapter(a, b, a, b)
        return started, self.restore(started, w) if self.fold else w

    def restore(self, adapter: Any, w: jax.Array) -> jax.Array:
        """w - s A0 B0."""
        with jax.default_matmul_precision("highest"):
            return w - self.scale * (adapter.A0 @ adapter.B0)

    def factors(self, adapter: Any, w: jax.Array) -> Factors:
        """a = A, b = B, and s; with A0 and B0, a = [A | A0] and b = [B ; -B0]."""
        a, b = jax.lax.stop_gradient(adapter.A) if self.freeze_a else adapter.A, adapter.B
        if self.initial.subtracts and not self.fold:
            a, b = jnp.concatenate([a, adapter.A0], axis=1), jnp.concatenate([b, -adapter.B0], axis=0)
        return Factors(a=a, b=b, s=self.scale)

    def for_lookup(self) -> LoRA:
        """On an embedding table loralib and PEFT swap the roles: A = 0 and B random. Not where A is frozen: nothing
        would ever change."""
        swap = isinstance(self.initial, Kaiming) and not self.freeze_a
        return replace(self, initializer="embedding") if swap else self

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError for an unknown initializer and for what it cannot fit."""
        super().check(n_in, n_out)
        self.initial.check(self.rank, n_in, n_out)
        if self.freeze_a and isinstance(self.initial, Embedding):
            raise ValueError("freeze_a=True with initializer='embedding' keeps A at 0, so nothing ever changes: take "
                             "initializer='kaiming', or train A")
