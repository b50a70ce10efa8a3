"""Whether a function works element by element: a GPU computes such a one in the pass that wants its result."""

from __future__ import annotations

from typing import Any

from lorajax.core import compat

ELEMENTWISE = frozenset((
    "abs add and broadcast_in_dim clamp convert_element_type copy cos div eq exp ge gt integer_pow is_finite le log "
    "logistic lt max min mul ne neg not or pow reshape rsqrt select_n sign sin sqrt square squeeze stop_gradient sub "
    "tanh transpose").split())  # fmt: skip
"""Primitives with no product, no reduction, no loop and no decomposition."""
CALLS = frozenset(("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"))


def elementwise(jaxpr: Any) -> bool:
    """Whether each of its equations is one of `ELEMENTWISE`, or a call of such."""
    return all(
        eqn.primitive.name in ELEMENTWISE
        or (eqn.primitive.name in CALLS and all(map(elementwise, compat.subjaxprs(eqn))))
        for eqn in compat.open_jaxpr(jaxpr).eqns)  # fmt: skip
