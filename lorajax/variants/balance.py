"""Losses that keep the experts of a mixture in use, over real tokens only: no row of padding counts.

    logits = lifted(balanced(adapt.bind(trainable, frozen), mask), ids, mask)
    loss = task(logits)          # its gradient is that of task + coefficient * mean over matrices of balance

The routers' weights exist only inside the model, in scans and rematerialised layers. So the term enters where the
weights are, in the backward pass: the gradient is that of the sum, and the loss itself is the task's alone. That is
exact where the result is differentiated as it is; a loss that is multiplied afterwards needs the coefficient multiplied
likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorajax.core.bound import Bound, Factor, Gate, Term, is_bound

KINDS = ("switch", "cv")


def balanced(bound: Any, mask: jax.Array, coefficient: float = 1e-2, kind: str = "switch") -> Any:
    """The bound tree with a balance term at every router that is a softmax over experts (HydraLoRA, MoLoRA).

    mask: 1 for real tokens, 0 for padding, in the shape of the leading dimensions of the weights' inputs. coefficient:
    of the mean over matrices. kind: with p (tokens, n) the weights,
      - ``switch``: ``n sum_e f_e mean_tokens p_e``, f_e the share of tokens whose largest weight is e's (arXiv
        2101.03961, equation 4; MixLoRA's term, there 1e-2); least, 1, where all experts are used alike;
      - ``cv``: ``var_e / (mean_e^2 + 1e-10)`` of ``sum_tokens p_e``, unbiased variance (LoRAMoE's released code, arXiv
        2312.09979, without its two types of samples).
    Raises ValueError for an unknown kind, a tree without routers, and weights that are no softmax of a router
    (MoLoRA's sigmoid, `given`).
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; there are {', '.join(KINDS)}")
    nodes = [x for x in jax.tree.leaves(bound, is_leaf=is_bound) if is_bound(x)]
    routed = [term for node in nodes for term in node.terms if term.gate is not None]
    if not routed:
        raise ValueError("nothing in this tree has a router: a balance term is for HydraLoRA and MoLoRA")
    if any(term.given is not None for term in routed):
        raise ValueError("the weights of these experts are given from outside: balance what computes them")
    count = sum(_matrices(term) for term in routed)
    seen = Factor(mask.astype(jnp.float32), ())

    def with_loss(term: Term) -> Term:
        if term.gate is None:
            return term
        return term._replace(gate=Gate(_balanced(term.gate.function, kind, coefficient / count)), seen=seen)

    return jax.tree.map(lambda x: Bound(x.w, tuple(map(with_loss, x.terms)), x.path) if is_bound(x) else x, bound,
                        is_leaf=is_bound)


def _matrices(term: Term) -> int:
    """How many routers stand in a stack: what is left of the first without its own two dimensions."""
    router = term.router
    assert router is not None
    own = [n for d, n in zip(router.dims, router.shape or router.stored.shape, strict=True)
           if term.b is not None and d in term.b.dims and d >= 0]
    return functools.reduce(lambda x, y: x * y, own, 1)


def switch(p: jax.Array, rows: jax.Array) -> jax.Array:
    """p: (tokens, n); rows: (tokens,), 0 for padding. Scalar."""
    real = jnp.maximum(jnp.sum(rows), 1.0)
    chosen = jax.nn.one_hot(jnp.argmax(p, -1), p.shape[-1]) * rows[:, None]
    f = jax.lax.stop_gradient(jnp.sum(chosen, 0) / real)
    return p.shape[-1] * jnp.sum(f * jnp.sum(p * rows[:, None], 0) / real)


def cv(p: jax.Array, rows: jax.Array) -> jax.Array:
    """Likewise."""
    used = jnp.sum(p * rows[:, None], 0)
    return jnp.var(used, ddof=1) / (jnp.square(jnp.mean(used)) + 1e-10)


@functools.cache
def _balanced(gate: Callable[..., jax.Array], kind: str, coefficient: float) -> Callable[..., jax.Array]:
    """The gate with a third argument, which row is a token, and the term in its derivative."""
    loss = {"switch": switch, "cv": cv}[kind]
    with jax.ensure_compile_time_eval():
        alike = gate(jnp.zeros((1, 3)), jnp.ones((1, 3)))
        shared = alike.size > 3  # one A for all experts (HydraLoRA)
        if not jnp.allclose(jnp.sum(alike), 3 if shared else 1):
            raise ValueError("a balance term is of a softmax over experts, and these weights do not sum to 1: take "
                             "router='softmax', or leave the term out")

    def term(routed: jax.Array, rows: jax.Array) -> jax.Array:
        flat = routed.reshape(-1, routed.shape[-1])
        n = flat.shape[-1]
        p = gate(flat, jnp.ones_like(flat)).reshape(-1, n, n) if shared else gate(flat, jnp.ones_like(flat))
        return loss(p[..., 0] if shared else p, jnp.broadcast_to(rows, routed.shape[:-1]).reshape(-1))

    @jax.custom_vjp
    def same(routed: jax.Array, rows: jax.Array) -> jax.Array:
        return routed

    def back(kept: Any, d: jax.Array) -> Any:
        routed, rows = kept
        return d + (coefficient * jax.grad(term)(routed, rows)).astype(d.dtype), jnp.zeros_like(rows)

    same.defvjp(lambda routed, rows: (routed, (routed, rows)), back)

    def with_term(routed: jax.Array, hidden: jax.Array, rows: jax.Array) -> jax.Array:
        return gate(same(routed, rows), hidden)

    return with_term
