"""Arrays that sites share, and scales that act on activations: against W + A diag(e) B diag(o), written out by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax.core.layout import aligned
from lorajax.core.variant import Factors, Leaf, Variant

from . import jaxprs, probe
from .case import normal
from .models import CASES, Weight
from .test_counts import ROWS, SHAPES, D, F, layer
from .test_lift_cases import FACTORED, weighted


class TiedAdapter(NamedTuple):
    A: jax.Array | None
    B: jax.Array | None
    e: jax.Array
    o: jax.Array


@dataclass(frozen=True)
class Tied(Variant):
    """W + A diag(e) B diag(o) / 2: A trained and B frozen, both shared by all sites; e and o random."""

    rank: int = 3
    name: str = "t"
    leaves: ClassVar[Mapping[str, Leaf]] = {
        "A": Leaf("a", ("in", "rank"), shared=True), "B": Leaf("b", ("rank", "out"), trainable=False, shared=True),
        "e": Leaf("e", ("rank",)), "o": Leaf("vector", ("out",))}

    @property
    def slot(self) -> str:
        return f"tied-{self.name}"

    def init_shared(self, key: jax.Array, n_in: int, n_out: int) -> dict[str, jax.Array]:
        key_a, key_b = jax.random.split(key)
        return {"A": jax.random.normal(key_a, (n_in, self.rank)) / math.sqrt(n_in),
                "B": jax.random.normal(key_b, (self.rank, n_out))}

    def init(self, key: jax.Array, w: jax.Array, stats: Any = None) -> tuple[TiedAdapter, jax.Array]:
        key_e, key_o = jax.random.split(key)
        return TiedAdapter(None, None, jax.random.normal(key_e, (self.rank,)),
                           jax.random.normal(key_o, w.shape[1:])), w

    def factors(self, adapter: TiedAdapter, w: Any) -> Factors:
        return Factors(adapter.A, adapter.B, e=adapter.e, o=adapter.o, s=0.5)


def merged(weights: Mapping[str, Weight], params: Any, trainable: Any, frozen: Any) -> Any:
    """W + s A diag(e) B diag(o), written out: the leading part of A and B, an (in, r) and an (r, out) per layer."""
    a, b, pairs = trainable["shared:tied-t"]["A"], frozen.shared["shared:tied-t"]["B"], {}
    for path, weight in weights.items():
        _, n_in, n_out = probe.sizes(weight, probe.leaves(params)[path].shape)
        e, o = trainable[path].e, trainable[path].o
        pairs[path] = (jnp.einsum("ir,...r->...ir", a[:n_in], e), jnp.einsum("ro,...o->...ro", b[:, :n_out], o))
    return probe.merged(weights, params, pairs)


CASES_OF_EACH_RULE = [
    "linen_scan", "linen_tied", "linen_conv_grouped", "linen_attention", "raw_both_dims", "raw_partial_contraction",
    "raw_gathered_experts", "raw_ragged_dot", "control_weight_in_carry", "shard_map_row_psum", "explicit_row"]


@pytest.mark.parametrize("name", CASES_OF_EACH_RULE)
def test_shared_factors_and_scales_are_the_merged_weight(name: str):
    """Outputs and gradients, also of the shared A, on a model for each rule; B is frozen."""
    case = CASES[name]
    assert case in FACTORED
    fn, params, args, _ = case.built
    with case.scope():
        adapt = lj.adapt(lj.sites(fn, params, *args), probe.rules(case.weights, Tied()))
        trainable, frozen = probe.init(adapt, params)
        lifted = lj.lift(fn, strict=True)

        def gradients(run: Any) -> Any:
            return jaxprs.trace(jax.value_and_grad(lambda t: weighted(run(t))), trainable)

        got = gradients(lambda t: lifted(adapt.bind(t, frozen), *args))
        want = gradients(lambda t: fn(merged(case.weights, params, t, frozen), *args))
        assert jaxprs.weight_shaped(got.jaxpr, case.weights, probe.leaves(params)) == []
        assert probe.error(jaxprs.run(got, trainable), want := jaxprs.run(want, trainable)) <= 1e-4
        assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(want[1]))
    assert set(trainable) == {*case.weights, "shared:tied-t"}


def test_merge_reads_the_leading_part():
    case = CASES["linen_scan"]
    fn, params, args, _ = case.built
    adapt = lj.adapt(lj.sites(fn, params, *args), probe.rules(case.weights, Tied()))
    trainable, frozen = probe.init(adapt, params)
    slot = adapt.slots["shared:tied-t"]
    sizes = [probe.sizes(w, probe.leaves(params)[path].shape)[1:] for path, w in case.weights.items()]
    assert (slot.n_in, slot.n_out) == tuple(map(max, zip(*sizes, strict=True)))
    assert len(set(sizes)) > 1, "the case has no teeth"
    assert trainable["shared:tied-t"]["A"].shape == (slot.n_in, 3)
    assert probe.error(adapt.merge(trainable, frozen), merged(case.weights, params, trainable, frozen)) <= 1e-6


PARAMS = {n: normal(4, *s, scale=1 / math.sqrt(s[0])) for n, s in SHAPES.items()}
X = normal(2, 25, D)  # rows and tokens are no size of a weight
RANK = 5


def scanned(params: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jax.lax.scan(lambda x, p: (layer(p, x), None), x, params)[0] ** 2)


def test_a_scan_has_no_copy_of_a_shared_factor_per_layer():
    """Nothing of the size of A or B has a layer dimension; of the size of A or B there is nothing but themselves, their
    leading parts, and A's gradient."""
    adapt = lj.adapt(lj.sites(scanned, PARAMS, X), [(".*", Tied(RANK))])
    trainable, frozen = jax.eval_shape(adapt.init, jax.random.key(0), PARAMS)

    def loss(t: Any, f: Any) -> jax.Array:
        return lj.lift(scanned, strict=True)(adapt.bind(t, f), X)

    program = jaxprs.trace(jax.value_and_grad(loss), trainable, frozen).jaxpr
    factors = [(n, RANK) for n in (D, F)]
    found = [(name, shape) for name, shape in jaxprs.shapes(program)
             if sorted(shape) in [sorted((4, *f)) for f in factors]]
    assert found == []
    made = {name for name, shape in jaxprs.shapes(program) if sorted(shape) in [sorted(f) for f in factors]}
    assert "dot_general" in made, "the gradient of A"
    assert made <= {"dot_general", "gather", "scatter-add", "add", "add_any", "broadcast_in_dim", "transpose", "scan",
                    "jit", "convert_element_type", "split"}  # split: the gradient of several sites' A in one product


