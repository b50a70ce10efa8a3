"""Plain JAX functions of the table in which a weight meets what has no factored form: merged there, and reported."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .case import Built, Weight, case, normal
from .models_raw import W, X, d, one


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, dy: (dy @ res[1].T, res[0].T @ dy))


@jax.custom_jvp
def product_jvp(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


product_jvp.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))


@case(W, fallback="custom_vjp_call")
def fallback_custom_vjp() -> Built:
    return one(lambda w, x: (product(x, w), x @ w), d(8, 12), X)


@case(W, fallback="custom_jvp_call")
def fallback_custom_jvp() -> Built:
    return one(lambda w, x: (product_jvp(x, w), x @ w), d(8, 12), X)


@case(W, fallback="")
def fallback_weight_decay() -> Built:
    """An elementwise use: `integer_pow` or `square`, whichever this JAX traces."""
    return one(lambda w, x: (x @ w, (w**2).sum()), d(8, 12), X)


@case({"w": Weight(), "v": Weight()}, fallback="concatenate")
def fallback_concatenate() -> Built:
    def fn(p: Any, x: jax.Array) -> Any:
        return x @ jnp.concatenate([p["w"], p["v"]], axis=1), x @ p["w"], x @ p["v"]

    return Built(fn, {"w": d(8, 12), "v": d(8, 10)}, (X,))


@case(W, fallback="pad")
def fallback_pad() -> Built:
    return one(lambda w, x: (x @ w, x @ jnp.pad(w, ((0, 0), (1, 2)))), d(8, 12), X)


@case(W, fallback="cumsum")
def fallback_inside_scan() -> Built:
    """The place is inside a loop; it is reported once."""
    def fn(w: jax.Array, x: jax.Array) -> Any:
        return lax.scan(lambda c, x: (c, (x @ w, x @ jnp.cumsum(w, 1))), 0.0, x)[1]

    return one(fn, d(8, 12), normal(5, 7, 8))


@case({"w": Weight(), "v": Weight()}, fallback="dot_general")
def fallback_product_of_weights() -> Built:
    return Built(lambda p, x: (x @ (p["w"] @ p["v"]), x @ p["w"], jnp.tanh(x @ p["w"]) @ p["v"]),
                 {"w": d(8, 12), "v": d(12, 10)}, (X,))


@case(W, fallback="reshape")
def fallback_mixed_reshape() -> Built:
    """In and out dimensions mixed."""
    return one(lambda w, x: (x @ w, x[:, :6] @ w.reshape(6, 16)), d(8, 12), X)


@case(W, fallback="sub")
def fallback_inner_step() -> Built:
    """A gradient step on the weight inside the function (MAML)."""

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        inner = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w)
        return jnp.tanh(x @ (w - 0.1 * inner))

    return one(fn, d(8, 12), X)


@case({"w": Weight(), "v": Weight()}, fallback="cond")
def fallback_cond_returns_weight() -> Built:
    def fn(p: Any, flag: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"]) @ p["v"] @ lax.cond(flag, lambda: p["w"], lambda: p["v"])

    return Built(fn, {"w": d(8, 8), "v": normal(8, 8, seed=1)}, (jnp.array(True), X))


@case(W, fallback="return")
def fallback_returned() -> Built:
    """The weight is among the outputs, its place in the program is the end of the function."""
    return one(lambda w, x: (x @ w, w), d(8, 12), X)
