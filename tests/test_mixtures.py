"""Mixtures: MoLoRA token by token in NumPy, arrow's routing, balance terms over real tokens only."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composing import PARAMS, SITES, trained

import lorajax as lj
from lorajax import compose
from lorajax.variants import HydraLoRA, LoRA, MoLoRA
from lorajax.variants.balance import balanced

RNG = np.random.default_rng(5)
X = jnp.asarray(RNG.normal(size=(3, 4, 6)), jnp.float32)
STACK = {"w": jnp.asarray(RNG.normal(size=(2, 6, 6)) * 0.5, jnp.float32)}


def layers(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def routed(variant: Any) -> Any:
    adapt = lj.adapt(lj.sites(layers, STACK, X), [("w", variant)])
    start, frozen = adapt.init(jax.random.key(0), STACK)
    rng = np.random.default_rng(1)
    return adapt, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.7, jnp.float32), start), frozen


def weights(logits: np.ndarray, router: str, top_k: int, temperature: float) -> np.ndarray:
    """One token's, from the words of the papers."""
    if router == "arrow":
        logits = np.abs(logits)
    keep = np.argsort(-logits)[: top_k or len(logits)]
    p = np.zeros(len(logits))
    if router == "sigmoid":
        p[keep] = 1 / (1 + np.exp(-logits[keep]))
    else:
        e = np.exp((logits[keep] - logits.max()) / temperature)
        p[keep] = e / e.sum()
    return p


@pytest.mark.parametrize(("router", "top_k", "temperature"), [
    ("softmax", 0, 1.0), ("softmax", 2, 0.5), ("sigmoid", 1, 1.0), ("arrow", 2, 2.0)])
def test_every_token_mixes_the_experts(router: str, top_k: int, temperature: float) -> None:
    variant = MoLoRA(rank=2, experts=3, alpha=3.0, router=router, top_k=top_k, temperature=temperature)
    adapt, trainable, frozen = routed(variant)
    have = jax.jit(lambda t: lj.lift(layers, strict=True)(adapt.bind(t, frozen), X))(trainable)
    want = np.asarray(X, np.float64)
    a, b, g = (np.asarray(x, np.float64) for x in trainable["w"])
    for i in range(2):
        new = np.zeros_like(want)
        for at in np.ndindex(3, 4):
            x = want[at]
            p = weights(x @ g[i], router, top_k, temperature)
            new[at] = x @ np.asarray(STACK["w"][i]) + 1.5 * sum(p[e] * x @ a[i, e] @ b[i, e] for e in range(3))
        want = np.tanh(new)
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"w: its adapter weighs rank components per token, so no merged weight"):
        adapt.merge(trainable, frozen)


def test_equal_settings_share_a_gate() -> None:
    assert MoLoRA(rank=2).gate is MoLoRA(rank=3, experts=4).gate is not MoLoRA(top_k=1).gate


def test_arrow_routes_by_the_first_singular_vector() -> None:
    ones = [trained(i, [("stack|head", LoRA(rank=1 + i, alpha=2.0))]) for i in range(3)]
    made = compose.arrow(ones, top_k=2, temperature=0.7)
    x = jnp.asarray(RNG.normal(size=(5, 7)), jnp.float32)
    adapt = lj.adapt(lj.sites(lambda p, x: x @ p["head"], {"head": PARAMS["head"]}, x),
                     [("head", made.adapt.plan["head"])])
    bound = adapt.bind({"head": made.trainable["head"]}, lj.Frozen({"head": PARAMS["head"]}, {}, {}))
    have = lj.lift(lambda p, x: x @ p["head"], strict=True)(bound, x)
    deltas = [np.asarray(one.adapt.plan["head"].scale * one.trainable["head"].A @ one.trainable["head"].B, np.float64)
              for one in ones]  # fmt: skip
    v = np.stack([np.linalg.svd(delta)[0][:, 0] for delta in deltas], 1)
    for token, row in zip(np.asarray(x, np.float64), np.asarray(have), strict=True):
        p = weights(token @ v, "arrow", 2, 0.7)
        want = token @ np.asarray(PARAMS["head"]) + sum(p[e] * token @ deltas[e] for e in range(3))
        np.testing.assert_allclose(row, want, rtol=1e-4, atol=1e-4)
    assert made.trainable["stack"].G.shape == (2, 6, 3)
    with pytest.raises(ValueError, match=r"head: adapters \[1\] do not adapt it"):
        compose.arrow([ones[0], trained(0, [("stack", LoRA(rank=1))])])
    with pytest.raises(ValueError, match="conv is used by a conv, which has no tokens to route"):
        compose.arrow([trained(0, [("conv", LoRA(rank=1))])])


