"""SoRA: the gate, its optimizer, the proximal step and its schedule, and the plain LoRA that is left."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from controlled import BATCH, PARAMS, Trainer, adapted, fn, noisy, start

from lorajax import optim
from lorajax.control import compact, sora
from lorajax.control.sora import official, soft, spaced
from lorajax.variants import LoRA, SoRA
from lorajax.variants.sora import SoRAAdapter

V = jnp.float32([-0.25, -0.15, -0.05, 0.05, 0.15, 0.25])


def test_proximal_step_of_the_worked_example() -> None:
    np.testing.assert_allclose(soft(V, 0.1), [-0.15, -0.05, 0, 0, 0.05, 0.15], atol=1e-7)
    np.testing.assert_allclose(official(V, 0.1), [-0.15, 0, 0, 0, 0, 0.15], atol=1e-7)
    for prox in (soft, official):
        np.testing.assert_array_equal(prox(V, 0.0), V)


def test_delta_and_start() -> None:
    rng = np.random.default_rng(0)
    a, g, b = rng.normal(size=(12, 3)), rng.normal(size=3), rng.normal(size=(3, 8))
    adapter = SoRAAdapter(*(jnp.float32(x) for x in (a, g, b)))
    delta = SoRA(rank=3, alpha=6.0).delta(adapter, jnp.zeros((12, 8)))
    np.testing.assert_allclose(delta, 6.0 / 3 * a @ np.diag(g) @ b, rtol=1e-4, atol=1e-5)
    start, _ = SoRA(rank=600).init(jax.random.key(0), jnp.zeros((768, 600)))
    assert 0.97 < float(jnp.abs(start.A).max()) * np.sqrt(768) <= 1
    np.testing.assert_allclose([np.mean(start.g), np.std(start.g)], [0, 1], atol=0.1)  # 600 draws: deviation 0.04
    assert not start.B.any()


def test_penalty_is_the_mean_over_all_gates() -> None:
    adapt = adapted(SoRA(rank=4, l1=0.3))
    trainable = noisy(start(SoRA(rank=4, l1=0.3))[0])
    gates = np.concatenate([np.abs(trainable[path].g).ravel() for path in ("stack", "wide")])
    np.testing.assert_allclose(adapt.penalty(trainable), 0.3 * gates.mean(), rtol=1e-5)


@pytest.mark.parametrize(("settings", "times_lr"), [({}, True), ({"times_lr": False, "prox": "official"}, False)])
def test_a_run_is_the_numpy_recursion(settings: Any, times_lr: bool) -> None:
    """Gates: Adam without decay at its own rate, then the threshold, which rises with the levels; in float64."""
    rate = lambda step: 0.05 / (1 + step)  # noqa: E731
    levels = [1.0, 4.0, 8.0] if times_lr else [0.01, 0.1, 0.2]
    make = lambda a: sora(a, total_steps=8, learning_rate=rate, threshold=levels, first=0.5, **settings)  # noqa: E731
    adapt = adapted(SoRA(rank=4))
    controller, tx = make(adapt), optim.sora(rate, adapt=adapt, gate_ratio=2.0, weight_decay=0.3)
    assert controller.settled == 7  # the last level begins with the update behind step 6
    trainable = noisy(start(SoRA(rank=4))[0])
    state, opt = controller.init(trainable), tx.init(trainable)
    g = np.float64(trainable["stack"].g)
    m, v, zeros = np.zeros_like(g), np.zeros_like(g), []

    @jax.jit
    def step(grads: Any, trainable: Any, opt: Any, state: Any) -> Any:
        updates, opt = tx.update(grads, opt, trainable)
        new, state = controller.update(grads, trainable, optax.apply_updates(trainable, updates), state)
        return new, opt, state

    for t in range(8):
        grads = noisy(jax.tree.map(jnp.zeros_like, trainable), t)
        d = np.float64(grads["stack"].g)
        m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d**2
        g = g - 2 * rate(t) * m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-6)
        xi = levels[0 if t < 4 else 1 if t < 6 else 2] * (rate(t) if times_lr else 1)
        if times_lr:
            g = np.sign(g) * np.maximum(np.abs(g) - xi, 0)
        else:
            g = np.where(np.abs(g) > xi, g - np.sign(g) * xi, g)
            g = np.where(np.abs(g) < xi, 0, g)
        with jax.numpy_dtype_promotion("standard"):
            trainable, opt, state = step(grads, trainable, opt, state)
        np.testing.assert_allclose(trainable["stack"].g, g, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.threshold, xi, rtol=1e-6)
        np.testing.assert_array_equal(state.left["stack"], (g != 0).sum(-1))
        zeros.append(int((g == 0).sum()))
    assert zeros[0] == 0 or not times_lr
    assert 0 < zeros[-1] < 8
    left = sum(int((np.asarray(trainable[path].g) != 0).sum()) for path in ("stack", "wide"))
    assert controller.report(state) == {"ranks_kept": left, "threshold": pytest.approx(xi)}


def test_factors_and_head_have_adamw_with_decay() -> None:
    adapt = adapted(SoRA(rank=4))
    trainable = noisy(start(SoRA(rank=4))[0])
    grads = noisy(jax.tree.map(jnp.zeros_like, trainable), 2)
    with jax.numpy_dtype_promotion("standard"):
        ours, plain = (jax.jit(lambda g, p, tx=tx: tx.update(g, tx.init(p), p)[0])(grads, trainable)
                       for tx in (optim.sora(0.1, adapt=adapt, weight_decay=0.2), optax.adamw(0.1, weight_decay=0.2)))
    for path, adapter in plain.items():
        for name, want in adapter._asdict().items():
            same = np.allclose(getattr(ours[path], name), want, rtol=1e-6)
            assert same == (name != "g"), f"{path} {name}"


def test_spacings() -> None:
    np.testing.assert_allclose(spaced(0.0, 6.0, 3), [0, 3, 6])
    np.testing.assert_allclose(np.diff(np.exp(spaced(0.5, 2.0, 5, "log_linear"))), (np.e**2 - np.e**0.5) / 4)
    np.testing.assert_allclose(spaced(1e-4, 1e-2, 3, "exp_linear"), [1e-4, 1e-3, 1e-2])


def test_compact_leaves_plain_lora_with_the_same_output() -> None:
    adapt = adapted(SoRA(rank=4, alpha=3.0, dropout=0.1))
    trainable, frozen = start(SoRA(rank=4, alpha=3.0, dropout=0.1))
    trainable = noisy(trainable)
    gates = {"stack": [[0, 2, 0, -1], [0, 0, 0, 0.5]], "wide": [0, 0, 3, 0]}
    trainable |= {path: trainable[path]._replace(g=jnp.float32(g)) for path, g in gates.items()}
    small, shrunk = compact(adapt, trainable)
    assert small.plan["stack"] == LoRA(rank=2, alpha=1.5, dropout=0.1)
    assert small.plan["wide"] == LoRA(rank=1, alpha=0.75, dropout=0.1)
    assert shrunk["stack"].A.shape == (2, 8, 2)
    got, want = small.merge(shrunk, frozen), adapt.merge(trainable, frozen)
    for path in ("stack", "wide"):
        a, g, b = (np.float64(x) for x in trainable[path])
        np.testing.assert_allclose(want[path], PARAMS[path] + 3.0 / 4 * (a * g[..., None, :]) @ b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got[path], want[path], rtol=1e-5, atol=1e-6)
    trainable["wide"] = trainable["wide"]._replace(g=jnp.zeros(4))
    assert set(compact(adapt, trainable)[0].plan) == {"stack", "head"}


def test_it_fits_with_half_of_the_ranks() -> None:
    rate = 0.02
    make = lambda a: sora(a, total_steps=120, learning_rate=rate, threshold=0.5)  # noqa: E731
    trainer = Trainer(SoRA(rank=4), make, optim.sora(rate, adapt=adapted(SoRA(rank=4))))
    before = float(jnp.mean(jnp.square(fn(PARAMS, BATCH["x"]) - BATCH["y"])))
    trainer.run(120)
    small, shrunk = compact(trainer.adapt, trainer.state.trainable)
    after = float(jnp.mean(jnp.square(fn(small.merge(shrunk, trainer.frozen), BATCH["x"]) - BATCH["y"])))
    assert trainer.controller.report(trainer.state.control)["ranks_kept"] < 12
    assert after < 0.3 * before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prox": "hard"}, "prox='hard' is unknown; there are soft, official"),
        ({"threshold": (0.1, -0.1)}, "none negative"),
        ({"first": 1.5}, r"first=1\.5.*share of the run in 0\.\.1"),
        ({"threshold": 2.0, "levels": 3}, r"threshold=2\.0 and max_threshold=0\.0: a schedule of levels=3 rises"),
        ({"threshold": 0, "levels": 3, "max_threshold": 1, "spacing": "exp_linear"}, "threshold=0 has no logarithm"),
        ({"levels": 3, "max_threshold": 2, "spacing": "cubic"}, "spacing='cubic' is unknown; there are linear, log_"),
    ],
)
def test_settings_that_cannot_be_met(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sora(adapted(SoRA(rank=4)), total_steps=10, **settings)


def test_without_a_gate_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no SoRA site; the rules made Full, LoRA.*control\.identity"):
        sora(adapted(LoRA(rank=4)), total_steps=10)
    with pytest.raises(ValueError, match=r"no array is labelled 'gate'; there are \['a', 'b', 'full'\].*adamw"):
        optim.sora(0.1, adapt=adapted(LoRA(rank=4)))
