"""Sparse LoRA: which entries stay, when they go, that they stay zero, and what reaches the saved adapter."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from controlled import BATCH, PARAMS, Trainer, adapted, loss, noisy, start
from safetensors.numpy import load_file

import lorajax as lj
from lorajax.control import prune, sparse
from lorajax.io import adapter
from lorajax.train.step import make_gradients
from lorajax.variants import DoRA, LoRA
from lorajax.variants.sparse import densities

VARIANT = LoRA(rank=4)
COUNT = 2 * (8 * 4 + 4 * 8) + 8 * 4 + 4 * 6


def arrays(tree: Any) -> dict[str, np.ndarray]:
    """Every matrix of A and B by name, layers of the stack one by one."""
    flat = {}
    for path in ("stack", "wide"):
        for name, x in tree[path]._asdict().items():
            for i, layer in enumerate(np.asarray(x) if path == "stack" else [np.asarray(x)]):
                flat[f"{path}{i}.{name}"] = layer
    return flat


def test_the_largest_scores_stay() -> None:
    adapt, trainable = adapted(VARIANT), start(VARIANT)[0]
    trainable, grads = noisy(trainable), noisy(jax.tree.map(jnp.zeros_like, trainable), 5)
    cases = list(itertools.product(("magnitude", "snip"), ("global", "local"), (0.1, 0.03, 1.0)))
    make = lambda t, g: [prune(adapt, t, d, score=x, scope=y, grads=g) for x, y, d in cases]  # noqa: E731
    values, slopes = arrays(trainable), arrays(grads)
    for (score, scope, density), masks in zip(cases, jax.jit(make)(trainable, grads), strict=True):
        scores = {k: np.abs(x * (slopes[k] if score == "snip" else 1)) for k, x in values.items()}
        if scope == "global":
            scores = {"all": np.concatenate([x.ravel() for x in scores.values()])}
        want = {}
        for name, x in scores.items():
            count = max(1, int(density * x.size))
            want[name] = x >= np.sort(x.ravel())[x.size - count]
            assert want[name].sum() == count
        got = arrays(masks)
        if scope == "global":
            got = {"all": np.concatenate([x.ravel() for x in got.values()])}
        for name, mask in want.items():
            np.testing.assert_array_equal(got[name], mask, err_msg=f"{score} {scope} {density} {name}")


def test_random_scores_are_of_the_seed() -> None:
    adapt, trainable = adapted(VARIANT), start(VARIANT)[0]
    settings = [(0.1, 0), (0.1, 0), (0.1, 1), (0.5, 0)]
    make = lambda t: [prune(adapt, t, density, score="random", seed=seed) for density, seed in settings]  # noqa: E731
    one, two, other, half = jax.jit(make)(trainable)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    assert sum(int(x.sum()) for x in jax.tree.leaves(one)) == int(0.1 * COUNT)
    assert not jax.tree.all(jax.tree.map(np.array_equal, one, other))
    assert min(x.sum() for x in arrays(half).values()) > 4


def test_the_draws_are_those_of_the_state() -> None:
    """Runs of several seeds share a program, whose controller was made with one of them."""
    adapt, trainable = adapted(VARIANT), start(VARIANT)[0]
    one, two = (sparse(adapt, total_steps=4, density=0.25, score="random", start=0.25, seed=n) for n in (0, 1))
    state, tree = two.init(trainable), noisy(trainable)
    found = [jax.jit(c.update)(tree, tree, tree, s)[1].masks
             for c, s in ((one, one.init(trainable)), (one, state), (two, state))]
    assert jax.tree.all(jax.tree.map(np.array_equal, found[1], found[2]))
    assert not jax.tree.all(jax.tree.map(np.array_equal, found[0], found[1]))


@pytest.mark.parametrize("score", ["magnitude", "snip"])
def test_b_at_zero_is_not_pruned_away(score: str) -> None:
    """At the start B's scores are all 0: it keeps its share all the same, by SNIP where its gradient is largest."""
    adapt, trainable = adapted(VARIANT), start(VARIANT)[0]
    grads = noisy(jax.tree.map(jnp.zeros_like, trainable), 5)
    grads |= {path: grads[path]._replace(A=jnp.zeros_like(grads[path].A)) for path in ("stack", "wide")}
    assert not arrays(trainable)["wide0.B"].any()
    got = arrays(jax.jit(lambda t, g: prune(adapt, t, 0.25, score=score, grads=g))(trainable, grads))
    for name, mask in got.items():
        assert mask.sum() == mask.size // 4, name
        if name.endswith("B") and score == "snip":
            slope = np.abs(arrays(grads)[name])
            assert slope[mask].min() > slope[~mask].max()


