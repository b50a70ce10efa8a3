"""Time and memory of a LoRA training step on several devices: data parallel, FSDP and tensor parallel against one.

    python -m experiments.bench.scaling --devices 2 --json scaling.json                    # two GPUs of one host
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.bench.scaling --cases tiny --steps 2

Weak scaling: `rows` rows for each device, random weights and tokens, LoRA of rank 16 on all linear layers, AdamW,
bfloat16 on an accelerator. Each layout is compiled once and timed as the median of `steps` steps, each waited for.
`speedup` is examples per second over those of one device; `memory` is XLA's own analysis of the compiled step,
arguments and temporaries of one device. On forced host devices the times mean nothing.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorajax as lj
from configs.plan import NAMES, SHAPES
from experiments.bench.setting import markdown, setting
from lorajax.core.sites import by_path
from lorajax.models import Bert, BertConfig, Llama, LlamaConfig
from lorajax.shard.mesh import make_mesh
from lorajax.shard.placement import Placement
from lorajax.shard.rules import FAMILIES
from lorajax.train.step import init_state, make_step

# name: (rows on each device, tokens of a row)
CASES = {"bert-base": (32, 128), "1.2b": (8, 1024), "tiny": (4, 16)}


def model(case: str) -> tuple[str, Any]:
    """(family, module) in the accelerator's own type."""
    kind: Any = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    types: dict[str, Any] = {"dtype": kind, "param_dtype": kind}
    if case == "bert-base":
        return "bert", Bert(BertConfig(hidden_dropout=0.0, attention_dropout=0.0, **types))
    shape: dict[str, Any] = dict(zip(NAMES, SHAPES[case], strict=True))
    return "llama", Llama(LlamaConfig(**shape, **types, scan_layers=True, remat="full"))


def loss_of(family: str, net: Any) -> Any:
    run = lj.lift(net.apply)

    def loss(bound: Any, batch: Any, key: jax.Array) -> Any:
        logits = run(bound, batch["ids"])
        labels = batch["ids"][:, 0] % logits.shape[-1] if family == "bert" else jnp.roll(batch["ids"], -1, 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), {}

    return loss


def measure(case: str, sizes: dict[str, int], steps: int) -> dict[str, float]:
    """ms of a step, examples per second, GiB of a device."""
    rows, length = CASES[case]
    rows *= math.prod(sizes.values())
    family, net = model(case)
    place = Placement(make_mesh(sizes), (), FAMILIES[family])
    net = type(net)(dataclasses.replace(net.config, rows=place.rows()))
    few = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), few)
    named, tree = by_path(shapes)
    where = jax.tree.unflatten(tree, list(place.base(named).values())) if place.mesh else None
    variables = jax.jit(lambda key: net.init(key, jnp.zeros((1, 2), jnp.int32)), out_shardings=where)(jax.random.key(0))
    adapt = lj.adapt(lj.sites(net.apply, shapes, jax.ShapeDtypeStruct((rows, length), jnp.int32)),
                     [("all-linear", lj.LoRA(rank=16))])  # fmt: skip
    trainable, frozen = jax.jit(adapt.init, out_shardings=place.adapters(adapt))(jax.random.key(1), variables)
    tx = optax.adamw(1e-4)
    begin = lambda key, trainable: init_state(key, trainable, tx)  # noqa: E731
    to = place.state(adapt, jax.eval_shape(begin, jax.random.key(2), trainable))
    state = jax.jit(begin, out_shardings=to)(jax.random.key(2), trainable)
    ids = jax.random.randint(jax.random.key(3), (rows, length), 0, net.config.vocab_size, jnp.int32)
    batch = place.batch({"ids": jax.device_get(ids)})
    jitted: Any = make_step(loss_of(family, net), adapt, tx, shardings=(to, place.whole))
    with jax.numpy_dtype_promotion("standard"):
        step = jitted.lower(state, frozen, batch).compile()
    memory, times = step.memory_analysis(), []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - begun)
    assert bool(metrics["finite"])
    seconds = statistics.median(times[2:])
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {"ms": seconds * 1e3, "examples/s": rows / seconds, "memory GiB": held / 2**30}


def table(cases: list[str], layouts: list[str], devices: int, steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for case in cases:
        alone = 0.0
        for name in layouts:
            found = measure(case, {} if name == "one" else {name: devices}, steps)
            alone = alone or found["examples/s"]
            speedup = found["examples/s"] / alone
            count = 1 if name == "one" else devices
            rows.append({"model": case, "layout": name if name == "one" else f"{name} {devices}", **found,
                         "speedup": speedup, "efficiency": speedup / count})
            print(json.dumps(rows[-1]), flush=True)
            jax.clear_caches()
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="bert-base,1.2b", help=f"of {', '.join(CASES)}")
    parser.add_argument("--layouts", default="one,data,fsdp,tensor", help="the first is what the others are held to")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args(argv)
    rows = table(options.cases.split(","), options.layouts.split(","), options.devices, options.steps)
    where = setting()
    if options.json:
        options.json.write_text(json.dumps({"setting": where, "rows": rows}, indent=1) + "\n")
    print(markdown(rows, where))


if __name__ == "__main__":
    main()
