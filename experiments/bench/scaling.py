"""Time and memory of a LoRA training step on several devices: data parallel, FSDP and tensor parallel against one.

    python -m experiments.bench.scaling --devices 2 --json scaling.json                   # two GPUs of one host
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.bench.scaling --runs tiny:one+data+data:4

Random weights and tokens, LoRA of rank 16 on all linear layers, AdamW, bfloat16 on an accelerator, decoders with the
fused attention on a GPU; layers unrolled, nothing computed again (`--scan`: scanned, decoders with full remat, which
compiles faster, and sums gradients over devices once a layer instead of once a step). All layouts of a model train the
same global batch, so `speedup`, over one device with it, is strong scaling; the layout `share` is one device with what
one of several has of the batch, and `weak` is examples per second over its. Both are of `ms`, a step among `steps` that
are dispatched one after another, median of three such rows; `waited` is the median of steps that are each waited for,
as a loop does that looks at every loss. `data:8` takes eight steps in a call (`steps_per_call`), and is compared with
`one:8` and `share:8`. `memory` is XLA's own analysis of the compiled step: arguments and temporaries of one device.
Every row is traced, compiled (`compiled in s`), timed and written before the next begins. On forced host devices the
times mean nothing.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorajax as lj
from configs.plan import NAMES, SHAPES
from experiments.bench import work
from experiments.bench.setting import markdown, setting
from lorajax.core.sites import by_path
from lorajax.models import Bert, BertConfig, Llama, LlamaConfig
from lorajax.shard.mesh import make_mesh
from lorajax.shard.placement import Placement
from lorajax.shard.rules import FAMILIES
from lorajax.train.step import init_state, make_step

# name: (rows of the batch for each device, tokens of a row)
CASES = {"bert-base": (32, 128), "bert-base-128": (128, 128), "1.2b": (8, 1024), "tiny": (4, 16)}
LAYOUTS = ("one", "share", "data", "fsdp", "tensor")
# In this order; each line is written as soon as it is there.
RUNS = "bert-base:one+share+data,1.2b:one+share+data+tensor+fsdp,bert-base-128:one+share+data"


class Run(NamedTuple):
    """A row of the table. layout: one of `LAYOUTS`. steps: in one call."""

    case: str
    layout: str
    steps: int = 1

    def __str__(self) -> str:
        return f"{self.case} {self.layout}{f':{self.steps}' * (self.steps > 1)}"


class Program(NamedTuple):
    """compile: to the step. start: makes (state, frozen, batch) on the devices. batch, tokens: of a step."""

    compile: Any
    start: Any
    batch: int
    tokens: int


def model(case: str, scan: bool) -> tuple[str, Any]:
    """(family, module) in the accelerator's own type."""
    kind: Any = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    types: dict[str, Any] = {"dtype": kind, "param_dtype": kind, "scan_layers": scan}
    if case.startswith("bert-base"):
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


def program(run: Run, devices: int, scan: bool) -> Program:
    """Traced, with nothing on a device yet; of a step whose batch is that of all devices, or of one for `share`."""
    family, net = model(run.case, scan)
    place = Placement(make_mesh({run.layout: devices} if spread(run) else {}), (), FAMILIES[family])
    net = type(net)(dataclasses.replace(net.config, rows=place.rows()))
    rows, length = CASES[run.case][0] * (1 if run.layout == "share" else devices), CASES[run.case][1]
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    named, tree = by_path(shapes)
    base = place.base(named) if place.mesh else dict.fromkeys(named)
    adapt = lj.adapt(lj.sites(net.apply, shapes, jax.ShapeDtypeStruct((rows, length), jnp.int32)),
                     [("all-linear", lj.LoRA(rank=16))])  # fmt: skip
    tx = optax.adamw(1e-4)
    begin = lambda key, trainable: init_state(key, trainable, tx)  # noqa: E731
    state = jax.eval_shape(begin, jax.random.key(2), adapt.shapes[0])
    to, adapters = place.state(adapt, state), place.adapters(adapt)
    ids = np.random.default_rng(3).integers(0, net.config.vocab_size, (rows, length)).astype(np.int32)
    stack = (lambda x: np.broadcast_to(x, (run.steps, *x.shape))) if run.steps > 1 else lambda x: x

    def start() -> tuple[Any, Any, Any]:
        drawn = [_drawn(like.shape, like.dtype, base[path])(np.uint32(work.seed(path))) for path, like in named.items()]
        trainable, frozen = jax.jit(adapt.init, out_shardings=adapters)(jax.random.key(1), tree.unflatten(drawn))
        state = jax.jit(begin, out_shardings=to)(jax.random.key(2), trainable)
        return state, frozen, place.batch({"ids": stack(ids)}, lead=int(run.steps > 1))

    step: Any = make_step(loss_of(family, net), adapt, tx, steps_per_call=run.steps, shardings=to and (to, place.whole))
    at = lambda tree, where: jax.tree.map(_like, tree, where) if where else tree  # noqa: E731
    frozen = adapt.shapes[1]
    given = (at(state, to), frozen._replace(base={path: _like(x, base[path]) for path, x in frozen.base.items()}),
             {"ids": _like(stack(ids), place.rows(int(run.steps > 1)))})  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):
        return Program(step.lower(*given).compile, start, rows, length)


