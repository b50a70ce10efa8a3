"""A model on a quantised base: what lives between the passes, what is sliced, sharded and saved."""

import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from core import jaxprs
from jax.sharding import NamedSharding, PartitionSpec

import lorajax as lj
from lorajax import quant
from lorajax.control import dylora
from lorajax.core.fingerprint import fingerprint
from lorajax.io import quantized
from lorajax.io.tensors import AdapterError, write_tensors
from lorajax.quant import NF4
from lorajax.train.checkpoint import Checkpoints
from lorajax.variants import DoRA

LAYERS, WIDTH, TOKENS = 4, 128, 6


def loop(p: Any, x: jax.Array) -> jax.Array:
    for i in range(LAYERS):
        x = jnp.tanh(x @ p[f"layer_{i}"])
    return x


def scan(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]


def base(style: str) -> dict[str, jax.Array]:
    w = jnp.float32(np.random.default_rng(0).normal(size=(LAYERS, WIDTH, WIDTH)) / np.sqrt(WIDTH))
    return {"layers": w} if style == "scan" else {f"layer_{i}": w[i] for i in range(LAYERS)}


def setting(style: str, variant: lj.Variant, form: Any = None) -> tuple[Any, Any, Any, Any, jax.Array]:
    """(lifted model, adapt, trainable with noise, frozen on a quantised base, x)"""
    fn, p, x = {"loop": loop, "scan": scan}[style], base(style), jnp.ones((TOKENS, WIDTH))
    sites = lj.sites(fn, p, x)
    packed = quant.plan(sites, [(".*", form or NF4(double=False))]).quantize(p)
    adapt = lj.adapt(sites, [(".*", variant)])
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), packed)
    draw = np.random.default_rng(1)
    trainable = jax.tree.map(lambda x: x + jnp.float32(0.1 * draw.normal(size=x.shape)), trainable)
    return lj.lift(fn, strict=True), adapt, trainable, frozen, x


def widened(frozen: Any) -> Any:
    return frozen._replace(base={path: w.dense() for path, w in frozen.base.items()})


@pytest.mark.parametrize("variant", [lj.LoRA(rank=2), DoRA(lj.LoRA(rank=2), detach=False)], ids=["lora", "dora"])
@pytest.mark.parametrize("style", ["loop", "scan"])
def test_no_dense_weight_lives_from_the_forward_to_the_backward_pass(style: str, variant: Any) -> None:
    fn, adapt, trainable, frozen, x = setting(style, variant)

    def residuals(frozen: Any, model: Any = fn) -> int:
        """Float elements, beyond the frozen arrays themselves, that the backward pass is handed."""
        def forward(tr: Any, frozen: Any) -> Any:
            return jax.vjp(lambda tr: model(adapt.bind(tr, frozen), x), tr)[1]

        saved = jax.eval_shape(forward, trainable, frozen)
        return sum(s.size for s in jax.tree.leaves(saved)
                   if jnp.issubdtype(s.dtype, jnp.floating) and WIDTH * WIDTH <= s.size)

    assert residuals(frozen) == 0
    # Teeth: unpacked outside of the rule, every dense weight is handed on.
    plain = lj.lift(loop if style == "loop" else scan)

    def naive(tr: Any, frozen: Any) -> Any:
        return jax.vjp(lambda tr: plain(adapt.bind(tr, widened(frozen)), x), tr)[1]

    saved = jax.eval_shape(naive, trainable, frozen)
    handed = sum(s.size for s in jax.tree.leaves(saved) if s.size >= WIDTH * WIDTH)
    assert handed >= (LAYERS - 1) * WIDTH * WIDTH  # the first needs none


