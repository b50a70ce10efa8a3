"""DyLoRA: the scale at every rank, what a step trains and moves, the draws, and the smaller adapters it leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from controlled import BATCH, PARAMS, Trainer, adapted, fn, noisy, start

import lorajax as lj
from lorajax.control import dylora, rank_masks, truncate
from lorajax.variants import AdaLoRA, LoRA
from lorajax.variants.dylora import component_scale


def drawn(controller: Any, state: Any) -> int:
    """b of the coming step: how many components act, less one."""
    return int((controller.masks(state)["wide"].on != 0).sum()) - 1


def test_effective_scale_of_the_worked_example() -> None:
    variant = LoRA(rank=8, alpha=16.0)
    effective = variant.scale * component_scale(variant) ** 2
    np.testing.assert_allclose(effective[[0, 3, 7]], [16, 4, 2], rtol=1e-6)
    stable = LoRA(rank=8, alpha=16.0, rslora=True)
    np.testing.assert_allclose(stable.scale * component_scale(stable) ** 2, 16 / np.sqrt(np.arange(1, 9)), rtol=1e-6)


def test_every_rank_is_a_lora_of_that_rank_in_one_compile() -> None:
    """Masked, merged and truncated, per layer of a stack, against x (W + alpha/k A[:, :k] B[:k]) in numpy."""
    variant = LoRA(rank=4, alpha=3.0, initializer="orthogonal")  # which could not start at an odd rank
    adapt, (trainable, frozen) = adapted(variant), start(variant)
    trainable = noisy(trainable)
    traces = []

    @jax.jit
    def run(masks: Any) -> jax.Array:
        traces.append(1)
        return lj.lift(fn)(adapt.bind(trainable, frozen, masks=masks), BATCH["x"])

    for k in range(1, 5):
        params = {"head": np.float64(trainable["head"].w)}
        for path in ("stack", "wide"):
            a, b = (np.float64(x) for x in trainable[path])
            params[path] = PARAMS[path] + 3.0 / k * a[..., :k] @ b[..., :k, :]
        x = np.float64(BATCH["x"])
        for w in params["stack"]:
            x = x + np.tanh(x @ w)
        want = np.tanh(x @ params["wide"]) @ params["head"]
        masks = rank_masks(adapt, k)
        np.testing.assert_allclose(run(masks), want, rtol=1e-4, atol=1e-4)
        merged = adapt.merge(trainable, frozen, masks=masks)
        small, cut = truncate(adapt, trainable, k)
        assert small.plan["wide"] == LoRA(rank=k, alpha=3.0)
        assert cut["stack"].A.shape == (2, 8, k)
        for path in params:
            np.testing.assert_allclose(merged[path], params[path], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(small.merge(cut, frozen)[path], params[path], rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_of_a_step(frozen: bool) -> None:
    """y = x W on squares, in numpy: only component b (frozen) or 0..b learn, through the scaled factors."""
    rng = np.random.default_rng(0)
    w, a, b, x = (rng.normal(size=shape) for shape in ((5, 3), (5, 3), (3, 3), (7, 5)))
    params = {"w": jnp.float32(w)}
    adapt = lj.adapt(lj.sites(lambda p, x: x @ p["w"], params, jnp.float32(x)), [("w", LoRA(rank=3, alpha=2.0))])
    trainable, rest = adapt.init(jax.random.key(0), params)
    trainable = {"w": trainable["w"]._replace(A=jnp.float32(a), B=jnp.float32(b))}
    controller = dylora(adapt, frozen=frozen)

    @jax.jit
    def gradient(state: Any) -> Any:
        bound = lambda t: adapt.bind(t, rest, masks=controller.masks(state))["w"]  # noqa: E731
        return jax.grad(lambda t: jnp.sum(jnp.square(lj.lift(jnp.dot)(jnp.float32(x), bound(t)))) / 2)(trainable)["w"]

    state, seen = controller.init(trainable), set()
    for step in range(12):
        at = state._replace(step=jnp.int32(step))
        top = int((controller.masks(at)["w"].on != 0).sum())
        g = x.T @ (x @ (w + 2.0 / top * a[:, :top] @ b[:top]))
        learns = np.isin(np.arange(3), [top - 1] if frozen else range(top))
        got = gradient(at)
        np.testing.assert_allclose(got.A, 2.0 / top * g @ b.T * learns, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got.B, 2.0 / top * a.T @ g * learns[:, None], rtol=1e-4, atol=1e-4)
        seen.add(top)
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_moves_under_adam_and_decay(frozen: bool, strict: bool) -> None:
    """Strict: exactly what learns, at every site. Otherwise everything does, as in the released code."""
    trainer = Trainer(LoRA(rank=4), lambda a: dylora(a, frozen=frozen, strict=strict, seed=1))
    before, seen = jax.tree.map(np.array, trainer.state.trainable), set()
    for _ in range(7):
        b = drawn(trainer.controller, trainer.state.control)
        (after,) = trainer.run(1)
        learns = np.isin(np.arange(4), [b] if frozen else range(b + 1)) | (not strict)
        for path in ("stack", "wide"):
            np.testing.assert_array_equal(np.any(after[path].A != before[path].A, axis=-2), learns | np.zeros_like(
                after[path].A[..., 0, :], bool))
            np.testing.assert_array_equal(np.all(after[path].B != before[path].B, axis=-1), learns | np.zeros_like(
                after[path].B[..., 0], bool))
        assert np.all(after["head"].w != before["head"].w)
        before = after
        seen.add(b)
    assert len(seen) > 2


def test_strict_does_not_need_a_masking_optimizer() -> None:
    """The controller itself undoes what momentum and decay moved."""
    adapt = adapted(LoRA(rank=4))
    controller = dylora(adapt)
    old = noisy(start(LoRA(rank=4))[0])
    new, _ = controller.update(None, old, noisy(old, 2), controller.init(old))
    assert int((np.asarray(new["wide"].A) != old["wide"].A).any(0).sum()) == 1


def test_one_rank_for_all_sites_by_the_given_probabilities() -> None:
    adapt = adapted(LoRA(rank=4))

    def draws(**settings: Any) -> np.ndarray:
        controller = dylora(adapt, **settings)
        start = controller.init({})
        masks = jax.jit(jax.vmap(lambda t: controller.masks(start._replace(step=t))))(jnp.arange(4000))
        ranks = [(np.asarray(m.on) != 0).sum(-1) for m in masks.values()]
        assert np.array_equal(ranks[0], np.broadcast_to(ranks[1][:, None], ranks[0].shape))  # both layers, both sites
        return ranks[1]

    uniform = draws()
    np.testing.assert_allclose(np.bincount(uniform, minlength=5)[1:] / 4000, 0.25, atol=0.03)  # deviation 0.007
    skewed = np.bincount(draws(probabilities=(1, 0, 0, 3)), minlength=5)[1:] / 4000
    np.testing.assert_allclose(skewed, [0.25, 0, 0, 0.75], atol=0.03)
    assert np.array_equal(draws(), uniform)
    assert 0.6 < np.mean(draws(seed=1) != uniform) < 0.9


def test_views_are_the_ranks() -> None:
    adapt = adapted(LoRA(rank=4))
    for ranks, names in (((), ["rank_1", "rank_2", "rank_3", "rank_4"]), ((1, 3), ["rank_1", "rank_3"])):
        controller = dylora(adapt, ranks=ranks)
        views = controller.views(controller.init({}))
        assert list(views) == names
        assert [int((m["wide"] != 0).sum()) for m in views.values()] == [int(name[-1]) for name in names]


def test_one_training_is_of_use_at_every_rank() -> None:
    """Each rank fits far better than none."""

    def fit(trainer: Any, masks: Any) -> float:
        bound = trainer.adapt.bind(trainer.state.trainable, trainer.frozen, masks=masks)
        return float(jnp.mean(jnp.square(lj.lift(fn)(bound, BATCH["x"]) - BATCH["y"])))

    trainer = Trainer(LoRA(rank=4), dylora, optax.adam(0.02))
    none = fit(trainer, {path: m * 0 for path, m in rank_masks(trainer.adapt, 4).items()})
    trainer.run(150)
    losses = [fit(trainer, rank_masks(trainer.adapt, k)) for k in range(1, 5)]
    assert max(losses) < 0.5 * none


@pytest.mark.parametrize(
    ("variant", "settings", "words"),
    [
        (LoRA(rank=4), {"probabilities": (1, 2)}, r"=\(1, 2\) must be 4 numbers, one for each rank 1\.\.4"),
        (LoRA(rank=4), {"probabilities": (0, 0, 0, 0)}, "not all 0"),
        (LoRA(rank=4), {"ranks": (0, 4)}, r"rank=0 is outside 1\.\.4"),
        (LoRA(rank=4, initializer="pissa"), {}, r"stack: a LoRA .* A, B, A0, B0, whose parts are no smaller adapters"),
        (AdaLoRA(rank=4), {}, r"found no LoRA site; the rules made AdaLoRA, Full.*control\.identity"),
    ],
)
def test_settings_that_cannot_be_met(variant: Any, settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dylora(adapted(variant), **settings)


def test_sites_of_unlike_ranks_are_refused() -> None:
    adapt = lj.adapt(lj.sites(fn, PARAMS, BATCH["x"]), [("wide", LoRA(rank=2)), ("stack", LoRA(rank=4))])
    with pytest.raises(ValueError, match=r"one rank for all sites.*ranks \[2, 4\]: give all sites one rank"):
        dylora(adapt)
    with pytest.raises(ValueError, match=r"rank=5 is outside 1\.\.4"):
        truncate(adapted(LoRA(rank=4)), {}, 5)
