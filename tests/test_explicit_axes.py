"""Meshes whose axes are explicit (shardings are part of types): starts, updates without factors, mixed batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorajax as lj
from lorajax.core.variant import Variant
from lorajax.variants import IA3, OFT, DoRA, KaSA, LoHa, LoRA, LoRAXS, MiCA, SHiRA

draw = np.random.default_rng(0)
PARAMS = {name: np.float32(draw.normal(size=(16, 16)) / 4) for name in ("up", "down")}
SPECS = {"up": P(None, "model"), "down": P("model", None)}
X = np.float32(draw.normal(size=(4, 5, 16)))


def net(p: Any, x: jax.Array, at: Any = None) -> jax.Array:
    return jnp.einsum("bti,io->bto", jnp.tanh(x @ p["up"]), p["down"], out_sharding=at)


SITES = lj.sites(net, PARAMS, X)


def spread(mesh: jax.sharding.Mesh) -> tuple[dict[str, jax.Array], jax.Array]:
    """The base's weights by columns and rows, and the examples."""
    return ({name: jax.device_put(w, NamedSharding(mesh, SPECS[name])) for name, w in PARAMS.items()},
            jax.device_put(X, NamedSharding(mesh, P("data"))))


def same(got: Any, want: Any) -> None:
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-5 * np.abs(two).max())


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


@pytest.mark.parametrize("variant", [LoRA(2, initializer="pissa", fold=True), LoRA(2, initializer="olora"), LoRAXS(2),
                                     MiCA(2), KaSA(2), LoHa(2), OFT(4), SHiRA(2)], ids=lambda v: type(v).__name__)
def test_starts_and_gradients(variant: Variant, mesh: jax.sharding.Mesh) -> None:
    adapt = lj.adapt(SITES, [(".*", variant)])

    def run(key: jax.Array, params: Any, x: jax.Array, at: Any = None) -> Any:
        trainable, frozen = adapt.init(key, params)
        fn = lj.lift(lambda p, x: net(p, x, at))
        return jax.value_and_grad(lambda tr: jnp.sum(jnp.sin(fn(adapt.bind(tr, frozen), x))))(trainable)

    want = jax.jit(run)(jax.random.key(0), PARAMS, X)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *args: run(*args, P("data")))(jax.random.key(0), *spread(mesh))
    same(got, want)


@pytest.mark.parametrize("variant", [DoRA(LoRA(2)), IA3("out")], ids=["dora", "ia3"])
def test_a_mixed_batch(variant: Variant, mesh: jax.sharding.Mesh) -> None:
    """Rows spread over `data`; a row's arrays are whole within it."""
    adapt, index = lj.adapt(SITES, [(".*", variant)]), np.array([0, 1, -1, 2])
    _, frozen = adapt.init(jax.random.key(0), PARAMS)
    shapes = adapt.shapes[0]
    many = jax.tree.map(lambda x: jnp.float32(draw.normal(size=(3, *x.shape))), shapes)

    def run(many: Any, frozen: Any, x: jax.Array, at: Any = None) -> Any:
        def total(many: Any) -> jax.Array:
            bank = lj.bank(adapt, many, frozen, params=frozen.base)
            return jnp.sum(jnp.sin(lj.mixed(lambda p, x: net(p, x, at), strict=True)(bank, index, x)))

        return jax.value_and_grad(total)(many)

    want = jax.jit(run)(many, frozen, X)
    with jax.set_mesh(mesh):
        base, x = spread(mesh)
        many, rest = jax.device_put((many, frozen._replace(base={})), NamedSharding(mesh, P()))
        got = jax.jit(lambda *args: run(*args, P(None)))(many, rest._replace(base=base), x)
    same(got, want)
