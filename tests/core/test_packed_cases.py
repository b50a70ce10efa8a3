"""Every model of the table on a quantised base, lifted, against itself on the dense form of that base."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import lorajax as lj
from lorajax import quant

from . import probe
from .models import Case
from .test_lift_cases import FACTORED, objective

QUICK = {"linen_scan_axis_1", "raw_ragged_dot", "linen_conv", "linen_tied", "shard_map_fsdp", "raw_lookup_modes"}


def cases() -> list[object]:
    return [pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow) for case in FACTORED]


@pytest.mark.parametrize("case", cases())
def test_a_quantised_base_is_its_dense_form(case: Case):
    """Int8, one scale for each output unit, fits a weight of any shape; a row that is sharded needs shorter blocks."""
    form = quant.Int8(block=2 if case.mesh or case.name.startswith("shard_map") else 0)
    with case.scope():
        built = case.built
        sites = lj.sites(built.fn, built.params, *built.args)
        packed = quant.plan(sites, [(rule, form) for rule, _ in probe.rules(case.weights)]).quantize(built.params)
        adapt = lj.adapt(sites, probe.rules(case.weights))
        trainable = probe.adapters(case.weights, built.params)
        frozen = adapt.frozen(packed, {})
        dense = adapt.frozen(jax.tree.map(lj.core.packed.unpacked, packed, is_leaf=lj.core.packed.is_packed), {})
        lifted = lj.lift(built.fn, strict=True)
        run = jax.jit(objective(lambda t, f, *a: lifted(adapt.bind(t, f), *a), case))
        got, want = (run(trainable, base, *built.args) for base in (frozen, dense))
        exact = built.exact is None
        assert probe.error(got[0], want[0]) <= (1e-5 if exact else 0.02)
        assert probe.error(got[1], want[1]) <= (1e-4 if exact else 0.02)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(got))
