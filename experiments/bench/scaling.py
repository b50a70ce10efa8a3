"""Time and memory of a LoRA training step on several devices: data parallel, FSDP and tensor parallel against one.

    python -m experiments.bench.scaling --devices 2 --json scaling.json                   # two GPUs of one host
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.bench.scaling --runs tiny:one+data

Random weights and tokens, LoRA of rank 16 on all linear layers, AdamW, bfloat16 on an accelerator, decoders with the
fused attention on a GPU; layers unrolled, nothing computed again (`--scan`: scanned, decoders with full remat, which
compiles faster, and sums gradients over devices once a layer instead of once a step). All layouts of a model train the
same global batch, so `speedup`, over one device with it, is strong scaling; the layout `share` is one device with what
one of several has of the batch, and `weak` is examples per second over its. Both are of `ms`, a step among `steps` that
are dispatched one after another, median of three such rows; `waited` is the median of steps that are each waited for,
as a loop does that looks at every loss. `memory` is XLA's own analysis of the compiled step: arguments and temporaries
of one device. On forced host devices the times mean nothing.
"""

import argparse
import dataclasses
import json
import math
import os
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

# name: (rows of the batch for each device, tokens of a row)
CASES = {"bert-base": (32, 128), "1.2b": (8, 1024), "tiny": (4, 16)}
LAYOUTS = ("one", "share", "data", "fsdp", "tensor")
# In this order; each line is written as soon as it is there.
RUNS = "bert-base:one+share+data,1.2b:one+share+data+fsdp+tensor,bert-base:fsdp+tensor"


def model(case: str, scan: bool) -> tuple[str, Any]:
    """(family, module) in the accelerator's own type."""
    kind: Any = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    types: dict[str, Any] = {"dtype": kind, "param_dtype": kind, "scan_layers": scan}
    if case == "bert-base":
        return "bert", Bert(BertConfig(hidden_dropout=0.0, attention_dropout=0.0, **types))
    shape: dict[str, Any] = dict(zip(NAMES, SHAPES[case], strict=True))
    fused = "cudnn" if jax.default_backend() == "gpu" else None
    how: dict[str, Any] = {"remat": "full" if scan else "none", "attention": fused}
    return "llama", Llama(LlamaConfig(**shape, **types, **how))


def loss_of(family: str, net: Any) -> Any:
    run = lj.lift(net.apply)

    def loss(bound: Any, batch: Any, key: jax.Array) -> Any:
        logits = run(bound, batch["ids"])
        labels = batch["ids"][:, 0] % logits.shape[-1] if family == "bert" else jnp.roll(batch["ids"], -1, 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), {}

    return loss


def measure(case: str, sizes: dict[str, int], parts: int, steps: int, scan: bool) -> dict[str, float]:
    """Of one step on a mesh of `sizes`, its batch `parts` times a device's rows."""
    began = time.perf_counter()
    rows, length = CASES[case][0] * parts, CASES[case][1]
    family, net = model(case, scan)
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
    ready, memory = time.perf_counter(), step.memory_analysis()
    waited, row = [], []
    for i in range(steps + 2):
        begun = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)
        waited += [time.perf_counter() - begun] * (i > 1)
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        row.append((time.perf_counter() - begun) / steps)
    assert bool(metrics["finite"])
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {"batch": rows, "tokens": length, "ms": statistics.median(row) * 1e3,
            "waited": statistics.median(waited) * 1e3, "memory GiB": held / 2**30, "compiled in s": ready - began}


def table(runs: str, devices: int, steps: int, seconds: float, file: Path | None, scan: bool) -> None:
    began, where = time.perf_counter(), setting() | {"flags": os.environ.get("XLA_FLAGS", "none")}
    rows: list[dict[str, Any]] = []
    speed: dict[tuple[str, str], float] = {}
    for case, layout in planned(runs):
        if time.perf_counter() - began > seconds:
            print(f"{case} {layout}: not measured, {seconds:g} s are over", flush=True)
            continue
        spread = layout not in ("one", "share")
        found = measure(case, {layout: devices} if spread else {}, 1 if layout == "share" else devices, steps, scan)
        per_second = speed[case, layout] = found["batch"] / found["ms"]
        speedup, weak = (per_second / speed.get((case, of), math.inf) for of in ("one", "share"))  # 0: not known
        rows.append({"model": case, "layout": f"{layout} {devices}" if spread else layout, **found, "speedup": speedup,
                     "efficiency": speedup / (devices if spread else 1), "weak": weak})
        print(json.dumps(rows[-1]), flush=True)
        if file:
            file.write_text(json.dumps({"setting": where, "rows": rows}, indent=1) + "\n")
            file.with_suffix(".md").write_text(markdown(rows, where) + "\n")
        jax.clear_caches()
    print(markdown(rows, where) if rows else "nothing measured")


def planned(runs: str) -> list[tuple[str, str]]:
    """`bert-base:one+data,...` as (model, layout)."""
    found = []
    for words in runs.split(","):
        case, _, layouts = words.partition(":")
        for layout in layouts.split("+"):
            if case not in CASES or layout not in LAYOUTS:
                raise SystemExit(f"--runs={words}: give model:layout+layout, of {', '.join(CASES)} and "
                                 f"{', '.join(LAYOUTS)}")
            found.append((case, layout))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default=RUNS, help=f"of {', '.join(CASES)}: {', '.join(LAYOUTS)}")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no measurement after so many")
    parser.add_argument("--json", type=Path, help="write the numbers there, and the table beside it, after every line")
    parser.add_argument("--scan", action="store_true", help="scanned layers, decoders with full remat")
    options = parser.parse_args(argv)
    table(options.runs, options.devices, options.steps, options.seconds, options.json, options.scan)


if __name__ == "__main__":
    main()
