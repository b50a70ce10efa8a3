"""What a low-rank method is: a frozen dataclass of hyperparameters with pure methods about ONE (in, out) matrix.

`W` is (in, out) and acts as ``y = x W``; `A` is (in, r), `B` is (r, out). The core lifts a variant over stacked layers
with `vmap` and reshapes n-D kernels, convolutions and embedding tables to (in, out) and back, so a variant never sees
a stack, a path, a sharding, a dtype policy or a file.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax


class Leaf(NamedTuple):
    """One row of a variant's leaf table: everything the framework knows about one array of an adapter.

    label: optimizer group (`a`, `b`, `e`, `magnitude`, `gate`, `full`, ...), what `optax.multi_transform` reads.
    axes: a name per dimension: `in`, `rank`, `out`, or any other word for a dimension that is none of these.
    peft: the suffix of this array in a PEFT file, None if PEFT has no such array.
    trainable: False puts the array in the frozen partition.
    """

    label: str
    axes: tuple[str, ...]
    peft: str | None = None
    trainable: bool = True


class Factors(NamedTuple):
    """How a variant changes its weight: ``W' = g_in[:, None] * (W + s * a @ b) * g[None, :]``, any part may be None.

    a: (in, r); b: (r, out); g: (out,), a scale per output unit; g_in: (in,), per input unit; s: a number, Python's or
    traced.
    """

    a: jax.Array | None = None
    b: jax.Array | None = None
    g: jax.Array | None = None
    g_in: jax.Array | None = None
    s: float | jax.Array | None = None


class Variant(abc.ABC):
    """A method. Concrete variants are frozen dataclasses whose field defaults are the paper's.

    A concrete variant defines `leaves`, `init` and one of `factors` (the update has low-rank factors or scales) and
    `delta` (it has not: LoHa, LoKr, sparse updates).
    """

    leaves: ClassVar[Mapping[str, Leaf]]
    """Table keyed by the field names of the adapter NamedTuple that `init` returns."""
    dropout: float | jax.Array = 0.0
    """Probability of dropping an input element on the adapter's branch; the base branch sees the input undropped."""
    reads_weight: ClassVar[bool] = False
    """Whether `factors` needs the weight (DoRA); if not, it is handed None there."""
    rewrites_weight: ClassVar[bool] = False
    """Whether `init` returns another weight than it was given; the new one then replaces it in the frozen partition."""

    @abc.abstractmethod
    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[Any, jax.Array]:
        """Returns (adapter, w_new) for a weight `w` (in, out) float32; `w_new` is `w` unless `rewrites_weight`."""

    def factors(self, adapter: Any, w: Any) -> Factors:
        """The update as factors, float32. `w` is the (in, out) frozen weight, float32; see `reads_weight`."""
        raise NotImplementedError(f"{type(self).__name__} has no low-rank factors; it defines delta(adapter, w)")

    def delta(self, adapter: Any, w: jax.Array) -> jax.Array:
        """The update as one dense (in, out) float32 array, ``W' - W``. Derived from `factors` where those exist."""
        a, b, g, g_in, s = self.factors(adapter, w)
        new = w if a is None or b is None else w + (a @ b if s is None else s * (a @ b))
        new = new if g is None else new * g[None, :]
        return (new if g_in is None else new * g_in[:, None]) - w

    @property
    def inner(self) -> Variant:
        """The variant that a wrapper (DoRA) wraps, otherwise itself: what controllers look at."""
        return self

    @property
    def factored(self) -> bool:
        """Whether `lift` may use `factors`; False for variants that only have `delta`."""
        return type(self).factors is not Variant.factors

    def penalty(self, adapter: Any, share: float) -> jax.Array | float:
        """The variant's own loss term for one matrix; the run's term is the sum over matrices.

        share: 1 / number of matrices this variant adapts, for papers whose term is a mean over the model.
        """
        return 0.0

    def for_lookup(self) -> Variant:
        """The variant to use on a lookup table (embedding), where a paper starts it differently."""
        return self

    def for_conv(self, window: int) -> Variant:
        """The variant to use on a convolution whose kernel has `window` positions: in is these, then channels."""
        return self

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError (value, limit, remedy) if the hyperparameters cannot fit an (n_in, n_out) weight."""
        rank = getattr(self, "rank", None)
        if rank is not None and not 1 <= rank <= min(n_in, n_out):
            raise ValueError(f"rank={rank} is outside 1..{min(n_in, n_out)}, the limit of a ({n_in}, {n_out}) weight: "
                             f"lower the rank by a rule for this path")
        if isinstance(self.dropout, (int, float)) and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} is not a probability in [0, 1)")


class FullAdapter(NamedTuple):
    """The weight itself, trained. w: the leaf's own shape."""

    w: jax.Array


@dataclass(frozen=True)
class Full:
    """Train the leaf itself: heads, biases, norms, full fine-tuning. The only rule that also takes leaves that no
    matmul, convolution or lookup consumes. The base holds no second copy: the leaf moves to the trainable partition."""

    leaves: ClassVar[Mapping[str, Leaf]] = {"w": Leaf("full", ())}