@pytest.mark.parametrize("style", ["loop", "scan"])
def test_a_weight_is_unpacked_when_its_input_is_there_and_no_sooner(style: str) -> None:
    """Else XLA's schedule for 32 layers under remat unpacked them all first: 17.2 in place of 6.2 GiB for an H100. A
    barrier holds a zero that every code is changed by, and no codes: what it holds is copied out of a scanned stack."""
    fn, adapt, trainable, frozen, x = setting(style, lj.LoRA(rank=2))
    found = jax.make_jaxpr(lambda tr, frozen: fn(adapt.bind(tr, frozen), x))(trainable, frozen)
    barriers = [eqn for eqn in jaxprs.equations(found) if eqn.primitive.name == "optimization_barrier"]
    held = [{(v.aval.shape, str(v.aval.dtype)) for v in eqn.invars} for eqn in barriers]
    assert held == [{((), "uint8"), (x.shape, "float32")}] * (LAYERS if style == "loop" else 1)
    changed = [eqn.outvars[0].aval.shape for eqn in jaxprs.equations(found) if eqn.primitive.name == "xor"]
    assert changed == [(WIDTH, WIDTH // 2)] * len(held)

    loss = jax.grad(lambda tr, frozen: jnp.sum(fn(adapt.bind(tr, frozen), x)))
    text = jax.jit(loss).lower(trainable, frozen).as_text()
    lines = [line for line in text.splitlines() if "optimization_barrier" in line]
    assert len(lines) >= 2  # the forward pass and the backward pass; functions that are alike are written once
    assert all("tensor<ui8>" in line and "xui8>" not in line for line in lines)


def test_an_input_is_no_residual_where_no_adapter_reads_it() -> None:
    w = quant.quantize(base("loop")["layer_0"], NF4(double=False))
    twice = lj.lift(lambda p, x: x @ p["w"] @ p["w"], strict=True)
    pull = jax.eval_shape(lambda w, x: jax.vjp(lambda x: twice({"w": w}, x), x)[1], w, jnp.ones((TOKENS, WIDTH)))
    assert {s.shape for s in jax.tree.leaves(pull) if s.size > 1} == {w.codes.shape, w.scales[0].shape}


@pytest.mark.parametrize("variant", [lj.LoRA(rank=2), DoRA(lj.LoRA(rank=2), detach=False)], ids=["lora", "dora"])
def test_a_scanned_stack_is_never_unpacked_whole(variant: Any) -> None:
    fn, adapt, trainable, frozen, x = setting("scan", variant, NF4())
    step = jax.make_jaxpr(jax.grad(lambda tr: jnp.sum(fn(adapt.bind(tr, frozen), x))))(trainable)
    made = [shape for _, shape in jaxprs.shapes(step)]
    assert (WIDTH, WIDTH) in made
    assert not [s for s in made if np.prod(s, dtype=int) >= LAYERS * WIDTH * WIDTH // 2], made


@pytest.mark.parametrize("style", ["loop", "scan"])
def test_values_and_gradients_are_those_of_the_dense_form(style: str) -> None:
    fn, adapt, trainable, frozen, x = setting(style, DoRA(lj.LoRA(rank=2)), NF4())
    run = jax.jit(jax.value_and_grad(lambda tr, frozen: jnp.sum(jnp.sin(fn(adapt.bind(tr, frozen), x)))))
    got, want = run(trainable, frozen), run(trainable, widened(frozen))
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Gradients reach 61: both lie up to 1.3e-6 of an array's largest number beside those of float64.
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=2e-6 * float(jnp.abs(two).max()))


def test_a_weight_without_an_adapter_is_unpacked_too() -> None:
    p, x = base("loop"), jnp.ones((TOKENS, WIDTH))
    packed = quant.plan(lj.sites(loop, p, x), [(".*", NF4())]).quantize(p)
    want = loop({path: w.dense() for path, w in packed.items()}, x)
    np.testing.assert_allclose(jax.jit(lj.lift(loop, strict=True))(packed, x), want, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lj.lift(scan, strict=True))(
        {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *packed.values())}, x), want, atol=1e-5)


SCRIPT = """
import jax, jax.numpy as jnp, lorajax as lj
from lorajax import quant
L, d = 8, 256
def model(p, x):
    for i in range(L):
        x = jnp.tanh(x @ p[str(i)])
    return x
p = {str(i): jax.ShapeDtypeStruct((d, d), jnp.float32) for i in range(L)}
x = jax.ShapeDtypeStruct((8, d), jnp.float32)
sites = lj.sites(model, p, x)
adapt = lj.adapt(sites, [(".*", lj.LoRA(rank=2))])
run = lj.lift(model, strict=True)
for base in (p, jax.eval_shape(quant.plan(sites, [(".*", quant.NF4())]).quantize, p)):
    trainable, frozen = jax.eval_shape(adapt.init, jax.random.key(0), base)
    step = jax.value_and_grad(lambda tr, frozen, x: jnp.sum(run(adapt.bind(tr, frozen), x)))
    found = jax.jit(step).lower(trainable, frozen, x).compile().memory_analysis()
    print(found.argument_size_in_bytes + found.temp_size_in_bytes)
"""


