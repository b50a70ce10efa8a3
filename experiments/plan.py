"""Memory of each device and FLOPs of a step, planned from shapes: no device, no weights, seconds also for 70B.

    python -m experiments.plan --config configs/plan.py:shape=70b,machine=v5p-64 [--config.mesh.tensor=4] [--compile]

Activations are what a step has alive at its fullest beside its arguments, by remat policy, in an abstract trace of one
device's share (its rows; along `tensor` its heads, feed-forward columns and vocabulary), without what a compiler fuses
(`lorajax/core/liveness.py`). README, "On several GPUs", compares the sums with XLA's for an H100. Not counted: copies
in another layout, which XLA's own attention needs, and room that cuBLAS asks for (32 MiB on an H100). --compile also
compiles the step, where there are as many devices (forced host devices will do), and prints XLA's memory analysis.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorajax as lj
from lorajax import build, config
from lorajax.core.liveness import fullest, total
from lorajax.core.sites import table
from lorajax.models import Llama, LlamaConfig
from lorajax.models.frozen_head import frozen_head_loss
from lorajax.models.fused_attention import fused_attention
from lorajax.shard import hosts
from lorajax.shard.machines import NAMED, machine
from lorajax.shard.mesh import BATCH, MeshError, make_mesh, sizes_of
from lorajax.shard.placement import Placement
from lorajax.shard.plan import flops, gathered, resident
from lorajax.shard.rules import described, specs
from lorajax.train.remat import POLICIES, ROOM
from lorajax.train.step import init_state, make_step

SPLIT = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")


def main(argv: list[str]) -> None:
    began = time.monotonic()
    launch = config.parse(argv, compile=False)
    c = launch.config
    config.needs(c, "args.machine", "configs/plan.py")
    where = machine(c.args.machine)
    sizes = sizes_of(dict(c.mesh), where.devices)
    rules, usual = build.sharding(c, "llama")
    rows = per_device(c.batch, math.prod(sizes[axis] for axis in BATCH), "batch", "data x fsdp")

    whole = settings(c)
    for name in SPLIT:
        if (n := getattr(whole, name)) % sizes["tensor"]:
            raise MeshError(f"mesh.tensor={sizes['tensor']} does not divide {name}={n}: the nearest that does is "
                            f"{max(d for d in range(1, sizes['tensor']) if n % d == 0)}")
    adapt = adapted(c, whole, c.batch)
    found = specs(adapt.sites.leaves, sizes, rules, usual)
    print(described(adapt.sites.leaves, found, sizes), "\n")
    used = math.prod(sizes.values())
    state = jax.eval_shape(optax.adamw(1e-3).init, adapt.shapes[0])
    parts = resident(adapt, sizes, rules, usual, state) | {"gathered layers": gathered(adapt, sizes, rules, usual)}
    count = sum(x.size for x in adapt.sites.leaves.values())
    print(f"{count / 1e9:.2f} billion parameters, {adapt.count() / 1e6:.1f} million trained; {c.batch} x "
          f"{c.max_length} tokens, {rows} rows on a device")

    own = {"remat": "", **{name: gib(n) for name, n in parts.items()}}
    lines: list[tuple[str, ...]] = [(*own, "activations", "in all", f"of {where.memory / 2**30:.1f}", "FLOPs a step",
                                     "at least")]
    needs: dict[str, float] = {}
    for remat in POLICIES:
        local: Any = {name: per_device(getattr(whole, name), sizes["tensor"], name, "tensor") for name in SPLIT}
        share = dataclasses.replace(whole, remat=remat, **local)
        kept = activations(c, share, rows)
        needs[remat] = sum(parts.values()) + kept
        work = step_flops(c, adapt, again=remat == "full")
        fits = "fits" if needs[remat] <= ROOM * where.memory else "too much"
        lines.append((remat, *list(own.values())[1:], gib(kept), gib(needs[remat]), fits, f"{work:.2e}",
                      f"{work / used / where.peak:.3f} s"))
    said = used if used == where.devices else f"{used} of the {where.devices}"
    print("GiB on each of", said, "devices of", where.name)
    print(table(lines))
    if min(needs.values()) > ROOM * where.memory:
        print(f"{where.name} is too small for this mesh, batch and method. With fsdp over all devices: {others(c)}")
    if launch.options["compile"]:
        compiled(c, whole, sizes)
    print(f"planned in {time.monotonic() - began:.1f} s")


def settings(c: Any, **more: Any) -> LlamaConfig:
    types = {"dtype": build.DTYPES[c.compute_dtype], "param_dtype": build.DTYPES[c.param_dtype]}
    return LlamaConfig(**c.model, **types, scan_layers=c.scan_layers, **more)


def per_device(n: int, parts: int, what: str, axes: str) -> int:
    if n % parts:
        raise MeshError(f"{what}={n} does not divide among {parts} devices along {axes}: the nearest that does is "
                        f"{max(1, round(n / parts)) * parts}")
    return n // parts


def activations(c: Any, settings: LlamaConfig, rows: int) -> int:
    # Of one device, at the fullest point of a step.
    known = {"": None, "xla": None, "cudnn": fused_attention, "short": fused_attention}
    known["auto"] = None if set(dict(c.mesh).values()) - {1} else fused_attention  # as build.attention has it
    fused = config.choose("attention", c.attention, known)
    if "rank" in c.variant:  # no rank is above the side of a device's part of a weight
        c = c.copy_and_resolve_references()
        c.variant.rank = min(c.variant.rank, settings.num_kv_heads * settings.head_dim, settings.intermediate_size)
    adapt = adapted(c, settings, rows)
    loss = lj.lift(objective(Llama(dataclasses.replace(settings, attention=fused)), head_trained(adapt)))
    ids = jax.ShapeDtypeStruct((rows, c.max_length), jnp.int32)

    def gradient(trainable: Any, frozen: Any, ids: Any) -> Any:
        return jax.grad(lambda trainable: loss(adapt.bind(trainable, frozen), ids))(trainable)

    with jax.numpy_dtype_promotion("standard"):
        return total(fullest(jax.make_jaxpr(gradient)(*adapt.shapes, ids)))


def objective(net: Any, trained_head: bool) -> Any:
    # The next token's cross-entropy, as experiments.lm has it: a head that does not train makes its logits in chunks.
    def loss(params: Any, ids: jax.Array) -> jax.Array:
        labels = jnp.roll(ids, -1, 1)
        if trained_head:
            logits = net.apply(params, ids)
            return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0])
        tree, tied = params["params"], net.config.tie_embeddings
        kernel = tree["embed"]["embedding"].T if tied else tree["head"]["kernel"]
        return frozen_head_loss(net.apply(params, ids, method="hidden"), kernel, labels, jnp.ones(ids.shape))

    return loss


def head_trained(adapt: lj.Adapt) -> bool:
    return any("head" in adapt.sites[path].roles for path in adapt.plan)


def adapted(c: Any, settings: LlamaConfig, rows: int) -> lj.Adapt:
    net, ids = Llama(settings), jax.ShapeDtypeStruct((rows, c.max_length), jnp.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    with jax.numpy_dtype_promotion("standard"):
        rules = [(c.args.targets, build.variant(c))]
        adapt = lj.adapt(lj.sites(objective(net, False), shapes, ids), rules)
        if head_trained(adapt):
            adapt = lj.adapt(lj.sites(objective(net, True), shapes, ids), rules)
    return adapt.on(jax.eval_shape(build.quant_plan(c, adapt).quantize, shapes)) if c.quant.format else adapt


def step_flops(c: Any, adapt: lj.Adapt, again: bool) -> float:
    # Attention's two products, forward once (twice where it is repeated) and twice backward.
    m = c.model
    attention = 4.0 * c.batch * c.max_length**2 * m.num_heads * m.head_dim * m.num_layers
    return flops(adapt, c.batch * c.max_length, again) + attention * (3 + again)


def others(c: Any) -> str:
    # The named machines whose devices hold the base, adapters and one row's activations at full remat.
    whole = settings(c, remat="full")
    adapt = adapted(c, whole, c.batch)
    kept = activations(c, whole, 1)
    state = jax.eval_shape(optax.adamw(1e-3).init, adapt.shapes[0])
    fit = []
    for name in NAMED:
        one = machine(name)
        sizes = sizes_of({"fsdp": -1}, one.devices)
        try:
            parts = resident(adapt, sizes, *build.sharding(c, "llama"), state)
            parts["gathered"] = gathered(adapt, sizes, *build.sharding(c, "llama"))
        except MeshError:  # a width that so many devices do not divide
            continue
        if sum(parts.values()) + kept <= ROOM * one.memory:
            fit.append(name)
    return ", ".join(fit) + " hold a row a device" if fit else "no named machine holds it"


def compiled(c: Any, whole: LlamaConfig, sizes: dict[str, int]) -> Any:
    count = math.prod(sizes.values())
    if jax.device_count() < count:
        return print(f"not compiled: {count} devices are needed and {jax.device_count()} are here")
    rules, usual = build.sharding(c, "llama")
    place = Placement(make_mesh(sizes), rules, usual)
    net = Llama(dataclasses.replace(whole, rows=place.rows(), remat="full"))
    adapt = adapted(c, net.config, c.batch)
    loss = lj.lift(objective(net, head_trained(adapt)))
    tx = optax.adamw(1e-3)
    state = jax.eval_shape(lambda k, t: init_state(k, t, tx), jax.random.key(0), adapt.shapes[0])
    to, rows = place.state(adapt, state), place.rows()
    step: Any = make_step(lambda p, b, _: (loss(p, b["ids"]), {}), adapt, tx, shardings=(to, place.whole))
    frozen = adapt.shapes[1]
    if place.mesh is not None:
        at = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        state = jax.tree.map(at, state, to)
        frozen = frozen._replace(base=place.gathering(jax.tree.map(at, frozen.base, place.base(frozen.base))))
    ids = jax.ShapeDtypeStruct((c.batch, c.max_length), jnp.int32, sharding=rows)
    with jax.numpy_dtype_promotion("standard"):
        done = step.lower(state, frozen, {"ids": ids}).compile()
    m = done.memory_analysis()
    print(f"compiled for {jax.devices()[0].device_kind}, remat full, GiB on a device: arguments "
          f"{gib(m.argument_size_in_bytes)}, temporaries {gib(m.temp_size_in_bytes)}, FLOPs outside loops "
          f"{done.cost_analysis().get('flops', 0):.2e}")
    return m


def gib(n: float) -> str:
    return f"{n / 2**30:.2f}"


if __name__ == "__main__":
    hosts.run(main, (config.ConfigError, lj.RuleError, MeshError))
