"""Time and memory of a training step, lorajax against PEFT, on one device in one run.

    python -m experiments.bench.speed decoders --json decoders.json --into README.md       # one table
    python -m experiments.bench.speed encoders --json encoders.json
    python -m experiments.bench.speed cpu --json cpu.json                                   # two cores
    python -m experiments.bench.speed decoders --rows lora_all,dora_all --limit 500 --quick --json decoders.json
    python -m experiments.bench.speed smoke                                                 # toy shapes, any machine

Each side of each row has a process of its own (experiments.bench.ours and .theirs), so that memory is free again. Both
draw the same weights, adapters included, and train on the same tokens with AdamW, no dropout, bfloat16 (on a CPU
float32); the first loss and the first gradient's norm of the two must agree, or the row says so. PEFT is run eager and
compiled in several ways, and the best counts. The limit is the step's products and attention alone. Times are medians
of blocks of steps, with the 10th and the 90th percentile. What is measured is in the JSON file at once: the same
command goes on where it was, and with nothing left to do it writes the tables alone.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.setting import markdown
from experiments.bench.work import ROWS, TABLES, Work
from lorajax.report import into

# What the first losses and the norms of the first gradients may differ by, relative. On a GPU PEFT's classifiers have
# their loss in bfloat16, whose steps are 2^-8; its decoders have it in float32.
AGREE = {"cpu": (1e-5, 1e-4), "cuda": (1e-3, 3e-2)}
CLASSIFIER = 2**-8
# A preset for research loops on a GPU, for what log.md has measured.
XLA_FLAGS = "--xla_gpu_enable_triton_gemm=false"
Lines = list[dict[str, Any]]


class Job(NamedTuple):
    row: str
    side: str
    hows: list[str]

    def __str__(self) -> str:
        return f"{self.row} {self.side} ({', '.join(how or 'plain' for how in self.hows)})"


def start(job: Job, o: argparse.Namespace, log: Any) -> subprocess.Popen[Any]:
    # Its imports are done while the one before it runs; it begins when it is told.
    row, weights = job.row, [f"--weights={o.weights.resolve()}"] if o.weights else []
    command = [o.peft_python if job.side == "theirs" else sys.executable, "-m", f"experiments.bench.{job.side}", row,
               "--wait", *weights, f"--blocks={o.blocks}", f"--file={o.json.with_suffix('.lines')}", "--how", *job.hows]
    env = {"XLA_FLAGS": XLA_FLAGS if ROWS[row].device == "cuda" else "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
           "JAX_PLATFORMS": ROWS[row].device, "PYTHONUNBUFFERED": "1", **os.environ}  # fmt: skip
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True)


def finish(process: subprocess.Popen[Any], seconds: float) -> str:
    # Lets it begin; '' or what became of it.
    try:
        process.communicate(b"\n", timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        end(process)
        return f"stopped after {seconds:.0f} s"
    return f"exit code {process.returncode}" if process.returncode else ""


def end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers it may have started
        process.wait()


def run(o: argparse.Namespace) -> None:
    began, lines_file = time.monotonic(), o.json.with_suffix(".lines")
    done = {(line["row"], line["side"], line["how"]) for line in read(lines_file)}
    jobs = []
    for row in o.rows:
        theirs = ROWS[row].theirs[: 3 if o.quick else None]
        for side, name, hows in (("ours", "lorajax", ROWS[row].ours), ("theirs", "PEFT", theirs)):
            if left_over := [how for how in hows if (row, name, how) not in done]:
                jobs.append(Job(row, side, left_over))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    early = cores >= 8  # on fewer the imports would disturb
    with o.json.with_suffix(".log").open("ab") as log:
        waiting = None
        for i, job in enumerate(jobs):
            left = o.limit - (time.monotonic() - began)
            if left < 20:
                print(f"no time left for {', '.join(map(str, jobs[i:]))}", flush=True)
                break
            process = waiting or start(job, o, log)
            waiting = start(jobs[i + 1], o, log) if early and i + 1 < len(jobs) else None
            begun = time.monotonic()
            trouble = finish(process, min(left - 5, o.each))
            print(f"{job}: {time.monotonic() - begun:.0f} s {trouble}", flush=True)
        if waiting:
            end(waiting)


def read(path: Path) -> Lines:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def summary(name: str, work: Work, lines: Lines) -> dict[str, Any]:
    """One row of the table, of what has been measured; '-' for what has not."""
    mine = [x for x in lines if x["row"] == name]
    peft, ours = ([x for x in mine if x["side"] == side and "ms" in x and x["how"] != "limit"]
                  for side in ("PEFT", "lorajax"))
    best, own, eager = (min(xs, key=lambda x: x["ms"], default=None)
                        for xs in (peft, ours, [x for x in peft if x["how"] == "eager"]))  # fmt: skip
    alone = next((x["ms"] for x in mine if x["how"] == "limit" and "ms" in x), None)
    lora = min((x["ms"] for x in lines if x["row"] == "lora_all" and x["side"] == "lorajax" and "ms" in x),
               default=None)

    def over(a: Any, b: Any, form: str = ".2f") -> str:
        return format(a / b, form) if a and b else "-"

    return {
        "work": f"{name}: {work.shape}{', its weights' * any(x.get('checkpoint', False) for x in mine)}, "
                f"{work.rows} x {work.tokens}",
        "PEFT eager, ms": shown(eager), "PEFT best, ms": shown(best, named=True),
        "lorajax, ms": shown(own, named=len(work.ours) > 1),
        "PEFT / lorajax": over(best and best["ms"], own and own["ms"]), "goal": f"{work.goal:g}" if peft else "-",
        "over our LoRA": over(own and own["ms"], lora) if name in ("dora_all", "nf4_all") else "-",
        "limit, ms": f"{alone:.2f}" if alone else "-", "limit / lorajax": over(alone, own and own["ms"]),
        "tokens/s": f"{work.rows * work.tokens / own['ms'] * 1e3:,.0f}" if own else "-",
        "peak GiB, PEFT and lorajax": f"{of(best, 'peak GiB')}, {of(own, 'peak GiB')}",
        "compile s": f"{of(best, 'compile s')}, {of(own, 'compile s')}",
        "first loss and gradient": agreement(work, peft, ours),
    }  # fmt: skip


def shown(line: dict[str, Any] | None, named: bool = False) -> str:
    if line is None:
        return "-"
    how = f" {line['how'] or 'plain'}" if named else ""
    return f"{line['ms']:.2f} ({line['low']:.2f} to {line['high']:.2f}){how}"


def of(line: dict[str, Any] | None, key: str) -> str:
    return f"{line[key]:.1f}" if line else "-"


def agreement(work: Work, peft: Lines, ours: Lines) -> str:
    """'agree' if every way to run the step has the first loss and gradient norm of ours; else by how much they do
    not."""
    if not (peft and ours):
        return "-"
    loss, norm = (max(abs(x[0] / y - 1) for x in pairs) for pairs, y in (
        ([x["losses"] for x in (*peft, *ours)], ours[0]["losses"][0]),
        ([[x["grad_norm"]] for x in (*peft, *ours)], ours[0]["grad_norm"])))  # fmt: skip
    most = AGREE[work.device]
    near = most[0] if work.decoder or work.device == "cpu" else CLASSIFIER
    return "agree" if loss < near and norm < most[1] else f"DIFFER by {loss:.1e} and {norm:.1e}"


def text(tables: list[str], rows: list[str], lines: Lines) -> str:
    parts = []
    for name in tables:
        found = [summary(row, work, lines) for row, work in TABLES[name].items()
                 if row in rows and any(x["row"] == row and "ms" in x for x in lines)]  # fmt: skip
        if not found:
            continue
        wanted = [key for key in found[0] if any(row[key] != "-" for row in found)]
        mine = {x["row"]: x for x in lines if x["row"] in TABLES[name] and "setting" in x}
        where = {key: value for x in lines if x["row"] in mine for key, value in x.get("setting", {}).items()}
        parts.append(markdown([{key: row[key] for key in wanted} for row in found], where))
        taken = {row: min(times)[1] for row in mine if (times := [
            (x["ms"], x["how"]) for x in lines if x["row"] == row and x["side"] == "lorajax" and "ms" in x])}
        profiles = [(x["row"], x["profile"]) for x in lines if "profile" in x and taken.get(x["row"]) == x["how"]]
        parts += ["Where the time of our step goes, in ms, with gaps between kernels as idle:"] if profiles else []
        parts += ["\n".join(f"- {row}: " + ", ".join(
            f"{kind} {ms:.2f}" for kind, ms in (p["kinds"] | {"idle": p["idle"]}).items()) for row, p in profiles)]
    return "\n\n".join(filter(None, parts))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=TABLES)
    parser.add_argument("--rows", default="", help=f"of {', '.join(ROWS)}; all of the tables")
    parser.add_argument("--blocks", type=int, default=25, help="measurements of each way, four or more calls each")
    parser.add_argument("--quick", action="store_true", help="only the first two ways to run PEFT, and the limit")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--each", type=float, default=600, help="seconds for one side of a row")
    parser.add_argument("--peft-python", default=sys.executable, help="the interpreter that has PyTorch and PEFT")
    parser.add_argument("--weights", type=Path, help="a Hugging Face folder of MiniLM, for the rows of its shape")
    parser.add_argument("--json", type=Path, default=Path("speed.json"), help="the numbers; beside it lines and a log")
    parser.add_argument("--into", type=Path, help="a document with the markers of a section `speed`")
    o = parser.parse_args(argv)
    known = [row for name in o.tables for row in TABLES[name]]
    o.rows = o.rows.split(",") if o.rows else known
    if unknown := [row for row in o.rows if row not in known]:
        raise SystemExit(f"error: no row {unknown[0]!r} in these tables, which have {', '.join(known)}")
    o.json.parent.mkdir(parents=True, exist_ok=True)
    run(o)
    lines = read(o.json.with_suffix(".lines"))
    o.json.write_text(json.dumps({"rows": lines}, indent=1) + "\n")
    found = text(o.tables, o.rows, lines)
    print(found)
    if o.into:
        into(o.into, "speed", found)


if __name__ == "__main__":
    main()
