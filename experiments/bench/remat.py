"""Time against memory of a LoRA step, by what the backward pass computes again (`remat` in configs).

    python -m experiments.bench.remat                                            # 1.2 billion parameters, 8 x 1024
    python -m experiments.bench.remat --shape 8b --batch 2 --tokens 2048 --scan
    python -m experiments.bench.remat --shape tiny --batch 2 --tokens 16 --steps 2

LoRA of rank 16 on all linear layers, cuDNN's attention on a GPU, bfloat16 on an accelerator. GiB are XLA's: arguments
and temporaries of the compiled step. The last line is what `remat=auto` takes on this device. Set
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false for quick compiles.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax

import lorajax as lj
from experiments.bench.decoder import Case, build, timed, weights
from experiments.bench.quant import SHAPES
from experiments.bench.setting import markdown, setting
from lorajax.train.remat import POLICIES, ROOM, gib, memory


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.2b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the numbers there, as they come")
    o = parser.parse_args(argv)
    case = Case(o.shape, o.batch, o.tokens, lj.LoRA(rank=o.rank), scan=o.scan)
    params, rows = weights(case), list[dict[str, Any]]()
    for remat in o.policies:
        try:
            rows.append({"remat": remat, **timed(build(case._replace(remat=remat), params), o.steps)})
        except jax.errors.JaxRuntimeError as error:  # a policy that does not fit
            print(f"{remat}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(json.dumps(rows[-1]), flush=True)
        if o.json:
            o.json.write_text(json.dumps({"setting": setting(), "case": str(case), "rows": rows}, indent=1) + "\n")
        jax.clear_caches()
    print(markdown(rows, setting()))
    fits = {row["remat"] for row in rows if row["GiB"] <= ROOM * memory() / 2**30}
    taken = next((policy for policy in POLICIES if policy in fits), "none of these fits")
    print(f"remat=auto on this device, {gib(ROOM * memory())}: {taken}")
    return rows


if __name__ == "__main__":
    main()
