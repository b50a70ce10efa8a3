"""Between a leaf of any shape and the (in, out) matrices that a variant sees; stacks of them are vmapped over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorajax.core.bound import RANK, Factor, Number, Term
from lorajax.core.packed import unpacked
from lorajax.core.sites import Site
from lorajax.core.variant import Factors


def matrix(site: Site, w: jax.Array) -> jax.Array:
    """A leaf of the site's shape, packed or not, as (stack..., in, out)."""
    order, w = (*site.stack_axes, *site.in_axes, *site.out_axes), unpacked(w)
    w = w if order == tuple(sorted(order)) else lax.transpose(w, order)
    shape = (*site.stack_shape, site.n_in, site.n_out)
    return w if w.shape == shape else lax.reshape(w, shape)


def leaf(site: Site, m: jax.Array) -> jax.Array:
    """(stack..., in, out) as a leaf of the site's shape: the inverse of `matrix`."""
    order = (*site.stack_axes, *site.in_axes, *site.out_axes)
    m = lax.reshape(m, [site.shape[i] for i in order])
    return lax.transpose(m, [order.index(i) for i in range(len(order))])


def nameless(site: Site) -> Site:
    """The site without what tells it from others of its shape, so that they share one compiled function."""
    return Site("", site.shape, site.dtype, site.uses[:1])


def over_stack(site: Site, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of one matrix, as a function of the site's stack of them."""
    for _ in site.stack_axes:
        function = jax.vmap(function)
    return function


def aligned(site: Site, factors: Factors) -> Term:
    """A variant's factors (with leading stack dimensions) along the leaf's own dimensions.

    The scales g end up inside a and b too, since W' = g_in (W + s a b) g.
    """
    a, b, g, g_in, s, e, o, router = factors
    if a is not None and s is not None and not isinstance(s, (int, float)):
        e = s[..., None] * (jnp.ones((*s.shape, a.shape[-1]), s.dtype) if e is None else e)
        s = None
    if a is not None and g_in is not None:
        a = _deeper(a, g_in.ndim + 1) * g_in[..., :, None]
    bare = b if g is not None and o is None else None
    if o is not None and g is not None:
        o = o * g
    elif b is not None and g is not None:
        b = _deeper(b, g.ndim + 1) * g[..., None, :]
    if g is not None and g_in is not None:
        raise ValueError(f"{site.path}: scales on both sides of one weight; give g or g_in")
    rank_a, rank_b = None if a is None else a.shape[-1], None if b is None else b.shape[-2]
    scale = _along(site, g, site.out_axes) if g is not None else _along(site, g_in, site.in_axes)
    return Term(_along(site, a, site.in_axes, after=rank_a), _along(site, b, site.out_axes, before=rank_b), scale,
                bare=_along(site, bare, site.out_axes, before=rank_b),
                s=None if s is None else Number(float(s)), o=_along(site, o, site.out_axes),
                e=None if e is None else Factor(e, (*site.stack_axes[:e.ndim - 1], RANK)),
                router=_along(site, router, site.in_axes, after=None if router is None else router.shape[-1]))


def _deeper(x: jax.Array, ndim: int) -> jax.Array:
    return x if x.ndim == ndim else lax.expand_dims(x, tuple(range(ndim - x.ndim)))


def _along(site: Site, x: Any, axes: tuple[int, ...], before: int | None = None, after: int | None = None) -> Any:
    """The factor of an array (stack..., before, flattened axes, after) or of one without the stack, common to all."""
    if x is None:
        return None
    front, back = [n for n in (before,) if n is not None], [n for n in (after,) if n is not None]
    stacked = x.ndim > len(front) + 1 + len(back)
    shape = (*[site.shape[i] for i in site.stack_axes if stacked], *front, *[site.shape[i] for i in axes], *back)
    dims = (*[i for i in site.stack_axes if stacked], *[RANK] * len(front), *axes, *[RANK] * len(back))
    return Factor(x, dims, None if x.shape == shape else shape)