def test_products_of_frozen_shared_factors_by_hand():
    """Multiply-adds of value_and_grad: x A and h B forward, as many backward, none for the gradient of a factor."""
    adapt = lj.adapt(lj.sites(scanned, PARAMS, X), [(".*", Tied(RANK))])
    trainable, frozen = jax.eval_shape(adapt.init, jax.random.key(0), PARAMS)

    def dots(fn: Any, *args: Any) -> int:
        total = 0
        for eqn in jaxprs.equations(jaxprs.trace(jax.grad(fn), *args).jaxpr):
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(
                    eqn.invars[0].aval.shape[i] for i in contracted)
        return total  # of one layer: the body of a scan is one jaxpr

    own = {path: adapter for path, adapter in trainable.items() if not path.startswith("shared:")}
    a = {path: arrays for path, arrays in trainable.items() if path.startswith("shared:")}
    lifted = dots(lambda own, a, f: lj.lift(scanned, strict=True)(adapt.bind({**own, **a}, f), X), own, a, frozen)
    plain = dots(lambda x, p: scanned(p, x), jax.ShapeDtypeStruct(X.shape, X.dtype), PARAMS)
    assert lifted == plain + sum(2 * 2 * ROWS * RANK * (n_in + n_out) for n_in, n_out in SHAPES.values())


def test_slots_appear_in_labels_counts_and_the_table():
    sites = lj.sites(scanned, PARAMS, X)
    adapt = lj.adapt(sites, [("query|key", Tied(RANK, name="qk")), ("up", Tied(2, name="up")), (".*", Tied(RANK))])
    trainable, frozen = adapt.shapes
    sizes = {"shared:tied-qk": (D, D), "shared:tied-up": (D, F), "shared:tied-t": (F, D)}
    assert {k: (s.n_in, s.n_out) for k, s in adapt.slots.items()} == sizes
    assert adapt.labels["shared:tied-t"] == {"A": "a"}
    assert adapt.labels["query"] == TiedAdapter(None, None, "e", "vector")
    assert jax.tree.structure(adapt.labels) == jax.tree.structure(trainable)
    shared = {k: {leaf: x.shape for leaf, x in arrays.items()} for k, arrays in frozen.shared.items()}
    assert shared == {"shared:tied-qk": {"B": (RANK, D)}, "shared:tied-up": {"B": (2, F)},
                      "shared:tied-t": {"B": (RANK, D)}}
    each = sum(4 * ((2 if n == "up" else RANK) + n_out) for n, (_, n_out) in SHAPES.items())
    assert adapt.count() == each + RANK * D + 2 * D + RANK * F
    table, base = re.sub(" +", " ", str(adapt)), sum(x.size for x in PARAMS.values())
    assert f"shared:tied-t Tied 5 {RANK * F} {100 * RANK * F / base:.3f} read by 3 weights" in table


def test_many_adapters_read_one_projection_under_vmap():
    adapt = lj.adapt(lj.sites(scanned, PARAMS, X), [(".*", Tied(RANK))])
    trainable, frozen = probe.init(adapt, PARAMS)
    several = {path: jax.tree.map(lambda x: jnp.stack([x, x / 2]), adapter) for path, adapter in trainable.items()
               if not path.startswith("shared:")}
    a = {"shared:tied-t": trainable["shared:tied-t"]}

    def loss(own: Any) -> jax.Array:
        return lj.lift(scanned, strict=True)(adapt.bind({**own, **a}, frozen), X)

    got = jax.jit(jax.vmap(loss))(several)
    one = jax.jit(loss)
    want = [one(jax.tree.map(lambda x, i=i: x[i], several)) for i in (0, 1)]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert abs(got[0] - got[1]) > 0.01 * abs(got[0])


def test_a_traced_scale_does_not_copy_a_shared_factor():
    """Many runs in one program: the scale is an array per layer, A and B are one array each."""
    site = lj.sites(scanned, PARAMS, X)["query"]
    a, b = normal(D, RANK), normal(RANK, D)
    term = aligned(site, Factors(a, b, s=jnp.arange(4.0)))
    assert term.a.stored is a
    assert term.b.stored is b
    np.testing.assert_array_equal(term.e.array, np.arange(4.0)[:, None] * np.ones(RANK))
