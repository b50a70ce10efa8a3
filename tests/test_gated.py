"""A gate of two adapted products is one kernel, which adds their updates: run by Pallas's interpreter against numpy and
the plain path; what it replaces; what it leaves alone."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import jaxprs
from core.case import normal
from jax import lax

import lorajax as lj
from experiments import glue, objective
from lorajax import build, config
from lorajax.core import contract, gated, interpret
from lorajax.models import Llama, LlamaConfig
from lorajax.train.run import Run
from lorajax.variants import AdaLoRA, DoRA, LoRA

ROWS, WIDTH, INNER = 32, 24, 128
SHAPES = {"gate": (WIDTH, INNER), "up": (WIDTH, INNER), "down": (INNER, WIDTH)}
X = normal(2, ROWS // 2, WIDTH, seed=7)
HF = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
      "num_key_value_heads": 1, "intermediate_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
      "hidden_act": "silu"}  # fmt: skip


def ffn(params: Any, x: jax.Array, act: Any = jax.nn.silu) -> jax.Array:
    return x + (act(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def adapted(variant: Any, targets: str = ".*", fn: Any = ffn, dtype: Any = jnp.float32, wide: bool = False) -> Any:
    """(base weights, adapters, function of (kernels, adapters, x)). wide: weights of `dtype`'s numbers in float32."""
    params = {name: normal(*shape, seed=i, scale=0.3).astype(dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    params = jax.tree.map(jnp.float32, params) if wide else params
    adapt = lj.adapt(lj.sites(fn, params, X.astype(params["gate"].dtype)), [(targets, variant)])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda x: x + normal(*x.shape, seed=x.size, scale=0.1), trainable)

    def run(kernels: str, t: Any, x: jax.Array) -> jax.Array:
        return lj.lift(fn, strict=True, kernels=kernels)(adapt.bind(t, frozen), x)

    return params, trainable, run


def slopes(fn: Any) -> Any:
    return jax.grad(lambda t, x: jnp.sum(jnp.sin(fn(t, x).astype(jnp.float32))), (0, 1))


def same(found: Any, wanted: Any, tol: float = 2e-5) -> None:
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol * max(1.0, float(jnp.abs(b).max())))


def kernels(fn: Any, *args: Any) -> list[str]:
    return [eqn.primitive.name for eqn in jaxprs.equations(jaxprs.trace(fn, *args))
            if eqn.primitive.name == "pallas_call"]  # fmt: skip


def test_numbers() -> None:
    params, t, run = adapted(LoRA(rank=4, alpha=6.0))
    gate, up, down = (np.float64(params[n]) + 1.5 * np.float64(t[n].A) @ np.float64(t[n].B) for n in SHAPES)
    x = np.float64(X)
    g = x @ gate
    np.testing.assert_allclose(run("interpret", t, X), x + (g / (1 + np.exp(-g)) * (x @ up)) @ down, rtol=2e-5,
                               atol=2e-5)


@pytest.mark.parametrize(("variant", "targets"), [
    (LoRA(rank=4), ".*"), (LoRA(rank=20), ".*"), (LoRA(rank=4), "gate|up"), (DoRA(LoRA(rank=4)), ".*"),
    (AdaLoRA(), ".*"), (LoRA(rank=2, freeze_a=True), ".*"),
])  # fmt: skip
def test_results_and_gradients_are_the_plain_path_s(variant: Any, targets: str) -> None:
    _, t, run = adapted(variant, targets)
    same(run("interpret", t, X), run("", t, X))
    same(*(slopes(partial(run, k))(t, X) for k in ("interpret", "")))


def test_two_kernels_take_the_place_of_the_updates() -> None:
    """Forward and back; what is as large as a gate is left to the three products with weights, two of them forward,
    and nothing else reads x of the next product again."""
    _, t, run = adapted(LoRA(rank=4))

    def wide(k: str) -> int:
        found = jaxprs.equations(jaxprs.trace(slopes(partial(run, k)), t, X))
        return sum(e.primitive.name == "dot_general" and e.outvars[0].aval.size == ROWS * INNER for e in found)

    assert len(kernels(slopes(partial(run, "interpret")), t, X)) == 2
    assert (wide("interpret"), wide("")) == (3, 6)


