"""Every way of composing against a derivation in NumPy, on dense updates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composing import EVERYWHERE, ONE, PARAMS, TWO, matrices, trained, updates

from lorajax import compose
from lorajax.compose.gathered import Part
from lorajax.compose.trim import of_model
from lorajax.variants import DoRA, LoRA

PATHS = EVERYWHERE.split("|")
THREE = trained(3, [("conv|head", LoRA(rank=2))])
DENSE = [{path: matrices(path, x) for path, x in updates(one).items() if path in one.adapt.plan}
         for one in (ONE, TWO, THREE)]  # fmt: skip


def close(have: Any, want: Any, **options: Any) -> None:
    np.testing.assert_allclose(have, want, **{"rtol": 1e-4, "atol": 5e-5} | options)


def made(method: compose.Method, **options: Any) -> dict[str, np.ndarray]:
    found = compose.compose([ONE, TWO, THREE], method, measure=False, **options)
    return {path: matrices(path, x) for path, x in updates(found).items() if path in PATHS}


def ties(vectors: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """Algorithm 1 of the paper on flattened task vectors."""
    trimmed = []
    for v, w in zip(vectors, weights, strict=True):
        k = int(density * np.count_nonzero(np.isfinite(v)))  # entries of sites that the task has not adapted are NaN
        size = np.nan_to_num(np.abs(v), nan=-1)
        trimmed.append(w * np.where(size >= np.sort(size)[len(v) - k], np.nan_to_num(v), 0))
    t = np.stack(trimmed)
    sign = np.sign(t.sum(0))
    sign[sign == 0] = np.sign(np.sign(t.sum(0)).sum())
    out = np.zeros(t.shape[1])
    for j in range(t.shape[1]):
        agree = [x for x in t[:, j] if x != 0 and np.sign(x) == sign[j]]
        out[j] = np.mean(agree) if agree else 0
    return out


def flat(one: dict[str, np.ndarray]) -> np.ndarray:
    like = {path: DENSE[0][path] for path in PATHS}
    return np.concatenate([one.get(path, np.full_like(like[path], np.nan)).ravel() for path in PATHS])


def test_ties_oracle() -> None:
    taus = np.float32([[[1, -2, 0.1, 0.5]], [[-0.5, -1, 0.2, -0.6]]])
    part = Part("w", 0, (0, 1), np.ones(2, np.float32), (), None, taus)
    for scope in ("matrix", "model"):
        method = compose.TIES(density=0.75, scope=scope)
        close(method.compose(part, method.survey(lambda: iter([part]), 2)), [[1, -1.5, 0, -0.6]])
    tie = part._replace(taus=np.float32([[[1, 1, 2]], [[-1, 3, 2]]]))  # the sum of the first is 0: the majority decides
    close(compose.TIES(density=1.0, scope="matrix").compose(tie, None), [[1, 2, 2]])


@pytest.mark.parametrize("density", [0.2, 0.63])
def test_ties_trims_the_whole_model(density: float) -> None:
    w = [0.7, -0.5, 1.2]
    have = made(compose.TIES(density, lam=0.8), weights=w)
    close(flat(have), 0.8 * ties([flat(one) for one in DENSE], w, density))
    other = made(compose.TIES(density, scope="matrix"), weights=w)
    whole = np.concatenate([np.concatenate([
        ties([one[path][i].ravel() for one in DENSE if path in one],
             [w[t] for t in range(3) if path in DENSE[t]], density)
        for i in range(len(DENSE[0][path]))]) for path in PATHS])
    close(flat(other), whole)
    assert np.abs(flat(have) - 0.8 * whole).max() > 0.01


def test_thresholds_of_a_model_are_exact() -> None:
    rng = np.random.default_rng(0)
    chunks = [rng.normal(size=(2, 5, 7)).astype(np.float32) * 10.0 ** rng.integers(-6, 3) for _ in range(9)]
    chunks.append(np.zeros((2, 3, 3), np.float32))

    def stream() -> Any:
        return (Part("w", i, (0, 1), np.ones(2), (), None, x.astype(np.float32)) for i, x in enumerate(chunks))

    every = np.concatenate([np.abs(x.astype(np.float32)).reshape(2, -1) for x in chunks], 1)
    for density in (0.001, 0.003, 0.2, 0.5, 0.99, 1.0):
        k = int(density * every.shape[1])
        want = np.sort(every, 1)[:, every.shape[1] - k] if k else [np.inf, np.inf]
        np.testing.assert_array_equal(of_model(stream, 2, density), want)


def test_magnitude_pruning() -> None:
    w = [0.7, -0.5, 1.2]
    have = flat(made(compose.MagnitudePrune(0.3), weights=w))
    want = 0.0
    for weight, one in zip(w, DENSE, strict=True):
        v = flat(one)
        k = int(0.3 * np.isfinite(v).sum())
        kept = np.argsort(-np.nan_to_num(np.abs(v), nan=-1))[:k]
        mask = np.zeros(len(v))
        mask[kept] = 1
        want = want + weight * np.nan_to_num(v) * mask
    close(have, want)


def test_dare_drops_by_key_and_keeps_the_mean() -> None:
    """Dense merges (no rank cuts anything): entries are 0 or rescaled, and other keys drop others."""
    def changed(key: int, **options: Any) -> np.ndarray:
        params = compose.merge(PARAMS, [ONE], compose.DARE(**options), key=jax.random.key(key)).params
        return np.concatenate([np.asarray(params[path] - PARAMS[path]).ravel() for path in PATHS])

    full = np.concatenate([np.asarray(updates(ONE)[path]).ravel() for path in PATHS])
    one, again, other = changed(0, p=0.75), changed(0, p=0.75), changed(1, p=0.75)
    np.testing.assert_array_equal(one, again)
    kept = np.abs(one) > 1e-6
    close(one[kept], 4 * full[kept])
    assert 0.15 < kept.mean() < 0.35 and 0.2 < (kept != (np.abs(other) > 1e-6)).mean() < 0.55
    layers = kept[66:138].reshape(2, 6, 6)  # behind the table's 66 entries
    assert (layers[0] != layers[1]).any()  # layers of a stack draw apart
    close(changed(0, p=0.0), full)
    ties_of_dropped = changed(0, p=0.75, then=compose.TIES(1.0))
    close(ties_of_dropped, one)  # one task alone agrees with itself


def test_dare_then_ties_trims_what_is_left() -> None:
    method = compose.DARE(0.5, then=compose.TIES(0.2))
    key = jax.random.key(4)
    found = compose.merge(PARAMS, [ONE, TWO], method, key=key).params
    dropped = compose.merge(PARAMS, [ONE], compose.DARE(0.5), key=key).params
    first, have = (np.concatenate([np.asarray(p[path] - PARAMS[path]).ravel() for path in PATHS])
                   for p in (dropped, found))  # fmt: skip
    size = np.abs(first)
    top = size >= np.sort(size)[len(size) - int(0.2 * len(size))]
    alone = top & (have != 0) & (np.abs(have - first) < 1e-5)
    assert alone.sum() > 0.25 * top.sum()  # where the other task is dropped or trimmed, this one's value stays
    assert (have != 0).mean() < 0.41  # at most two times 20 %


@pytest.mark.parametrize("side", ["out", "in"])
def test_knots(side: str) -> None:
    """The stacked SVD of the dense updates, as in the paper; its coordinates are unique up to sign, which the merge by
    signs commutes with."""
    w = [0.7, -0.5, 1.2]
    have = made(compose.KnOTS(compose.TIES(0.6, scope="matrix"), side=side), weights=w)
    exact = made(compose.KnOTS(compose.Sum(), side=side), weights=w)
    for path in PATHS:
        who = [t for t in range(3) if path in DENSE[t]]
        for i in range(len(DENSE[0][path])):
            taus = [DENSE[t][path][i] if side == "out" else DENSE[t][path][i].T for t in who]
            u, s, vt = np.linalg.svd(np.concatenate(taus), full_matrices=False)
            k = int((s > 1e-5).sum())
            blocks = np.split((u * s)[:, :k], len(who))
            for tau, z in zip(taus, blocks, strict=True):
                close(z @ vt[:k], tau)
            merged = ties([z.ravel() for z in blocks], [w[t] for t in who], 0.6).reshape(blocks[0].shape) @ vt[:k]
            close(have[path][i], merged if side == "out" else merged.T, atol=2e-4)
            close(exact[path][i], sum(w[t] * DENSE[t][path][i] for t in who))


def test_orthogonal_projection() -> None:
    have = made(compose.Orthogonal(), weights=[1.0, 0.5, 2.0])
    both = made(compose.Orthogonal(side="both"), weights=[1.0, 0.5, 0.0])
    for path in PATHS:
        for i, first in enumerate(DENSE[0][path]):
            bases, want = np.zeros((first.shape[0], 0)), 0.0
            for t, weight in zip(range(3), (1.0, 0.5, 2.0), strict=True):
                if path not in DENSE[t]:
                    continue
                tau = DENSE[t][path][i]
                left = tau - bases @ np.linalg.lstsq(bases, tau, rcond=None)[0] if bases.size else tau
                want = want + weight * left
                u, s, _ = np.linalg.svd(left)
                bases = np.concatenate([bases, u[:, : int((s > 1e-5).sum())]], 1)
            close(have[path][i], want, atol=2e-4)
            second = 2 * (both[path][i] - first)  # untouched: the inputs and outputs of the first
            close(first.T @ second, 0, atol=1e-4)
            close(first @ second.T, 0, atol=1e-4)
    errors = compose.compose([ONE, TWO], compose.Orthogonal()).errors
    assert all(0.01 < x < 1 for x in errors.values())


@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_a_space_is_that_of_the_update_not_of_its_factors(side: str) -> None:
    """An untrained adapter (B is 0) and one that was there already, but for rounding, take nothing from the next."""
    nothing = ONE._replace(trainable={path: x._replace(B=0 * x.B) for path, x in ONE.trainable.items()})
    turned = ONE._replace(trainable={path: x._replace(A=x.A * jnp.float32(0.7)) for path, x in ONE.trainable.items()})
    assert max(compose.compose([nothing, TWO], compose.Orthogonal(side)).errors.values()) < 1e-6
    want, have = (updates(compose.compose(several, compose.Orthogonal(side)))
                  for several in ([ONE, TWO], [ONE, turned, TWO]))
    for path in want:
        close(have[path], want[path], atol=1e-4)


def test_lorahub_and_pefts_linear_have_cross_terms() -> None:
    """e1 e1^T and e2 e2^T with weights 1/2: variants.md, 9.7's oracle."""
    def unit(i: int) -> Any:
        one = trained(0, [("head", LoRA(rank=1, alpha=1.0))])
        a, b = jnp.zeros((7, 1)).at[i].set(1.0), jnp.zeros((1, 4)).at[0, i].set(1.0)
        return one._replace(trainable={"head": one.trainable["head"]._replace(A=a, B=b)})

    def corner(method: compose.Method, weights: Any = (0.5, 0.5)) -> tuple[np.ndarray, float]:
        found = compose.compose([unit(0), unit(1)], method, weights=weights)
        return updates(found)["head"][:2, :2], found.errors["head"]

    close(corner(compose.Sum())[0], 0.5 * np.eye(2))
    have, error = corner(compose.PEFTForm("linear"))
    close(have, 0.5 * np.ones((2, 2)))
    close(error, 1.0)
    have, error = corner(compose.LoraHub())
    close(have, 0.25 * np.ones((2, 2)))
    close(corner(compose.LoraHub(), (-0.5, 1.0))[0], [[0.25, -0.5], [-0.5, 1.0]])


