"""Composing adapters: exact sums of any variants, what a rank loses, interference, and the errors."""

from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composing import EVERYWHERE, ONE, PARAMS, TOKENS, TWO, matrices, model, trained, updates

import lorajax as lj
from lorajax import compose
from lorajax.compose.svd import compress, decompose
from lorajax.io import peft
from lorajax.models import adapter_names
from lorajax.variants import IA3, AdaLoRA, DoRA, HydraLoRA, LoHa, LoRA, VeRA

LIFTED = lj.lift(model, strict=True)


def close(have: Any, want: Any, **options: Any) -> None:
    np.testing.assert_allclose(have, want, **{"rtol": 1e-4, "atol": 3e-5} | options)


# Exact sums


KINDS = {
    "ranks-and-scales": [LoRA(rank=2, alpha=3.0), LoRA(rank=3, alpha=5.0, rslora=True)],
    "patterns": [[("stack", LoRA(rank=1, alpha=7.0)), ("table|conv", LoRA(rank=3))], [("conv|head", LoRA(rank=2))]],
    "dora": [[("stack|conv", DoRA(LoRA(rank=2)))], LoRA(rank=2)],
    "pissa": [[("stack", LoRA(rank=2, initializer="pissa"))], [("stack|head", LoRA(rank=2, initializer="olora"))]],
    "pissa-folded": [[("stack|conv", LoRA(rank=2, initializer="pissa", fold=True))], LoRA(rank=2)],
    "others": [[("stack", AdaLoRA(rank=2))], [("head", VeRA(rank=2, d_initial=0.5))], [("stack", LoHa(2))],
               [("stack|head", IA3())]],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_sum_is_the_sum_of_updates_from_the_original_base(kind: str) -> None:
    adapters = [trained(i, rules) for i, rules in enumerate(KINDS[kind])]
    w = [0.7, -0.5, 1.3, 0.4][: len(adapters)]
    made = compose.compose(adapters, weights=w)
    want = {path: sum(w[t] * updates(one)[path] for t, one in enumerate(adapters)) for path in PARAMS}
    have = updates(made)
    for path in PARAMS:
        close(have[path], want[path], err_msg=path)
    assert max(made.errors.values()) < 1e-5
    assert all(type(choice) is LoRA for choice in made.adapt.plan.values())
    for path, leaf in made.frozen.base.items():  # also where a start was folded into one of them
        np.testing.assert_array_equal(leaf, PARAMS[path])
    merged = {path: jnp.float32(PARAMS[path] + want[path]) for path in PARAMS}
    close(LIFTED(made.adapt.bind(made.trainable, made.frozen), TOKENS), model(merged, TOKENS), atol=1e-4)


def test_negation_and_task_arithmetic() -> None:
    gone = compose.compose([ONE, ONE], weights=[1.0, -1.0])
    assert all(np.abs(x).max() < 1e-5 for x in updates(gone).values())
    half = updates(compose.compose([ONE, TWO], compose.TaskArithmetic(0.3)))
    for path in PARAMS:
        close(half[path], 0.3 * (updates(ONE)[path] + updates(TWO)[path]))


def test_a_rank_keeps_the_best_of_that_rank_and_says_what_is_lost() -> None:
    made = compose.compose([ONE, TWO], rank=2)
    have = updates(made)
    for path in EVERYWHERE.split("|"):
        assert made.adapt.plan[path].rank == 2  # type: ignore[union-attr]
        want = matrices(path, updates(ONE)[path] + updates(TWO)[path])
        u, s, vt = np.linalg.svd(want, full_matrices=False)
        close(matrices(path, have[path]), (u[..., :2] * s[:, None, :2]) @ vt[:, :2])
        lost = np.sqrt(np.sum(s[:, 2:] ** 2) / np.sum(s**2))
        close([made.errors[path], made.truncated[path]], [lost, lost])
        assert 0.01 < lost < 1
    assert "head   2     0." in str(made)


def test_compression_forms_nothing_of_the_weights_shape() -> None:
    pair = compose.Pair(jnp.zeros((50, 6)), jnp.zeros((6, 40)))
    jaxpr = jax.make_jaxpr(lambda a, b: compress(compose.Pair(a, b), 3)[:2])(*pair[:2])

    def sizes(jaxpr: Any) -> Any:
        for eqn in jaxpr.eqns:
            for x in (*eqn.invars, *eqn.outvars):
                yield tuple(sorted(x.aval.shape, reverse=True))[:2]
            for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    seen = set(sizes(jaxpr.jaxpr))
    assert (50, 6) in seen and (6, 6) in seen
    assert not [shape for shape in seen if len(shape) == 2 and shape[1] > 6]
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(6, 40))
    close(decompose(compose.Pair(jnp.float32(a), jnp.float32(b))).s, np.linalg.svd(a @ b, compute_uv=False)[:6])


