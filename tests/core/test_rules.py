"""Rules: the first full match wins, everything is accounted for, and every mistake is answered with the way out."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lorajax as lj

from . import probe
from .case import normal
from .models import CASES
from .probe import Probe


def fn(p: Any, x: jax.Array) -> jax.Array:
    for layer in p["encoder"]:
        x = x * layer["norm"]["scale"][None]
        x = jnp.tanh(x @ layer["query"]["kernel"] + layer["query"]["bias"][None]) @ layer["value"]["kernel"]
    return x @ p["classifier"]["kernel"] + p["classifier"]["bias"][None]


PARAMS = {
    "encoder": [{"norm": {"scale": normal(8)}, "query": {"kernel": normal(8, 12), "bias": normal(12)},
                 "value": {"kernel": normal(12, 8)}} for _ in range(2)],
    "classifier": {"kernel": normal(8, 4), "bias": normal(4)},
}
X = normal(5, 8)
QUERY, VALUE = [f"encoder/{i}/query/kernel" for i in range(2)], [f"encoder/{i}/value/kernel" for i in range(2)]


@pytest.fixture
def sites() -> Any:
    return lj.sites(fn, PARAMS, X)


def test_the_first_full_match_wins(sites: Any):
    rules = [("encoder/0/query/kernel", Probe(1)), (".*/query/kernel", Probe(2)), (".*/kernel", Probe(3))]
    adapt = lj.adapt(sites, rules)
    assert {path: variant.rank for path, variant in adapt.plan.items()} == {
        QUERY[0]: 1, QUERY[1]: 2, VALUE[0]: 3, VALUE[1]: 3, "classifier/kernel": 3}


def test_order_decides(sites: Any):
    """The same two rules the other way round: the broad one would leave the narrow one without any match."""
    with pytest.raises(ValueError, match=re.escape("encoder/0/query/kernel")):
        lj.adapt(sites, [(".*/query/kernel", Probe(2)), ("encoder/0/query/kernel", Probe(1))])


def test_a_match_is_of_the_whole_path(sites: Any):
    """`query` alone is no path; `re.search` would take it."""
    with pytest.raises(ValueError, match="query"):
        lj.adapt(sites, [("query", Probe())])


def test_none_leaves_alone(sites: Any):
    adapt = lj.adapt(sites, [("classifier/.*", None), (".*/query/.*", None), (".*/kernel", Probe())])
    assert set(adapt.plan) == set(VALUE)


def test_what_no_rule_names_is_frozen(sites: Any):
    adapt = lj.adapt(sites, [(".*/value/kernel", Probe())])
    trainable, frozen = probe.init(adapt, PARAMS)
    assert set(trainable) == set(VALUE)
    assert set(frozen.base) == set(sites.leaves)


def test_full_takes_biases_norms_and_heads(sites: Any):
    adapt = lj.adapt(sites, [(".*/bias", lj.Full()), (".*/scale", lj.Full()), ("classifier/kernel", lj.Full()),
                             (".*/kernel", Probe())])
    full = {path for path, what in adapt.plan.items() if isinstance(what, lj.Full)}
    assert full == {"encoder/0/query/bias", "encoder/1/query/bias", "encoder/0/norm/scale", "encoder/1/norm/scale",
                    "classifier/kernel", "classifier/bias"}
    assert set(adapt.plan) - full == {*QUERY, *VALUE}


def test_a_broad_rule_of_a_variant_takes_the_weights_and_leaves_the_rest(sites: Any):
    adapt = lj.adapt(sites, [(".*", Probe())])
    assert set(adapt.plan) == {*QUERY, *VALUE, "classifier/kernel"}


def test_a_broad_variant_does_not_take_biases_away_from_a_later_full(sites: Any):
    adapt = lj.adapt(sites, [("encoder/.*", Probe()), (".*/bias", lj.Full())])
    assert {path for path, what in adapt.plan.items() if isinstance(what, lj.Full)} == {
        "encoder/0/query/bias", "encoder/1/query/bias", "classifier/bias"}


def test_rank_and_scale_per_path_are_rules(sites: Any):
    adapt = lj.adapt(sites, [("encoder/0/.*", Probe(rank=1, scale=2.0)), ("encoder/1/.*", Probe(rank=4, scale=0.25))])
    trainable, frozen = probe.init(adapt, PARAMS)
    assert trainable[QUERY[0]].a.shape == (8, 1)
    assert trainable[QUERY[1]].a.shape == (8, 4)
    merged = jax.jit(adapt.merge)(trainable, frozen)
    for i, scale in enumerate((2.0, 0.25)):
        a, b = trainable[VALUE[i]]
        want = PARAMS["encoder"][i]["value"]["kernel"] + scale * a @ b
        assert float(jnp.abs(merged["encoder"][i]["value"]["kernel"] - want).max()) < 1e-6


def test_a_rule_that_matches_nothing_names_the_nearest_paths(sites: Any):
    with pytest.raises(ValueError, match="matches nothing|no path|no site") as caught:
        lj.adapt(sites, [(".*/kernel", Probe()), ("encoder/0/qeury/kernel", Probe())])
    message = str(caught.value)
    assert "encoder/0/qeury/kernel" in message
    assert "encoder/0/query/kernel" in message
    assert "classifier/bias" not in message


def test_a_wrong_pattern_names_the_rule(sites: Any):
    with pytest.raises(ValueError, match=re.escape("encoder/(0")):
        lj.adapt(sites, [("encoder/(0", Probe())])


@pytest.mark.parametrize("path", ["classifier/bias", "encoder/0/norm/scale"])
def test_a_variant_on_a_vector_says_what_takes_vectors(sites: Any, path: str):
    with pytest.raises(ValueError, match=path) as caught:
        lj.adapt(sites, [(path, Probe())])
    assert "Full()" in str(caught.value)
    assert "None" in str(caught.value)


def test_a_rank_too_large_names_site_value_limit_and_remedy(sites: Any):
    with pytest.raises(ValueError, match="rank=9") as caught:
        lj.adapt(sites, [(".*/query/kernel", Probe(rank=9))])
    message = str(caught.value)
    assert QUERY[0] in message
    assert "8" in message.replace(QUERY[0], "")
    assert "rule" in message


def test_the_rank_limit_of_a_stacked_or_split_weight_is_that_of_one_layer():
    """(4, 8, 2, 6) is four (8, 12) matrices: rank 8 fits, 9 does not."""
    case = CASES["linen_scan"]
    sites = lj.sites(case.built.fn, case.built.params, *case.built.args)
    path = "params/blocks/heads/kernel"
    trainable, _ = jax.eval_shape(lj.adapt(sites, [(path, Probe(rank=12))]).init, jax.random.key(0), case.built.params)
    assert trainable[path].a.shape == (4, 12, 12)
    with pytest.raises(ValueError, match="rank=13"):
        lj.adapt(sites, [(path, Probe(rank=13))])


def test_something_that_is_no_rule_is_refused(sites: Any):
    with pytest.raises(ValueError, match=r"8\).*LoRA\(rank=8\), Full\(\) or None"):
        lj.adapt(sites, [(".*/kernel", 8)])


def test_presets_and_patterns_mix():
    """A preset is one more rule, which takes what the rules before it left."""
    case = CASES["linen_attention"]
    sites = lj.sites(case.built.fn, case.built.params, *case.built.args)
    adapt = lj.adapt(sites, [(".*/query/kernel", Probe(1)), ("qv", Probe(2))])
    assert {path: what.rank for path, what in adapt.plan.items()} == {
        "params/query/kernel": 1, "params/value/kernel": 2}


def test_a_leaf_called_like_a_preset_is_named_by_its_path():
    """As rules that name sites by their paths do, those of a saved adapter for one."""
    params = {"attention": normal(8, 8), "embeddings": normal(8, 8)}
    sites = lj.sites(lambda p, x: x @ p["embeddings"] @ p["attention"] @ p["attention"], params, X)
    assert [*lj.adapt(sites, [("embeddings", Probe(1))]).plan] == ["embeddings"]
    assert len(lj.adapt(sites, [("ffn|embeddings|attention", Probe(1))]).plan) == 2


def test_the_table_shows_which_rule_took_which_site(sites: Any):
    adapt = lj.adapt(sites, [("encoder/0/query/kernel", Probe(2)), (".*/kernel", Probe(3)), (".*/scale", lj.Full())])
    text = str(adapt)

    def line(path: str) -> str:
        return next(line for line in text.splitlines() if line.startswith(path))

    assert "Probe" in line(QUERY[0])
    assert "encoder/0/query/kernel" in line(QUERY[0])
    assert ".*/kernel" in line(QUERY[1])
    assert re.search(r"\b2\b", line(QUERY[0]))
    assert re.search(r"\b3\b", line(QUERY[1]))
    assert re.search(r"\b40\b", line(QUERY[0]))  # (8 + 12) * 2 parameters
    assert re.search(r"\b60\b", line(QUERY[1]))
    assert "Full" in line("encoder/0/norm/scale")
    total = 40 + 60 + 2 * 60 + 36 + 16
    assert str(total) in text
    base = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    assert f"{100 * total / base:.1f}" in text or f"{100 * total / base:.2f}" in text
    assert "%" in text
    assert re.search(r"[KMG]i?B", text), "an estimate of training memory"


def test_counts(sites: Any):
    rules = [("encoder/0/query/kernel", Probe(2)), (".*/value/kernel", Probe(3)), (".*/scale", lj.Full())]
    adapt = lj.adapt(sites, rules)
    trainable, _ = probe.init(adapt, PARAMS)
    assert adapt.count(trainable) == 40 + 2 * 60 + 16
