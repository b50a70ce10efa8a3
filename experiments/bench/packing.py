"""Runs side by side in one program against one run at a time: milliseconds of a step for each run, in one process.

    python -m experiments.bench.packing                                                # both rows, on a GPU
    python -m experiments.bench.packing --rows minilm --runs 32 64 --steps-per-call 10 --json packing.json
    python -m experiments.bench.packing --rows bert --how short cudnn --packed-only
    python -m experiments.bench.packing --rows tiny_bert --runs 3 --blocks 2           # toy shapes, any machine

Shapes, weights and batch are those of `experiments.bench.speed`, which times PEFT on them: LoRA of rank 8 on query and
value of MiniLM (16 x 64 tokens, 64 runs) and of BERT-base (32 x 128, 32 runs), AdamW, bfloat16 compute. Every run has
arrays of its own for adapter, optimizer, batch and learning rate; alone and packed are the library's own steps
(lorajax.train.step, lorajax.train.pack), and the row says what the losses of the first call differ by. Each is compiled
once, which is told and not counted. A row for each `--how`: XLA's attention, cuDNN's, the compiler set otherwise.
`--how short` is lorajax.models.short_attention, one kernel each way.

Measured (one H200, JAX 0.11.2, 2026-11-23), ms of a run's step, packed and alone: MiniLM, 64 runs, 0.184 and 0.769
(4.17 times; goals at most 0.22, and 4); BERT-base, 32 runs, 3.69 (goal at most 3.6), alone 4.54 in
`experiments.bench.speed`. With cuDNN's attention, an earlier run: 0.251 and 0.929, 3.92 and 5.07. PEFT with CUDA graphs
on the same machine that hour (`experiments.bench.speed`): 1.10 and 7.41. Compilation of a pack 8 to 17 s.
"""

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import kernels, ours
from experiments.bench import work as shared
from experiments.bench.setting import markdown, setting
from experiments.bench.work import RATE, ROWS, Work
from lorajax import control, optim
from lorajax.core.adapt import Frozen
from lorajax.models import Bert
from lorajax.models.attention import side_by_side
from lorajax.train.pack import Pack, Parts, make_packed_step

RUNS = {"minilm": 64, "bert": 32}


def measure(
    work: Work, runs: int, steps_per_call: int, blocks: int, how: str, packed_only: bool, profile: bool
) -> dict[str, Any]:
    attention, _, compiler = how.partition("+")
    alone = ours.build(work, attention, steps_per_call)
    loss = alone.loss
    if attention == "cudnn":  # the others are the same under a vmap
        loss = ours.make_loss(work, Bert(dataclasses.replace(alone.net.config, attention=side_by_side)), alone.adapt)

    def make(values: Any) -> Parts:
        return Parts(loss, alone.adapt, optim.adamw(values["lr"], weight_decay=0.01), control.identity())

    stacked = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.stack([x] * runs), tree))
    own, batches = Frozen({}, stacked(alone.frozen.aux), {}), stacked(alone.batch)
    pack = Pack(stacked(alone.state), alone.frozen._replace(aux={}), own,
                {"lr": jnp.full(runs, RATE, jnp.float32)})  # fmt: skip
    step = make_packed_step(make, clip=None, steps_per_call=steps_per_call)
    row: dict[str, Any] = {"work": f"{work.shape}, {work.rows} x {work.tokens}, {work.targets}", "how": how or "xla",
                           "runs": runs, "steps a call": steps_per_call}  # fmt: skip
    ways: list[Any] = [
        ("alone", alone.step, alone.state, (alone.frozen, alone.batch)),
        ("packed", step.jitted, pack.state, (pack[1:], batches, np.ones(runs, bool)))]  # type: ignore[attr-defined]
    losses = []
    for name, jitted, state, rest in ways[packed_only:]:
        began = time.perf_counter()
        compiled: Any = jitted.lower(state, *rest).compile(compiler_options=ours.COMPILERS[compiler])
        row[f"{name}, compile s"] = time.perf_counter() - began
        held = [state]

        def call(compiled: Any = compiled, held: list[Any] = held, rest: Any = rest) -> Any:
            held[0], metrics = compiled(held[0], *rest)
            return metrics

        losses.append(np.ravel(jax.device_get(call()["loss"])))
        found = shared.timed(call, jax.block_until_ready, blocks, steps_per_call)
        each = 1 if name == "alone" else runs
        row |= {f"{name}, ms": found["ms"] / each, f"{name}, low": found["low"] / each,
                f"{name}, high": found["high"] / each}  # fmt: skip
        m = compiled.memory_analysis()
        row[f"{name}, GiB"] = (m.argument_size_in_bytes + m.temp_size_in_bytes) / 2**30
    if profile:  # of the pack
        print(json.dumps({"how": row["how"], "profile": kernels.where(call, steps_per_call)}), flush=True)
    if not packed_only:
        row["alone / packed"] = row["alone, ms"] / row["packed, ms"]
    many = losses[-1].reshape(runs, -1)  # without the one alone, compared with one another
    row["losses differ by"] = float(np.abs(many - (many[0] if packed_only else losses[0])).max())
    row["last loss"] = float(many[0, -1])
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(RUNS), choices=ROWS)
    parser.add_argument("--runs", nargs="+", type=int, default=[0], help="side by side; 0: 64 of MiniLM, 32 of BERT")
    parser.add_argument("--steps-per-call", nargs="+", type=int, default=[10])
    parser.add_argument("--targets", default="", help="all-linear, for one; else what the row says")
    parser.add_argument("--how", nargs="+", default=[""], help="[attention][+compiler], see bench.ours; '': XLA's")
    parser.add_argument("--packed-only", action="store_true", help="no run by itself")
    parser.add_argument("--profile", action="store_true", help="where the pack's time goes, milliseconds of its step")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args(argv)
    rows = []
    for name in o.rows:
        work = dataclasses.replace(ROWS[name], **({"targets": o.targets} if o.targets else {}))
        for runs, steps, how in itertools.product(o.runs, o.steps_per_call, o.how):
            try:
                rows.append(measure(work, runs or RUNS.get(name, 8), steps, o.blocks, how, o.packed_only, o.profile))
            except RuntimeError as error:  # too much memory, no cuDNN: the others count
                print(f"{name}, {runs} runs, {how or 'xla'}: {str(error)[:300]}", flush=True)
                continue
            print(json.dumps(rows[-1]), flush=True)
            if o.json:
                o.json.write_text(json.dumps({"setting": setting(), "rows": rows}, indent=1) + "\n")
            jax.clear_caches()
    if rows:
        print(markdown(rows, setting()))


if __name__ == "__main__":
    main()