def test_sixteen_bits() -> None:
    """As near to float32, on the same numbers, as the plain path."""
    for variant in (LoRA(rank=4), DoRA(LoRA(rank=4))):
        near(variant, ".*", "interpret", X)


def near(variant: Any, targets: str, k: str, x: jax.Array) -> None:
    _, t, run = adapted(variant, targets, dtype=jnp.bfloat16)
    _, _, exact = adapted(variant, targets, dtype=jnp.bfloat16, wide=True)
    x = x.astype(jnp.bfloat16)
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        want = jax.tree.leaves(jax.jit(slopes(partial(exact, "")))(t, jnp.float32(x)))
        both = [jax.tree.leaves(jax.jit(slopes(partial(run, how)))(t, x)) for how in (k, "")]
    for right, ours, plain in zip(want, *both, strict=True):
        off = [float(jnp.sqrt(jnp.mean(jnp.square(jnp.float32(y) - right)))) for y in (ours, plain)]
        assert off[0] <= 1.2 * off[1]


def test_under_vmap_and_checkpoint() -> None:
    _, t, run = adapted(DoRA(LoRA(rank=4)))
    many = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), t)
    xs = jnp.stack([X, X + 1])
    same(*(jax.vmap(slopes(partial(run, k)))(many, xs) for k in ("interpret", "")))
    again = jax.checkpoint(partial(run, "interpret"))
    same(slopes(again)(t, X), slopes(partial(run, ""))(t, X))


def other_silu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x + 1)


other_silu.__name__ = "silu"


@jax.custom_vjp
def own_slope(x: jax.Array) -> jax.Array:
    return x * lax.logistic(x)


own_slope.defvjp(lambda x: (own_slope(x), None), lambda _, by: (by,))


def thrice(x: jax.Array) -> jax.Array:
    return lax.scan(lambda c, _: (c * lax.logistic(c), None), x, length=3)[0]


def twice(params: Any, x: jax.Array) -> jax.Array:
    up = x @ params["up"]
    return (jax.nn.silu(x @ params["gate"]) * up + up) @ params["down"]


def of_both(params: Any, x: jax.Array) -> jax.Array:
    gate, up = x @ params["gate"], x @ params["up"]
    return (jax.jit(lambda a, b: lax.logistic(a) * b)(gate, gate + 1) * up) @ params["down"]


@pytest.mark.parametrize(("fn", "targets", "rows"), [
    (ffn, "up", ROWS), (ffn, "gate|down", ROWS), (ffn, ".*", 5), (partial(ffn, act=jax.nn.gelu), ".*", ROWS),
    (partial(ffn, act=jax.jit(other_silu)), ".*", ROWS), (twice, ".*", ROWS), (partial(ffn, act=own_slope), ".*", ROWS),
    (partial(ffn, act=thrice), ".*", ROWS), (partial(ffn, act=jax.jit(lambda x: lax.logistic(x) * 2.0)), ".*", ROWS),
    (of_both, ".*", ROWS),
])  # fmt: skip
@pytest.mark.parametrize("variant", [LoRA(rank=4), DoRA(LoRA(rank=4))])
def test_what_it_leaves_alone(fn: Any, targets: str, rows: int, variant: Any) -> None:
    _, t, run = adapted(variant, targets, fn)
    x = X.reshape(-1, WIDTH)[:rows]
    assert not kernels(partial(run, "interpret"), t, x)
    same(run("interpret", t, x), run("", t, x), 1e-6)
    same(*(slopes(partial(run, k))(t, x) for k in ("interpret", "")), 1e-6)