@pytest.mark.parametrize(("variant", "kind"), [
    (MoLoRA(rank=2, experts=3, alpha=2.0), "switch"), (HydraLoRA(rank=2, heads=3, alpha=2.0), "cv")])
def test_the_balance_term_adds_its_gradient_and_leaves_padding_out(variant: Any, kind: str) -> None:
    """Against the same model with its weights spelled out, and the term added to the loss."""
    adapt, trainable, frozen = routed(variant)
    mask = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], jnp.float32)
    lifted = lj.lift(layers, strict=True)

    def task(y: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(y) * mask[..., None])

    def ours(t: Any, x: jax.Array) -> jax.Array:
        return task(lifted(balanced(adapt.bind(t, frozen), mask, 0.3, kind), x))

    def spelled(t: Any, x: jax.Array) -> jax.Array:
        total, real = 0.0, np.flatnonzero(np.asarray(mask).reshape(-1))
        for i in range(2):
            a, b, g = (v[i] for v in t["w"])
            p = jax.nn.softmax(x @ g)
            rows = p.reshape(-1, 3)[real]
            if kind == "switch":
                f = jnp.mean(jax.nn.one_hot(jnp.argmax(rows, -1), 3), 0)
                total = total + 3 * jnp.sum(f * rows.mean(0))
            else:
                used = rows.sum(0)
                total = total + (jnp.sum((used - used.mean()) ** 2) / 2) / (used.mean() ** 2 + 1e-10)
            each = [x @ (a if a.ndim == 2 else a[e]) @ b[e] for e in range(3)]
            x = jnp.tanh(x @ STACK["w"][i] + sum(p[..., e, None] * each[e] for e in range(3)))
        return task(x) + 0.3 * total / 2

    have, want = jax.jit(jax.grad(ours))(trainable, X), jax.jit(jax.grad(spelled))(trainable, X)
    for x, y in zip(have["w"], want["w"], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * float(jnp.abs(y).max()))
    plain = jax.jit(jax.grad(lambda t, x: task(lifted(adapt.bind(t, frozen), x))))(trainable, X)
    assert jnp.abs(plain["w"].G - have["w"].G).max() > 1e-4
    other = jnp.where(mask[..., None] > 0, X, 9.0)  # what padding holds changes nothing
    for x, y in zip(jax.jit(jax.grad(ours))(trainable, other)["w"], have["w"], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("build", "words"), [
    (lambda: lj.adapt(SITES, [("head", MoLoRA(rank=2, experts=0))]), "experts=0 is below 1"),
    (lambda: lj.adapt(SITES, [("head", MoLoRA(rank=2, router="top"))]), "router='top' is unknown; there are softmax"),
    (lambda: lj.adapt(SITES, [("head", MoLoRA(rank=2, experts=2, top_k=3))]), r"top_k=3 is outside 0..2"),
    (lambda: lj.adapt(SITES, [("head", MoLoRA(rank=2, temperature=0.0))]), "temperature=0.0 must be above 0"),
    (lambda: balanced(PARAMS, jnp.ones(3)), "nothing in this tree has a router"),
    (lambda: balanced(PARAMS, jnp.ones(3), kind="z"), "kind='z' is unknown; there are switch, cv"),
])
def test_errors(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