def test_blended_is_a_function_of_its_weights_with_gradients() -> None:
    adapt, of, frozen = compose.blended([ONE, TWO])
    loss = jax.jit(lambda w: jnp.sum(jnp.square(LIFTED(adapt.bind(of(w), frozen), TOKENS))))
    w = jnp.asarray([0.3, -0.2])
    merged = {p: jnp.float32(PARAMS[p] + 0.3 * updates(ONE)[p] - 0.2 * updates(TWO)[p]) for p in PARAMS}
    close(loss(w), jnp.sum(jnp.square(model(merged, TOKENS))), rtol=1e-3)
    slope = (loss(w + jnp.asarray([1e-2, 0])) - loss(w - jnp.asarray([1e-2, 0]))) / 2e-2
    close(jax.grad(loss)(w)[0], slope, rtol=2e-2)


# What is trained in full


def test_weights_trained_in_full() -> None:
    both = [trained(i, [("stack", LoRA(rank=2)), ("head|bias", lj.Full())]) for i in (5, 6)]
    with pytest.raises(ValueError, match=r"adapters \[0, 1\] trained bias \(and 1 others\) in full.*full='drop'"):
        compose.compose(both)
    with pytest.raises(ValueError, match="every adapter trained bias in full.*params="):
        compose.compose(both, full="drop")
    adapt, of, _ = compose.blended(both, full=0)
    np.testing.assert_array_equal(of(np.float32([0.5, 0.5]))["head"].w, both[0].trainable["head"].w)
    assert list(adapt.plan) == ["bias", "head", "stack"]
    taken = compose.compose(both, full=1, weights=[0.5, 0.5])
    np.testing.assert_array_equal(taken.trainable["head"].w, both[1].trainable["head"].w)
    added = compose.compose(both, full="sum", weights=[2.0, -1.0], params=PARAMS)
    change = 2 * (both[0].trainable["bias"].w - PARAMS["bias"]) - (both[1].trainable["bias"].w - PARAMS["bias"])
    close(added.trainable["bias"].w, PARAMS["bias"] + change)
    dropped = compose.compose(both, full="drop", params=PARAMS)
    assert "head" not in dropped.adapt.plan
    np.testing.assert_array_equal(dropped.frozen.base["head"], PARAMS["head"])


# Interference


