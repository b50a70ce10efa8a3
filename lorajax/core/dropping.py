"""The dropouts of an adapter in training: of its input's elements, of rank components, of inputs and outputs for all
tokens, of the whole adapter."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lorajax.core.bound import RANK, Factor, Term
from lorajax.core.sites import Site
from lorajax.core.variant import Variant, may_drop


def dropping(term: Term, site: Site, choice: Variant, key: jax.Array) -> Term:
    """The term with the variant's dropouts on, each drawn on its own from `key`, one draw per matrix of the site.

    An element of the input is dropped where the term meets it (`contract.dropped`); a rank component by the scale e; an
    input in a and an output by the scale o; a whole adapter by e and by its scale of the weight, which becomes 1.
    """
    if may_drop(choice.dropout):
        keys = jax.random.split(key, site.stack_shape) if site.stack_axes else key
        rate = Factor(jnp.asarray(choice.dropout, jnp.float32), ())
        term = term._replace(key=Factor(keys, site.stack_axes), rate=rate)
    if term.a is not None and may_drop(choice.rank_dropout):
        every = term.a.size(RANK)
        shape = (*site.stack_shape, every // 2 if choice.behind else every)
        on = kept(choice.rank_dropout, jax.random.fold_in(key, 1), shape) / (1.0 - choice.rank_dropout)
        if choice.behind:
            on = jnp.concatenate([on, on if choice.behind == "copies" else jnp.ones(shape)], -1)
        term = _scaled(term, Factor(on, (*site.stack_axes, RANK)))
    if term.a is not None and may_drop(choice.unit_dropout):
        a, o = (Factor(kept(choice.unit_dropout, jax.random.fold_in(key, 3 + i), tuple(site.shape[d] for d in dims))
                       / (1.0 - choice.unit_dropout), dims)
                for i, dims in enumerate(((*site.stack_axes, *site.in_axes), (*site.stack_axes, *site.out_axes))))
        term = term._replace(a=term.a.times(a), o=o if term.o is None else term.o.times(o))
    if may_drop(choice.module_dropout):
        whole = Factor(kept(choice.module_dropout, jax.random.fold_in(key, 2), site.stack_shape), site.stack_axes)
        term = term if term.a is None else _scaled(term, whole)
        if term.g is not None:
            change = Factor(term.g.array - 1, term.g.dims).times(whole)
            term = term._replace(g=Factor(change.array + 1, change.dims))
    return term


def _scaled(term: Term, on: Factor) -> Term:
    e = term.e
    if e is None and term.a is not None:
        e = Factor(jnp.ones(term.a.size(RANK), jnp.float32), (RANK,))
    return term if e is None else term._replace(e=e.times(on))


def kept(rate: float | jax.Array, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """1 with probability 1 - rate, else 0, float32."""
    return jax.random.bernoulli(key, 1.0 - rate, shape).astype(jnp.float32)
