"""DoRA's scale multiplied into the frozen weight: the formulas in NumPy, what is kept, where it is not done."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import jaxprs
from core.case import normal
from jax import lax
from test_dora import Model, dora, gradients

import lorajax as lj
from lorajax import quant
from lorajax.core.packed import unpacked
from lorajax.variants import DoRA, LoRA
from lorajax.variants.dora import _cross

ROWS = 40
WEIGHTS = jnp.cos(jnp.arange(1, 3001, dtype=jnp.float32))
MODELS = {
    "matmul": Model(lambda p, x: x @ p["w"], (6, 8), normal(ROWS, 6), (6, 8)),
    "on the left": Model(lambda p, x: p["w"].T @ x.T, (6, 8), normal(ROWS, 6), (6, 8)),
    "from heads": Model(lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]), (2, 4, 6), normal(ROWS, 2, 4), (8, 6)),
    "scan": Model(lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], (3, 6, 6), normal(ROWS, 6),
                  (3, 6, 6)),
}  # fmt: skip


def bound(model: Model, variant: Any) -> tuple[Any, Any, Any, Any]:
    params = {"w": normal(*model.w, scale=0.6)}
    adapt = lj.adapt(lj.sites(model.fn, params, model.x), [("w", variant)])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    noisy = {name: None if x is None else normal(*x.shape, seed=2, scale=0.7)
             for name, x in trainable["w"]._asdict().items()}  # fmt: skip
    return params, adapt, {"w": trainable["w"]._replace(**noisy)}, frozen


def loss_of(model: Model, adapt: Any, fold: bool = True) -> Any:
    run = lj.lift(model.fn, strict=True)

    def loss(trainable: Any, frozen: Any, x: Any = model.x) -> jax.Array:
        out = run(adapt.bind(trainable, frozen, fold_scales=fold), x)
        return weighted(out)

    return loss


def weighted(out: jax.Array) -> jax.Array:
    return jnp.sum(out.ravel() * WEIGHTS[: out.size])


def test_the_scale_of_the_sum_of_both_products_is_the_last_pass() -> None:
    """(x W + x A B) g: whatever reads the result can do it as it reads, and only this sum is kept for g's gradient."""
    adapt, trainable, frozen = bound(MODELS["matmul"], DoRA(LoRA(rank=2)))[1:]
    jaxpr = jaxprs.trace(lambda t: lj.lift(MODELS["matmul"].fn)(adapt.bind(t, frozen), MODELS["matmul"].x), trainable)
    large = [eqn.primitive.name for eqn in jaxprs.equations(jaxpr) if eqn.outvars[0].aval.shape == (ROWS, 8)]
    assert [name for name in large if name != "jit"] == ["dot_general", "dot_general", "add", "name", "mul"]


@pytest.mark.parametrize(("name", "detach"), [*[(name, True) for name in MODELS], ("matmul", False)])
def test_output_and_gradients(name: str, detach: bool) -> None:
    """One magnitude is 0 and one far below it: their gradients are what they are for any other."""
    model, s = MODELS[name], 1.5
    params, adapt, trainable, frozen = bound(model, DoRA(LoRA(rank=2, alpha=3.0), detach))
    a, b, m, _ = trainable["w"]
    m = m.at[..., 1].set(0.0).at[..., 2].set(1e-30)
    trainable = {"w": trainable["w"]._replace(magnitude=m)}
    w = np.asarray(params["w"]).reshape(model.matrix)
    new = jnp.float32(dora(w, s * np.float64(a) @ np.float64(b), m).reshape(model.w))
    plain = jax.grad(lambda w: weighted(model.fn({"w": w}, model.x)))(new)
    ours = jax.jit(jax.grad(loss_of(model, adapt)))(trainable, frozen)
    expected = gradients(w, a, b, m, s, np.asarray(plain).reshape(model.matrix), detach)
    for field, theirs in zip("ABm", expected, strict=True):
        mine = ours["w"].magnitude if field == "m" else getattr(ours["w"], field)
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=3e-5 * np.abs(theirs).max(), err_msg=field)