def test_lorahub_splits_the_scale() -> None:
    found = compose.compose([trained(1, LoRA(rank=2, alpha=3.0))] * 2, compose.LoraHub(), weights=[0.5, 0.2])
    for path in PATHS:
        close(updates(found)[path], 0.49 * updates(ONE)[path])


def test_weights_are_learned_without_gradients() -> None:
    """A quadratic loss whose minimum lies in the box; l1 moves it, and a bound holds."""
    target = np.asarray([0.8, -0.3, 0.0], np.float32)
    calls = []

    def loss(w: Any) -> float:
        calls.append(np.asarray(w))
        return float(np.sum((np.asarray(w) - target) ** 2))

    found = compose.learn(loss, 3, steps=60, l1=0.0)
    close(found.weights, target, atol=0.05)
    assert len(calls) == found.evaluations <= 60 and not calls[0].any()
    few = compose.learn(loss, 3, steps=5)
    assert few.evaluations == 5 and few.objective <= loss(np.zeros(3))
    held = compose.learn(lambda w: -float(w[0]), 1, steps=30)
    close(held.weights, [1.5], atol=1e-3)
    shrunk = compose.learn(lambda w: float((w[0] - 1) ** 2), 1, steps=60, l1=0.4)
    close(shrunk.weights, [0.8], atol=0.02)
    bad = compose.learn(lambda w: float("nan") if w[0] > 0.1 else float((w[0] + 0.5) ** 2), 1, steps=40, l1=0.0)
    close(bad.weights, [-0.5], atol=0.05)