def test_compiled_memory_of_layers_is_that_of_the_codes() -> None:
    """By XLA's own count. Its pipeline for CPUs removes optimization barriers (that for GPUs keeps them until memory is
    planned) and plans for many threads: both are turned off here."""
    flags = "--xla_disable_hlo_passes=cse_barrier_expander --xla_cpu_enable_concurrency_optimized_scheduler=false"
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
                          env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
    dense, packed = map(int, done.stdout.split())
    one = 256 * 256 * 4
    # 8 dense weights against 8 packed ones of 4.13 bits and those that are unpacked just then: two, and their codes
    assert dense - packed >= (8 - 8 * 4.13 / 32 - 3.5) * one


def test_sharded_as_any_weight_and_never_inside_a_block() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    fn, adapt, trainable, frozen, x = setting("scan", lj.LoRA(rank=2), NF4(block=32))
    w = frozen.base["layers"]
    run = jax.jit(jax.value_and_grad(lambda tr, f, x: jnp.sum(jnp.sin(fn(adapt.bind(tr, f), x)))))
    want = run(trainable, frozen, x)
    for spec in (PartitionSpec(None, None, "model"), PartitionSpec(None, "model"), PartitionSpec("data")):
        placed = jax.device_put(w, w.shardings(mesh, spec))
        assert placed.codes.addressable_shards[0].data.size < w.codes.size
        everywhere = NamedSharding(mesh, PartitionSpec())
        got = run(*jax.device_put((trainable, {}, x), everywhere)[:1], frozen._replace(base={"layers": placed}),
                  jax.device_put(x, everywhere))
        for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cut inside a block of 32: shard another dimension"):
        w.shardings(mesh, PartitionSpec(None, ("data", "model")))