def kept(name: str, fold: bool) -> list[tuple[int, ...]]:
    """Shapes of what lives from the forward to the backward pass, arguments left out."""
    model = MODELS[name]
    _, adapt, trainable, frozen = bound(model, DoRA(LoRA(rank=2)))
    loss = loss_of(model, adapt, fold)
    jaxpr = jax.make_jaxpr(lambda t, f: jax.vjp(lambda t: loss(t, f), t)[1])(trainable, frozen).jaxpr
    return [v.aval.shape for v in jaxpr.outvars if v not in jaxpr.invars and hasattr(v, "aval")]


@pytest.mark.parametrize("name", ["matmul", "scan"])
def test_no_scaled_weight_is_kept(name: str) -> None:
    """The backward pass makes it again; beside the weight itself, an argument, nothing has its shape."""
    shapes = kept(name, True)
    assert MODELS[name].w not in shapes
    stack = MODELS[name].w[:-2]
    assert (*stack, ROWS, MODELS[name].w[-1]) in shapes  # the result, from which m has its gradient


def test_it_is_one_function_to_differentiate() -> None:
    """Second derivatives, and those of the base, are those of the scaled result."""
    model = MODELS["matmul"]
    _, adapt, trainable, frozen = bound(model, DoRA(LoRA(rank=2)))
    along = jax.tree.map(lambda x: normal(*x.shape, seed=5), trainable)

    def curved(fold: bool) -> Any:
        loss = loss_of(model, adapt, fold)
        square = lambda t, base: jnp.square(loss(t, frozen._replace(base=base)))  # noqa: E731
        hvp = jax.jit(lambda t: jax.jvp(jax.grad(lambda t: square(t, frozen.base)), (t,), (along,))[1])(trainable)
        return hvp, jax.jit(jax.grad(square, argnums=1))(trainable, frozen.base)

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-3 * float(jnp.abs(y).max())),
                 curved(True), curved(False))  # fmt: skip


def test_where_it_is_not_done() -> None:
    """Fewer rows than inputs, several scales, dropout, no leave to do it: the result is scaled. No weight is then
    multiplied, so the program has nothing of its shape."""
    model = MODELS["matmul"]
    _, adapt, trainable, frozen = bound(model, DoRA(LoRA(rank=2)))

    def scaled_weights(fold: bool, rows: int, key: Any = None) -> int:
        run = lj.lift(model.fn, strict=True)
        trace = jaxprs.trace(lambda t: run(adapt.bind(t, frozen, fold_scales=fold, key=key), model.x[:rows]), trainable)
        products = [e for e in jaxprs.equations(trace) if e.primitive.name == "mul"]
        return sum(e.outvars[0].aval.shape == model.w for e in products)

    assert scaled_weights(True, ROWS) == 1 and scaled_weights(True, 6) == 1
    assert scaled_weights(False, ROWS) == scaled_weights(True, 5) == 0


def test_on_a_quantised_base() -> None:
    model = Model(lambda p, x: x @ p["w"], (64, 32), normal(80, 64), (64, 32))
    params, adapt, trainable, frozen = bound(model, DoRA(LoRA(rank=2)))
    packed = quant.plan(adapt.sites, [("w", quant.NF4())]).quantize(params)
    dense = {"w": unpacked(packed["w"])}
    ours, theirs = (jax.jit(jax.value_and_grad(loss_of(model, adapt, fold)))(trainable, frozen._replace(base=base))
                    for fold, base in ((True, packed), (False, dense)))  # fmt: skip
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * float(jnp.abs(y).max())),
                 ours, theirs)  # fmt: skip


def test_norms_of_a_bfloat16_weight_are_as_exact_as_of_float32() -> None:
    w, a = normal(256, 32).astype(jnp.bfloat16), normal(256, 4, seed=1)
    want = np.float64(a).T @ np.float64(w)
    found = jax.jit(_cross)(w, a)
    np.testing.assert_allclose(found, want, atol=2e-6 * np.abs(want).max() * 4)
    rough = jnp.einsum("io,ir->ro", w, a.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    assert np.abs(rough - want).max() > 100 * np.abs(found - want).max()
    jaxpr = jaxprs.trace(_cross, w, a)
    assert not [e for e in jaxprs.equations(jaxpr) if e.outvars[0].aval.shape == w.shape]