def test_between_doras_magnitude_and_direction_are_averaged_apart() -> None:
    one, two = (trained(i, [("conv|stack", DoRA(LoRA(rank=2, alpha=a))), ("head", LoRA(rank=2))])
                for i, a in ((7, 3.0), (8, 5.0)))  # fmt: skip
    for ends, who in (([1.0, 0.0], one), ([0.0, 1.0], two)):
        found = compose.interpolate([one, two], ends)
        for path in PARAMS:
            close(updates(found)[path], updates(who)[path])
    found = compose.interpolate([one, two], [0.3, 0.7])
    assert isinstance(found.adapt.plan["conv"], DoRA) and isinstance(found.adapt.plan["head"], LoRA)
    close(updates(found)["head"], 0.3 * updates(one)["head"] + 0.7 * updates(two)["head"])
    for path in ("conv", "stack"):
        w = matrices(path, np.asarray(PARAMS[path], np.float64))
        whole = [w + matrices(path, updates(x)[path]) for x in (one, two)]
        m = [np.asarray(x.trainable[path].magnitude, np.float64).reshape(len(w), 1, -1) for x in (one, two)]
        direction = 0.3 * whole[0] / np.abs(m[0]) + 0.7 * whole[1] / np.abs(m[1])
        length = np.linalg.norm(direction, axis=1, keepdims=True)
        assert all((x > 0).all() for x in m)  # so a magnitude is the length of W's column
        close(w + matrices(path, updates(found)[path]), direction / length * (0.3 * m[0] + 0.7 * m[1]), atol=2e-4)
