"""Weights of experts from outside: per token, per sequence or per layer, in place of a router's (X-LoRA's scalings)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.core.bound import RANK, Bound, Factor, Gate, Term, is_bound


def given(bound: Any, weights: jax.Array | Mapping[str, jax.Array]) -> Any:
    """The bound tree, where every adapter with experts of their own A (MoLoRA, `lorajax.compose.arrow`) is weighed by
    ``weights`` as they are, in place of its router: differentiable in them.

    weights: (rows..., experts), the same for all, or path -> (stack..., rows..., experts); the rows are those of the
    weights' inputs, such as (batch, tokens). Raises ValueError for a tree without experts and for paths left out.
    """
    nodes = [x for x in jax.tree.leaves(bound, is_leaf=is_bound) if is_bound(x)]
    paths = [str(node.path) for node in nodes if any(term.router is not None for term in node.terms)]
    if not paths:
        raise ValueError("nothing in this tree has experts: bind a MoLoRA, or what lorajax.compose.arrow returned")
    if isinstance(weights, Mapping) and (left := [path for path in paths if path not in weights]):
        raise ValueError(f"no weights for {left[0]}: give every path with experts its own, or one array for all")

    def of(node: Bound) -> Bound:
        return Bound(node.w, tuple(term if term.router is None else _with(term, weights, str(node.path))
                                   for term in node.terms), node.path)

    return jax.tree.map(lambda x: of(x) if is_bound(x) else x, bound, is_leaf=is_bound)


def _with(term: Term, weights: jax.Array | Mapping[str, jax.Array], path: str) -> Term:
    assert term.router is not None and term.b is not None
    stack = tuple(d for d in term.router.dims if d != RANK and d in term.b.dims) if isinstance(weights, Mapping) else ()
    array = weights[path] if isinstance(weights, Mapping) else weights
    flat = array.reshape(*array.shape[:len(stack)], -1)
    return term._replace(given=Factor(flat.astype(jnp.float32), (*stack, RANK)), gate=Gate(_weigh))


def _weigh(p: jax.Array, hidden: jax.Array) -> jax.Array:
    """(..., experts * rank): p_e times the components of expert e."""
    parts = hidden.reshape(*hidden.shape[:-1], p.shape[-1], -1)
    return (p.astype(hidden.dtype)[..., :, None] * parts).reshape(hidden.shape)
