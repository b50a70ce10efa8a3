"""Adapters of many tasks in fewer numbers: storage against score, from finished runs of `experiments.glue`.

    python -m experiments.storage RUN RUN ... [--rank=8] [--steps=1000] [--rows=8] [--length=128] [--lr=1e-3] [--seed=0]
                                  [--examples=0] [--json=FILE]

RUN: a run's folder (runs/glue/<config>/seed=0); the runs share a base. Ways to store them, heads beside each:

    apart               each run's own adapter
    apart, fewer ranks  each cut to a quarter of --rank
    one A               A of --rank for all, B for each, by SVD of the finished adapters
    one A, trained      the same, shared from the start: trained on all tasks at once, with heads of its own
    hierarchy           a common adapter of --rank, a quarter of it for each task
    one for all         the mean of the adapters, cut to 4 times --rank
    ..., distilled      from there, trained to match the outputs of all adapters; it sees no label

What is trained takes --steps steps of --rows rows of every task, each row of a mixed batch with its own task's B or
head. --examples: of each split, 0 for all. The error is that of the update against the task's own adapter's.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import lorajax as lj
from experiments import glue
from experiments.compose import TrainedRun, load_run, without_head
from lorajax import build, compose, data
from lorajax.compose.compressed import distances
from lorajax.compose.matching import distance
from lorajax.core.sites import by_path
from lorajax.models import Bert
from lorajax.train.compiled import compile_cache
from lorajax.train.step import init_state, make_step
from lorajax.variants.lora import LoRA, LoRAAdapter


def main(argv: list[str]) -> str:
    parser = argparse.ArgumentParser(prog="python -m experiments.storage", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    for name, default in {"rank": 8, "steps": 1000, "rows": 8, "length": 128, "lr": 1e-3, "seed": 0, "examples": 0
                          }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args(argv)
    compile_cache()
    tasks = Tasks([load_run(folder) for folder in o.runs], o)
    small, bare, n = max(1, o.rank // 4), tasks.bare, len(o.runs)
    one = compose.together(bare, compose.Sum(), weights=[1 / n] * n, rank=4 * o.rank)
    dense = rank_of(one.adapters[0])
    rows = {
        "apart": compose.separate(bare),
        f"apart, rank {small}": tasks.cut(small),
        f"one A of rank {o.rank}": compose.share_a(bare, o.rank),
        f"one A of rank {o.rank}, trained": tasks.share(o.rank),
        f"common of rank {o.rank}, own of {small}": compose.hierarchy(bare, o.rank, small).whole,
        f"one for all, rank {dense}": one,
        f"one for all, rank {dense}, distilled": tasks.distil(one.adapters[0]),
    }
    scores: dict[str, list[float]] = {}

    def score(adapters: Sequence[Any]) -> list[float]:
        name = list(rows)[len(scores)]
        scores[name] = tasks.score(adapters)
        print(json.dumps({"stored as": name, "parameters": rows[name].parameters,
                          **dict(zip(tasks.names, scores[name], strict=True))}), flush=True)
        return scores[name]

    said = compose.storage(rows, score)
    print(f"\n{said}")
    if o.json:
        o.json.write_text(json.dumps({name: {"parameters": row.parameters, "errors": row.errors,
                                             "scores": dict(zip(tasks.names, scores[name], strict=True))}
                                      for name, row in rows.items()}, indent=1) + "\n")
    return said


NEVER = -1e4  # the bias of an output that a task has not


class Wide(NamedTuple):
    # The encoder with a head as wide as the widest task's; a task with fewer classes has outputs that never win. fresh:
    # a head for each task that has not been trained.
    net: Bert
    variables: Any
    heads: tuple[dict[str, jax.Array], ...]
    fresh: tuple[dict[str, jax.Array], ...]


def widened(runs: list[TrainedRun]) -> Wide:
    first = runs[0].model
    outputs = max(run.task.outputs for run in runs)
    net = Bert(replace(first.net.config, num_labels=outputs))
    shapes = by_path(jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))[0]
    flat, heads = dict(by_path(first.variables)[0]), list[dict[str, jax.Array]]()
    drawn, fresh = by_path(net.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))[0], list[dict[str, jax.Array]]()
    for run in runs:
        heads.append({})
        has = jnp.arange(outputs) < run.task.outputs
        fresh.append({path: jnp.where(has, drawn[path], NEVER if path.endswith("bias") else 0.0)
                      for path in run.model.fresh})
        for path in run.model.fresh:
            x = run.adapter.trainable[path].w
            missing = [(0, wanted - there) for wanted, there in zip(shapes[path].shape, x.shape, strict=True)]
            heads[-1][path] = jnp.pad(x, missing, constant_values=NEVER if path.endswith("bias") else 0.0)
    return Wide(net, traverse_util.unflatten_dict(flat | heads[0], sep="/"), tuple(heads), tuple(fresh))


class Tasks:
    # All runs on one wide model: their adapters without heads, mixed batches of all, training and scores.

    def __init__(self, runs: list[TrainedRun], options: Any):
        self.wide, self.options, self.count = widened(runs), options, len(runs)
        self.names = [run.task.name for run in runs]
        self.tasks = [run.task for run in runs]
        one = jnp.zeros((1, 8), jnp.int32)
        self.sites = lj.sites(self.wide.net.apply, self.wide.variables, one, one, one)
        self.bare = [self.plain([without_head(run, self.sites)]) for run in runs]
        self.paths = "|".join(map(re.escape, self.bare[0].adapt.plan))
        self.head = "|".join(map(re.escape, runs[0].model.fresh))
        self.found: list[build.Data] = []
        self.batches: list[dict[str, data.Batches]] = []
        for run in runs:
            c = run.config.copy_and_resolve_references()
            c.unlock()
            c.update(batch=options.rows, max_length=options.length, shapes=0, seed=options.seed,
                     examples=options.examples)
            self.found.append(build.load_data(c))
            self.batches.append(build.batches(c, build.tokens(c, self.found[-1], run.model.folder)))
        self.predict = jax.jit(lambda variables, batch: self.wide.net.apply(variables, *glue.inputs(batch)))

    def plain(self, adapters: list[Any], **options: Any) -> Any:
        return compose.compose(adapters, full="drop", params=self.wide.variables, measure=False, **options)

    def cut(self, rank: int) -> compose.Compressed:
        made = tuple(self.plain([one], rank=rank) for one in self.bare)
        return compose.Compressed(made, [one.trainable for one in made], distances(self.bare, made))

    def mixed_batch(self, step: int) -> dict[str, Any]:
        # Rows of every task, and whose each is.
        parts = [b["train"].batch(*divmod(step, len(b["train"]))) for b in self.batches]
        whole = {name: np.concatenate([np.asarray(part[name], np.float32) if name == "label" else part[name]
                                       for part in parts]) for name in parts[0]}
        return whole | {"task": np.repeat(np.arange(self.count, dtype=np.int32), self.options.rows)}

    def adapted(self, rank: int, scale: float) -> lj.Adapt:
        return lj.adapt(self.sites, [(self.head, lj.Full()), (self.paths, LoRA(rank=rank, alpha=scale * rank))])

    def trained(self, loss: Any, adapt: Any, every: Any, start: Any, frozen: Any, batch: Any) -> Any:
        # What tasks train together, by steps on mixed batches.
        o = self.options
        schedule = optax.warmup_cosine_decay_schedule(0.0, o.lr, max(1, o.steps // 20), o.steps)
        tx = optax.adamw(schedule, weight_decay=0.0)
        step = make_step(loss, Banked(adapt, self.wide.variables, every), tx)
        state = init_state(jax.random.key(o.seed), start, tx)
        for i in range(o.steps):
            state, metrics = step(state, frozen, batch(i))
            if (i + 1) % max(1, o.steps // 5) == 0:
                print(f"step {i + 1}: loss {float(metrics['loss']):.4f}", flush=True)
        return state.trainable

    def mean(self, each: Any, of_class: Any, batch: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        regression = jnp.asarray([task.regression for task in self.tasks])[batch["task"]]
        rows = jnp.where(regression, each, of_class) * batch["weight"]
        return jnp.sum(rows) / jnp.sum(batch["weight"]), {}

    def share(self, rank: int) -> compose.Compressed:
        # One A from the start: the B's and heads of all tasks train side by side, on a mixed stream.
        adapt = self.adapted(rank, scale=2.0)
        arrays, frozen = compose.start_shared(adapt, jax.random.key(self.options.seed), self.wide.variables, self.count)
        heads = jax.tree.map(lambda *x: jnp.stack(x), *self.wide.fresh)
        own = {path: type(x)(heads[path]) if path in heads else x for path, x in arrays.own.items()}
        arrays = arrays._replace(own=own)
        run = lj.mixed(Bert(self.wide.net.config, deterministic=False).apply)

        def loss(bank: Any, batch: Any, key: jax.Array) -> Any:
            logits = run(bank, batch["task"], *glue.inputs(batch), rngs={"dropout": key})
            label = batch["label"].astype(jnp.int32)
            return self.mean(jnp.square(logits[:, 0] - batch["label"]),
                             optax.softmax_cross_entropy_with_integer_labels(logits, label), batch)

        def every(arrays: Any) -> Any:
            return jax.tree.map(lambda *x: jnp.stack(x), *[compose.of_task(arrays, t) for t in range(self.count)])

        arrays = self.trained(loss, adapt, every, arrays, frozen, self.mixed_batch)
        made = tuple(compose.Adapter(adapt, compose.of_task(arrays, t), frozen) for t in range(self.count))
        stored = [{path: x for path, x in tree.items() if path not in self.wide.heads[0]} for tree in arrays]
        return compose.Compressed(made, stored, distances(self.bare, [self.plain([one]) for one in made]))

    def distil(self, student: Any) -> compose.Compressed:
        # One adapter for all tasks under the heads of its teachers, whose answers it learns.
        heads = jax.tree.map(lambda *x: jnp.stack(x), *self.wide.heads)
        teacher = self.adapted(max(rank_of(one) for one in self.bare), scale=1.0)
        adapt = self.adapted(rank_of(student), scale=1.0)

        def whole(adapt: Any, many: dict[str, Any]) -> dict[str, Any]:
            full = {path: type(adapt.shapes[0][path])(x) for path, x in heads.items()}
            return {path: {**many, **full}[path] for path in adapt.plan}

        each = [{path: padded(x, rank_of(teacher)) for path, x in one.trainable.items()} for one in self.bare]
        teachers = lj.bank(teacher, whole(teacher, jax.tree.map(lambda *x: jnp.stack(x), *each)),
                           teacher.frozen(self.wide.variables, {}), params=self.wide.variables)
        run = lj.mixed(self.wide.net.apply)
        answer = jax.jit(lambda bank, batch: run(bank, batch["task"], *glue.inputs(batch)))

        def loss(bank: Any, batch: Any, key: jax.Array) -> Any:
            outputs, target = run(bank, batch["task"], *glue.inputs(batch)), batch["target"]
            return self.mean(distance(outputs[:, :1], target[:, :1], None), distance(outputs, target, 2.0), batch)

        def every(one: Any) -> Any:
            return whole(adapt, jax.tree.map(lambda x: jnp.broadcast_to(x, (self.count, *x.shape)), one))

        def taught(step: int) -> dict[str, Any]:
            batch = {name: x for name, x in self.mixed_batch(step).items() if name != "label"}
            return batch | {"target": answer(teachers, batch)}

        start = {path: padded(x, rank_of(student)) for path, x in student.trainable.items()}
        trainable = self.trained(loss, adapt, every, start, adapt.frozen(self.wide.variables, {}), taught)
        low = lj.adapt(self.sites, [(self.paths, LoRA(rank=rank_of(student), alpha=float(rank_of(student))))])
        made = compose.Adapter(low, trainable, low.frozen(self.wide.variables, {}))
        return compose.Compressed((made,) * self.count, trainable, distances(self.bare, [made] * self.count))

    def score(self, adapters: Sequence[Any]) -> list[float]:
        found = []
        for t, one in enumerate(adapters):
            weights = by_path(one.adapt.merge(one.trainable, one.frozen))[0]
            if not one.adapt.plan.keys() & self.wide.heads[t].keys():
                weights = {**weights, **self.wide.heads[t]}
            variables = traverse_util.unflatten_dict(weights, sep="/")
            split = self.tasks[t].evaluation[0]
            passed = list(self.batches[t][split].epoch())
            outputs = np.concatenate(jax.device_get([self.predict(variables, batch) for batch in passed]))
            label, weight = (np.concatenate([batch[name] for batch in passed]) for name in ("label", "weight"))
            outputs = outputs[:, :self.tasks[t].outputs]
            found.append(data.evaluate(self.tasks[t], outputs, label, weight)[self.tasks[t].headline])
        return found


class Banked(NamedTuple):
    # `make_step`'s adapt, whose bound tree is a bank of all tasks. every: what is trained -> arrays of all tasks.
    adapt: lj.Adapt
    variables: Any
    every: Any

    def bind(self, trained: Any, frozen: Any, **_: Any) -> Any:
        return lj.bank(self.adapt, self.every(trained), frozen, params=self.variables)

    def penalty(self, trained: Any) -> jax.Array:
        return jnp.zeros(())


def rank_of(one: Any) -> int:
    plan = (one if isinstance(one, lj.Adapt) else one.adapt).plan.values()
    return max(choice.rank for choice in plan if isinstance(choice, LoRA))


def padded(x: LoRAAdapter, rank: int) -> LoRAAdapter:
    none, more = [(0, 0)] * (x.A.ndim - 2), rank - x.A.shape[-1]
    return LoRAAdapter(jnp.pad(x.A, [*none, (0, 0), (0, more)]), jnp.pad(x.B, [*none, (0, more), (0, 0)]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
