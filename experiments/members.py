"""The members of a pack: runs of one program, and what each of them reads.

`experiments.programs` says how they begin and step, `experiments.packed` trains them together.
"""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import lorajax as lj
from experiments import glue
from experiments.balance import in_use
from lorajax import build, config, data, sweep
from lorajax.control import Controller
from lorajax.models import Bert
from lorajax.models.attention import side_by_side
from lorajax.models.short_attention import short_attention, short_side_by_side
from lorajax.shard import hosts
from lorajax.train.pack import Parts
from lorajax.train.run import run_folder, write_json

# A run's rank, where it may differ from the others', and what its learning rates from step to step depend on.
RANKS = ("variant.rank", "args.rank")
LENGTH = ("epochs", "steps", "warmup", "schedule")


class Member(NamedTuple):
    """One run of a pack. kind: of its arrays. adapt: of its own rank, for the adapter that it leaves. batches: one
    object for all members of one seed. total: its steps."""

    launch: config.Launch
    folder: Path
    kind: str
    adapt: lj.Adapt
    controller: Controller
    batches: dict[str, data.Batches]
    trained: int
    total: int


class Prepared(NamedTuple):
    """What the runs of a program read, the same for all. sites: traced on a batch of `c.batch` examples."""

    found: build.Data
    tokens: dict[str, data.Tokens]
    model: build.Model
    sites: lj.Sites


def shared_config(group: sweep.Group) -> ConfigDict:
    # What all have in common, at the largest rank and length.
    c = ConfigDict(group.launches[0].config.to_dict())
    for key in {"epochs", "steps"} & set(group.differ):
        c[key] = max(one.config[key] for one in group.launches)
    if "variant.rank" in group.differ:
        c.variant.rank = max(one.config.variant.rank for one in group.launches)
    return c


def numbers(group: sweep.Group, m: Member, longest: int) -> dict[str, Any]:
    # A run's own numbers. At a lower rank alpha makes up for the rank that the shared program divides by. Of another
    # length: its learning rates, as shares of `lr`, up to the last step of all.
    c = m.launch.config
    flat = config.flatten(c)
    own: dict[str, Any] = {key: flat[key] for key in group.differ if key not in ("seed", *RANKS, *LENGTH)}
    if "lr" in own or "head_lr" in own:
        own |= {"lr": flat["lr"], "head_lr": flat["head_lr"] or flat["lr"]}
    if set(LENGTH) & set(group.differ):
        unit = ConfigDict(c.to_dict() | {"lr": 1.0})
        shares = np.asarray(jax.vmap(build.schedule(unit, m.total))(np.arange(m.total, dtype=np.float32)))
        own["schedule"] = np.pad(shares, (0, longest - m.total))
    if "variant.rank" in group.differ:
        mine: Any = build.variant(c)
        shared: Any = build.variant(shared_config(group))
        own["variant.alpha"] = mine.scale / dataclasses.replace(shared, alpha=1.0).scale
    return own


# What the runs of a study read stays read. A few tasks and one model.
TEXT = ("args.task", "args.model", "data", "examples", "max_length")
NET = ("args.model", "pooling", "compute_dtype", "head_dropout", "scan_layers", "remat", "dropout",
       "attention")
LOADED: dict[Any, Any] = {}
READING = threading.RLock()  # programs are made in threads


def prepared(c: ConfigDict) -> Prepared:
    if c.remat == "auto":
        raise config.ConfigError("remat='auto' is decided for one run, and a sweep's packs are as large as the memory "
                                 "allows: take remat=none, attention or full")
    flat = config.flatten(c)
    net = json.dumps({k: v for k, v in flat.items() if k in NET or k.startswith(("mesh.", "shard."))})
    text = json.dumps({k: v for k, v in flat.items() if k in TEXT})
    with READING:
        found = once(text, lambda: build.load_data(c))
        model = once((net, found.task.outputs), lambda: load_model(c, found.task))
        tokens = once((text, "tokens"), lambda: build.tokens(c, found, model.folder))
        one = build.batches(c, tokens)["train"].batch(0, 0)
        seen = *(x.shape for x in one.values()), net, found.task.outputs
        sites = once(seen, lambda: lj.sites(model.net.apply, model.variables, *glue.inputs(one)))
    return Prepared(found, tokens, model, sites)


