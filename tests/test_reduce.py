"""Rank schedules: ranks fall by the table, the weakest components go, and what has gone neither acts nor moves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorajax as lj
from lorajax.control import budget_schedule, reduce
from lorajax.optim import adamw, freeze_ranks
from lorajax.train.step import init_state, make_step
from lorajax.variants import LoRA

WEIGHTS = {"q": (8, 6), "layers": (2, 6, 6)}


def model(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ p["q"], p["layers"])[0]


rng = np.random.default_rng(0)
BASE = {name: jnp.float32(rng.normal(size=shape)) / 2 for name, shape in WEIGHTS.items()}
X = jnp.float32(rng.normal(size=(16, 8)))
SITES = lj.sites(model, BASE, X)
ADAPT = lj.adapt(SITES, [(".*", LoRA(rank=6))])


@pytest.mark.parametrize("by", ["magnitude", "last"])
def test_ranks_fall_by_the_table_and_what_is_gone_stays_still(by: str) -> None:
    total = 20
    trainable, frozen = ADAPT.init(jax.random.key(0), BASE)
    controller = reduce(ADAPT, total_steps=total, final={"q": 2, "layers": 1}, t_initial=2, t_final=8, by=by)
    assert controller.settled == 12
    tx = optax.chain(adamw(3e-2, 0.1), freeze_ranks(ADAPT.plan))
    f = lj.lift(model)
    target = jnp.sin(X @ jnp.ones((8, 6)))
    step = make_step(lambda bound, batch, key: (jnp.mean(jnp.square(f(bound, batch["x"]) - target)), {}), ADAPT, tx,
                     controller, clip=None)
    state = init_state(jax.random.key(1), trainable, tx, controller)
    tables = {path: budget_schedule(total, 2, 8, 6, final) for path, final in (("q", 2), ("layers", 1))}
    gone = {path: np.zeros(k.shape, bool) for path, k in state.control.kept.items()}
    for t in range(1, total + 1):
        before = jax.tree.map(np.array, state.trainable)
        state, _ = step(state, frozen, {"x": X})
        for path, kept in state.control.kept.items():
            kept = np.array(kept)
            assert set(kept.sum(-1).ravel()) == {tables[path][t]}
            assert not (kept & gone[path]).any()  # never back
            now = state.trainable[path]
            assert not np.array(now.B)[~kept].any()
            went = np.swapaxes(np.array(now.A) == before[path].A, -1, -2).all(-1)
            assert went[gone[path]].all()  # neither momentum nor decay moves them
            if by == "last":
                assert all((row == (np.arange(6) < row.sum())).all() for row in kept.reshape(-1, 6))
            gone[path] = ~kept
    assert [kept.sum(-1).ravel().tolist() for kept in (state.control.kept["q"], state.control.kept["layers"])] == [
        [2], [1, 1]]
    assert controller.report(state.control) == {"ranks_kept": 4}
    masked = ADAPT.bind(state.trainable, frozen, masks=controller.masks(state.control))
    np.testing.assert_array_equal(f(masked, X), f(ADAPT.bind(state.trainable, frozen), X))


def test_the_weakest_components_go() -> None:
    trainable, _ = ADAPT.init(jax.random.key(0), BASE)
    filled = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), trainable)
    controller = reduce(ADAPT, total_steps=2, final=2, t_initial=0, t_final=0)
    state = controller.init(filled)
    _, state = controller.update(None, None, filled, state)
    new, state = controller.update(None, None, filled, state)
    for path in WEIGHTS:
        a, b = np.float64(filled[path].A), np.float64(filled[path].B)
        weights = np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-1)
        expected = weights >= np.sort(weights, -1)[..., -2:-1]
        np.testing.assert_array_equal(state.kept[path], expected)
        np.testing.assert_array_equal(new[path].B, np.where(expected[..., None], filled[path].B, 0))
        np.testing.assert_array_equal(new[path].A, filled[path].A)


@pytest.mark.parametrize(("more", "words"), [
    ({"final": 7}, r"layers: final rank 7 is outside 1..6, the rank it starts with"),
    ({"final": {"q": 0}}, r"q: final rank 0 is outside 1..6"),
    ({"final": {"v": 2}}, r"final names \['v'\], which are no LoRA sites; those are: layers, q"),
    ({"final": {}}, r"no site to reduce"),
    ({"final": 2, "by": "first"}, r"by='first' is unknown; there are 'magnitude' and 'last'"),
    ({"final": 2, "t_final": 20}, r"total_steps=20 leaves no step for pruning"),
])  # fmt: skip
def test_errors(more: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reduce(ADAPT, total_steps=20, **more)
