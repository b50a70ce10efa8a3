"""What a quantised base costs: the compiled memory and the time of a training step, against the same base in bfloat16.

    python -m experiments.bench.quant                       # 1.2 billion parameters, 8 x 1024 tokens: for one GPU
    python -m experiments.bench.quant --shape 8b --batch 2 --tokens 2048 --remat full [--scan]
    python -m experiments.bench.quant --shape 8b ... --rows nf4:adamw_8bit nf4:adamw nf4:adamw_paged
    python -m experiments.bench.quant --shape tiny --steps 2

Weights are drawn at random, on the device, and quantised there, one layer at a time. NF4 with double quantisation; LoRA
of rank 16 on all linear; the step of `lorajax.train`, the frozen head's loss in chunks. Of the bytes, arguments and
temporaries are XLA's own count (what the step returns takes the place of its arguments); the device's peak is the
runtime's, of the process until the row was made, so that it says something of the first row, and of one that is larger
than those before. --json FILE adds every row to FILE as soon as it is measured.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lorajax as lj
from experiments.bench.setting import markdown, setting
from lorajax import optim, quant
from lorajax.core.packed import unpacked
from lorajax.core.sites import by_path
from lorajax.models import Llama, LlamaConfig
from lorajax.models.frozen_head import frozen_head_loss
from lorajax.train.step import init_state, make_step

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2,
             "num_kv_heads": 2, "head_dim": 32},
    "small": {"vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1536, "num_layers": 6, "num_heads": 6,
              "num_kv_heads": 6, "head_dim": 64},
    "1.2b": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32,
             "num_kv_heads": 8, "head_dim": 64},
    "8b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32,
           "num_kv_heads": 8, "head_dim": 128},
}  # fmt: skip
BASES = {"nf4": quant.NF4(), "bfloat16": None}


class Program(NamedTuple):
    """step: jitted. plan: what of the base is quantised. init: params -> (state, frozen), under jit. ids: (batch,
    tokens)."""

    step: Any
    plan: quant.Plan
    init: Any
    ids: jax.Array


def program(o: argparse.Namespace, base: str, optimizer: str) -> Program:
    net = Llama(LlamaConfig(**SHAPES[o.shape], tie_embeddings=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
                            remat=o.remat, scan_layers=o.scan, attention=o.attention))  # fmt: skip
    drawn = np.random.default_rng(0).integers(0, SHAPES[o.shape]["vocab_size"], (o.batch, o.tokens))
    ids = jnp.asarray(drawn, jnp.int32)
    sites = lj.sites(net.apply, jax.eval_shape(net.init, jax.random.key(0), ids[:1, :2]), ids)
    adapt = lj.adapt(sites, [("all-linear", lj.LoRA(rank=16))])
    tx = optim.NAMES[optimizer](1e-4, adapt=adapt)
    hidden = lj.lift(functools.partial(net.apply, method="hidden"), strict=True, once=o.once)

    def loss(params: Any, ids: jax.Array, key: Any) -> Any:
        labels, weights = jnp.roll(ids, -1, 1), jnp.ones(ids.shape).at[:, -1].set(0)
        return frozen_head_loss(hidden(params, ids), unpacked(params["params"]["head"]["kernel"]), labels, weights), {}

    def init(params: Any) -> Any:
        trainable, frozen = adapt.init(jax.random.key(2), params)
        return init_state(jax.random.key(3), trainable, tx), frozen

    rules = [("all-linear", BASES[base])]
    return Program(make_step(loss, adapt, tx), quant.plan(sites, rules), init, ids)


def make_base(plan: quant.Plan) -> Any:
    # Leaf by leaf, of a stack layer by layer: a large model in float32 would not fit beside its codes.
    leaves = []
    for i, (path, like) in enumerate(plan.sites.leaves.items()):
        row = plan.rows.get(path)
        if path not in plan.sites:  # norms
            leaves.append(jnp.ones(like.shape, like.dtype))
            continue
        stack = len(plan.sites[path].stack_axes)
        leaves.append(_leaf(jax.random.fold_in(jax.random.key(1), i), like.shape, stack, row and row.form))
    return jax.tree.unflatten(plan.sites.tree, leaves)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _leaf(key: jax.Array, shape: tuple[int, ...], stack: int, form: Any) -> Any:
    if stack:
        return jax.lax.map(lambda key: _leaf(key, shape[1:], stack - 1, form), jax.random.split(key, shape[0]))
    w = (jax.random.normal(key, shape, jnp.float32) / np.sqrt(shape[-2])).astype(jnp.bfloat16)
    return w if form is None else quant.quantize(w, form)


def measure(o: argparse.Namespace, base: str, optimizer: str) -> dict[str, Any]:
    step, plan, init, ids = program(o, base, optimizer)
    params = make_base(plan)
    held = sum(w.nbytes for w in by_path(params)[0].values())
    state, frozen = jax.jit(init, donate_argnums=0)(params)
    del params
    began = time.perf_counter()
    with jax.numpy_dtype_promotion("standard"):  # attention's gradient in 16 bits
        compiled = step.lower(state, frozen, ids).compile()
    compile_seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    times = []
    for _ in range(o.steps + 2):
        began = time.perf_counter()
        state, metrics = compiled(state, frozen, ids)
        jax.block_until_ready(metrics)
        times.append(1e3 * (time.perf_counter() - began))
    own = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {"base": base, "optimizer": optimizer, "base GiB": held / 2**30,
            "arguments and temporaries GiB": own / 2**30, "device's peak GiB": peak / 2**30,
            "on the host GiB": memory.host_argument_size_in_bytes / 2**30,
            "ms a step": float(np.median(times[2:])), "slowest": max(times[2:]), "compile s": compile_seconds,
            "loss": float(metrics["loss"])}  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.2b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--once", default="", help="weights dequantised once a backward pass, as of lj.lift")
    parser.add_argument("--attention", choices=("xla", "cudnn"), help="on a GPU cudnn, if it is not said")
    parser.add_argument("--rows", nargs="+", default=["nf4:adamw", "bfloat16:adamw"], help="base:optimizer")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args(argv)
    if o.attention is None and jax.default_backend() == "gpu":
        o.attention = "cudnn"
    rows = []
    for row in o.rows:
        rows.append(measure(o, *row.split(":")))
        if o.json:
            with o.json.open("a") as file:
                file.write(json.dumps({"shape": o.shape, "batch": o.batch, "tokens": o.tokens, "remat": o.remat,
                                       "scan": o.scan, **rows[-1]}) + "\n")  # fmt: skip
    print(markdown(rows, setting()), flush=True)
    return rows


if __name__ == "__main__":
    main()
