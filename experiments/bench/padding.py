"""Padding of every GLUE task's training batches, and how many padded lengths (compiled programs) keep it under a share.

    python -m experiments.bench.padding [--tasks rte mrpc] [--at-most 0.05] [--steps-per-call 8] [--json FILE]

With the batch, the longest text and the tokenizer of `--config configs/lora.py:task=<task>`, whose config it is. Slots
are those of an epoch, empty rows of the last batch included; `calls` pads batches that share a call to the longest of
them. Nothing is timed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.bench.setting import markdown, setting
from lorajax import build, config, data
from lorajax.io import assets


def measure(c: ConfigDict, at_most: float, steps_per_call: int) -> dict[str, Any]:
    found = build.load_data(c)
    tokens = build.tokens(c, found, assets.resolve(c.args.model).path)
    usual = build.batches(c, tokens)["train"]
    c.shapes, c.padding, lengths = 32, at_most, tokens["train"].lengths
    train = build.batches(c, tokens)["train"]
    four = data.Batches(tokens["train"], c.batch, shapes=4, seed=c.seed)
    c.steps_per_call = steps_per_call
    calls = build.batches(c, tokens)["train"]
    apart = 1 - lengths.sum() / (c.batch * loosely(calls, steps_per_call))
    return {"task": c.args.task, "examples": len(lengths), "batch": c.batch, "max length": c.max_length,
            "tokens a text": float(np.mean(lengths)), "one length %": 100 * (1 - lengths.mean() / lengths.max()),
            "4 lengths %": 100 * four.padding(), "lengths": len(train.lengths), "padding %": 100 * train.padding(),
            "default lengths": len(usual.lengths), "default %": 100 * usual.padding(),
            f"lengths in calls of {steps_per_call}": len(calls.lengths), "those %": 100 * calls.padding(),
            "in calls of any lengths %": 100 * apart}  # fmt: skip


def loosely(batches: data.Batches, n: int) -> float:
    # What calls of batches in any order would pad to.
    padded = data.Batches(batches.tokens, batches.batch_size, seed=batches.seed, lengths=batches.lengths)._plan(0)[1]
    return float(sum(len(padded[i : i + n]) * padded[i : i + n].max() for i in range(0, len(padded), n)))


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=[name for name in data.TASKS if name != "reviews"])
    parser.add_argument("--at-most", type=float, default=0.05)
    parser.add_argument("--steps-per-call", type=int, default=8)
    parser.add_argument("--config", default="configs/lora.py", help="model and data may be set: FILE:model=...")
    parser.add_argument("--data", default="", help="folder of parquet files")
    parser.add_argument("--json", type=Path, help="write the numbers there, as they come")
    o = parser.parse_args(argv)
    rows = []
    for name in o.tasks:
        c = ConfigDict(config.load(f"{o.config}{',' if ':' in o.config else ':'}task={name}").to_dict())
        c.data = o.data
        rows.append(measure(c, o.at_most, o.steps_per_call))
        print(json.dumps(rows[-1]), flush=True)
        if o.json:
            o.json.write_text(json.dumps({"setting": setting(), "rows": rows}, indent=1) + "\n")
    print(markdown(rows, setting()))
    return rows


if __name__ == "__main__":
    main()
