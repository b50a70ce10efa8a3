"""What a study will take, from shapes alone: the memory and the arithmetic of every program before it is compiled.

Time is a guess: the multiplications of the model's weights at a quarter of the rate of one large matrix product on this
device, the share that a prototype of packed runs had on an H200 (a small encoder; larger models do better). Compilation
is not in it. The study's own progress lines say what it really takes.
"""

import json
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lorajax as lj
from experiments.members import Prepared, maker, prepared, shared_config
from lorajax import build, config, start, sweep
from lorajax.train.footprint import Activations, Footprint, footprint, kept

SHARE = 0.25
# Settings that the arrays between forward and backward pass depend on, beside those of the variant.
KEEPS = ("args.model", "args.targets", "batch", "accumulate", "compute_dtype", "remat", "scan_layers", "dropout",
         "head_dropout", "pooling", "neftune", "controller.name", "attention")  # fmt: skip
KEPT: dict[str, Activations] = {}


class Part(NamedTuple):
    """What does not depend on the texts and their length. shared, held: bytes of all runs and of each, without what
    the forward pass keeps. back: multiplications of each weight in the backward pass. own: weights trained themselves.
    waits: what is held depends on data."""

    shared: int
    held: int
    activations: Activations
    back: float
    own: int
    waits: bool


class Estimate(NamedTuple):
    """Of one group.

    footprint: 0 where it waits for data. flops: of one of its runs. program: what makes its compiled programs; groups
    that agree in it and in their size share them. lengths: padded lengths, each a program for training and one for
    evaluation. width: devices that share the runs. part, kind: what other lengths and tasks have in common with it.
    """

    footprint: Footprint
    flops: float
    program: str
    lengths: tuple[int, ...]
    width: int
    part: Part
    kind: str

    def fits(self, limit: float, most: int) -> int:
        """Runs of a pack, at most `most` a device, that need less than `limit` bytes of each."""
        return self.width * self.footprint.runs(limit, most)


def estimate(group: sweep.Group, known: dict[str, Estimate]) -> Estimate:
    # known: estimates by what they depend on; it is filled here.
    c = shared_config(group)
    alike = ("seed", "lr", *group.differ)
    key = json.dumps({k: v for k, v in config.flatten(c).items() if k not in alike}, sort_keys=True, default=str)
    if key not in known:
        known[key] = measure(c, key, known)
    return known[key]


def measure(c: Any, key: str, known: dict[str, Estimate]) -> Estimate:
    begun = prepared(c)
    batches = build.batches(c, begun.tokens)
    train, task = batches["train"], begun.found.task
    total, longest = build.total_steps(c, len(train)), train.lengths[-1]
    alike = {k: v for k, v in json.loads(key).items() if k not in ("args.task", "data", "epochs")}
    program = json.dumps([total, task.outputs, task.regression, [*train.lengths], alike])
    # Tasks differ in their texts alone, which are traced at one length for all; very short ones at their own.
    kind = json.dumps([task.outputs, task.regression, longest if longest < 16 else 0,
                       {k: v for k, v in alike.items() if k != "max_length"}])
    near = next((one.part for one in known.values() if one.kind == kind), None)
    one = train.batch(0, 0)
    batch = {name: jax.ShapeDtypeStruct((c.batch // c.accumulate, *((longest,) if x.ndim > 1 else ())), x.dtype)
             for name, x in one.items()}
    part = near or parted(c, begun, total, batch, longest)
    footprint = Footprint(part.shared, part.held + part.activations.of(c.batch // c.accumulate, longest))
    # The weights that are multiplied: forward, backward to the activations (where something in the encoder is trained),
    # and those trained themselves once more.
    weights = sum(multiplied(begun).values())
    slots = {name: float(b.tokens.lengths.sum()) / (1 - b.padding()) for name, b in batches.items()}
    evaluations = total // build.every(c.eval_every, len(train), c.steps_per_call) or 1
    flops = total * slots["train"] / len(train) * ((2.0 + part.back) * weights + 2.0 * part.own)
    flops += evaluations * 2.0 * weights * sum(n for name, n in slots.items() if name != "train")
    return Estimate(Footprint(0, 0) if part.waits else footprint, flops, program, tuple(train.lengths),
                    begun.model.place.sizes.get("trial", 1), part, kind)


def parted(c: Any, begun: Prepared, total: int, batch: Any, longest: int) -> Part:
    parts, sizes = maker(c, begun, total)({}), multiplied(begun)
    back = 2.0 if any(path in sizes and path not in begun.model.fresh for path in parts.adapt.plan) else 0.0
    own = sum(n for path, n in sizes.items() if isinstance(parts.adapt.plan.get(path), lj.Full))
    if start.reads_data(c, parts.adapt):
        return Part(0, 0, Activations(0, 0, 0), back, own, True)
    growth = json.dumps({k: v for k, v in config.flatten(c).items()
                         if k.startswith(("variant.", "also.", "quant.")) or k in KEEPS}
                        | {"length": longest if longest < 16 else 0}, default=str)
    if growth not in KEPT:
        KEPT[growth] = kept(parts, begun.model.variables, batch, tokens=True)
    size = footprint(parts, begun.model.variables, batch, Activations(0, 0, 0))
    return Part(size.shared, size.own, KEPT[growth], back, own, False)


def multiplied(begun: Prepared) -> dict[str, int]:
    return {path: math.prod(site.shape) for path, site in begun.sites.items() if site.op == "matmul"}


def compiles(groups: list[sweep.Group], found: list[Estimate]) -> int:
    """Programs that XLA has to compile for training and evaluation, at most."""
    distinct = {(one.program, len(group.launches), group.differ): len(one.lengths)
                for group, one in zip(groups, found, strict=True)}
    return 2 * sum(distinct.values())


def matmul_rate() -> float:
    """FLOP per second of one large matrix product on the first device, the best of three."""
    cpu = jax.default_backend() == "cpu"
    n, dtype = (1024, jnp.float32) if cpu else (8192, jnp.bfloat16)
    x = jnp.ones((n, n), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2.0 * n**3 / best
