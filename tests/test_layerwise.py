"""The quantised weights of a rematerialised layer: how often each is unpacked, and what lives between the passes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import jaxprs

import lorajax as lj
from lorajax import quant
from lorajax.quant import NF4
from lorajax.quant.dynamic import dynamic_map
from lorajax.variants import DoRA

LAYERS, WIDTH, TOKENS = 2, 64, 5
KEEP = jax.checkpoint_policies.dots_saveable


def layer(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def unrolled(p: Any, x: jax.Array, remat: Any = jax.checkpoint) -> jax.Array:
    for i in range(LAYERS):
        x = remat(layer)({name: p[f"{name}_{i}"] for name in ("up", "down")}, x)
    return x


def scan(p: Any, x: jax.Array) -> jax.Array:
    step = jax.checkpoint(layer, prevent_cse=False)
    return jax.lax.scan(lambda x, w: (step(w, x), None), x, p)[0]


STYLES = {"unrolled": unrolled, "scan": scan}


def setting(style: str, form: Any = None, variant: Any = None, remat: Any = None) -> tuple[Any, Any, Any, Any, Any]:
    """(lift with its keywords, adapt, trainable with noise, frozen on a quantised base, x)"""
    draw, fn = np.random.default_rng(0), STYLES[style]
    if remat is not None:
        fn = functools.partial(fn, remat=remat)
    p = {name: jnp.float32(draw.normal(size=(LAYERS, WIDTH, WIDTH)) / 8) for name in ("up", "down")}
    if style == "unrolled":
        p = {f"{name}_{i}": w[i] for name, w in p.items() for i in range(LAYERS)}
    x = jnp.float32(draw.normal(size=(TOKENS, WIDTH)))
    sites = lj.sites(fn, p, x)
    adapt = lj.adapt(sites, [(".*", variant or lj.LoRA(rank=2))])
    trainable, frozen = adapt.init(jax.random.key(0), quant.plan(sites, [(".*", form or NF4())]).quantize(p))
    trainable = jax.tree.map(lambda x: x + jnp.float32(0.1 * draw.normal(size=x.shape)), trainable)
    return functools.partial(lj.lift, fn, strict=True), adapt, trainable, frozen, x


def gradient(lifted: Any, adapt: Any, x: jax.Array, **how: Any) -> Any:
    return jax.value_and_grad(lambda tr, frozen: jnp.sum(jnp.square(lifted(**how)(adapt.bind(tr, frozen), x))))


def unpackings(program: Any, *args: Any) -> int:
    """How often a weight is unpacked: a lookup of the first and one of the second codes of its bytes each."""
    found = [eqn.invars[0].aval.shape for eqn in jaxprs.equations(jax.make_jaxpr(program)(*args))
             if eqn.primitive.name == "gather"]
    return found.count((16,)) // 2


@pytest.mark.parametrize("once, backward", [("", 3), (".*up.*", 2), (".*", 2)])
def test_a_layer_unpacks_a_weight_once_or_twice_in_its_backward_pass(once: str, backward: int) -> None:
    """Recomputed is `up`, for `down`'s product is the layer's result; the derivative by the input reads both."""
    lifted, adapt, trainable, frozen, x = setting("scan")
    step = gradient(lifted, adapt, x, once=once)
    assert unpackings(lambda tr, f: lifted(once=once)(adapt.bind(tr, f), x), trainable, frozen) == 2
    assert unpackings(step, trainable, frozen) == 2 + backward


def test_as_often_where_more_is_kept_than_a_layers_input() -> None:
    """A policy may keep what was unpacked in the forward pass, so none of these weights is unpacked once."""
    for remat in (functools.partial(jax.checkpoint, policy=KEEP), lambda f: f):
        lifted, adapt, trainable, frozen, x = setting("unrolled", remat=remat)
        counts = {unpackings(gradient(lifted, adapt, x, once=once), trainable, frozen) for once in ("", ".*")}
        assert len(counts) == 1

        def saved(tr: Any, f: Any, lifted: Any = lifted, adapt: Any = adapt, x: Any = x) -> Any:
            return jax.vjp(lambda tr: lifted(once=".*")(adapt.bind(tr, f), x), tr)[1]

        kept = jax.tree.leaves(jax.eval_shape(saved, trainable, frozen))
        assert not [s for s in kept if jnp.issubdtype(s.dtype, jnp.floating) and s.size >= WIDTH * WIDTH]


@pytest.mark.parametrize("style", STYLES)
def test_nothing_dense_lives_from_the_forward_to_the_backward_pass(style: str) -> None:
    lifted, adapt, trainable, frozen, x = setting(style)

    def saved(tr: Any, f: Any) -> Any:
        return jax.vjp(lambda tr: lifted(once=".*")(adapt.bind(tr, f), x), tr)[1]

    kept = jax.tree.leaves(jax.eval_shape(saved, trainable, frozen))
    assert not [s for s in kept if jnp.issubdtype(s.dtype, jnp.floating) and s.size >= WIDTH * WIDTH]


@pytest.mark.parametrize("style, form", [("unrolled", NF4()), ("scan", NF4()), ("unrolled", NF4(double=False)),
                                         ("scan", quant.FP4()), ("unrolled", quant.Int8()), ("scan", quant.Q4_1())])
def test_numbers_do_not_depend_on_it(style: str, form: Any) -> None:
    variant = DoRA(lj.LoRA(rank=2), detach=False) if style == "scan" else None
    lifted, adapt, trainable, frozen, x = setting(style, form, variant)
    dense = frozen._replace(base={path: w.dense() for path, w in frozen.base.items()})
    want = jax.jit(gradient(lifted, adapt, x))(trainable, dense)
    for once in (".*", "up.*"):
        got = jax.jit(gradient(lifted, adapt, x, once=once))(trainable, frozen)
        for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=2e-6 * float(jnp.abs(two).max()))


def test_the_weights_of_a_layer_read_the_same_tables_which_wait_for_its_input() -> None:
    """One barrier holds the tables and x: what XLA's multi-output fusion needs to unpack several in one kernel."""
    lifted, adapt, trainable, frozen, x = setting("unrolled")
    found = jax.make_jaxpr(lambda tr, f: lifted()(adapt.bind(tr, f), x))(trainable, frozen)
    (inner, *others) = [eqn.params["jaxpr"] for eqn in jaxprs.equations(found)
                        if eqn.primitive.name in ("checkpoint", "remat2")]
    assert len(others) == LAYERS - 1
    barriers = [eqn for eqn in jaxprs.equations(inner) if eqn.primitive.name == "optimization_barrier"]
    shapes = [sorted(v.aval.shape for v in eqn.invars) for eqn in barriers]
    own = sorted([(16,), dynamic_map().shape, x.shape])
    assert [s for s in shapes if (16,) in s] == [own]
    (tied,) = [eqn for eqn, s in zip(barriers, shapes, strict=True) if s == own]
    assert not [eqn for eqn in jaxprs.equations(inner) if eqn.primitive.name == "xor"]  # nothing else to wait for
    assert len({id(v) for v in tied.outvars}) == 3


