"""Attention as one block a head, run by Pallas's interpreter: results and gradients are those of the plain path, one
kernel forward and one backward for all runs side by side, and what it is not made for goes elsewhere."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import jaxprs

import lorajax as lj
from lorajax import build, config
from lorajax.models import Bert, BertConfig, attention, short_attention
from lorajax.models.attention import attend
from lorajax.models.short_attention import attend_block


def heads(tokens: int, keys: int, size: int, *lead: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    """q (..., 2, tokens, 3, size), k and v of `keys`, and a weight for each number of the result."""
    draw = jax.random.split(jax.random.key(tokens), 4)
    return [jax.random.normal(key, (*lead, 2, n, 3, size)).astype(dtype)
            for key, n in zip(draw, (tokens, keys, keys, tokens), strict=True)]  # fmt: skip


def gradients(fn: Any) -> Any:
    def total(q: Any, k: Any, v: Any, by: Any, seen: Any) -> Any:
        out = fn(q, k, v, seen)
        return (out * by).astype(jnp.float32).sum(), out

    return jax.grad(total, (0, 1, 2), has_aux=True)


def block(q: Any, k: Any, v: Any, seen: Any) -> jax.Array:
    return attend_block(q, k, v, seen.astype(jnp.int32), 0.3, True)


def plain(q: Any, k: Any, v: Any, seen: Any) -> jax.Array:
    return attend(q, k, v, mask=seen[:, None, None, :], scale=0.3, implementation="xla")


@pytest.mark.parametrize(("tokens", "keys", "size"), [(16, 16, 16), (40, 24, 16), (9, 100, 32)])
def test_results_and_gradients(tokens: int, keys: int, size: int) -> None:
    """Lengths that are no power of two; a row whose last keys are padding, and one that sees no key at all."""
    q, k, v, by = heads(tokens, keys, size)
    seen = jnp.arange(keys)[None, :] < jnp.array([[keys - 3], [0]])
    for ours, theirs in zip(*(jax.tree.leaves(gradients(fn)(q, k, v, by, seen)) for fn in (block, plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_sixteen_bits() -> None:
    """As near to float32 as the plain path."""
    wide = heads(16, 16, 16)
    seen = jnp.arange(16)[None, :] < jnp.array([[16], [7]])
    exact = jax.tree.leaves(gradients(plain)(*wide, seen))
    q, k, v, by = (x.astype(jnp.bfloat16) for x in wide)
    with jax.numpy_dtype_promotion("standard"):
        for want, *got in zip(exact, *(jax.tree.leaves(gradients(f)(q, k, v, by, seen)) for f in (block, plain)),
                              strict=True):  # fmt: skip
            ours, theirs = (float(jnp.abs(x.astype(jnp.float32) - want).max()) for x in got)
            assert ours <= 1.2 * theirs + 1e-3


def test_runs_side_by_side_are_the_runs_and_one_kernel() -> None:
    q, k, v, by = heads(12, 12, 16, 3)
    seen = jnp.arange(12)[None, None, :] < jnp.arange(6).reshape(3, 2, 1) * 2 + 1
    for axes, mask in ((0, seen), (None, seen[0])):
        together = jax.vmap(gradients(block), (0, 0, 0, 0, axes))
        found = together(q, k, v, by, mask)
        for i in range(3):
            one = gradients(plain)(q[i], k[i], v[i], by[i], mask if axes is None else mask[i])
            jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=2e-5, atol=2e-5), found, one)
        names = [eqn.primitive.name for eqn in jaxprs.equations(jaxprs.trace(together, q, k, v, by, mask))]
        assert [n for n in names if n.startswith("dot_")] == ["dot_product_attention_fwd_block",
                                                             "dot_product_attention_bwd_block"]


def test_nothing_as_wide_as_the_scores_is_transposed() -> None:
    """The compiler would make the softmax a second time for it."""
    q, seen = jnp.zeros((2, 64, 3, 16)), jnp.ones((2, 32), jnp.int32)
    k = q[:, :32]
    kernel = partial(short_attention._backward_call, scale=0.3, interpret=True)
    found = list(jaxprs.equations(jaxprs.trace(kernel, q, k, k, seen, q)))
    turned = [eqn.invars[0].aval.shape for eqn in found if eqn.primitive.name == "transpose"]
    for eqn in found:
        if eqn.primitive.name == "dot_general":
            (of_a, of_b), _ = eqn.params["dimension_numbers"]
            turned += [x.aval.shape for x, of, plain in zip(eqn.invars, (of_a, of_b), (1, 0), strict=True)
                       if tuple(of) != (plain,)]  # fmt: skip
    assert turned and not {(64, 32), (32, 64)} & set(turned)


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention.jax, "devices", lambda: [SimpleNamespace(
        device_kind="NVIDIA H200", compute_capability="9.0")])


@pytest.mark.parametrize(("shape", "how", "ours"), [
    ((2, 64, 2, 32), {}, True),
    ((2, 128, 2, 64), {"mask": (2, 1, 1, 128)}, True),
    ((2, 40, 2, 16), {"mask": (1, 1, 1, 40)}, True),
    ((2, 129, 2, 32), {}, False),
    ((2, 64, 2, 48), {}, False),
    ((2, 64, 2, 8), {}, False),
    ((2, 64, 2, 32), {"mask": (2, 1, 64, 64)}, False),
    ((2, 64, 2, 32), {"bias": (2, 1, 1, 64)}, False),
    ((2, 64, 2, 32), {"causal": True}, False),
    ((2, 64, 2, 32), {"scale": -0.5}, False),
])  # fmt: skip
def test_what_it_takes(monkeypatch: pytest.MonkeyPatch, shape: Any, how: dict[str, Any], ours: bool) -> None:
    on_gpu(monkeypatch)
    taken = []
    monkeypatch.setattr(short_attention, "side_by_side", lambda q, *_, **__: taken.append(False) or q)
    elsewhere = lambda q, *_, **__: taken.append(None) or q  # noqa: E731
    monkeypatch.setattr(short_attention, "attend_block", lambda q, *_: taken.append(True) or q)
    how = {name: jnp.ones(x, bool) if isinstance(x, tuple) else x for name, x in how.items()}
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jnp.zeros(shape, dtype)
        short_attention.short_side_by_side(x, x, x, **how)
        short_attention.short_attention(x, x, x, otherwise=elsewhere, **how)
    assert taken == [ours, ours or None, False, None]


def test_alone_a_mask_keeps_its_one_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past what the kernels take, a run alone gives cuDNN's attention a bias for all heads, not for each."""
    on_gpu(monkeypatch)
    given = []

    def kernel(q: Any, *_: Any, mask: Any, **how: Any) -> Any:
        given.append((how["implementation"], mask.shape))
        return q

    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", kernel)
    x, mask = jnp.zeros((2, 256, 4, 32), jnp.bfloat16), jnp.ones((2, 1, 1, 256), bool)
    for attention_of in (short_attention.short_attention, short_attention.short_side_by_side):
        attention_of(x, x, x, mask=mask)
    assert given == [("cudnn", (2, heads, 256, 256)) for heads in (1, 4)]


