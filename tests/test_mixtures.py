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
from lorajax.variants.given import given

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


def bound_of(variant: Any) -> Any:
    adapt, trainable, frozen = routed(variant)
    return adapt.bind(trainable, frozen)


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


def test_weights_from_outside_per_token_and_layer() -> None:
    adapt, trainable, frozen = routed(MoLoRA(rank=2, experts=3, alpha=2.0))
    p = jnp.asarray(RNG.uniform(size=(2, 3, 4, 3)), jnp.float32)
    bound = adapt.bind(trainable, frozen)
    have = jax.jit(lambda p: lj.lift(layers, strict=True)(given(bound, {"w": p}), X))(p)
    want = np.asarray(X, np.float64)
    a, b, _ = (np.asarray(x, np.float64) for x in trainable["w"])
    for i in range(2):
        each = np.stack([want @ a[i, e] @ b[i, e] for e in range(3)], -1)
        want = np.tanh(want @ np.asarray(STACK["w"][i]) + np.sum(each * np.asarray(p[i])[..., None, :], -1))
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
    same = lj.lift(layers)(given(bound, p[0]), X)
    np.testing.assert_allclose(same, lj.lift(layers)(given(bound, {"w": jnp.stack([p[0], p[0]])}), X), atol=1e-6)


def test_x_lora_weighs_by_what_a_first_pass_saw() -> None:
    """Two passes by hand; only the classifier gets a gradient, and none through the first pass."""
    adapt, trainable, frozen = routed(MoLoRA(rank=2, experts=3, alpha=2.0))
    bound, lifted = adapt.bind(trainable, frozen), lj.lift(layers)
    net = compose.XLoRA(6, 3, layers=2, depth=2, size=5, temperature=0.5, global_scale=2.0, placeholder=1 / 3)
    params = net.init(jax.random.key(1))
    run = jax.jit(lambda params, x: net.two_pass(params, lifted, lifted, adapt, bound, x))
    have, p = run(params, X)
    h = np.asarray(lifted(given(bound, jnp.full((3, 4, 3), 1 / 3)), X), np.float64)
    (w1, b1), (w2, b2) = ((np.asarray(x["w"]), np.asarray(x["b"])) for x in params)
    logits = (np.maximum(h @ w1 + b1, 0) @ w2 + b2).reshape(3, 4, 2, 3) / 0.5
    e = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.moveaxis(2 * e / e.sum(-1, keepdims=True), 2, 0)
    np.testing.assert_allclose(p, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(have, lifted(given(bound, {"w": jnp.float32(want)}), X), rtol=1e-4, atol=1e-5)

    def frozen_first(params: Any) -> jax.Array:
        return jnp.sum(jnp.square(lifted(given(bound, {"w": net.weights(params, jnp.float32(h))}), X)))

    ours = jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(run(params, X)[0]))))(params)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(jax.jit(jax.grad(frozen_first))(params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="layers=3, and 2 matrices have experts"):
        compose.XLoRA(6, 3, layers=3).two_pass(params, lifted, lifted, adapt, bound, X)


def test_merging_by_likeness_is_one_weight_for_all_tokens_of_a_sequence() -> None:
    mask = jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], jnp.float32)
    tasks = jnp.asarray(RNG.normal(size=(2, 6)), jnp.float32)
    p = compose.by_likeness(X, mask, tasks, temperature=0.5)
    assert p.shape == (3, 4, 2)
    for row, m, have in zip(np.asarray(X, np.float64), np.asarray(mask), np.asarray(p), strict=True):
        mean = row[m > 0].mean(0)
        cosine = np.asarray([mean @ t / np.linalg.norm(mean) / np.linalg.norm(t) for t in np.asarray(tasks)])
        want = np.exp(cosine / 0.5) / np.exp(cosine / 0.5).sum()
        np.testing.assert_allclose(have, np.broadcast_to(want, (4, 2)), rtol=1e-4)


@pytest.mark.parametrize(("build", "words"), [
    (lambda: lj.adapt(SITES, [("head", MoLoRA(rank=2, experts=0))]), "experts=0 is below 1"),
    (lambda: lj.adapt(SITES, [("head", MoLoRA(rank=2, router="top"))]), "router='top' is unknown; there are softmax"),
    (lambda: lj.adapt(SITES, [("head", MoLoRA(rank=2, experts=2, top_k=3))]), r"top_k=3 is outside 0..2"),
    (lambda: lj.adapt(SITES, [("head", MoLoRA(rank=2, temperature=0.0))]), "temperature=0.0 must be above 0"),
    (lambda: balanced(PARAMS, jnp.ones(3)), "nothing in this tree has a router"),
    (lambda: given(PARAMS, jnp.ones(3)), "nothing in this tree has experts"),
    (lambda: given(bound_of(MoLoRA(rank=2, experts=3)), {"v": X}), "no weights for w: give every path"),
    (lambda: lj.lift(layers)(given(bound_of(MoLoRA(rank=2, experts=3)), jnp.ones((5, 3))), X),
     r"given as 15 numbers, and a weight reads rows of \(3, 4\)"),
    (lambda: compose.XLoRA(4, 2, top_k=3), r"top_k=3 must be in 0..2"),
    (lambda: balanced(bound_of(MoLoRA(2, router="sigmoid")), jnp.ones((3, 4))), "do not sum to 1: take router"),
    (lambda: balanced(given(bound_of(MoLoRA(2, 3)), jnp.ones((3, 4, 3))), jnp.ones((3, 4))), "given from outside"),
    (lambda: balanced(PARAMS, jnp.ones(3), kind="z"), "kind='z' is unknown; there are switch, cv"),
])
def test_errors(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
