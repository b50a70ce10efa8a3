"""Between a leaf of any shape and the (in, out) matrices that a variant sees; stacks of them are vmapped over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lorajax.core.bound import RANK, Factor, Number, Term
from lorajax.core.sites import Site
from lorajax.core.variant import Factors


def matrix(site: Site, w: jax.Array) -> jax.Array:
    """A leaf of the site's shape as (stack..., in, out)."""
    order = (*site.stack_axes, *site.in_axes, *site.out_axes)
    w = w if order == tuple(sorted(order)) else lax.transpose(w, order)
    shape = (*site.stack_shape, site.n_in, site.n_out)
    return w if w.shape == shape else lax.reshape(w, shape)


def leaf(site: Site, m: jax.Array) -> jax.Array:
    """(stack..., in, out) as a leaf of the site's shape: the inverse of `matrix`."""
    order = (*site.stack_axes, *site.in_axes, *site.out_axes)
    m = lax.reshape(m, [site.shape[i] for i in order])
    return lax.transpose(m, [order.index(i) for i in range(len(order))])


def over_stack(site: Site, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of one matrix, as a function of the site's stack of them."""
    for _ in site.stack_axes:
        function = jax.vmap(function)
    return function


def aligned(site: Site, factors: Factors) -> Term:
    """A variant's factors (with leading stack dimensions) along the leaf's own dimensions.

    The scales g end up inside a and b too, since W' = g_in (W + s a b) g.
    """
    a, b, g, g_in, s = factors
    if b is not None and s is not None and not isinstance(s, (int, float)):
        b, s = b * s.reshape(*s.shape, 1, 1).astype(b.dtype), None
    if a is not None and g_in is not None:
        a = a * g_in[..., :, None]
    if b is not None and g is not None:
        b = b * g[..., None, :]
    if g is not None and g_in is not None:
        raise ValueError(f"{site.path}: scales on both sides of one weight; give g or g_in")
    rank = None if a is None else a.shape[-1]
    scale = _along(site, g, site.out_axes) if g is not None else _along(site, g_in, site.in_axes)
    return Term(_along(site, a, site.in_axes, after=rank), _along(site, b, site.out_axes, before=rank), scale,
                s=None if s is None else Number(float(s)))


def _along(site: Site, x: Any, axes: tuple[int, ...], before: int | None = None, after: int | None = None) -> Any:
    if x is None:
        return None
    front, back = [n for n in (before,) if n is not None], [n for n in (after,) if n is not None]
    shape = (*site.stack_shape, *front, *[site.shape[i] for i in axes], *back)
    dims = (*site.stack_axes, *[RANK] * (before is not None), *axes, *[RANK] * (after is not None))
    return Factor(x, dims, None if x.shape == shape else shape)