def test_elsewhere_it_is_the_plain_path() -> None:
    q, k, v, _ = heads(6, 6, 16)
    mask = jnp.arange(6)[None, None, None, :] < jnp.array([4, 6])[:, None, None, None]
    np.testing.assert_array_equal(short_attention.short_attention(q, k, v, mask=mask), attend(q, k, v, mask=mask))


def test_in_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its projections have their roles, it is kept where `remat` keeps the fused attention, and nothing else of the
    step has a number for each query and key."""
    on_gpu(monkeypatch)
    hf = {"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 64, "max_position_embeddings": 64, "type_vocab_size": 2, "hidden_act": "gelu",
          "pad_token_id": 0}
    for remat, forward in (("none", 2), ("attention", 2), ("full", 4)):
        how: Any = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "remat": remat}
        net = Bert(BertConfig.from_hf(hf, attention=short_attention.short_attention, **how))
        ids = jnp.ones((3, 40), jnp.int32)
        params = jax.eval_shape(net.init, jax.random.key(0), ids)
        adapt = lj.adapt(lj.sites(net.apply, params, ids, ids), [("qv", lj.LoRA(rank=2))])
        assert len(adapt.plan) == 4
        trainable, frozen = jax.eval_shape(adapt.init, jax.random.key(0), params)
        run = lj.lift(net.apply)

        def loss(t: Any, frozen: Any, run: Any = run, adapt: Any = adapt, ids: Any = ids) -> jax.Array:
            return run(adapt.bind(t, frozen), ids, ids).sum()

        with jax.numpy_dtype_promotion("standard"):
            found = jaxprs.equations(jax.make_jaxpr(jax.grad(loss))(trainable, frozen))
        names = [eqn.primitive.name for eqn in found]
        assert names.count("dot_product_attention_fwd_block") == forward
        assert names.count("dot_product_attention_bwd_block") == 2
        assert not [v for eqn in found for v in eqn.outvars if getattr(v.aval, "shape", ())[-2:] == (40, 40)]


def test_config() -> None:
    c = config.load("configs/lora.py")
    c.attention = "short"
    assert build.attention(c) is short_attention.short_attention
    c.mesh.data = 2
    with pytest.raises(config.ConfigError, match="attention=short is for one device.*'data': 2.*attention=auto"):
        build.attention(c)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "size"), [(64, 32), (128, 64), (40, 16)])
def test_on_a_gpu(tokens: int, size: int) -> None:
    """As near to float32 as the plain path."""
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    q, k, v, by = heads(tokens, tokens, size, 3, dtype=jnp.bfloat16)
    seen = jnp.arange(tokens)[None, None, :] < jnp.array([[tokens, 7], [1, tokens - 3], [33, 16]])[:, :, None]
    exact = jax.jit(jax.vmap(gradients(plain)))(*(x.astype(jnp.float32) for x in (q, k, v, by)), seen)
    fused = partial(short_attention.short_side_by_side, scale=0.3)
    ways = [lambda q, k, v, seen: fused(q, k, v, mask=seen[:, None, None, :]), plain]
    with jax.numpy_dtype_promotion("standard"):
        found = [jax.jit(jax.vmap(gradients(fn)))(q, k, v, by, seen) for fn in ways]
    for want, *got in zip(*map(jax.tree.leaves, (exact, *found)), strict=True):
        ours, theirs = (float(np.abs(np.asarray(x, np.float32) - want).max()) for x in got)
        assert ours <= 1.2 * theirs + 1e-3
