"""What is timed on either side: the rows of the tables. Neither framework is imported here."""

import argparse
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.shapes import SHAPES

ALPHA, RATE = 16, 1e-4


@dataclass(frozen=True)
class Work:
    """One row. method: lora, dora, full, or nf4, which is lora on a quantised base. targets: a preset of the rules.
    ours: how lorajax runs it, '[attention][/scan][/fused][/plain][:steps in one call][+compiler]': scan, its layers
    in one stacked tree; fused, the fused attention is not computed again; plain, without the kernels of
    `lorajax.core.gated_kernel`; theirs: how PEFT does, see experiments.bench.theirs,
    where `limit` is what is measured beside it. goal: PEFT's best time over ours."""

    shape: str
    rows: int
    tokens: int
    method: str = "lora"
    targets: str = "all-linear"
    rank: int = 16
    remat: bool = False
    ours: tuple[str, ...] = ("cudnn",)
    theirs: tuple[str, ...] = ("limit", "eager", "layers")
    device: str = "cuda"
    goal: float = 1.0

    @property
    def config(self) -> dict[str, Any]:
        return SHAPES[self.shape]

    @property
    def decoder(self) -> bool:
        return self.config["model_type"] == "llama"

    def checkpoint(self, folder: Path | None) -> Path | None:
        """The file of its weights in a folder of MiniLM's; other shapes have random ones."""
        return folder / "model.safetensors" if folder and self.shape == "minilm" else None

    def batch(self) -> dict[str, np.ndarray]:
        """Random tokens, no padding: input_ids (rows, tokens) and, for an encoder, label (rows,)."""
        rng = np.random.default_rng(0)
        ids = rng.integers(1, self.config["vocab_size"], (self.rows, self.tokens)).astype(np.int32)
        return {"input_ids": ids} | ({} if self.decoder else {"label": rng.integers(0, 2, self.rows).astype(np.int32)})


SMALL: dict[str, Any] = {"targets": "qv", "rank": 8, "theirs": ("limit", "eager", "model", "graphs", "amp"),
                         "ours": ("short:16", "cudnn:16", ":16")}
CPU: dict[str, Any] = SMALL | {"device": "cpu", "theirs": ("limit", "eager", "model"), "ours": ("", ":8")}
EIGHT = ("cudnn/scan", "cudnn/scan/fused")
TOY: dict[str, Any] = {"device": "cpu", "theirs": ("limit", "eager"), "ours": ("",)}
TABLES: dict[str, dict[str, Work]] = {
    "decoders": {
        "lora_all": Work("1.2b", 8, 1024, theirs=("limit", "eager", "layers", "model", "amp"), goal=1.2),
        "lora_qv": Work("1.2b", 8, 1024, targets="qv", goal=1.1),
        "dora_all": Work("1.2b", 8, 1024, "dora", goal=1.3),
        "nf4_all": Work("1.2b", 8, 1024, "nf4", theirs=()),
        "full": Work("1.2b", 8, 1024, "full"),
        "8b": Work("8b", 2, 2048, remat=True, ours=EIGHT, goal=1.18),
    },
    "encoders": {
        "bert": Work("bert-base", 32, 128, goal=1.5, **SMALL),
        "minilm": Work("minilm", 16, 64, **SMALL),
    },
    "cpu": {"minilm_cpu": Work("minilm", 16, 64, goal=1.3, **CPU)},
    "smoke": {
        "tiny": Work("tiny", 2, 16, rank=4, **TOY),
        "tiny_dora": Work("tiny", 2, 16, "dora", rank=4, remat=True, **TOY | {"ours": ("", "/scan")}),
        "tiny_full": Work("tiny", 2, 16, "full", **TOY),
        "tiny_nf4": Work("tiny", 2, 16, "nf4", rank=4, **TOY | {"theirs": ()}),
        "tiny_bert": Work("tiny-bert", 4, 8, targets="qv", rank=4, **TOY | {"ours": ("", ":2")}),
    },
}  # fmt: skip
ROWS = {name: work for table in TABLES.values() for name, work in table.items()}


def seed(name: str) -> int:
    """Of the tensor of a checkpoint that has this name."""
    return zlib.crc32(name.encode())


def drawn(index: Any, seed: Any, real: Callable[[Any], Any], whole: Callable[[int], Any] = int) -> Any:
    """The elements `index` of a tensor: uniform, mean 0, deviation 0.02, a hash of index and seed, so that both
    frameworks draw the same weights where they want them. index: integers below 2^32 of a type whose products may wrap
    (uint32, int64), whole: its constants; real: to float32."""
    one, two, three, low = map(whole, (0x9E3779B1, 0x2C1B3C6D, 0x297A2D39, 0xFFFFFFFF))
    h = (index * one + seed) & low
    h = ((h ^ (h >> 15)) * two) & low
    h = ((h ^ (h >> 12)) * three) & low
    wide = 0.02 * math.sqrt(3.0)
    return real((h ^ (h >> 15)) >> 8) * (wide / 2**23) - wide


def kind(name: str, ndim: int) -> str:
    """'ones' for the scales of norms, 'drawn' for all other tensors of a checkpoint."""
    return "ones" if ndim == 1 and name.endswith("weight") else "drawn"


def timed(call: Callable[[], Any], wait: Callable[[Any], Any], blocks: int, steps_per_call: int = 1) -> dict[str, Any]:
    """Milliseconds of a step: the median of `blocks` blocks of calls, each waited for at its end, and its 10th and 90th
    percentile. A block is as many calls as take 40 ms and at least four, so that steps follow one another as in
    training, where the host sends the next one while the device works."""
    began = time.perf_counter()
    wait(call())
    calls = max(4, min(64, round(0.04 / max(time.perf_counter() - began, 1e-6))))
    times = []
    for _ in range(blocks):
        began = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        times.append(1e3 * (time.perf_counter() - began) / (calls * steps_per_call))
    low, median, high = np.percentile(times, (10, 50, 90)).tolist()
    return {"ms": median, "low": low, "high": high, "blocks": blocks, "steps a block": calls * steps_per_call}


def options(doc: str, argv: list[str] | None) -> argparse.Namespace:
    """The command line of one side."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--how", nargs="+", help="ways to run it in place of the row's own")
    parser.add_argument("--blocks", type=int, default=25, help="measurements, of four or more calls each")
    parser.add_argument("--file", type=Path, help="append the lines there")
    parser.add_argument("--weights", type=Path, help="a Hugging Face folder of MiniLM, for the rows of its shape")
    parser.add_argument("--wait", action="store_true", help="imports first, then starts when a line comes in")
    o = parser.parse_args(argv)
    if ROWS[o.row].device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # before a backend counts its threads
    if o.wait:
        sys.stdin.readline()
    return o


def tell(o: argparse.Namespace, line: dict[str, Any]) -> None:
    """A measured line, on the screen and in the file."""
    text = json.dumps({"row": o.row, **line})
    print(text, flush=True)
    if o.file:
        with o.file.open("a") as file:
            file.write(text + "\n")