def test_densities_of_the_stages() -> None:
    np.testing.assert_allclose(densities(0.001, 3), [0.1, 0.01, 0.001])
    np.testing.assert_allclose(densities(0.1, 3, "linear"), [0.7, 0.4, 0.1])
    np.testing.assert_allclose(densities(0.1), [0.1])


@pytest.mark.parametrize(
    ("score", "schedule", "scope"),
    [("random", "exponential", "local"), ("magnitude", "linear", "local"), ("snip", "exponential", "global")],
)
def test_what_is_pruned_stays_zero_under_adam_and_decay(score: str, schedule: str, scope: str) -> None:
    """In stages at steps 2, 4 and 6 of 10; an entry never comes back, what is left moves in every step."""
    settings: Any = {"density": 0.08, "score": score, "scope": scope, "stages": 3, "schedule": schedule}
    trainer = Trainer(VARIANT, lambda a: sparse(a, total_steps=10, start=0.2, stop=0.6, **settings))
    assert trainer.controller.settled == 6
    seen = [arrays(tree) for tree in trainer.run(10)]
    left = [sum(np.count_nonzero(x) for x in step.values()) for step in seen]
    sizes = [COUNT] if scope == "global" else [x.size for x in seen[0].values()]
    linear = [1 - 0.92 / 3, 1 - 1.84 / 3, 0.08]
    stages = linear if schedule == "linear" else [0.08 ** (1 / 3), 0.08 ** (2 / 3), 0.08]
    want = [COUNT, *(sum(int(density * size) for size in sizes) for density in stages)]
    assert left == np.repeat(want, [1, 2, 2, 5]).tolist()
    for before, after in itertools.pairwise(seen):
        for name, x in after.items():
            assert not np.any((x != 0) & (before[name] == 0)), name
    moved = [np.mean(x[x != 0] != seen[-2][name][x != 0]) for name, x in seen[-1].items() if x.any()]
    assert min(moved) == 1
    assert trainer.controller.report(trainer.state.control)["density"] == pytest.approx(want[-1] / COUNT)


@pytest.mark.parametrize("score", ["magnitude", "snip"])
def test_one_shot_before_training(score: str) -> None:
    """The paper's order. SNIP has its gradient after the first step."""
    trainer = Trainer(VARIANT, lambda a: sparse(a, total_steps=4, density=0.1, score=score, start=0.0))
    left = trainer.controller.report(trainer.state.control)["density"]
    assert left == 1 if score == "snip" else left <= 0.1
    first, last = (arrays(tree) for tree in trainer.run(2))
    for name in first:
        np.testing.assert_array_equal(first[name] != 0, last[name] != 0)
    assert np.mean(np.concatenate([x.ravel() != 0 for x in first.values()])) <= 0.1