def load_model(c: ConfigDict, task: Any) -> build.Model:
    model = build.load_model(c, task, jax.random.key(0))
    packed = {"cudnn": side_by_side, short_attention: short_side_by_side}.get(model.net.config.attention)
    if packed is None:
        return model
    return model._replace(net=Bert(dataclasses.replace(model.net.config, attention=packed)))


def once(key: Any, read: Callable[[], Any]) -> Any:
    if key not in LOADED:
        LOADED[key] = read()
    return LOADED[key]


def rounded(group: sweep.Group, c: ConfigDict, begun: Prepared) -> tuple[Prepared, dict[str, Any]]:
    # On the quantised base, where there is one, and what a start made with it.
    model, made = build.quantized(c, lj.adapt(begun.sites, build.rules(c, begun.model)), begun.model)
    if made and any(key.startswith("variant.") for key in group.differ):
        raise config.ConfigError("a start that is made with the quantised base differs between runs whose variant "
                                 "differs: leave the variant's settings out of the grid")
    return begun._replace(model=model), made


# Settings of a run that its arrays do not depend on before the first step, given its keys.
LATER = ("seed", "lr", "head_lr", "weight_decay", "variant.dropout", "optimizer.ratio", *LENGTH)


def assemble(group: sweep.Group, begun: Prepared) -> list[Member]:
    adapts: dict[Any, tuple[lj.Adapt, int]] = {}
    batches: dict[int, dict[str, data.Batches]] = {}
    members = []
    for launch in group.launches:
        own, kind = launch.config, kind_of(launch.config)
        told = kind, own.variant.get("dropout")  # which the folder of its adapter says
        if told not in adapts:
            adapt = lj.adapt(begun.sites, build.rules(own, begun.model))
            adapts[told] = adapt, adapt.count()
        if own.seed not in batches:
            batches[own.seed] = build.batches(own, begun.tokens)
        adapt, trained = adapts[told]
        total = build.total_steps(own, len(batches[own.seed]["train"]))
        members.append(Member(launch, folder_of(launch), kind, adapt, build.controller(own, adapt, total),
                              batches[own.seed], trained, total))
    return members


def kind_of(c: ConfigDict) -> str:
    # What a run's arrays at step 0 depend on, given its keys.
    return json.dumps({k: v for k, v in config.flatten(c).items() if k not in LATER}, default=str)


def maker(c: ConfigDict, begun: Prepared, total: int) -> Any:
    loss = glue.make_loss(begun.model.net, begun.found.task, c)

    def make(values: Any) -> Parts:
        # Also inside the trace: the numbers stand in the config like any others.
        mine = ConfigDict(c.to_dict())
        for key, value in values.items():
            *parents, last = key.split(".")
            node: Any = mine
            for parent in parents:
                node = node[parent]
            with node.ignore_type():
                node[last] = value
        adapt = lj.adapt(begun.sites, build.rules(mine, begun.model))
        optimizer = build.optimizer(mine, adapt, begun.model, total)
        return Parts(in_use(mine, adapt, loss, glue.tokens), adapt, optimizer, build.controller(mine, adapt, total))

    return make


def narrow(trainable: Any, plan: dict[str, Any]) -> Any:
    # Arrays of the run's own rank: what `widen` added is zeros.
    def cut(path: str, arrays: Any) -> Any:
        leaves, rank = plan[path].leaves, getattr(plan[path], "rank", None)
        if rank is None:
            return arrays

        def one(name: str, x: Any) -> Any:
            axes = leaves[name].axes
            if x is None or "rank" not in axes:
                return x
            return x[(slice(None),) * (x.ndim - len(axes) + axes.index("rank")) + (slice(rank),)]

        return arrays._replace(**{name: one(name, x) for name, x in arrays._asdict().items()})

    return {path: cut(path, arrays) if path in plan else arrays for path, arrays in trainable.items()}


def folder_of(launch: config.Launch) -> Path:
    return run_folder(launch.options["workdir"], launch.config.study, launch.name, launch.config.seed)


def record(folder: Path, reason: str) -> None:
    if not hosts.writes():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "failed.json", {"reason": reason})