def test_inside_shard_map() -> None:
    """Pallas's interpreter takes no data there whose axes JAX checks."""
    mesh = jax.make_mesh((1,), ("data",))

    def mapped(params: Any, x: jax.Array) -> jax.Array:
        spec = jax.sharding.PartitionSpec()
        return jax.shard_map(ffn, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(params, x)

    _, t, run = adapted(LoRA(rank=4), fn=mapped)
    same(run("interpret", t, X), run("", t, X), 1e-6)


def test_ranks_that_are_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the next product: its x A is a product of its own. Of a side: it is added up (a rank that no other test here
    has, for rules are traced once for equal shapes)."""
    for module, rank, made in ((interpret, 4, 1), (contract, 6, 0)):
        with monkeypatch.context() as m:
            m.setattr(module, "WIDEST", 3)
            _, t, run = adapted(LoRA(rank=rank))
            assert len(kernels(partial(run, "interpret"), t, X)) == made
            same(*(slopes(partial(run, k))(t, X) for k in ("interpret", "")))


def test_on_a_machine_without_such_a_gpu_it_is_the_plain_path() -> None:
    _, t, run = adapted(LoRA(rank=4), dtype=jnp.bfloat16)
    assert jax.default_backend() == "gpu" or not kernels(partial(run, "triton"), t, X.astype(jnp.bfloat16))


@pytest.mark.parametrize("how", [{}, {"scan_layers": True, "remat": "full"}, {"remat": "attention"}])
def test_in_a_decoder(how: dict[str, Any]) -> None:
    net = Llama(LlamaConfig.from_hf(HF, **how))
    ids = jnp.arange(64).reshape(4, 16) % 40
    params = net.init(jax.random.key(0), ids)
    adapt = lj.adapt(lj.sites(net.apply, params, ids), [("all-linear", LoRA(rank=2))])
    t, frozen = adapt.init(jax.random.key(1), params)
    t = jax.tree.map(lambda x: x + normal(*x.shape, seed=x.size, scale=0.1), t)

    def loss(k: str, t: Any, _: Any) -> jax.Array:
        hidden = lj.lift(partial(net.apply, method="hidden"), strict=True, kernels=k)
        return hidden(adapt.bind(t, frozen), ids)

    found = kernels(jax.jit(slopes(partial(loss, "interpret"))), t, jnp.zeros(()))
    layers = 1 if how.get("scan_layers") else 2
    assert len(found) == layers * (3 if how else 2)
    same(*(jax.jit(slopes(partial(loss, k)))(t, jnp.zeros(())) for k in ("interpret", "")), 1e-4)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"kernels='tritn' is unknown; there are '', 'triton', 'interpret'"):
        lj.lift(ffn, kernels="tritn")


def test_an_older_run_goes_on(tmp_path: Any) -> None:
    """Its config says nothing of kernels, on which no number depends."""
    now = config.to_dict(config.load("configs/e2e.py"))
    before = {k: v for k, v in now.items() if k != "kernels"} | {
        "quant": {k: v for k, v in now["quant"].items() if k != "once"}}  # fmt: skip
    for c in (before, now):
        with Run(tmp_path, c, ignore=glue.FREE, tensorboard=False):
            pass


def test_language_models_pass_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(objective.lj, "lift", lambda fn, **how: given.append(how["kernels"]) or fn)
    c: Any = config.load("configs/e2e.py")
    objective.make_sft(c, SimpleNamespace(net=Llama(LlamaConfig.from_hf(HF)), head="head"), SimpleNamespace(plan={}))
    assert set(given) == {"triton"}


def test_the_config_takes_it_on_one_device_only() -> None:
    c: Any = config.load("configs/e2e.py")
    assert build.kernels(c) == "triton"
    c.mesh.data = 2
    assert build.kernels(c) == ""
    c.mesh.data, c.kernels = 1, "auo"
    with pytest.raises(config.ConfigError, match="did you mean 'auto'"):
        build.kernels(c)


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "targets"), [
    (LoRA(rank=16), ".*"), (LoRA(rank=4), "gate|up"), (DoRA(LoRA(rank=20)), ".*")])  # fmt: skip
def test_on_a_gpu(variant: Any, targets: str) -> None:
    """The compiled kernels are as near to float32 as the plain path."""
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    assert gated.fits(*[jax.ShapeDtypeStruct((1024, INNER), jnp.bfloat16)] * 2, "triton")
    near(variant, targets, "triton", jnp.tile(X, (4, 8, 1)) + normal(8, 128, WIDTH, seed=3))
