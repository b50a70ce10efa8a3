"""DoRA: magnitude and direction of the weight, adapted apart (Liu et al., arXiv 2402.09353, equation 5)."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant, may_drop
from lorajax.variants.lora import LoRA

SMALLEST = 1e-6
"""What a norm counts at least: the magnitude of a zero column, which is then finite and can grow."""
LEAST_GROWTH = 1e-6
"""What ||V||^2 / ||W||^2 counts at least: below it the expansion has no correct digit in float32."""


PLAIN = LoRA()


@dataclass(frozen=True)
class DoRA(Variant):
    """``W' = V diag(m / ||V||)``, ``V = W + update`` (arXiv 2402.09353, equation 5), one norm per output unit.

    The released code reduces torch's dimension 1, so a norm is that of a column of our (in, out) matrix: of a linear
    layer over its inputs, of a convolution over window and input channels, of an embedding over the vocabulary. A bias
    is not scaled. Starts where `of` starts, since m = ||V|| then; exactly the identity for an update that starts at 0.

    of: the variant that makes the update, anything additive: `LoRA` (the paper; its recipe is rank 32, alpha 64,
      dropout 0.05, or half of both ranks and alphas), `AdaLoRA`, one with a `delta` alone. None: no update, the
      magnitude alone is trained (the released code's ``Wdecompose_target_modules``). Its dropout acts on the input of
      the update and of the (m / ||V|| - 1) part, which then costs a second base product, as in PEFT.
    detach: ||V|| is a constant in the backward pass (the paper's section 4.3 and the released setting). False is the
      full gradient, another algorithm.

    ``||V||^2 = ||W||^2 + 2 s diag(W^T A B) + s^2 diag(B^T A^T A B)`` in float32, with ``||W||`` computed once at the
    start: neither W + s A B nor its gradient is formed. Labels: those of `of`, and `magnitude` for m.
    """

    of: Variant | None = PLAIN
    detach: bool = True

    reads_weight = True

    @property
    def leaves(self) -> Mapping[str, Leaf]:  # type: ignore[override]
        """Rows of `of`, then m, and the frozen ||W||."""
        return {**(self.of.leaves if self.of else {}),
                "magnitude": Leaf("magnitude", ("out",), peft="lora_magnitude_vector"),
                "weight_norm": Leaf("norm", ("out",), trainable=False)}

    @property
    def inner(self) -> Variant:
        """The variant that is wrapped."""
        return self.of or self

    @property
    def rank(self) -> int | None:
        """The rank of `of`, None if it has none."""
        return getattr(self.of, "rank", None)

    @property
    def dropout(self) -> float | jax.Array:  # type: ignore[override]
        """The dropout of `of`."""
        return self.of.dropout if self.of else 0.0

    @property
    def factored(self) -> bool:
        """Whether `of` has factors."""
        return self.of is None or self.of.factored

    @property
    def rewrites_weight(self) -> bool:  # type: ignore[override]
        """Whether the start of `of` does."""
        return self.of is not None and self.of.rewrites_weight

    @property
    def any_rank(self) -> bool:  # type: ignore[override]
        """As for `of`."""
        return self.of is None or self.of.any_rank

    @property
    def slot(self) -> str:
        """That of `of`: VeRA with and without DoRA read one projection."""
        return self.inner.slot if self.of else ""

    @property
    def redraws(self) -> bool:
        """As for `of`."""
        return self.of is not None and self.of.redraws

    def init_shared(self, key: jax.Array, n_in: int, n_out: int) -> dict[str, jax.Array]:
        """The shared arrays of `of`."""
        return self.of.init_shared(key, n_in, n_out) if self.of else {}

    def read_shared(self, arrays: Mapping[str, jax.Array], n_in: int, n_out: int) -> dict[str, jax.Array]:
        """As `of` reads them."""
        return self.of.read_shared(arrays, n_in, n_out) if self.of else {}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[Any, jax.Array]:
        """Returns (the arrays of `of`, m = ||V||, ||W||), and the weight that `of` leaves."""
        inner, w = self.of.init(key, w, stats) if self.of else (Nothing(), w)
        norm = jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(w), 0)), SMALLEST)
        adapter = adapter_type(type(inner))(*inner, norm, norm)
        return adapter._replace(magnitude=norm / self.gain(adapter, w)), w

    def factors(self, adapter: Any, w: jax.Array) -> Factors:
        """The factors of `of`, and g = m / ||V||."""
        found = self.of.factors(inner_of(adapter), w) if self.of else Factors()
        if found.g is not None or found.g_in is not None or found.router is not None:
            raise ValueError(f"{type(self.of).__name__} scales the weight or has a router, and DoRA(of=...) needs an "
                             f"update that is added to it: wrap LoRA(...) or another additive variant, or use it "
                             f"without DoRA")
        return found._replace(g=self.gain(adapter, w))

    def delta(self, adapter: Any, w: jax.Array) -> jax.Array:
        """``V diag(m / ||V||) - W``, for an update without factors too."""
        if self.factored or self.of is None:
            return super().delta(adapter, w)
        return (w + self.of.delta(inner_of(adapter), w)) * self.gain(adapter, w)[None, :] - w

    def gain(self, adapter: Any, w: jax.Array) -> jax.Array:
        """m / ||V||, (out,) float32."""
        inner, m, norm = inner_of(adapter), *(jnp.float32(x) for x in (adapter.magnitude, adapter.weight_norm))
        if self.of is None:
            return m / norm
        inner = jax.lax.stop_gradient(inner) if self.detach else inner
        added = _factored(self.of.factors(inner, w), w) if self.factored else _dense(self.of.delta(inner, w), w)
        return m / norm / jnp.sqrt(jnp.maximum(1 + added / jnp.square(norm), LEAST_GROWTH))

    def penalty(self, adapter: Any, share: float) -> jax.Array | float:
        """That of `of`."""
        return self.of.penalty(inner_of(adapter), share) if self.of else 0.0

    def for_lookup(self) -> DoRA:
        """Around what `of` is on a lookup table."""
        return replace(self, of=self.of.for_lookup()) if self.of else self

    def for_conv(self, window: int) -> DoRA:
        """Around what `of` is on a convolution."""
        return replace(self, of=self.of.for_conv(window)) if self.of else self

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError where `of` does, and for one that scales the weight."""
        super().check(n_in, n_out)
        if self.of:
            self.of.check(n_in, n_out)
            if may_drop(self.of.rank_dropout) or may_drop(self.of.module_dropout):
                raise ValueError(f"rank_dropout={self.of.rank_dropout} and module_dropout={self.of.module_dropout} of "
                                 f"{type(self.of).__name__} inside DoRA have no effect: give them to DoRA itself")
        w = jax.ShapeDtypeStruct((n_in, n_out), jnp.float32)
        jax.eval_shape(lambda key, w: self.delta(self.init(key, w)[0], w), jax.random.key(0), w)


class Nothing(NamedTuple):
    """The arrays of no update."""


def _joined(inner: Any) -> Any:
    """The NamedTuple type with the fields of `inner`, magnitude: (out,), weight_norm: (out,)."""
    make: Any = namedtuple
    made = make("DoRAAdapter", (*inner._fields, "magnitude", "weight_norm"))
    made.inner = inner
    return made


adapter_type: Any = functools.cache(_joined)
"""One type per type of inner adapter: trees of adapters then have one structure."""


def inner_of(adapter: Any) -> Any:
    """The arrays of the wrapped variant, in its own NamedTuple."""
    return type(adapter).inner(*adapter[:-2])


def _factored(found: Factors, w: jax.Array) -> jax.Array:
    """||W + s A B||^2 - ||W||^2 per column, from (out, r) and (r, r) products."""
    found = found.folded()
    if found.a is None or found.b is None:
        return jnp.zeros(w.shape[1])
    a, b, s = found.a, found.b, 1.0 if found.s is None else found.s
    with jax.default_matmul_precision("highest"):
        cross, own = jnp.einsum("io,ir->ro", w, a), (a.T @ a) @ b
    return s * jnp.sum((2 * cross + s * own) * b, 0)


def _dense(delta: jax.Array, w: jax.Array) -> jax.Array:
    """The same from the update itself."""
    return jnp.sum((2 * w + delta) * delta, 0)