def spread(run: Run) -> bool:
    return run.layout not in ("one", "share")


def _like(x: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@cache
def _drawn(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """seed -> a weight, whose values are of no importance: a hash, so that few and small programs make them all."""

    def made(seed: jax.Array) -> jax.Array:
        index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
        x = work.drawn(index, seed, lambda h: h.astype(jnp.float32), np.uint32)
        return (x + (1.0 if len(shape) == 1 else 0.0)).astype(dtype)

    return jax.jit(made, out_shardings=sharding)


def measure(program: Program, steps: int, per_call: int) -> dict[str, float]:
    """Of `steps` steps, or the calls that have as many."""
    began = time.perf_counter()
    step = program.compile()
    took = time.perf_counter() - began
    state, frozen, batch = program.start()
    calls, memory = -(-steps // per_call), step.memory_analysis()
    waited, row = [], []
    for i in range(calls + 2):
        begun = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)
        waited += [time.perf_counter() - begun] * (i > 1)
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(calls):
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        row.append((time.perf_counter() - begun) / calls)
    assert bool(jnp.all(metrics["finite"]))
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {"batch": program.batch, "tokens": program.tokens, "ms": statistics.median(row) / per_call * 1e3,
            "waited": statistics.median(waited) / per_call * 1e3, "memory GiB": held / 2**30,
            "compiled in s": took}  # fmt: skip


def table(runs: list[Run], devices: int, steps: int, seconds: float, file: Path | None, scan: bool) -> None:
    began, where = time.perf_counter(), setting() | {"flags": os.environ.get("XLA_FLAGS", "none")}
    rows: list[dict[str, Any]] = []
    speed: dict[Run, float] = {}
    for run in runs:
        if time.perf_counter() - began > seconds:
            print(f"{run}: not measured, {seconds:g} s are over", flush=True)
            continue
        found = measure(program(run, devices, scan), steps, run.steps)
        per_second = speed[run] = found["batch"] / found["ms"]
        speedup, weak = (per_second / speed.get(run._replace(layout=of), math.inf) for of in ("one", "share"))
        count = devices if spread(run) else 1
        rows.append({"model": run.case, "layout": f"{run.layout} {devices}" if spread(run) else run.layout,
                     "steps a call": run.steps, **found, "speedup": speedup,
                     "efficiency": speedup / count, "weak": weak})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        if file:
            file.write_text(json.dumps({"setting": where, "rows": rows}, indent=1) + "\n")
            file.with_suffix(".md").write_text(markdown(rows, where) + "\n")
    print(markdown(rows, where) if rows else "nothing measured")


def planned(runs: str) -> list[Run]:
    """`bert-base:one+data+data:8,1.2b:one` as runs."""
    found = []
    for words in runs.split(","):
        case, _, layouts = words.partition(":")
        for word in layouts.split("+"):
            layout, _, steps = word.partition(":")
            if case not in CASES or layout not in LAYOUTS or not (steps or "1").isdigit():
                raise SystemExit(f"--runs={words}: give model:layout+layout:8,model:layout, of {', '.join(CASES)} and "
                                 f"{', '.join(LAYOUTS)}")
            found.append(Run(case, layout, int(steps or 1)))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default=RUNS, help=f"of {', '.join(CASES)}: {', '.join(LAYOUTS)}")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no measurement after so many")
    parser.add_argument("--json", type=Path, help="write the numbers there, and the table beside it, after every line")
    parser.add_argument("--scan", action="store_true", help="scanned layers, decoders with full remat")
    o = parser.parse_args(argv)
    table(planned(o.runs), o.devices, o.steps, o.seconds, o.json, o.scan)


if __name__ == "__main__":
    main()
