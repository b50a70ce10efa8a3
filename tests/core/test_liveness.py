"""What a program has alive at its fullest: by hand, and against XLA's count where the CPU's fusion is as a GPU's."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lorajax as lj
from lorajax import quant
from lorajax.core.liveness import fullest, size, total

ROWS, WIDE, RANK = 96, 32, 4
X = jax.ShapeDtypeStruct((ROWS, WIDE), jnp.float32)


def step(apply: Any, layers: int, dtype: Any = jnp.float32, form: Any = None) -> tuple[Any, tuple[Any, ...]]:
    """The gradient of LoRA on `layers` square weights, and what it is called with."""
    params = {f"layer_{i}": jax.ShapeDtypeStruct((WIDE, WIDE), dtype) for i in range(layers)}
    sites = lj.sites(apply, params, X)
    adapt = lj.adapt(sites, [(".*", lj.LoRA(rank=RANK))])
    if form is not None:
        adapt = adapt.on(jax.eval_shape(quant.plan(sites, [(".*", form)]).quantize, params))

    def gradient(trainable: Any, frozen: Any, x: jax.Array) -> Any:
        loss = lambda t: jnp.square(lj.lift(apply)(adapt.bind(t, frozen), x).astype(jnp.float32)).mean()  # noqa: E731
        return jax.grad(loss)(trainable)

    return gradient, (*adapt.shapes, X)


def alive(fn: Any, *args: Any) -> int:
    return total(fullest(jax.make_jaxpr(fn)(*args)))


def chain(act: Any, layers: int, dtype: Any = jnp.float32, wrap: Any = lambda f: f) -> Any:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        for i in range(layers):
            x = wrap(lambda x, w: act(x @ w))(x, params[f"layer_{i}"])
        return x

    return apply


def normed(x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


@pytest.mark.parametrize("act", [normed, jax.nn.softmax])
@pytest.mark.parametrize("layers", [2, 4])
def test_xla_counts_the_same(act: Any, layers: int) -> None:
    fn, args = step(chain(act, layers), layers)
    told = jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert alive(fn, *args) == pytest.approx(told, rel=0.03)


@pytest.mark.parametrize("form", [None, quant.NF4(block=32), quant.Int8()], ids=["bfloat16", "nf4", "int8"])
@pytest.mark.parametrize(("act", "arrays"), [(jax.nn.silu, 2), (normed, 2), (jax.nn.gelu, 2)])
def test_a_layer_keeps_its_sum_and_its_input(act: Any, arrays: int, form: Any) -> None:
    """In 16 bits: x W + (x A) B, what the activation makes of it, x A, and what a norm divides by. None of the float32
    in between; of a quantised weight no dense copy."""
    def needs(layers: int) -> int:
        return alive(*_called(step(chain(act, layers, jnp.bfloat16), layers, jnp.bfloat16, form)))

    small = 2 * ROWS * RANK + 2 * 2 * RANK * WIDE + (4 * ROWS if act is normed else 0)  # x A, A and B in 16 bits
    assert needs(5) - needs(4) == arrays * 2 * ROWS * WIDE + small


def _called(made: tuple[Any, tuple[Any, ...]]) -> tuple[Any, ...]:
    return made[0], *made[1]


def test_the_error_function_is_made_once() -> None:
    """Dozens of operations: its argument and its value are kept as well (bfloat16)."""
    def needs(act: Any, layers: int) -> int:
        return alive(*_called(step(chain(act, layers, jnp.bfloat16), layers, jnp.bfloat16)))

    exact = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    more = (needs(exact, 5) - needs(exact, 4)) - (needs(jax.nn.gelu, 5) - needs(jax.nn.gelu, 4))
    assert more == 2 * 2 * ROWS * WIDE


def test_full_remat_keeps_what_enters_a_layer() -> None:
    def needs(layers: int, wrap: Any) -> int:
        return alive(*_called(step(chain(jnp.tanh, layers, wrap=wrap), layers)))

    assert needs(5, jax.checkpoint) - needs(4, jax.checkpoint) == 4 * ROWS * WIDE
    plain = lambda f: f  # noqa: E731
    assert needs(5, plain) - needs(4, plain) > 4 * ROWS * WIDE


def test_what_two_layers_share_is_there_once() -> None:
    """Each of them reads it behind a barrier of its own."""
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        shared = jnp.sin(x[:7] @ w)
        layer = jax.checkpoint(lambda x, shared: jnp.sin(x @ w @ shared.T) @ shared)
        return layer(layer(x, shared), shared).sum()

    found = fullest(jax.make_jaxpr(jax.grad(loss))(X, jax.ShapeDtypeStruct((WIDE, WIDE), jnp.float32)))
    assert [x.shape for x in found].count((7, WIDE)) == 2  # it, and what it is the sine of


def test_a_scan_stacks_what_its_layers_keep() -> None:
    def run(depth: int) -> list[Any]:
        def loss(x: jax.Array, w: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0].sum()

        return fullest(jax.make_jaxpr(jax.grad(loss))(X, jax.ShapeDtypeStruct((depth, WIDE, WIDE), jnp.float32)))

    assert total(run(7)) - total(run(4)) == 3 * 4 * ROWS * WIDE  # the cosines
    assert any(x.shape == (7, ROWS, WIDE) for x in run(7))


def test_what_is_made_of_the_same_is_made_at_once() -> None:
    """Both factors' gradients beside the three arrays that they are of: neither takes the place of one."""
    def gated(a: jax.Array, b: jax.Array, w: jax.Array) -> jax.Array:
        g, u = a @ w, b @ w
        return (g * u) @ w

    def gradients(a: jax.Array, b: jax.Array, w: jax.Array, by: jax.Array) -> Any:
        da, db = jax.vjp(lambda a, b: gated(a, b, w), a, b)[1](by)
        return da @ w, db @ w

    w = jax.ShapeDtypeStruct((WIDE, WIDE), jnp.float32)
    assert alive(gradients, X, X, w, X) == 5 * size(X)


def test_arguments_results_keys_and_dead_code_are_not_counted() -> None:
    def fn(x: jax.Array, key: jax.Array) -> jax.Array:
        _ = jnp.sin(x) @ x.T
        return x * jax.jit(lambda x: (x, 2.0))(x)[1]  # a call that returns a constant

    assert fullest(jax.make_jaxpr(fn)(X, jax.random.key(0))) == []
    assert size(jax.random.key(0)) == 8
    assert total({"a": X, "b": jnp.ones(3, jnp.bfloat16)}) == 4 * ROWS * WIDE + 6
