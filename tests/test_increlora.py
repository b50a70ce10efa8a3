"""IncreLoRA: what acts and what learns at each rank, and the growth, against plain numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax.control import compact, increlora
from lorajax.optim import adamw
from lorajax.train.step import init_state, make_step
from lorajax.variants import IncreLoRA, LoRA
from lorajax.variants.increlora import IncreLoRAAdapter

WEIGHTS = {"q": (8, 6), "layers": (3, 6, 6), "v": (6, 7)}
VARIANT = IncreLoRA(rank=5, alpha=3.0, initial=1, reserve=2, orth=0.2)


def model(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ p["q"], p["layers"])[0] @ p["v"]


rng = np.random.default_rng(0)
BASE = {name: jnp.float32(rng.normal(size=shape)) / 2 for name, shape in WEIGHTS.items()}
X = jnp.float32(rng.normal(size=(16, 8)))
SITES = lj.sites(model, BASE, X)
ADAPT = lj.adapt(SITES, [(".*", VARIANT)])


def noise(n: float) -> IncreLoRAAdapter:
    draw = np.random.default_rng(3)
    return IncreLoRAAdapter(*(jnp.float32(draw.normal(size=s)) for s in ((8, 5), (5,), (5, 6))), jnp.float32(n))


@pytest.mark.parametrize("n", [0, 2, 4])
def test_what_acts_and_what_learns(n: int) -> None:
    """r = 1 + n active components with E, two more with E held, s = alpha / (r + 1e-5)."""
    adapter, w = noise(n), jnp.zeros((8, 6))
    a, e, b = (np.float64(x) for x in adapter[:3])
    live = np.arange(5) < 1 + n + 2
    expected = 3.0 / (1 + n + 1e-5) * (a * (e * live)) @ b
    np.testing.assert_allclose(VARIANT.delta(adapter, w), expected, rtol=1e-4, atol=1e-5)
    g = jnp.float32(np.random.default_rng(4).normal(size=(8, 6)))
    grads = jax.grad(lambda x: jnp.sum(g * VARIANT.delta(x, w)))(adapter)
    assert np.array_equal(np.array(grads.E) != 0, np.arange(5) < 1 + n)
    for moving in (np.array(grads.A).T, np.array(grads.B)):
        assert np.array_equal(moving.any(-1), live)
    assert grads.n == 0


def test_penalty_is_that_of_the_live_components() -> None:
    adapter = noise(1)
    a, b = np.float64(adapter.A)[:, :4], np.float64(adapter.B)[:4]
    distance = [np.linalg.norm(x - np.eye(4)) for x in (a.T @ a, b @ b.T)]
    np.testing.assert_allclose(VARIANT.penalty(adapter, 0.25), 0.2 * 0.25 * np.mean(distance), rtol=1e-5)
    pull = jax.grad(lambda x: VARIANT.penalty(x, 1.0))(adapter)
    assert not np.array(pull.A)[:, 4].any()
    assert np.array(pull.A)[:, :4].any(0).all()


def random_tree(seed: int, ranks: dict[str, np.ndarray]) -> dict[str, IncreLoRAAdapter]:
    draw = np.random.default_rng(seed)
    tree = jax.tree.map(lambda x: jnp.float32(draw.normal(size=x.shape)), ADAPT.shapes[0])
    return {path: tree[path]._replace(n=jnp.float32(ranks[path] - 1)) for path in tree}


def test_growth_step_by_step_in_numpy() -> None:
    """Five matrices of rank 1, target 14 of 25: rounds of two matrices by two ranks at steps 6 and 9."""
    controller = increlora(ADAPT, total_steps=20, target_rank=2.8, warmup=4, interval=3, top_h=2)
    assert controller.settled == 10
    paths = list(ADAPT.plan)
    names = [(path, i) for path in paths for i in np.ndindex(SITES[path].stack_shape)]
    ranks = {path: np.ones(SITES[path].stack_shape, int) for path in paths}
    mean = deviation = np.zeros(5)
    state = controller.init(random_tree(0, ranks))
    update = jax.jit(controller.update)
    sums = []
    for t in range(20):
        old, new, grads = (random_tree(100 * k + t, ranks) for k in (1, 2, 3))
        total = sum(r.sum() for r in ranks.values())
        score = np.array([abs((np.float64(old[p].E[i]) * np.float64(grads[p].E[i])).sum())
                          / np.sqrt(SITES[p].n_in * SITES[p].n_out) for p, i in names])  # fmt: skip
        after = {path: r.copy() for path, r in ranks.items()}
        if total + 2 <= 14:
            mean = 0.85 * mean + 0.15 * score
            deviation = 0.85 * deviation + 0.15 * abs(score - mean)
            if t > 4 and t % 3 == 0:
                best = sorted(range(5), key=lambda k: -(mean * deviation)[k])
                for k in best[:min(2, (14 - total) // 2)]:
                    after[names[k][0]][names[k][1]] += 2
        finished = sum(r.sum() for r in after.values()) + 2 > 14
        result, state = update(grads, old, new, state)
        sums.append(sum(r.sum() for r in after.values()))
        for path, i in names:
            np.testing.assert_array_equal(state.ranks[path], after[path], err_msg=f"step {t}")
            got, was, is_ = (jax.tree.map(lambda x, i=i: np.array(x[i]), tree[path]) for tree in (result, old, new))
            r = ranks[path][i]
            assert got.n == after[path][i] - 1
            np.testing.assert_array_equal(got.A, np.where(np.arange(5) < r + 2, is_.A, was.A))
            np.testing.assert_array_equal(got.B.T, np.where(np.arange(5) < r + 2, is_.B.T, was.B.T))
            held = np.where(np.arange(5) < r, is_.E, was.E)
            np.testing.assert_array_equal(got.E, held * ((np.arange(5) < after[path][i]) | (not finished)))
        ranks = after
    assert sums == [5] * 6 + [9] * 3 + [13] * 11
    assert controller.report(state) == {"ranks_kept": 13}


@pytest.mark.parametrize("favour", ["q", "layers", "v"])
def test_growth_is_over_when_the_run_says_so(favour: str) -> None:
    """There are five matrices for rounds of ten; and of rounds of four, when four are full one is left."""
    for top_h, total, settled in ((10, 9, 7), (4, 13, 13)):
        controller = increlora(ADAPT, total_steps=total, target_rank=5, warmup=0, interval=3, top_h=top_h)
        assert controller.settled == settled
        tree = random_tree(0, {path: np.ones(SITES[path].stack_shape, int) for path in ADAPT.plan})
        grads = jax.tree.map(jnp.ones_like, tree)
        grads[favour] = jax.tree.map(lambda x: 100 * x, grads[favour])
        state, update = controller.init(tree), jax.jit(controller.update)
        for _ in range(settled):
            tree, state = update(grads, tree, tree, state)
        assert controller.report(state) == {"ranks_kept": 25}


def test_training_grows_to_the_budget_and_compacts_to_adalora() -> None:
    trainable, frozen = ADAPT.init(jax.random.key(0), BASE)
    controller = increlora(ADAPT, total_steps=20, target_rank=2.2, warmup=2, interval=3, top_h=1)
    tx = adamw(3e-2, 0.1)
    f = lj.lift(model)
    target = jnp.sin(X @ jnp.ones((8, 7)))
    loss = lambda bound, batch, key: (jnp.mean(jnp.square(f(bound, batch) - target)), {})  # noqa: E731
    step = make_step(loss, ADAPT, tx, controller)
    state = init_state(jax.random.key(1), trainable, tx, controller)
    losses = []
    for _ in range(20):
        state, metrics = step(state, frozen, X)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert controller.report(state.control) == {"ranks_kept": 11}
    reserve = {path: np.arange(5) >= np.array(r)[..., None] for path, r in state.control.ranks.items()}
    for path, gone in reserve.items():
        assert not np.array(state.trainable[path].E)[gone].any()
        idle = np.arange(5) >= np.array(state.control.ranks[path])[..., None] + 2
        assert np.array_equal(np.array(state.trainable[path].B)[idle], np.array(trainable[path].B)[idle])
    small, less = compact(ADAPT, state.trainable)
    assert {type(v).__name__ for v in small.plan.values()} == {"AdaLoRA"}
    assert {p: v.rank for p, v in small.plan.items()} == {p: int(r.max()) for p, r in state.control.ranks.items()}
    out = f(ADAPT.bind(state.trainable, frozen), X)
    np.testing.assert_allclose(f(small.bind(less, frozen), X), out, atol=1e-5)


@pytest.mark.parametrize(("more", "words"), [
    ({"target_rank": 0.5}, r"target_rank=0.5 makes a final budget of 2 ranks for 5 matrices that start with 5 and can"),
    ({"target_rank": 6}, r"a final budget of 30 ranks .* can reach 25: raise the variant's rank, or choose .* in 1..5"),
    ({"target_rank": 5, "top_h": 1}, r"10 rounds of growth, one each 2 steps after 2, end at step 23 of a run of 20"),
    ({"top_h": 0}, r"top_h=0 is below 1"),
])  # fmt: skip
def test_errors(more: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        increlora(ADAPT, total_steps=20, **{"target_rank": 2} | more)


def test_errors_of_the_rules() -> None:
    with pytest.raises(ValueError, match=r"found no IncreLoRA site; the rules made LoRA: give at least one path Incre"):
        increlora(lj.adapt(SITES, [(".*", LoRA(rank=2))]), total_steps=20)
    mixed = lj.adapt(SITES, [("q", VARIANT), ("v", IncreLoRA(rank=5, reserve=1))])
    with pytest.raises(ValueError, match=r"sites with reserves \[1, 2\]: all of them must grow by the same number"):
        increlora(mixed, total_steps=20)
    with pytest.raises(ValueError, match=r"rank=4 must hold initial=2 and reserve=3, both at least 1"):
        IncreLoRA(rank=4, initial=2, reserve=3).check(8, 8)
