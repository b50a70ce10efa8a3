"""Scores per site, spectra of the update, and the budget that becomes ranks: against numpy and by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_glue import files, own_cache, words  # noqa: F401

import lorajax as lj
from experiments import glue
from lorajax import build, config, control, start
from lorajax.control.importance import METRICS
from lorajax.core.sites import by_path
from lorajax.variants import AdaLoRA, DoRA, LoRA

R = 3
WEIGHTS = {"q": (10, 6), "layers": (2, 6, 6), "tiny": (6, 2), "head": (2, 2)}


def model(p: Any, x: jax.Array) -> jax.Array:
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ p["q"], p["layers"])
    return x @ p["tiny"] @ p["head"]


rng = np.random.default_rng(0)
BASE = {name: jnp.float32(rng.normal(size=shape)) / 2 for name, shape in WEIGHTS.items()}
X, Y = jnp.float32(rng.normal(size=(4, 6, 10))), jnp.float32(rng.normal(size=(4, 6, 2)))  # four batches of six
SITES = lj.sites(model, BASE, X[0])
ADAPT = lj.adapt(SITES, [("q", LoRA(rank=R, alpha=6)), ("layers", LoRA(rank=R, alpha=3)), ("tiny", AdaLoRA(rank=2)),
                         ("head", lj.Full())])
START, FROZEN = ADAPT.init(jax.random.key(0), BASE)
TRAINABLE = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)) / 2, START)
BATCHES = [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]
LIFTED = lj.lift(model)


@jax.jit
def gradient(trainable: Any, batch: Any) -> Any:
    def loss(trainable: Any) -> jax.Array:
        return jnp.mean(jnp.square(LIFTED(ADAPT.bind(trainable, FROZEN), batch["x"]) - batch["y"]))

    return jax.grad(loss)(trainable)


def per_matrix(tree: Any, path: str) -> list[list[np.ndarray]]:
    """The arrays of each matrix of a site, float64."""
    stack = SITES[path].stack_shape
    return [[np.float64(x)[i] for x in tree[path]] for i in np.ndindex(stack)]


def by_hand(metric: str, weights: list[np.ndarray], grads: list[np.ndarray]) -> float:
    if metric == "sensitivity":
        return sum(np.abs(w * g).sum() for w, g in zip(weights, grads, strict=True))
    squares = sum((g**2).sum() for g in grads)
    return np.sqrt(squares) if metric == "gradient_norm" else squares


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("by_size", [False, True])
def test_scores_are_means_over_batches_and_layers(metric: str, by_size: bool) -> None:
    found = control.importance(ADAPT, gradient, TRAINABLE, iter(BATCHES), metric, by_size=by_size)
    grads = [gradient(TRAINABLE, batch) for batch in BATCHES]
    assert list(found) == ["layers", "q", "tiny"]
    for path, score in found.items():
        weights = per_matrix(TRAINABLE, path)
        each = [by_hand(metric, w, g) for gs in grads for w, g in zip(weights, per_matrix(gs, path), strict=True)]
        size = np.sqrt(sum(w.size for w in weights[0])) if by_size else 1.0
        assert score == pytest.approx(np.mean(each) / size, rel=1e-5)


def test_fisher_per_example_squares_each_examples_gradient() -> None:
    found = control.importance(ADAPT, gradient, TRAINABLE, BATCHES[:1], "fisher", per_example=True)
    rows = [gradient(TRAINABLE, {"x": X[0, i : i + 1], "y": Y[0, i : i + 1]}) for i in range(6)]
    expected = np.mean([sum((np.float64(g) ** 2).sum() for g in row["q"]) for row in rows])
    assert found["q"] == pytest.approx(expected, rel=1e-5)
    assert found["q"] > 1.5 * control.importance(ADAPT, gradient, TRAINABLE, BATCHES[:1], "fisher")["q"]


def test_smoothed_sensitivity_is_adaloras_element_by_element() -> None:
    found = control.smoothed_sensitivity(ADAPT, gradient, TRAINABLE, BATCHES)
    grads = [gradient(TRAINABLE, batch) for batch in BATCHES]
    for path, score in found.items():
        total = 0.0
        for i, weights in enumerate(per_matrix(TRAINABLE, path)):
            for k, w in enumerate(weights):
                mean = deviation = np.zeros_like(w)
                for gs in grads:
                    sensed = np.abs(w * per_matrix(gs, path)[i][k])
                    mean = 0.85 * mean + 0.15 * sensed
                    deviation = 0.85 * deviation + 0.15 * np.abs(sensed - mean)
                total += (mean * deviation).sum()
        assert score == pytest.approx(total / len(per_matrix(TRAINABLE, path)), rel=1e-4)


def test_importance_errors() -> None:
    with pytest.raises(ValueError, match=r"metric='hessian' is unknown; there are gradient_norm, fisher, sensitivity"):
        control.importance(ADAPT, gradient, TRAINABLE, BATCHES, "hessian")
    for score in (control.importance, control.smoothed_sensitivity):
        with pytest.raises(ValueError, match=r"no batch to score: give at least one"):
            score(ADAPT, gradient, TRAINABLE, [])


# Spectra


def test_spectra_are_those_of_the_dense_update() -> None:
    found = control.spectra(ADAPT, TRAINABLE, FROZEN)
    assert {path: x.shape for path, x in found.items()} == {"q": (3,), "layers": (2, 3), "tiny": (2,)}
    merged = ADAPT.merge(TRAINABLE, FROZEN)
    for path, sigma in found.items():
        delta = np.float64(merged[path]) - np.float64(BASE[path])
        rank = sigma.shape[-1]
        np.testing.assert_allclose(sigma, np.linalg.svd(delta, compute_uv=False)[..., :rank], rtol=1e-4, atol=1e-5)


def test_spectra_form_nothing_of_the_weights_size() -> None:
    w = {"w": jnp.zeros((300, 200))}
    adapt = lj.adapt(lj.sites(lambda p, x: x @ p["w"], w, jnp.ones((2, 300))), [("w", LoRA(rank=4))])
    trainable, frozen = adapt.init(jax.random.key(0), w)
    jaxpr = jax.make_jaxpr(lambda t: control.spectra(adapt, t, frozen))(trainable)
    biggest = max(v.aval.size for eqn in jax.tree.leaves(jaxpr.eqns, is_leaf=lambda e: hasattr(e, "outvars"))
                  for v in eqn.outvars)
    assert biggest <= 300 * 4


def test_spectrum_of_a_variant_without_factors_is_an_error() -> None:
    adapt = lj.adapt(SITES, [("q", DoRA(LoRA(rank=2)))])
    with pytest.raises(ValueError, match=r"q: the update of DoRA is no product of two factors"):
        control.spectra(adapt, *adapt.init(jax.random.key(0), BASE))


def test_ranks_of_known_spectra() -> None:
    sigma = jnp.float32([[4, 4, 4, 4], [4, 0, 0, 0], [2, 1, 1, 0], [0, 0, 0, 0]])
    p = np.array([0.5, 0.25, 0.25])
    expected = [4, 1, np.exp(-(p * np.log(p)).sum()), 0]
    np.testing.assert_allclose(control.effective_rank(sigma), expected, rtol=1e-6)
    np.testing.assert_allclose(control.stable_rank(sigma), [4, 1, 6 / 4, 0], rtol=1e-6)
    assert control.energy_rank(sigma, 0.7).tolist() == [3, 1, 2, 0]  # shares 1/4, 1, 4/6: 2 of 4 make 5/6
    assert control.energy_rank(sigma, 1.0).tolist() == [4, 1, 3, 0]
    assert np.isfinite(jax.grad(lambda s: control.effective_rank(s).sum() + control.stable_rank(s).sum())(sigma)).all()


# Budgets


FLAT = {f"w{i}": (20, 12) for i in range(4)}


def flat(shapes: dict[str, tuple[int, int]]) -> Any:
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    inputs = {name: jnp.zeros((1, shape[0])) for name, shape in shapes.items()}
    sites = lj.sites(lambda p, x: [x[name] @ p[name] for name in shapes], params, inputs)
    return lj.adapt(sites, [(".*", LoRA(rank=2))])


def test_largest_remainder_by_hand() -> None:
    """10 ranks over 4.5, 3.4, 1.1, 1.0 of 10: floors 4, 3, 1, 1, and the one left to the largest remainder, 0.5."""
    adapt = flat(FLAT)
    scores = dict(zip(FLAT, (4.5, 3.4, 1.1, 1.0), strict=True))
    assert control.allocate(adapt, scores, ranks=10) == {"w0": 5, "w1": 3, "w2": 1, "w3": 1}
    # The minimum takes its part first: 0.05 of 10 is raised to 1, the others share 7 as 5 : 4 : 1.
    scores = dict(zip(FLAT, (0.5, 0.4, 0.1, 1e-6), strict=True))
    assert control.allocate(adapt, scores, ranks=11, minimum=1) == {"w0": 5, "w1": 4, "w2": 1, "w3": 1}
    # None is above min(in, out) = 12; what it cannot take goes to the others.
    scores = dict(zip(FLAT, (100.0, 1.0, 1.0, 0.0), strict=True))
    assert control.allocate(adapt, scores, ranks=20, minimum=0) == {"w0": 12, "w1": 4, "w2": 4, "w3": 0}


def test_budget_in_ranks_is_met_exactly() -> None:
    adapt = flat(FLAT)
    draw = np.random.default_rng(1)
    for budget in (4, 7, 23, 47, 48):
        scores = dict(zip(FLAT, draw.lognormal(sigma=2, size=4), strict=True))
        found = control.allocate(adapt, scores, ranks=budget)
        assert sum(found.values()) == budget
        assert all(1 <= r <= 12 for r in found.values())
        order = sorted(FLAT, key=lambda path: scores[path])
        assert [found[path] for path in order] == sorted(found.values())  # more score, no less rank
    assert set(control.allocate(adapt, scores, ranks=1000).values()) == {12}


def test_budget_in_parameters_counts_in_plus_out_of_every_layer() -> None:
    cost = {"q": 16, "layers": 2 * 12, "tiny": 8}
    scores = {"q": 3.0, "layers": 2.0, "tiny": 1.0}
    for budget in (48, 60, 100, 131):
        found = control.allocate(ADAPT, scores, parameters=budget)
        spent = sum(cost[path] * r for path, r in found.items())
        assert spent <= budget
        room = [path for path in cost if found[path] < min(SITES[path].n_in, SITES[path].n_out)]
        assert all(budget - spent < cost[path] for path in room)
    # t * (3, 2, 1) costs t * (48 + 48 + 8) = 104 t: at 104, exactly ranks 3, 2, 1.
    ranks = control.allocate(ADAPT, scores, parameters=104)
    assert ranks == {"q": 3, "layers": 2, "tiny": 1}
    again = lj.adapt(SITES, control.with_ranks(ADAPT, ranks))
    assert again.count() == 104 + 1 + 4  # and AdaLoRA's E of rank 1, and the head


def test_ranks_become_rules() -> None:
    adapt = lj.adapt(SITES, [("q", LoRA(rank=4, alpha=8)), ("layers", LoRA(rank=4, alpha=8, rslora=True)),
                             ("tiny", DoRA(LoRA(rank=2, alpha=2))), ("head", lj.Full())])
    ranks = {"q": 2, "layers": 1, "tiny": 1}
    rules = dict(control.with_ranks(adapt, ranks))
    assert rules == {"q": LoRA(rank=2, alpha=8), "layers": LoRA(rank=1, alpha=8, rslora=True),
                     "tiny": DoRA(LoRA(rank=1, alpha=2)), "head": lj.Full()}
    same = dict(control.with_ranks(adapt, ranks, keep="scale"))
    assert (same["q"].scale, same["layers"].scale) == (2.0, 4.0)
    assert (same["q"].rank, same["layers"].rank) == (2, 1)
    assert same["tiny"].of.scale == 1.0
    without = control.with_ranks(adapt, {"q": 0})
    assert "q" not in lj.adapt(SITES, without).plan
    assert lj.adapt(SITES, list(without)).plan["layers"] == adapt.plan["layers"]
    with pytest.raises(ValueError, match=r"keep='s' is unknown; there are 'alpha' and 'scale'"):
        control.with_ranks(adapt, ranks, keep="s")


@pytest.mark.parametrize(("scores", "budget", "words"), [
    ({"w0": 1.0, "w1": 1.0}, {"ranks": 1}, r"a budget of 1 ranks is below 2, what rank 1 at each of 2 sites takes"),
    ({"w0": 1.0}, {"parameters": 31}, r"a budget of 31 parameters is below 32, .*\(w0: 32\): raise the budget, adapt"),
    ({"w0": 1.0}, {}, r"ranks=None and parameters=None: give the budget as one of the two"),
    ({"w0": 1.0}, {"ranks": 3, "parameters": 99}, r"ranks=3 and parameters=99: give the budget as one"),
    ({"v": 1.0}, {"ranks": 3}, r"scores name \['v'\], which have no adapter; these have: w0, w1, w2, w3"),
    ({"w0": -1.0}, {"ranks": 3}, r"w0: score -1.0 is not a finite number >= 0"),
    ({"w0": float("nan")}, {"ranks": 3}, r"w0: score nan is not a finite"),
    ({"w0": 0.0, "w1": 0.0}, {"ranks": 3}, r"all scores are 0: sensitivities are, while B is 0"),
])  # fmt: skip
def test_budget_errors(scores: Any, budget: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        control.allocate(flat(FLAT), scores, **budget)


def test_the_experiment_shares_out_its_budget_by_gradient_norm(files, tmp_path) -> None:  # noqa: F811
    """Against the gradients G of the weights themselves, by the chain rule of s A B."""
    asked = words(files, tmp_path, "ranks", ",rank=2,targets=qv", "--config.ranks.batches=2")
    c = config.parse(asked, workdir="").config
    found = build.load_data(c)
    net = build.load_model(c, found.task, jax.random.key(0))
    batches = build.batches(c, build.tokens(c, found, net.folder))
    one = batches["train"].batch(0, 0)
    adapt = lj.adapt(lj.sites(net.net.apply, net.variables, *glue.inputs(one)), build.rules(c, net))
    loss = glue.make_loss(net.net, found.task, c)
    ranked = start.by_importance(c, adapt, net, loss, batches["train"], jax.random.key(1))
    ranks = {path: v.rank for path, v in ranked.plan.items() if isinstance(v, LoRA)}
    assert sum(ranks.values()) == 2 * 4
    assert {v.scale for v in ranked.plan.values() if isinstance(v, LoRA)} == {8.0}
    assert [path for path in ranked.plan if path not in ranks] == ["params/classifier/bias", "params/classifier/kernel"]
    trainable, _ = adapt.init(jax.random.key(1), net.variables)
    total = dict.fromkeys(ranks, 0.0)
    dense = jax.jit(jax.grad(lambda params, batch: loss(params, batch, jax.random.key(0))[0]))
    for i in range(2):
        g = by_path(dense(net.variables, batches["train"].batch(0, i)))[0]
        for path in total:  # B = 0: the gradient of B is s A^T G, and that of A is 0
            total[path] += np.linalg.norm(8.0 * np.float64(trainable[path].A).T @ np.float64(g[path])) / 2
    assert ranks == control.allocate(adapt, total, ranks=8)
