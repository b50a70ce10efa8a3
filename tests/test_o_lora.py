"""O-LoRA against NumPy: the penalty, the sum of all adapters, and what training makes of the overlap."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from core.case import normal
from jax import lax

import lorajax as lj
from lorajax.train.step import init_state, make_step
from lorajax.variants import AdaLoRA, DoRA, LoHa, LoRA
from lorajax.variants.o_lora import After, Earlier, after

PARAMS = {"u": normal(6, 8), "stack": normal(3, 8, 8, scale=0.4), "head": normal(8, 2)}
X = normal(5, 6)


def fn(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ p["u"], p["stack"])[0] @ p["head"]


SITES = lj.sites(fn, PARAMS, X)


def task(seed: int, variant: Any) -> Earlier:
    """A trained adapter: noise in every array, and a head of its own."""
    adapt = lj.adapt(SITES, [("u|stack", variant), ("head", lj.Full())])
    trainable, frozen = adapt.init(jax.random.key(seed), PARAMS)
    loud = lambda path, t: jax.tree.map(lambda x: normal(*x.shape, seed=seed + len(path), scale=0.4), t)  # noqa: E731
    return Earlier(adapt, {path: loud(path, t) for path, t in trainable.items()}, frozen)


ONE, TWO, NEW = task(1, LoRA(rank=2)), task(20, LoRA(rank=3, alpha=5.0)), task(40, LoRA(rank=2))
JOINED = after(NEW.adapt, [ONE, TWO])


def delta(old: Earlier, path: str) -> Any:
    a, b = (np.float64(x) for x in old.trainable[path])
    return old.adapt.plan[path].scale * a @ b  # type: ignore[union-attr]


def test_penalty_is_the_sum_of_absolute_entries_over_layers_and_earlier_adapters() -> None:
    want = 0.0
    for old in (ONE, TWO):
        for path in ("u", "stack"):
            a_old, a_new = np.float64(old.trainable[path].A), np.float64(NEW.trainable[path].A)
            pairs = zip(*(a.reshape(-1, *a.shape[-2:]) for a in (a_old, a_new)), strict=True)
            for one, new in pairs:
                want += 0.5 * np.abs(one.T @ new).sum()
    assert want > 1
    np.testing.assert_allclose(JOINED.penalty(NEW.trainable), want, rtol=1e-5)
    norms = sum(np.linalg.norm(m) for path in ("u", "stack") for x in NEW.trainable[path]
                for m in np.asarray(x).reshape(-1, *x.shape[-2:]))
    both = after(NEW.adapt, [ONE, TWO], l2=0.3).penalty(NEW.trainable)
    np.testing.assert_allclose(both, want + 0.3 * norms, rtol=1e-5)
    start, _ = NEW.adapt.init(jax.random.key(0), PARAMS)
    grads = jax.grad(after(NEW.adapt, [ONE], l2=0.3).penalty)(start)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(grads["u"].A - 0.3 * start["u"].A / jnp.linalg.norm(start["u"].A),
                               0.5 * ONE.trainable["u"].A @ jnp.sign(ONE.trainable["u"].A.T @ start["u"].A), atol=1e-5)


def test_all_adapters_are_summed_and_the_new_head_is_used() -> None:
    bound = jax.jit(JOINED.bind)(NEW.trainable, NEW.frozen)
    params = {path: np.float64(w) + sum(delta(t, path) for t in (ONE, TWO, NEW)) for path, w in PARAMS.items()
              if path != "head"} | {"head": NEW.trainable["head"].w}
    params = {path: jnp.float32(w) for path, w in params.items()}
    np.testing.assert_allclose(lj.lift(fn, strict=True)(bound, X), fn(params, X), rtol=1e-4, atol=1e-4)
    merged = JOINED.merge(NEW.trainable, NEW.frozen)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5), merged, params)
    third = after(task(60, LoRA(rank=2)).adapt, [ONE, Earlier(JOINED, NEW.trainable, NEW.frozen)])
    silent, frozen = third.init(jax.random.key(0), PARAMS)  # B = 0: the sum of the first and the second, once each
    np.testing.assert_allclose(third.merge(silent, frozen)["u"], PARAMS["u"] + delta(ONE, "u") + delta(NEW, "u"),
                               rtol=1e-4, atol=1e-5)


def test_a_training_step_lowers_the_overlap() -> None:
    """Through the library's own step, with a strong penalty; without one the overlap stays where it was."""
    y = normal(5, 2, seed=9)

    def loss(bound: Any, batch: Any, key: jax.Array) -> Any:
        return jnp.mean(jnp.square(lj.lift(fn)(bound, batch) - y)), {}

    overlaps = []
    for weight in (0.0, 0.5):
        adapt = after(NEW.adapt, [ONE], orth=weight)
        trainable, frozen = adapt.init(jax.random.key(0), PARAMS)
        tx = optax.adam(1e-2)
        state, step = init_state(jax.random.key(1), trainable, tx), make_step(loss, adapt, tx)
        for _ in range(60):
            state, metrics = step(state, frozen, X)
        assert bool(metrics["finite"])
        overlaps.append(float(after(NEW.adapt, [ONE], orth=1.0).penalty(state.trainable)))
    assert overlaps[1] < 0.2 * overlaps[0]


@pytest.mark.parametrize("variant", [DoRA(LoRA(rank=2)), AdaLoRA(rank=2)])
def test_other_variants_with_an_a(variant: Any) -> None:
    joined = after(NEW.adapt, [task(5, variant)])
    assert isinstance(joined, After)
    assert float(joined.penalty(NEW.trainable)) > 0.1


def test_errors() -> None:
    other = lj.adapt(lj.sites(lambda p, x: x @ p["u"], {"u": PARAMS["u"]}, X), [("u", LoRA(rank=2))])
    elsewhere = Earlier(other, *other.init(jax.random.key(0), {"u": PARAMS["u"]}))
    with pytest.raises(ValueError, match=r"earlier\[0\] belongs to a model with other weights"):
        after(NEW.adapt, [elsewhere])
    with pytest.raises(ValueError, match=r"earlier\[1\] has no A.*adapts head, stack, u.*orth=0"):
        after(NEW.adapt, [ONE, task(3, LoHa(rank=2))])
    after(NEW.adapt, [task(3, LoHa(rank=2))], orth=0.0)
    with pytest.raises(ValueError, match=r"earlier\[0\] changed the weight 'stack'.*convert it"):
        after(NEW.adapt, [task(3, LoRA(rank=2, initializer="pissa", fold=True))])
