"""A variant around another one (a field, not a subclass): it adds arrays of its own and passes everything else on."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorajax.core.variant import Factors, Leaf, Variant, may_drop


class Wrapper(Variant):
    """Base of wrappers, dataclasses with a field `of`. The adapter has the arrays of `of`, then those of `own`."""

    of: Variant | None
    own: ClassVar[Mapping[str, Leaf]]
    """Rows of the wrapper's own arrays."""
    # What follows is that of `of`.
    inner = property(lambda self: self.of or Unchanged())
    rank = property(lambda self: getattr(self.inner, "rank", None))
    dropout = property(lambda self: self.inner.dropout)
    factored = property(lambda self: self.inner.factored)
    rewrites_weight = property(lambda self: self.inner.rewrites_weight)
    any_rank = property(lambda self: self.inner.any_rank)
    behind = property(lambda self: self.inner.behind)
    slot = property(lambda self: self.inner.slot)
    redraws = property(lambda self: self.inner.redraws)
    statistic = property(lambda self: self.inner.statistic)
    before_quantizing = property(lambda self: self.inner.before_quantizing)
    init_shared = property(lambda self: self.inner.init_shared)
    read_shared = property(lambda self: self.inner.read_shared)

    @property
    def leaves(self) -> Mapping[str, Leaf]:  # type: ignore[override]
        """Rows of `of`, then the wrapper's own."""
        return {**self.inner.leaves, **self.own}

    def restore(self, adapter: Any, w: jax.Array) -> jax.Array:
        """The weight that `of` leaves."""
        return self.inner.restore(inner_of(adapter), w)

    def penalty(self, adapter: Any, share: float) -> jax.Array | float:
        """That of `of`."""
        return self.inner.penalty(inner_of(adapter), share)

    def for_lookup(self) -> Variant:
        """Around what `of` is on a lookup table."""
        return replace(self, of=self.of and self.of.for_lookup())  # type: ignore[call-arg]

    def for_conv(self, window: int) -> Variant:
        """Around what `of` is on a convolution."""
        return replace(self, of=self.of and self.of.for_conv(window))  # type: ignore[call-arg]

    def check(self, n_in: int, n_out: int) -> None:
        """Raises ValueError where `of` does, for dropouts inside that would have no effect, and for an `of` that is not
        additive: it scales the weight or has a router."""
        super().check(n_in, n_out)
        self.inner.check(n_in, n_out)
        inside, name = type(self.of).__name__, type(self).__name__
        for option in ("rank_dropout", "unit_dropout", "module_dropout"):
            if may_drop(getattr(self.inner, option)):
                raise ValueError(f"{option}={getattr(self.inner, option)} of {inside} inside {name} has no effect: "
                                 f"give it to {name} itself")
        w = jax.ShapeDtypeStruct((n_in, n_out), jnp.float32)
        read = self.inner.statistic
        stats = read and jax.eval_shape(functools.partial(read.init, n_in, n_out))
        found = jax.eval_shape(self._start, jax.random.key(0), w, stats) if self.factored else Factors()
        if found.g is not None or found.g_in is not None or found.router is not None:
            raise ValueError(f"{inside} scales the weight or has a router, and {name}(of=...) needs an update that is "
                             f"added to it: wrap LoRA(...) or another additive variant, or use it without {name}")
        jax.eval_shape(self.init, jax.random.key(0), w, stats)  # raises where the start needs what is not there yet

    def _start(self, key: jax.Array, w: jax.Array, stats: Any) -> Factors:
        inner, _ = self.inner.init(key, w, stats)
        if any(row.shared for row in self.leaves.values()):
            inner = inner._replace(**self.inner.read_shared(self.inner.init_shared(key, *w.shape), *w.shape))
        return self.inner.factors(inner, w)


class Nothing(NamedTuple):
    """The arrays of no update."""


class Unchanged(Variant):
    """No update: what a wrapper around None wraps."""

    leaves: ClassVar[Mapping[str, Leaf]] = {}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[Nothing, jax.Array]:
        """No arrays."""
        return Nothing(), w

    def factors(self, adapter: Nothing, w: jax.Array) -> Factors:
        """No factors."""
        return Factors()


def joined(name: str, inner: Any, **own: jax.Array) -> Any:
    """The adapter of a wrapper, a NamedTuple called `name`: the arrays of `inner`, then `own`."""
    return _type(name, type(inner), tuple(own))(*inner, *own.values())


def inner_of(adapter: Any) -> Any:
    """The arrays of the wrapped variant, in its own NamedTuple."""
    kind = type(adapter).inner
    return kind(*adapter[:len(kind._fields)])


def _made(name: str, inner: Any, own: tuple[str, ...]) -> Any:
    make: Any = namedtuple
    made = make(name, (*inner._fields, *own))
    made.inner = inner
    return made


_type: Any = functools.cache(_made)  # one type per type of inner adapter: trees of adapters then have one structure
