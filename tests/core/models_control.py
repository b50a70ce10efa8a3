"""Plain JAX functions of the table: control flow, transformations inside the function, annotations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from .case import Built, Weight, case, normal
from .models_raw import W, X, d, one

STACK = {"w": Weight((1,), (2,), (0,))}
SQUARE = Weight()


@case(W, differentiable=False)
def control_while() -> Built:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda c: (c[1] < 20.0) & (c[0] < 6), lambda c: (c[0] + 1, c[1] + jnp.abs(x @ w).mean()),
                              (0, 0.0))[1] * (x @ w)

    return one(fn, d(8, 12), X)


@case(W, differentiable=False)
def control_while_carry() -> Built:
    """The weight is handed round in the carry."""
    def step(carry: Any) -> Any:
        i, w, total, x = carry
        return i + 1, w, total + jnp.abs(x @ w).sum(0), x

    return one(lambda w, x: lax.while_loop(lambda c: c[0] < 3, step, (0, w, jnp.zeros(12), x))[2], d(8, 12), X)


@case({"w": SQUARE})
def control_fori_static() -> Built:
    return one(lambda w, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x), d(8, 8), normal(5, 8))


@case({"w": Weight((1,), (0,)), "v": SQUARE})  # the branch of False comes first in the trace
def control_cond() -> Built:
    def fn(p: Any, flag: jax.Array, x: jax.Array) -> jax.Array:
        y = lax.cond(flag, lambda w, x: x @ w, lambda w, x: jnp.sin(x @ w.T), p["w"], x)
        return lax.switch(1 + flag.astype(jnp.int32), [lambda x: x, lambda x: x @ p["v"], lambda x: x @ p["v"] + 1], y)

    return Built(fn, {"w": d(8, 8), "v": normal(8, 8, seed=1)}, (jnp.array(True), X))


@case(STACK)
def control_index_python() -> Built:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        for i in range(4):
            x = jnp.tanh(x @ w[i])
        return x

    return one(fn, d(4, 8, 8), X)


@case(STACK)
def control_index_fori() -> Built:
    return one(lambda w, x: lax.fori_loop(0, 4, lambda i, x: jnp.tanh(x @ w[i]), x), d(4, 8, 8), X)


@case(STACK)
def control_index_scan() -> Built:
    return one(lambda w, x: lax.scan(lambda x, i: (jnp.tanh(x @ w[i]), x.sum()), x, jnp.arange(4)), d(4, 8, 8), X)


@case(STACK)
def control_scan() -> Built:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w, reverse=True, unroll=2)[0]

    return one(fn, d(4, 8, 8), X)


@case({"w": Weight((2,), (3,), (0, 1))})
def control_scan_nested() -> Built:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w), x, w)[0]

    return one(fn, d(2, 3 + 1, 8, 8), X)


@case(W)
def control_weight_in_carry() -> Built:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(lambda c, x: ((c[0], c[1] + (x @ c[0]).sum()), x @ c[0]), (w, jnp.float32(0)), x)[1]

    return one(fn, d(8, 12), normal(5, 7, 8))


@case({"w": Weight((0,), (1, 2))})
def control_scan_returns_a_constant() -> Built:
    """Each step returns a kernel of three dimensions that it closes over."""

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        every = lax.scan(lambda c, _: (c, w), 0.0, None, length=2)[1]
        return jnp.einsum("bi,ihd->bhd", x, every[1])

    return one(fn, d(8, 2, 6), X)


@case(STACK)
def control_scan_returns_weights() -> Built:
    """One scan hands the transposed weights on to the next."""

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        x, turned = lax.scan(lambda x, w: (jnp.tanh(x @ w), w.T), x, w)
        return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, turned)[0]

    return one(fn, d(4, 8, 8), X)


@case({"w": Weight((1,), (2,), (0,)), "v": SQUARE})
def control_scan_xs_and_closure() -> Built:
    """One weight is sliced by the scan, another is a constant of its body."""
    return Built(lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w) @ p["v"], x.mean()), x, p["w"]),
                 {"w": d(4, 8, 12), "v": d(12, 8)}, (X,))


@case(W)
def control_grad_inside() -> Built:
    """The function differentiates a network with respect to its input, plainly and through a checkpoint."""

    def fn(w: jax.Array, x: jax.Array) -> Any:
        def energy(x: jax.Array) -> jax.Array:
            return jnp.sin(x @ w).sum()

        return jax.grad(energy)(x), jax.grad(jax.checkpoint(energy))(x), jax.jvp(energy, (x,), (x,))[1]

    return one(fn, d(8, 13), X)


@case(W)
def control_vmap_inside() -> Built:
    return one(lambda w, x: jax.vmap(lambda row: jnp.tanh(row @ w))(x), d(8, 12), X)


@case(STACK)
def control_vmap_stacked() -> Built:
    return one(lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), d(4, 8, 12), normal(4, 5, 8))


@case({"w": Weight((0,), (2,), (1,))})
def control_vmap_axis_1() -> Built:
    return one(lambda w, x: jax.vmap(lambda w, x: jnp.tanh(x @ w), (1, 0), 1)(w, x), d(8, 4, 12), normal(4, 5, 8))


@case(W)
def control_checkpoint_names() -> Built:
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda w, x: jnp.sin(checkpoint_name(jnp.tanh(x @ w), "hidden")), policy=policy)(w, x)

    return one(fn, d(8, 12), X)


@case({"w": SQUARE})
def control_shared_jit() -> Built:
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = layer(w, x)
        return x

    return one(fn, d(8, 8), X)


@case({"w": Weight((1,), (0,))})
def control_jit_returns_weight() -> Built:
    return one(lambda w, x: x @ jax.jit(lambda w: w.T.astype(jnp.float32))(w), d(12, 8), X)


@case(W)
def control_debug_callback() -> Built:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        y = x @ w
        jax.debug.callback(lambda y: None, y)
        return jnp.tanh(y)

    return one(fn, d(8, 12), X)


@jax.custom_vjp
def swish(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


swish.defvjp(lambda x: (swish(x), x), lambda x, dy: (2 * dy * jax.nn.sigmoid(x),))  # wrong, to be obeyed


@jax.custom_jvp
def softsign(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.abs(x))


softsign.defjvp(lambda p, t: (softsign(*p), 3 * t[0]))


@case(W)
def control_custom_rules_on_activations() -> Built:
    """The models' own derivative rules survive; they are not the true derivatives, so a lost rule shows."""
    return one(lambda w, x: softsign(swish(x @ w)), d(8, 12), X)


@case(W)
def control_pallas_on_activations() -> Built:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        y = x @ w
        negative = pl.pallas_call(lambda i, o: o.__setitem__(..., -i[...]), jax.ShapeDtypeStruct(y.shape, y.dtype),
                                  interpret=True)
        return y + lax.stop_gradient(negative(lax.stop_gradient(y))) * 0.5

    return one(fn, d(8, 12), X)
