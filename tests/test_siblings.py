"""Weights that read one input: x A of them is one product; what stays apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import jaxprs
from core.case import normal

import lorajax as lj
from lorajax.core import siblings
from lorajax.variants import DoRA, LoRA

X = normal(5, 6)
SHAPES = {"q": (6, 8), "k": (6, 4), "v": (6, 4), "o": (8, 6)}


def model(params: Any, x: jax.Array) -> jax.Array:
    """Three products of x, the later weights cast when their turn comes; then one that reads something else."""
    q, k, v, o = (params[name] for name in "qkvo")
    y = jnp.tanh(x @ q.astype(x.dtype))
    y = y * jnp.concatenate([x @ k.astype(x.dtype), jnp.tensordot(x, v.astype(x.dtype).T, ((1,), (1,)))], -1)
    return y @ o.astype(x.dtype)


def adapted(variant: Any, fn: Any = model, targets: str = "[qkvo]", **bind: Any) -> Any:
    params = {name: normal(*shape, seed=i, scale=0.5) for i, (name, shape) in enumerate(SHAPES.items())}
    adapt = lj.adapt(lj.sites(fn, params, X), [(targets, variant)])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda x: normal(*x.shape, seed=9, scale=0.4), trainable)
    run = lj.lift(fn, strict=True)
    return params, trainable, lambda t, x=X: run(adapt.bind(t, frozen, **bind), x)


def products(fn: Any, *args: Any) -> list[tuple[int, ...]]:
    """Shapes of the products' results, forward."""
    return [eqn.outvars[0].aval.shape for eqn in jaxprs.equations(jaxprs.trace(fn, *args))
            if eqn.primitive.name == "dot_general"]  # fmt: skip


def test_numbers() -> None:
    params, trainable, run = adapted(LoRA(rank=2, alpha=3.0))
    n = {name: np.float64(params[name]) + 1.5 * np.float64(t.A) @ np.float64(t.B) for name, t in trainable.items()}
    x = np.float64(X)
    want = (np.tanh(x @ n["q"]) * np.concatenate([x @ n["k"], x @ n["v"]], 1)) @ n["o"]
    np.testing.assert_allclose(run(trainable), want, rtol=2e-5, atol=2e-5)

    def merged(t: Any, x: jax.Array) -> jax.Array:
        return model({name: params[name] + 1.5 * t[name].A @ t[name].B for name in params}, x)

    for derivative in (jax.grad, jax.jacfwd):
        ours, dense = (derivative(lambda t, x, f=f: jnp.sin(f(t, x)).sum(), argnums=(0, 1))(trainable, X)
                       for f in (run, merged))  # fmt: skip
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, dense)


def test_one_product_with_a_forward_and_one_back() -> None:
    _, trainable, run = adapted(LoRA(rank=3))
    found = products(run, trainable)
    assert len(found) == 4 + 4 + 2  # with W, with B, with A
    assert found.count((5, 9)) == found.count((5, 3)) == 1  # q, k and v; o
    both = products(lambda x: jax.vjp(lambda x: run(trainable, x), x)[1](X), X)
    forward = 2  # o: W and B
    assert both.count((5, 6)) == forward + 3 + 1  # q, k and v towards x: W of each, A of all three at once


@pytest.mark.parametrize(
    ("variant", "bind", "widest", "together"),
    [
        (DoRA(LoRA(rank=3)), {}, 9, 1),
        (LoRA(rank=3, dropout=0.5), {"key": jax.random.key(1)}, 9, 0),  # each drops elements of its own
        (LoRA(rank=3), {}, 8, 0),
    ],
)
def test_who_is_joined(variant: Any, bind: Any, widest: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "WIDEST", widest)
    _, trainable, run = adapted(variant, **bind)
    found = products(run, trainable)
    assert found.count((5, 9)) == together
    assert found.count((5, 3)) == (1 if together else 4)


def test_a_weight_that_other_data_made_is_not_waited_for() -> None:
    """k is scaled by what x made, after q has read x: it is merged there, and q's own product stands."""

    def late(params: Any, x: jax.Array) -> jax.Array:
        y = x @ params["q"]
        return y.sum() + (x @ (params["k"] * y.mean())).sum()

    _, trainable, run = adapted(LoRA(rank=2), late, "[q]")
    assert products(run, trainable).count((5, 2)) == 1