@pytest.mark.parametrize("form", [NF4(block=32), quant.Int8(block=32)], ids=repr)
def test_on_a_mesh_with_explicit_axes(form: Any) -> None:
    """Both ways to cut a weight; and a table, whose lookup JAX writes for automatic axes."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    draw = np.random.default_rng(0)
    p = {name: jnp.float32(draw.normal(size=(128, 128)) / 11) for name in ("table", "up", "down")}
    specs = {"table": PartitionSpec(), "up": PartitionSpec(None, "model"), "down": PartitionSpec("model")}
    rows = PartitionSpec("data", None)

    def model(p: Any, ids: jax.Array, at: Any = None) -> jax.Array:
        x = jnp.tanh(p["table"].at[ids].get(out_sharding=at) @ p["up"])
        return jnp.tanh(jnp.einsum("ti,io->to", x, p["down"], out_sharding=at))

    ids = jnp.arange(8)
    sites = lj.sites(model, p, ids)
    adapt = lj.adapt(sites, [(".*", DoRA(lj.LoRA(rank=2)))])
    plan = quant.plan(sites, [(".*", form)])
    trainable, frozen = adapt.init(jax.random.key(0), plan.quantize(p))
    trainable = jax.tree.map(lambda x: x + jnp.float32(0.1 * draw.normal(size=x.shape)), trainable)

    def run(trainable: Any, frozen: Any, ids: Any, at: Any = None) -> Any:
        fn = lj.lift(functools.partial(model, at=at), strict=True)
        return jax.jit(jax.value_and_grad(lambda tr: jnp.sum(jnp.sin(fn(adapt.bind(tr, frozen), ids)))))(trainable)

    want = run(trainable, frozen, ids)
    with jax.set_mesh(mesh):
        base = {path: jax.device_put(w, w.shardings(mesh, specs[path])) for path, w in frozen.base.items()}
        for path, whole in p.items():  # quantised where it lies, it is the same
            there = quant.quantize(jax.device_put(whole, NamedSharding(mesh, specs[path])), *plan.rows[path])
            assert there.codes.sharding == base[path].codes.sharding
            assert jax.tree.all(jax.tree.map(np.array_equal, there, base[path]))
        with pytest.raises(ValueError, match="cut inside a block of 32: shard another dimension"):
            quant.quantize(jax.device_put(p["up"], NamedSharding(mesh, PartitionSpec(("data", "model")))), form)
        rest, ids = frozen._replace(base={}), jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
        trainable, rest = jax.device_put((trainable, rest), NamedSharding(mesh, PartitionSpec()))
        got = run(trainable, rest._replace(base=base), ids, rows)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_checkpoints_and_fingerprint(tmp_path: Any) -> None:
    _, _, _, frozen, _ = setting("loop", lj.LoRA(rank=2), NF4())
    with Checkpoints(tmp_path / "checkpoints") as saved:
        saved.save(1, frozen.base, {})
        back, _ = saved.restore(jax.eval_shape(lambda x: x, frozen.base))
    assert jax.tree.structure(back) == jax.tree.structure(frozen.base)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, frozen.base))
    prints = {fingerprint(back), fingerprint(frozen.base)}
    assert len(prints) == 1
    assert fingerprint(base("loop")) not in prints
    assert fingerprint(setting("loop", lj.LoRA(rank=2), quant.FP4())[3].base) not in prints


def test_a_quantised_base_as_a_file(tmp_path: Any) -> None:
    w = base("scan")["layers"]
    tree = {"params": {"a": quant.quantize(w, NF4(), order=(0, 2, 1), stack=1),
                       "b": {"c": quant.quantize(w[0].astype(jnp.bfloat16), quant.Q4_1()), "bias": jnp.ones(3)}}}
    back = quantized.load(quantized.save(tmp_path / "base.safetensors", tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, tree))
    assert fingerprint(back) == fingerprint(tree)
    write_tensors(tmp_path / "other.safetensors", {"a": np.ones(3)}, {})
    with pytest.raises(AdapterError, match="no quantised base that lorajax wrote"):
        quantized.load(tmp_path / "other.safetensors")


def test_dylora_trains_at_drawn_ranks() -> None:
    fn, adapt, trainable, frozen, x = setting("loop", lj.LoRA(rank=4))
    controller = dylora(adapt, total_steps=10)
    masks = controller.masks(controller.init(trainable))
    out = jax.jit(lambda f: fn(adapt.bind(trainable, f, masks=masks), x))
    np.testing.assert_allclose(out(frozen), out(widened(frozen)), rtol=1e-4, atol=1e-5)


def test_members_of_a_sweep_read_one_quantised_base() -> None:
    fn, adapt, trainable, frozen, x = setting("loop", lj.LoRA(rank=2), NF4())
    two = jax.tree.map(lambda x: jnp.stack([x, -x]), trainable)
    grad = jax.grad(lambda tr, f: jnp.sum(jnp.sin(fn(adapt.bind(tr, f), x))))
    side_by_side = jax.jit(jax.vmap(grad, in_axes=(0, None)))
    got, want = side_by_side(two, frozen), side_by_side(two, widened(frozen))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    unpacked = [s for _, s in jaxprs.shapes(jax.make_jaxpr(jax.vmap(grad, in_axes=(0, None)))(two, frozen))]
    assert (WIDTH, WIDTH) in unpacked and (2, WIDTH, WIDTH) not in unpacked


def test_a_step_moves_the_adapters_alone() -> None:
    fn, adapt, trainable, frozen, x = setting("scan", lj.LoRA(rank=2), NF4())
    tx = optax.adam(1e-2)

    @jax.jit
    def step(tr: Any, state: Any, frozen: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda tr: jnp.mean(jnp.square(fn(adapt.bind(tr, frozen), x) - 0.5)))(tr)
        updates, state = tx.update(grads, state, tr)
        return optax.apply_updates(tr, updates), state, loss

    state, losses = tx.init(trainable), []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(20):
            trainable, state, loss = step(trainable, state, frozen)
            losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