def test_masks_from_the_gradient_of_a_batch_before_training() -> None:
    """`make_gradients` -> `prune` -> `sparse(masks=...)`: SNIP in the paper's order, before any step."""
    trainer = Trainer(VARIANT, lambda a: sparse(a, total_steps=4, density=0.1))
    found = jax.jit(make_gradients(loss, trainer.adapt))(trainer.state, trainer.frozen, BATCH)
    masks = prune(trainer.adapt, trainer.state.trainable, 0.1, grads=found.grads)
    values, slopes = arrays(trainer.state.trainable), arrays(found.grads)
    everything = {name: np.abs(x * slopes[name]) for name, x in values.items()}
    kept = np.concatenate([everything[name][mask] for name, mask in arrays(masks).items()])
    gone = np.concatenate([everything[name][~mask] for name, mask in arrays(masks).items()])
    assert kept.min() > gone.max()
    trainer = Trainer(VARIANT, lambda a: sparse(a, total_steps=4, masks=masks))
    assert trainer.controller.settled == 0
    last = arrays(trainer.run(3)[-1])
    for name, mask in arrays(masks).items():
        np.testing.assert_array_equal(last[name] != 0, mask)


def test_zeros_neither_act_nor_get_gradient_before_the_first_update() -> None:
    trainer = Trainer(VARIANT, lambda a: sparse(a, total_steps=4, density=0.1, score="random", start=0.0))
    masks = trainer.controller.masks(trainer.state.control)
    merged = trainer.adapt.merge(trainer.state.trainable, trainer.frozen, masks=masks)
    a, b = (np.float64(x) * np.asarray(m) for x, m in zip(trainer.state.trainable["wide"], masks["wide"], strict=True))
    np.testing.assert_allclose(merged["wide"], PARAMS["wide"] + VARIANT.scale * a @ b, rtol=1e-5, atol=1e-5)
    found = jax.jit(make_gradients(loss, trainer.adapt, trainer.controller))(trainer.state, trainer.frozen, BATCH)
    for name, mask in arrays(masks).items():
        assert not arrays(found.grads)[name][~mask].any()


def test_the_saved_adapter_is_as_sparse(tmp_path: Any) -> None:
    trainer = Trainer(VARIANT, lambda a: sparse(a, total_steps=5, density=0.05, start=0.3), optax.adamw(0.1))
    trainer.run(5)
    folder = adapter.save(tmp_path / "adapter", trainer.adapt, trainer.state.trainable, trainer.frozen)
    saved = {name: x for name, x in load_file(folder / adapter.OWN).items() if "head" not in name}
    assert sum(x.size for x in saved.values()) == COUNT
    assert 0.04 * COUNT < sum(np.count_nonzero(x) for x in saved.values()) <= 0.05 * COUNT


def test_any_variant_with_factors() -> None:
    """DoRA's magnitude is not pruned."""
    trainer = Trainer(DoRA(LoRA(rank=4)), lambda a: sparse(a, total_steps=3, density=0.1, score="magnitude", start=0.0))
    last = trainer.run(2)[-1]
    assert np.mean(last["stack"].A != 0) < 0.5
    assert np.all(last["stack"].magnitude != 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"density": 0.0}, r"density=0\.0 is outside \(0, 1\]"),
        ({"score": "grasp"}, "score='grasp'.*the scores are random, magnitude, snip"),
        ({"scope": "layer"}, "scope='layer'.*the scopes global, local"),
        ({"stages": 0}, "stages=0"),
        ({"schedule": "cubic"}, "schedule='cubic'.*exponential, linear"),
        ({"stages": 2, "start": 0.5, "stop": 0.5}, r"start=0\.5 and stop=0\.5 are shares of the run"),
    ],
)
def test_settings_that_cannot_be_met(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sparse(adapted(VARIANT), total_steps=10, **settings)


def test_nothing_to_prune_and_no_gradient() -> None:
    full = lj.adapt(adapted(VARIANT).sites, [(".*", lj.Full())])
    with pytest.raises(ValueError, match=r"nothing to prune: the rules made Full.*LoRA\(\.\.\.\)"):
        sparse(full, total_steps=10)
    adapt, trainable = adapted(VARIANT), start(VARIANT)[0]
    with pytest.raises(ValueError, match="score='snip' multiplies parameters by gradients: give grads"):
        prune(adapt, trainable)
