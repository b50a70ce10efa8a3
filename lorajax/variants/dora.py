"""DoRA: magnitude and direction of the weight, adapted apart (Liu et al., arXiv 2402.09353, equation 5)."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core import compat
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
    # What follows is that of `of`.
    inner = property(lambda self: self.of or Unchanged())
    rank = property(lambda self: getattr(self.inner, "rank", None))
    dropout = property(lambda self: self.inner.dropout)
    factored = property(lambda self: self.inner.factored)
    rewrites_weight = property(lambda self: self.inner.rewrites_weight)
    any_rank = property(lambda self: self.inner.any_rank)
    slot = property(lambda self: self.inner.slot)
    redraws = property(lambda self: self.inner.redraws)
    statistic = property(lambda self: self.inner.statistic)
    init_shared = property(lambda self: self.inner.init_shared)
    read_shared = property(lambda self: self.inner.read_shared)

    @property
    def leaves(self) -> Mapping[str, Leaf]:  # type: ignore[override]
        """Rows of `of`, then m, and the frozen ||W||."""
        return {**self.inner.leaves, "magnitude": Leaf("magnitude", ("out",), peft="lora_magnitude_vector"),
                "weight_norm": Leaf("norm", ("out",), trainable=False)}

    def restore(self, adapter: Any, w: jax.Array) -> jax.Array:
        """The weight that `of` leaves."""
        return self.inner.restore(inner_of(adapter), w)

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[Any, jax.Array]:
        """Returns (the arrays of `of`, m = ||V||, ||W||), and the weight that `of` leaves."""
        inner, w = self.inner.init(key, w, stats)
        norm = jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(w), 0)), SMALLEST)
        adapter = adapter_type(type(inner))(*inner, norm, norm)
        # Shared arrays are not here yet: an update that does not start at 0 without them raises.
        return adapter._replace(magnitude=norm / self.gain(adapter, w)), w

    def factors(self, adapter: Any, w: jax.Array) -> Factors:
        """The factors of `of`, and g = m / ||V||."""
        return self.inner.factors(inner_of(adapter), w)._replace(g=self.gain(adapter, w))

    def delta(self, adapter: Any, w: jax.Array) -> jax.Array:
        """``V diag(m / ||V||) - W``."""
        return (w + self.inner.delta(inner_of(adapter), w)) * self.gain(adapter, w)[None, :] - w

    def gain(self, adapter: Any, w: jax.Array) -> jax.Array:
        """m / ||V||, (out,) float32."""
        m, norm = jnp.float32(adapter.magnitude), jnp.float32(adapter.weight_norm)
        inner = jax.lax.stop_gradient(inner_of(adapter)) if self.detach else inner_of(adapter)
        if self.factored:
            added = _added(self.inner.factors(inner, w), w)
        else:
            delta = self.inner.delta(inner, w)
            added = jnp.sum((2 * w + delta) * delta, 0)
        return m / norm / jnp.sqrt(jnp.maximum(1 + added / jnp.square(norm), LEAST_GROWTH))

    def penalty(self, adapter: Any, share: float) -> jax.Array | float:
        """That of `of`."""
        return self.inner.penalty(inner_of(adapter), share)

    def for_lookup(self) -> DoRA:
        """Around what `of` is on a lookup table."""
        return replace(self, of=self.of and self.of.for_lookup())

    def for_conv(self, window: int) -> DoRA:
        """Around what `of` is on a convolution."""
        return replace(self, of=self.of.for_conv(window)) if self.of else self

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError where `of` does, and for one that is not additive."""
        super().check(n_in, n_out)
        self.inner.check(n_in, n_out)
        for name in ("rank_dropout", "unit_dropout", "module_dropout"):
            if may_drop(getattr(self.inner, name)):
                raise ValueError(f"{name}={getattr(self.inner, name)} of {type(self.of).__name__} inside DoRA has no "
                                 f"effect: give it to DoRA itself")
        w = jax.ShapeDtypeStruct((n_in, n_out), jnp.float32)
        read = self.inner.statistic
        stats = read and jax.eval_shape(functools.partial(read.init, n_in, n_out))
        found = jax.eval_shape(self._start, jax.random.key(0), w, stats) if self.factored else Factors()
        if found.g is not None or found.g_in is not None or found.router is not None:
            raise ValueError(f"{type(self.of).__name__} scales the weight or has a router, and DoRA(of=...) needs an "
                             f"update that is added to it: wrap LoRA(...) or another additive variant, or use it "
                             f"without DoRA")
        jax.eval_shape(self.init, jax.random.key(0), w)

    def _start(self, key: jax.Array, w: jax.Array, stats: Any) -> Factors:
        inner, _ = self.inner.init(key, w, stats)
        if any(row.shared for row in self.leaves.values()):
            inner = inner._replace(**self.inner.read_shared(self.inner.init_shared(key, *w.shape), *w.shape))
        return self.inner.factors(inner, w)


class Nothing(NamedTuple):
    """The arrays of no update."""


class Unchanged(Variant):
    """No update."""

    leaves: ClassVar[Mapping[str, Leaf]] = {}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[Nothing, jax.Array]:
        """No arrays."""
        return Nothing(), w

    def factors(self, adapter: Nothing, w: jax.Array) -> Factors:
        """No factors."""
        return Factors()


def _joined(inner: Any) -> Any:
    make: Any = namedtuple
    made = make("DoRAAdapter", (*inner._fields, "magnitude", "weight_norm"))
    made.inner = inner
    return made


adapter_type: Any = functools.cache(_joined)
"""The type of `DoRA`'s adapter, one per type of inner adapter: its fields, magnitude (out,), weight_norm (out,)."""


def inner_of(adapter: Any) -> Any:
    """The arrays of the wrapped variant, in its own NamedTuple."""
    return type(adapter).inner(*adapter[:-2])


def _added(found: Factors, w: jax.Array) -> jax.Array:
    """||W + s A B||^2 - ||W||^2 per column, from (out, r) and (r, r) products."""
    found = found.folded()
    if found.a is None or found.b is None:
        return jnp.zeros(w.shape[1])
    a, b, s = found.a, found.b, 1.0 if found.s is None else found.s
    cross, own = compat.einsum("io,ir->ro", w, a), compat.einsum("rs,so->ro", compat.einsum("ir,is->rs", a, a), b)
    return s * jnp.sum((2 * cross + s * own) * b, 0)
