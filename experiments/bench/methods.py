"""A step of LoRA and of DoRA on the same frozen weights, and of several LoRA steps in one call.

    python -m experiments.bench.methods                                          # 1.2 billion parameters, 8 x 1024
    python -m experiments.bench.methods --shape tiny --batch 2 --tokens 16 --steps 2
    python -m experiments.bench.methods --cases "lora" "lora, 8 a call" --shape small --batch 16 --tokens 64

Rank 16 on all linear layers. --kernels prints where the device's time goes, by kernel.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax

import lorajax as lj
from experiments.bench.decoder import Built, Case, build, timed, weights
from experiments.bench.quant import SHAPES
from experiments.bench.setting import markdown, setting
from lorajax.variants import DoRA

CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"wrap": DoRA},
    "lora, 8 a call": {"steps_per_call": 8},
    "lora, q and v": {"targets": "qv"},
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.2b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["lora", "dora"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=0, help="print so many kernels of each case")
    parser.add_argument("--json", type=Path, help="write the numbers there, as they come")
    o = parser.parse_args(argv)
    plain, rows = Case(o.shape, o.batch, o.tokens, lj.LoRA(rank=o.rank), remat=o.remat), list[dict[str, Any]]()
    params = weights(plain)
    for name in o.cases:
        told = dict(CASES[name])
        wrap = told.pop("wrap", lambda lora: lora)
        built = build(plain._replace(variant=wrap(plain.variant), **told), params)
        found = timed(built._replace(state=jax.tree.map(jax.numpy.copy, built.state)), o.steps)
        rows.append({"case": name, **found, "over the first": found["ms"] / (rows[0]["ms"] if rows else found["ms"])})
        print(json.dumps(rows[-1]), flush=True)
        if o.json:
            o.json.write_text(json.dumps({"setting": setting(), "case": str(plain), "rows": rows}, indent=1) + "\n")
        if o.kernels:
            print("\n".join(kernels(built, o.kernels)), flush=True)
        jax.clear_caches()
    print(markdown(rows, setting()))
    return rows


def kernels(built: Built, count: int, steps: int = 3) -> list[str]:
    """ms of a call in each of the device's kernels, the largest first, by JAX's profiler."""
    with jax.numpy_dtype_promotion("standard"):
        compiled, state = built.step.lower(built.state, built.frozen, built.batch).compile(), built.state
    spent: Counter[str] = Counter()
    times: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, metrics = compiled(state, built.frozen, built.batch)
            jax.block_until_ready(metrics)
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    if not line.name.startswith("Stream"):
                        continue
                    for event in line.events:
                        spent[event.name] += event.duration_ns
                        times[event.name] += 1
    total = sum(spent.values()) / steps / 1e6
    each = [f"{ns / steps / 1e6:8.3f} ms {times[name] // steps:5d} x {name[:100]}"
            for name, ns in spent.most_common(count)]  # fmt: skip
    return [f"{total:8.3f} ms of kernels in a call, {sum(times.values()) // steps} of them", *each]


if __name__ == "__main__":
    main()
