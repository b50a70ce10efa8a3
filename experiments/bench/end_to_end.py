"""Seconds of a whole fine-tuning, imports to the last file: Hugging Face's Trainer with PEFT against experiments.glue.

    python -m experiments.bench.end_to_end --model minilm --data FOLDER --json end_to_end.json --into README.md

MiniLM on SST-2, LoRA of rank 8 on query and value, batches of 32, 3 epochs, an evaluation and a checkpoint after each,
bfloat16 on a GPU. The commands one after the other, each alone; lorajax twice, first with an empty compilation cache,
then with the one that it left. `start` is the part of the seconds from the end of the imports to the loop, `loop` that
from the first step to the last, evaluations and checkpoints included; `compiling` the part of the loop that waited for
a program of the step, `waited` the most of it that the device can have stood idle for want of a batch. Ours pads all to
one length: each further one is a program to compile (not compared with four of them).
The accuracies stand beside the times: the recipes are alike but for what each framework does itself (PEFT's side has
BERT's pooler and pads to the longest of a batch; ours pools by the mean).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.bench.setting import markdown, setting
from lorajax.io import assets
from lorajax.report import into

PEFT = "HF Trainer + PEFT"
SHARES = {"waited %": "data", "evaluation %": "evaluation", "checkpoints %": "checkpoints"}


def timed(command: list[str], limit: float, **env: str) -> tuple[float, str]:
    # (seconds, what it printed). JAX leaves the GPU's memory to whoever comes next.
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit,
                          env={**os.environ, **env})  # fmt: skip
    if done.returncode:
        raise SystemExit(f"error: exit code {done.returncode} of {' '.join(command)}:\n{done.stdout[-3000:]}")
    return time.perf_counter() - began, done.stdout


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--data", default=os.environ.get("LORAJAX_DATA", ""), help="the folder that holds sst2/")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", default="3e-4")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--examples", type=int, default=0, help="of each split, 0 for all")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one command")
    parser.add_argument("--peft-python", default=sys.executable, help="the interpreter that has PyTorch and PEFT")
    parser.add_argument("--json", type=Path, default=Path("end_to_end.json"))
    parser.add_argument("--into", type=Path, help="a document with the markers of a section `end_to_end`")
    o, words = parser.parse_known_args(argv)  # the rest is for our config: --config.steps_per_call=16
    o.json.parent.mkdir(parents=True, exist_ok=True)
    model = str(assets.resolve(o.model).path)
    rows: list[dict[str, Any]] = []

    def told(name: str, seconds: float, found: dict[str, Any]) -> None:
        rows.append({"what": name, "seconds": seconds, "PEFT over it": "-", **found})
        if peft := next((row["seconds"] for row in rows if row["what"] == PEFT), None):
            rows[:] = [row | {"PEFT over it": peft / row["seconds"]} for row in rows]
        print(json.dumps(rows[-1]), flush=True)
        o.json.write_text(json.dumps({"rows": rows, "epochs": o.epochs}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        theirs = [o.peft_python, "-m", "experiments.bench.trainer", "--model", model, "--data", o.data, "--out",
                  f"{folder}/peft", f"--epochs={o.epochs}", f"--lr={o.lr}", f"--batch={o.batch}",
                  f"--examples={o.examples}"]
        for name in ("first run", PEFT, "again, compiled before"):
            if name == PEFT:
                seconds, out = timed(theirs, o.limit)
                scores = json.loads(out.strip().splitlines()[-1])
                told(PEFT, seconds, {
                    "steps": scores["steps"], "start s": "-", "loop s": scores["loop"], "compiling s": "-",
                    "accuracy": scores["accuracy"], "padding %": "-", **dict.fromkeys(SHARES, "-")})  # fmt: skip
                continue
            ours = [sys.executable, "-m", "experiments.glue", "--config",
                    f"configs/lora.py:task=sst2,model={model},targets=qv,rank=8", f"--config.data={o.data}",
                    f"--config.epochs={o.epochs}", f"--config.lr={o.lr}", "--config.dropout=0.0",
                    f"--config.batch={o.batch}", f"--config.examples={o.examples}", "--config.max_length=64",
                    "--config.probe=false", "--config.shapes=1", "--config.padding=0.0",
                    f"--workdir={folder}/{name[:5]}", *words]
            seconds, _ = timed(ours, o.limit, JAX_COMPILATION_CACHE_DIR=f"{folder}/cache")
            left = json.loads(next(Path(folder, name[:5]).rglob("summary.json")).read_text())
            shares = {key: 100 * left["time"].get(of, 0.0) for key, of in SHARES.items()}
            told(f"lorajax, {name}", seconds, {
                "steps": left["steps"], "start s": left["time"]["start"], "loop s": left["time"]["loop"],
                "compiling s": left["time"]["compiling"], "accuracy": left["scores"]["accuracy"],
                "padding %": 100 * left["padding"], **shares})  # fmt: skip
    where = setting()
    o.json.write_text(json.dumps({"setting": where, "rows": rows, "epochs": o.epochs}, indent=1) + "\n")
    found = markdown(rows, where)
    print(found)
    if o.into:
        into(o.into, "end_to_end", found)
    return rows


if __name__ == "__main__":
    main()