def test_interference_of_known_spaces() -> None:
    """Rank-1 updates along coordinate axes: overlaps, cosines and signs are known without a computer."""
    def axes(i: int, j: int, sign: float = 1.0) -> Any:
        one = trained(0, [("head", LoRA(rank=1, alpha=1.0))])
        a, b = jnp.zeros((7, 1)).at[i].set(1.0), sign * jnp.zeros((1, 4)).at[0, j].set(2.0)
        return one._replace(trainable={"head": one.trainable["head"]._replace(A=a, B=b)})

    found = compose.interference([axes(0, 0), axes(0, 1), axes(0, 0, -1.0), ONE])
    np.testing.assert_allclose(found.overlap_in["head"][:3, :3], np.ones((3, 3)), atol=1e-6)
    np.testing.assert_allclose(found.overlap_out["head"][:3, :3], [[1, 0, 1], [0, 1, 0], [1, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(found.cosine["head"][:3, :3], [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-6)
    assert found.conflict["head"][0, 2] == 1 and found.conflict["head"][0, 0] == 0
    assert np.isnan(found.conflict["head"][0, 1])  # no entry where both are
    assert np.isnan(found.cosine["stack"][0, 3]) and found.cosine["stack"][3, 3] == pytest.approx(1)


def test_interference_is_that_of_the_dense_updates() -> None:
    found = compose.interference([ONE, TWO])
    for path in EVERYWHERE.split("|"):
        rows = []
        for x, y in zip(matrices(path, updates(ONE)[path]), matrices(path, updates(TWO)[path]), strict=True):
            u, v = np.linalg.svd(x)[0][:, :2], np.linalg.svd(y)[0][:, :3]
            p, q = np.linalg.svd(x)[2][:2].T, np.linalg.svd(y)[2][:3].T
            rows.append([np.sum((u.T @ v) ** 2) / 2, np.sum((p.T @ q) ** 2) / 2,
                         np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y), np.mean(np.sign(x) != np.sign(y))])
        close([measure[path][0, 1] for measure in found], np.mean(rows, 0), rtol=1e-3)
    assert "0, 1" in str(found)


# Errors


def other_base(path: str) -> Any:
    return {**PARAMS, path: PARAMS[path] + 0.1}


WIDE = {**PARAMS, "head": jnp.zeros((7, 5))}
DARE, TIES, Sum = compose.DARE, compose.TIES, compose.Sum


@pytest.mark.parametrize(("build", "words"), [
    (lambda: compose.compose([]), "no adapters were given"),
    (lambda: compose.compose([PARAMS]), r"adapters\[0\] is a dict; .*compose.Adapter"),
    (lambda: compose.compose([ONE, trained(1, LoRA(2), other_base("head"))]),
     r"adapters\[1\] was trained on another base than adapters\[0\]: head differs, fingerprint lj1:"),
    (lambda: compose.compose([ONE], params=other_base("bias")), r"adapters\[0\] .* another base than params: bias"),
    (lambda: compose.compose([ONE, trained(1, LoRA(2), WIDE)]), r"another model than adapters\[0\]: head is \(7, 5\)"),
    (lambda: compose.compose([ONE], weights=[1, 2]), r"weights have shape \(2,\) for 1 adapters"),
    (lambda: compose.compose([ONE], weights=[np.nan]), "must be finite"),
    (lambda: compose.compose([ONE], rank=0), "rank=0 is below 1"),
    (lambda: compose.compose([ONE], "ties"), r"'ties' is no composition: give an instance such as Sum\(\)"),
    (lambda: compose.compose([ONE], TIES(density=-0.1)), r"density=-0.1 is outside \[0, 1\]"),
    (lambda: compose.compose([ONE], TIES(scope="layer")), "scope='layer' is unknown; there are model, matrix"),
    (lambda: compose.compose([ONE], DARE(p=1.0)), r"p=1.0 is not a drop rate in \[0, 1\)"),
    (lambda: compose.compose([ONE], DARE()), r"DARE draws at random: give key="),
    (lambda: compose.compose([ONE], compose.KnOTS(DARE())), "KnOTS draws at random"),
    (lambda: compose.compose([ONE], DARE(then=compose.KnOTS()), key=jax.random.key(0)), "then=KnOTS.* the factors"),
    (lambda: compose.compose([ONE], compose.KnOTS(compose.LoraHub())), r"then=LoraHub\(\) reads the factors"),
    (lambda: compose.compose([ONE], compose.KnOTS(compose.PEFTForm("ties"))), "then=PEFTForm.*reads the factors"),
    (lambda: compose.compose([ONE], compose.KnOTS(side="left")), "side='left' is unknown"),
    (lambda: compose.compose([ONE], compose.Orthogonal(side="left")), "side='left' is unknown"),
    (lambda: compose.compose([ONE], compose.PEFTForm("svd")), r"kind='svd' is unknown.*Sum\(\)"),
    (lambda: compose.compose([ONE], compose.PEFTForm("ties", majority="most")), "majority='most' is unknown"),
    (lambda: compose.compose([ONE, TWO], compose.PEFTForm()), r"ranks \[2, 3\].* A and B apart: use Sum\(\)"),
    (lambda: compose.compose([ONE, TWO], compose.LoraHub()), r"ranks \[2, 3\].* LoraHub adds"),
    (lambda: compose.compose([ONE, trained(0, [("head", HydraLoRA(rank=2))])]), "weighs its update per token"),
    (lambda: compose.compose([ONE], full=1), "full=1 names none of the 1 adapters"),
    (lambda: compose.compose([ONE], full="keep"), "full='keep' is unknown"),
    (lambda: compose.blended([ONE], TIES()), "TIES forms dense updates: blend by Sum"),
    (lambda: compose.interpolate([ONE, TWO], [0.5, 0.6]), r"no point between 2 adapters: give one number >= 0"),
    (lambda: compose.learn(lambda w: w[0], 0), "count=0"),
])
def test_errors(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


# The golden of PEFT


GOLDEN = {
    "cat": (compose.Sum(), None), "svd": (compose.Sum(), 4),
    "ties_svd": (compose.PEFTForm("ties", svd=True), 4),
    "magnitude_prune_svd": (compose.PEFTForm("magnitude_prune", svd=True), 4),
    "linear": (compose.PEFTForm(), None), "linear_neg": (compose.PEFTForm(), None),
    "ties": (compose.PEFTForm("ties"), None), "magnitude_prune": (compose.PEFTForm("magnitude_prune"), None),
}  # fmt: skip


@pytest.fixture(scope="module")
def two_of_peft() -> Any:
    case = golden.load("multi_weighted_llama")
    names = adapter_names(case.model.config)
    sites = lj.sites(lambda params, inputs: case.model.apply(params, **inputs), case.params, case.inputs)
    adapters = []
    for name in ("a", "b"):
        found = peft.read(case.folder / "adapter" / name, sites, names)
        adapt = lj.adapt(sites, found.rules)
        adapters.append(compose.Adapter(adapt, *peft.fill(found, *adapt.init(jax.random.key(0), case.params))))
    return case, adapters, jax.jit(case.logits)


@pytest.mark.parametrize("kind", GOLDEN)
def test_weighted_adapters_of_peft(two_of_peft: Any, kind: str) -> None:
    case, adapters, logits = two_of_peft
    method, rank = GOLDEN[kind]
    w = case.info["weights_linear_neg" if kind == "linear_neg" else "weights"]
    assert not hasattr(method, "density") or method.density == case.info["density"]
    made = compose.compose(adapters, method, weights=w, rank=rank, measure=False)
    merged = made.adapt.merge(made.trainable, made.frozen)
    have, base = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (merged, case.params))
    keys = {jax.tree_util.keystr(key, simple=True, separator="/"): key for key in base}
    for module in case.info["merged_samples"]:
        key = keys[case.paths[module]]
        delta = np.asarray(have[key] - base[key]).reshape(base[key].shape[0], -1)
        np.testing.assert_allclose(delta, case.expected[f"delta/{kind}/{module}.weight"].T, atol=2e-5)
    out = logits(merged)
    np.testing.assert_allclose(case.real(out), case.real(case.expected[f"logits/{kind}"]), atol=1e-4, rtol=1e-4)