def test_members_of_a_sweep_share_what_is_unpacked() -> None:
    lifted, adapt, trainable, frozen, x = setting("unrolled")
    two = jax.tree.map(lambda x: jnp.stack([x, -x]), trainable)
    side_by_side = jax.vmap(gradient(lifted, adapt, x, once=".*"), in_axes=(0, None))
    made = [s for _, s in jaxprs.shapes(jax.make_jaxpr(side_by_side)(two, frozen))]
    assert (WIDTH, WIDTH) in made and (2, WIDTH, WIDTH) not in made


def test_on_a_mesh_by_hand() -> None:
    lifted, adapt, trainable, frozen, x = setting("unrolled")
    mesh, spec = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.P
    x = jnp.concatenate([x] * 4)

    def loss(tr: Any, f: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(lifted(once=".*")(adapt.bind(tr, f), x)))

    def by_hand(tr: Any, f: Any, x: jax.Array) -> jax.Array:
        return jax.lax.psum(loss(tr, f, x), "data")

    split = jax.shard_map(by_hand, mesh=mesh, in_specs=(spec(), spec(), spec("data")), out_specs=spec())
    got, want = (jax.jit(jax.grad(fn))(trainable, frozen, x) for fn in (split, loss))
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_what_is_no_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"once='\*up' is not a regular expression.*'\.\*' is every weight"):
        lj.lift(jnp.sin, once="*up")
