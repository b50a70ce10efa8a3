"""Many adapters in fewer numbers: shared A, hierarchies, a student that matches outputs; storage against error."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composing import ONE, PARAMS, TOKENS, TWO, matrices, model, trained, updates

import lorajax as lj
from lorajax import compose
from lorajax.train.step import init_state, make_step
from lorajax.variants import LoRA

PATHS = ["stack", "head"]
TASKS = [trained(i, [("stack|head", LoRA(rank=2, alpha=2.0 + i))]) for i in range(3)]
DENSE = [{path: matrices(path, updates(one)[path]) for path in PATHS} for one in TASKS]
LIFTED = lj.lift(model)


def close(have: Any, want: Any, **options: Any) -> None:
    np.testing.assert_allclose(have, want, **{"rtol": 1e-4, "atol": 5e-5} | options)


def distance(made: compose.Compressed, t: int) -> float:
    have = {path: matrices(path, updates(made.adapters[t])[path]) for path in PATHS}
    wrong = sum(np.sum((have[path] - DENSE[t][path]) ** 2) for path in PATHS)
    return float(np.sqrt(wrong / sum(np.sum(DENSE[t][path] ** 2) for path in PATHS)))


def test_one_a_for_all_tasks_is_the_svd_of_the_stacked_updates() -> None:
    made = compose.share_a(TASKS, rank=3)
    for path in PATHS:
        for i in range(len(DENSE[0][path])):
            stacked = np.concatenate([one[path][i] for one in DENSE], 1)
            u, s, vt = np.linalg.svd(stacked, full_matrices=False)
            best = np.split((u[:, :3] * s[:3]) @ vt[:3], 3, axis=1)
            for t in range(3):
                close(matrices(path, updates(made.adapters[t])[path])[i], best[t])
    close(made.errors, [distance(made, t) for t in range(3)], rtol=1e-3)
    assert all(0.05 < x < 1 for x in made.errors)
    first = made.adapters[0].trainable
    assert all(one.trainable[path].A is first[path].A for one in made.adapters for path in PATHS)
    assert made.parameters == 3 * (2 * 6 + 7) + 3 * 3 * (2 * 6 + 4)
    exact = compose.share_a(TASKS, rank=6)
    assert max(exact.errors) < 1e-5


def test_a_loud_task_counts_less_by_weight() -> None:
    loud = TASKS[0]._replace(trainable={path: x._replace(B=50 * x.B) for path, x in TASKS[0].trainable.items()})
    heard, fair = (compose.share_a([loud, TASKS[1]], 2, weights=w).errors for w in (None, [0.02, 1.0]))
    assert heard[1] > fair[1] + 0.1


def test_a_hierarchy_splits_what_is_common() -> None:
    """Tasks that are a common update and a small one each: found again, and better than either part alone."""
    parts = [compose.compose([TASKS[0], trained(20 + t, [("stack|head", LoRA(rank=1, alpha=0.1))])], measure=False)
             for t in range(3)]  # fmt: skip
    found = compose.hierarchy(parts, common=2, specific=1, rounds=30)
    for path in PATHS:
        close(matrices(path, updates(found.common)[path]), DENSE[0][path], atol=0.06)
    assert max(found.whole.errors) < 0.02
    once = compose.hierarchy(TASKS, 1, 1, rounds=1).whole.errors
    often = compose.hierarchy(TASKS, 1, 1, rounds=5).whole.errors
    sizes = [sum(np.sum(one[path] ** 2) for path in PATHS) for one in DENSE]
    assert np.dot(np.square(often), sizes) < np.dot(np.square(once), sizes)
    whole = found.whole.adapters[1]
    specific, common = found.specific[1], found.common
    bound = specific.adapt.bind(specific.trainable, specific.frozen, onto=common.adapt.bind(*common[1:]))
    close(LIFTED(bound, TOKENS), LIFTED(whole.adapt.bind(whole.trainable, whole.frozen), TOKENS), atol=1e-4)
    assert found.whole.parameters == 2 * (2 * 12 + 11) + 3 * (2 * 12 + 11)


def test_storage_table() -> None:
    rows = {"apart": compose.separate(TASKS), "one A": compose.share_a(TASKS, 3),
            "summed": compose.together(TASKS, compose.Sum(), weights=[1 / 3] * 3, rank=2)}
    said = compose.storage(rows, score=lambda adapters: [1.0, 0.5, 0.75])
    head, *lines = said.splitlines()
    assert head.split() == "stored as parameters part error worst score worst".split()
    assert lines[0].split() == ["apart", "210", "1.000", "0.0000", "0.0000", "0.7500", "0.5000"]
    assert lines[1].split()[2] == str(rows["one A"].parameters)
    for name, row in rows.items():
        close(row.errors, [distance(row, t) for t in range(3)], rtol=1e-3, err_msg=name)
    assert "score" not in compose.storage(rows)


def test_sharing_a_from_the_start() -> None:
    """Two tasks over one A: gradients of both reach it, each B gets its own, and both tasks are learned."""
    adapt = lj.adapt(TASKS[0].adapt.sites, [("stack", LoRA(rank=2)), ("head", lj.Full())])
    arrays, frozen = compose.start_shared(adapt, jax.random.key(0), PARAMS, 2)
    assert arrays.common["stack"].B is None and arrays.own["stack"].A is None
    assert arrays.own["stack"].B.shape == (2, 2, 2, 6) and arrays.own["head"].w.shape == (2, 7, 4)
    start, _ = adapt.init(jax.random.key(0), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, compose.of_task(arrays, 1), start)
    rng = np.random.default_rng(0)
    arrays = arrays._replace(own=jax.tree.map(lambda x: x + jnp.float32(rng.normal(size=x.shape) * 0.3), arrays.own))

    def loss(trainable: Any) -> jax.Array:
        return jnp.sum(jnp.square(LIFTED(adapt.bind(trainable, frozen), TOKENS)))

    both = jax.jit(jax.grad(lambda a: loss(compose.of_task(a, 0)) + 2 * loss(compose.of_task(a, 1))))(arrays)
    each = [jax.jit(jax.grad(loss))(compose.of_task(arrays, t)) for t in range(2)]
    close(both.common["stack"].A, each[0]["stack"].A + 2 * each[1]["stack"].A, rtol=1e-3)
    close(both.own["stack"].B[1], 2 * each[1]["stack"].B, rtol=1e-3)
    with pytest.raises(ValueError, match=r"labels=\('c',\) are not all trained here; there are a, b, full"):
        compose.start_shared(adapt, jax.random.key(0), PARAMS, 2, labels=("c",))


def test_a_student_learns_the_answers_of_its_teachers() -> None:
    forward = lj.lift(model)
    rng = np.random.default_rng(1)
    inputs = [(t, (jnp.asarray(rng.integers(5 * t, 5 * t + 5, (8, 5)), jnp.int32),)) for t in (0, 1)]
    batches = list(compose.taught(forward, [ONE, TWO], inputs))
    close(batches[1]["target"], model(TWO.adapt.merge(TWO.trainable, TWO.frozen), inputs[1][1][0]), atol=1e-4)
    loss = compose.matching(forward)
    logits = np.asarray(model(PARAMS, inputs[0][1][0]), np.float64)
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True)
            for x in (np.asarray(batches[0]["target"], np.float64), logits))  # fmt: skip
    each = 4 * np.sum(p * np.log(p / q), -1)
    close(loss(PARAMS, batches[0], None)[0], each.mean(), rtol=1e-3)
    half = jnp.asarray([1.0] * 4 + [0.0] * 4)
    close(loss(PARAMS, {**batches[0], "weight": half}, None)[0], each[:4].mean(), rtol=1e-3)
    squared = compose.matching(forward, temperature=None)(PARAMS, batches[0], None)[0]
    close(squared, np.mean((logits - np.asarray(batches[0]["target"])) ** 2), rtol=1e-3)

    adapt = lj.adapt(ONE.adapt.sites, [("stack|conv|head|table", LoRA(rank=4))])
    trainable, frozen = adapt.init(jax.random.key(0), PARAMS)
    tx = optax.adam(3e-2)
    step = make_step(loss, adapt, tx)
    with jax.numpy_dtype_promotion("standard"):
        state, losses = init_state(jax.random.key(1), trainable, tx), []
        for i in range(120):
            state, metrics = step(state, frozen, {k: batches[i % 2][k] for k in ("inputs", "target")})
            losses.append(float(metrics["loss"]))
    assert sum(losses[-2:]) < 0.25 * sum(losses[:2])


@pytest.mark.parametrize(("build", "words"), [
    (lambda: compose.share_a(TASKS, 0), "rank=0 is below 1"),
    (lambda: compose.hierarchy(TASKS, 1, 0), "specific=0"),
    (lambda: compose.share_a([trained(0, [("stack", LoRA(rank=1)), ("head", lj.Full())])], 1),
     "every adapter trained head in full, which one A cannot share"),
    (lambda: list(compose.taught(LIFTED, [ONE], [(1, (TOKENS,))])), "task 1 has no teacher: there are 1"),
])
def test_errors(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
