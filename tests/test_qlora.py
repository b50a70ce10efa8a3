"""A quantised base from a config."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from experiments import glue, objective
from lorajax import build, config
from lorajax.core.packed import unpacked
from lorajax.data import TASKS
from lorajax.models import Bert, BertConfig
from lorajax.quant import NF4, Int8, Quantized
from lorajax.shard.mesh import MeshError, make_mesh
from lorajax.shard.placement import LOCAL, Placement


class Model(NamedTuple):
    variables: Any
    fresh: tuple[str, ...] = ("head",)
    fingerprint: str = "before"
    place: Placement = LOCAL


def function(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ p["up"]) @ p["down"]) @ p["head"]


def world(*words: str, variant: Any = None) -> tuple[Any, Any, Model]:
    draw = np.random.default_rng(0)
    sizes = {"up": (64, 128), "down": (128, 64), "head": (64, 4)}
    model = Model({k: jnp.float32(draw.normal(size=s) / 8) for k, s in sizes.items()})
    sites = lj.sites(function, model.variables, jnp.ones((2, 64)))
    adapt = lj.adapt(sites, [("head", lj.Full()), ("all-linear", variant or lj.LoRA(rank=4))])
    return config.parse(["--config=configs/lora.py", *words]).config, adapt, model


def test_the_base_is_quantised_and_the_head_is_not() -> None:
    c, adapt, model = world("--config.quant.format=nf4")
    new, made = build.quantized(c, adapt, model)
    assert {k: type(w) for k, w in new.variables.items() if k != "head"} == {"up": Quantized, "down": Quantized}
    assert new.variables["up"].format == NF4()
    assert new.variables["head"] is model.variables["head"]
    assert new.fingerprint != "before" and made == {}
    other, _ = build.quantized(world("--config.quant.format=int8", "--config.quant.targets=up")[0], adapt, model)
    assert other.variables["up"].format == Int8() and other.variables["down"] is model.variables["down"]
    assert build.quantized(world()[0], adapt, model) == (model, {})


def test_a_mesh_changes_no_number() -> None:
    rules = ((".*up", ("fsdp", "tensor")), (".*down", (("tensor", "fsdp"), None)))
    place = Placement(make_mesh({"fsdp": 2, "tensor": 4}), rules)
    c, adapt, model = world("--config.quant.format=nf4", "--config.quant.block=16")
    dense = jax.device_put(model.variables, place.base(model.variables))
    here, there = (build.quantized(c, adapt, m)[0].variables
                   for m in (model, model._replace(variables=dense, place=place)))  # fmt: skip
    lies = {name: {x.sharding.shard_shape(x.shape) for x in (w.codes, w.scales[0])}
            for name, w in there.items() if name != "head"}  # fmt: skip
    assert lies == {"up": {(128 // 4, 64 // 2 // 2), (128 // 4, 64 // 16 // 2)},
                    "down": {(64, 128 // 2 // 8), (64, 128 // 16 // 8)}}  # fmt: skip
    x, lifted = jnp.ones((8, 64)), lj.lift(function, strict=True)

    def run(params: Any, rows: Any) -> Any:
        trainable, frozen = jax.jit(adapt.init, out_shardings=rows.adapters(adapt))(jax.random.key(0), params)
        step = jax.jit(jax.value_and_grad(lambda tr: jnp.sum(lifted(adapt.bind(tr, frozen), x) ** 2)))
        return step(trainable)

    for one, two in zip(jax.tree.leaves(run(here, LOCAL)), jax.tree.leaves(run(there, place)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    # Moved to another mesh, and back to one device.
    for elsewhere, devices in ((Placement(make_mesh({"fsdp": 4}), rules), 4), (LOCAL, 1)):
        moved = elsewhere.put(there)
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(moved)} == {devices}
        for one, two in zip(jax.tree.leaves(run(here, LOCAL)), jax.tree.leaves(run(moved, elsewhere)), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    whole_rows = world("--config.quant.format=int8")[0]
    with pytest.raises(MeshError, match="down: .*cut inside a block of 128: shard another dimension, or fewer ways"):
        build.quantized(whole_rows, adapt, model._replace(variables=dense, place=place))


def test_what_a_config_may_not_ask() -> None:
    for words, error in ((("--config.quant.format=nf5",), "nf5.*did you mean"),
                         (("--config.quant.format=nf4", "--config.controller.name=relora"), "ReLoRA merges into")):
        with pytest.raises(config.ConfigError, match=error):
            build.quantized(*world(*words))
    with pytest.raises(ValueError, match="block=60 does not divide"):
        build.quantized(*world("--config.quant.format=nf4", "--config.quant.block=60"))


def test_loftq_from_a_config_starts_nearer_to_the_weights() -> None:
    c, adapt, model = world("--config.quant.format=nf4", "--config.quant.double=false",
                            variant=lj.LoRA(rank=16, initializer="loftq"))
    new, made = build.quantized(c, adapt, model)
    trainable, frozen = adapt.init(jax.random.key(0), new.variables, made)
    w, merged = model.variables["up"], adapt.merge(trainable, frozen)["up"]
    plain = unpacked(build.quantized(c, world()[1], model)[0].variables["up"])
    assert np.linalg.norm(merged - w) < 0.9 * np.linalg.norm(plain - w)


def test_the_recipe() -> None:
    c = config.load("configs/qlora.py")
    assert (c.variant.rank, c.variant.alpha, c.variant.dropout, c.args.targets) == (64, 16.0, 0.1, "all-linear")
    assert (c.lr, c.schedule, c.warmup, c.clip, c.batch, c.weight_decay) == (2e-4, "constant", 0.03, 0.3, 16, 0.0)
    assert (c.quant.format, c.quant.double, c.quant.block, c.optimizer.name) == ("nf4", True, 0, "adamw_8bit")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "vera", "dylora"])
def test_a_run(method: str, tmp_path: Any) -> None:
    from experiments import lm

    arg = f"variant={method},smoke"
    lm.main([f"--config=configs/qlora.py:{arg}", "--config.generate=-1", f"--workdir={tmp_path}"])
    assert list(tmp_path.rglob("summary.json"))


@pytest.mark.slow
def test_the_benchmark_in_small() -> None:
    from experiments.bench.quant import main

    rows = main(["--shape=tiny", "--batch=1", "--tokens=8", "--steps=1"])
    assert [row["base"] for row in rows] == ["nf4", "bfloat16"]
    assert rows[0]["base GiB"] < 0.6 * rows[1]["base GiB"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=0.05)


def test_what_is_dequantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's `once` reaches the lifted model of every pass that trains."""
    asked: list[Any] = []
    monkeypatch.setattr(lj, "lift", lambda fn, once=None, **_: asked.append(once) or fn)
    c = config.load("configs/qlora.py:smoke")
    model: Any = SimpleNamespace(net=SimpleNamespace(apply=lambda *_: None, config=SimpleNamespace()), head="")
    plan: Any = SimpleNamespace(plan={})
    objective.make_losses(c, model, plan, True)
    assert asked == [".*"] * 4
    c = config.load("configs/lora.py")
    c.quant.once = "up"
    glue.make_loss(Bert(BertConfig()), TASKS["sst2"], c)
    assert asked[4:] == ["up"]
