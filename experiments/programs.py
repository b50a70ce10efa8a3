"""The programs of a pack: how its runs begin, step and are evaluated, compiled in threads before they are needed.

XLA compiles on the CPU while the device trains. Packs that differ in nothing but where their texts come from share one
program. On a mesh nothing is compiled ahead.
"""

import dataclasses
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import lorajax as lj
from experiments import glue
from experiments.members import Member, Prepared, assemble, folder_of, maker, numbers, prepared, rounded, shared_config
from lorajax import build, config, sweep
from lorajax.core.adapt import Frozen
from lorajax.core.sites import by_path
from lorajax.data.feed import calls, widths
from lorajax.shard import hosts
from lorajax.train.compiled import Ready
from lorajax.train.pack import Pack, make_packed_eval, make_packed_step, widen
from lorajax.train.step import init_state


@dataclasses.dataclass(frozen=True)
class Program:
    """What the runs of a pack share. begin: arrays of `Team` -> (state, frozen arrays of the adapters, those that sites
    share), with an axis of the runs in front. alike: whether the last are the same in every run. views: the
    controller's, None where it has none."""

    begin: Ready
    step: Ready
    evaluate: Ready
    choose: Ready
    views: Ready | None
    base: tuple[str, ...]
    alike: bool
    where: Any


class Team(NamedTuple):
    """The runs of a pack, about to begin. total: steps of the longest. width: of the mesh's axis `trial`, which the
    runs fill: the last one stands, inactive, in the places that are left over. entering: what `begin` takes besides the
    base. values: name -> (runs, ...), the numbers of each run's own."""

    program: Program
    members: list[Member]
    begun: Prepared
    total: int
    width: int
    entering: Any
    values: dict[str, np.ndarray]

    @property
    def all(self) -> list[Member]:
        return self.members + self.members[-1:] * (-len(self.members) % self.width)

    def pack(self) -> Pack:
        variables = self.begun.model.variables
        state, aux, shared = self.program.begin(variables, *self.entering)
        flat, _ = by_path(variables)
        common = Frozen({path: flat[path] for path in self.program.base}, {}, {})
        if self.program.alike:
            common = common._replace(shared=jax.tree.map(lambda x: x[0], shared))
        own = Frozen({}, aux, {} if self.program.alike else shared)
        if self.program.where is not None:
            state, own, values = jax.jit(lambda x: x, out_shardings=self.program.where)((state, own, self.values))
            return Pack(state, common, own, values)
        return Pack(state, common, own, jax.device_put(self.values))


class Programs:
    """Of a study. workers: threads that compile ahead; 0: the first call of a program compiles it."""

    def __init__(self, workers: int = 0, adapters: bool = True):
        self.workers, self.adapters = workers, adapters
        self.pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="compile")
        self.teams: dict[str, Future[Team]] = {}
        self.known: dict[str, Future[Program]] = {}
        self.tracing, self.looking = threading.Lock(), threading.Lock()

    def ahead(self, groups: Sequence[sweep.Group]) -> None:
        """Starts on the next packs."""
        for group in groups[:self.workers]:
            if len(group.launches) > 1 and named(group) not in self.teams:
                self.teams[named(group)] = self.pool.submit(self.team, group)

    def get(self, group: sweep.Group) -> Team:
        """A pack, as soon as it can begin. Raises what went wrong on the way."""
        team = self.teams.pop(named(group), None)
        return self.team(group) if team is None else team.result()

    def team(self, group: sweep.Group) -> Team:
        with self.tracing:
            c = shared_config(group)
            begun, made = rounded(group, c, prepared(c))
            members = assemble(group, begun)
            total = max(m.total for m in members)
            width = begun.model.place.sizes.get("trial", 1)
            key = identity(group, members, begun, total)
        with self.looking:
            ours = key not in self.known
            if ours:
                self.known[key] = Future()
            future = self.known[key]
        all_ = members + members[-1:] * (-len(members) % width)
        entering = *enter(all_, begun), made
        rows = [numbers(group, m, total) for m in all_]
        values = {name: np.asarray([row[name] for row in rows], np.float32) for name in rows[0]}
        if ours:
            try:
                with self.tracing:
                    program = make_program(group, members, begun, total, entering, values)
                team = Team(program, members, begun, total, width, entering, values)
                if self.workers and begun.model.place.mesh is None:
                    ready(team, c, self.adapters, self.tracing)
                future.set_result(program)
            except BaseException as error:
                with self.looking:
                    del self.known[key]  # the next attempt is a new one
                future.set_exception(error)
                raise
        return Team(future.result(), members, begun, total, width, entering, values)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def named(group: sweep.Group) -> str:
    return f"{len(group.launches)} from {folder_of(group.launches[0])} to {folder_of(group.launches[-1])}"


# No program depends on these: where texts come from, what is told, how far a run goes beside its steps in all.
FREE = ("args.task", "data", "study", "examples", "epochs", "steps", "log_every", "eval_every", "probe", "seed")


def identity(group: sweep.Group, members: list[Member], begun: Prepared, total: int) -> str:
    # Packs with the same answer have the same programs: the same constants, numbers, kinds of start, and shapes.
    task, lengths = begun.found.task, members[0].batches["train"].lengths
    rest = {k: v for k, v in config.flatten(shared_config(group)).items() if k not in (*FREE, *group.differ)}
    kinds: dict[str, set[int]] = {}
    for m in members:
        kind = {k: v for k, v in json.loads(m.kind).items() if k not in FREE}
        kinds.setdefault(json.dumps(kind), set()).add(m.launch.config.seed)
    told = [(kind, len(seeds)) for kind, seeds in kinds.items()]
    return json.dumps([rest, told, total, task.outputs, task.regression, lengths, len(members), group.differ],
                      default=str)


def enter(members: list[Member], begun: Prepared) -> tuple[Any, np.ndarray]:
    """What the runs begin with, for each kind of start and each of its seeds once, and which of them each run is."""
    found: dict[str, dict[int, Any]] = {}
    for m in members:
        seeds, seed = found.setdefault(m.kind, {}), m.launch.config.seed
        if seed not in seeds:
            head_key, adapter_key, train_key = jax.random.split(jax.random.key(seed), 3)
            flat, _ = by_path(build.with_head(begun.model, head_key))
            head = {path: flat[path] for path in begun.model.fresh}
            seeds[seed] = len(seeds), {"head": head, "adapter": adapter_key, "train": train_key, "seed": np.int32(seed)}
    first = dict(zip(found, np.cumsum([0, *map(len, found.values())]), strict=False))
    order = [first[m.kind] + found[m.kind][m.launch.config.seed][0] for m in members]
    return tuple(tuple(start for _, start in seeds.values()) for seeds in found.values()), np.array(order, np.int32)


def make_program(group: sweep.Group, members: list[Member], begun: Prepared, total: int, entering: Any,
                 values: Any) -> Program:
    c, model, place = shared_config(group), begun.model, begun.model.place
    make = maker(c, begun, total)
    adapts = list({m.kind: m.adapt for m in members}.values())

    def one(adapt: lj.Adapt, start: Any, variables: Any, made: Any) -> Any:
        flat = traverse_util.flatten_dict(variables, sep="/") | start["head"]
        trainable, frozen = adapt.init(start["adapter"], traverse_util.unflatten_dict(flat, sep="/"), made)
        if "variant.rank" in group.differ:
            trainable |= {p: widen(trainable[p], choice.leaves, c.variant.rank) for p, choice in adapt.plan.items()}
        _, _, tx, controller = make({"seed": start["seed"]})
        return init_state(start["train"], trainable, tx, controller), frozen.aux, frozen.shared

    def begin(variables: Any, kinds: Any, order: Any, made: Any) -> Any:
        # A start is made once for all runs of its seed, and what it makes of the base alone (an SVD) once for all.
        parts = []
        for adapt, starts in zip(adapts, kinds, strict=True):
            together = jax.tree.map(lambda *xs: jnp.stack(xs), *starts)
            parts.append(jax.vmap(lambda start, adapt=adapt: one(adapt, start, variables, made))(together))
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[order], *parts)

    args = model.variables, *entering
    state, aux, shared = jax.eval_shape(begin, *args)
    drawn = hosts.fetch(jax.jit(lambda *args: begin(*args)[2])(*args)) if jax.tree.leaves(shared) else {}
    alike = all(bool((np.asarray(x) == np.asarray(x)[:1]).all()) for x in jax.tree.leaves(drawn))
    own = Frozen({}, aux, {} if alike else shared)
    where = place.pack(members[0].adapt, (state, own, values))
    starts = None if where is None else (where[0], where[1].aux, None)

    step = make_packed_step(make, clip=c.clip or None, accumulate=c.accumulate, steps_per_call=c.steps_per_call,
                            shardings=where and (where[0], place.whole))
    predict = lj.lift(model.net.apply)
    evaluate = make_packed_eval(lambda bound, batch: predict(bound, *glue.inputs(batch)), make, place.whole)
    control = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.control)
    views = members[0].controller.views
    chosen = where and (where[0].trainable, where[0].control)
    return Program(Ready(jax.jit(begin, out_shardings=starts)), Ready(step.jitted), Ready(evaluate.jitted),  # type: ignore[attr-defined]
                   Ready(jax.jit(better_of, out_shardings=chosen)),
                   Ready(jax.jit(jax.vmap(views))) if jax.eval_shape(views, control) else None,
                   tuple(members[0].adapt.shapes[1].base), alike, where)


def batches_of(team: Team, c: Any) -> Any:
    """step -> the batches of one call, of all runs; those of one seed are made once."""
    share = team.begun.model.place.share(c.batch, c.accumulate)
    each = {m.launch.config.seed: m.batches["train"] for m in team.members}
    makers = [calls(b.part(share), accumulate=c.accumulate, steps_per_call=c.steps_per_call) for b in each.values()]
    index = [list(each).index(m.launch.config.seed) for m in team.all]

    def made(step: int) -> Any:
        batches = [make(step) for make in makers]
        return {name: np.stack([batch[name] for batch in batches])[index] for name in batches[0]}

    return made


def ready(team: Team, c: Any, adapters: bool, tracing: threading.Lock) -> None:
    """Compiles all that a pack is going to call."""
    program, variables, runs = team.program, team.begun.model.variables, len(team.all)
    state, aux, shared = jax.eval_shape(program.begin.jitted, variables, *team.entering)
    flat, _ = by_path(variables)
    common = Frozen({path: flat[path] for path in program.base}, {}, {})
    if program.alike:
        common = common._replace(shared=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shared))
    own, values = Frozen({}, aux, {} if program.alike else shared), team.values
    flags = np.ones(runs, bool)
    chosen = state.trainable if adapters else {}, state.control
    train = team.members[0].batches["train"]
    one = batches_of(team, c)(0)
    tasks: list[tuple[Ready, Any]] = []
    for length in widths(train, range(0, team.total, c.steps_per_call), c.steps_per_call):
        batch: Any = {name: jax.ShapeDtypeStruct((*x.shape[:-1], length) if name in SEQUENCES else x.shape, x.dtype)
                 for name, x in one.items()}
        tasks.append((program.step, (state, (common, own, values), batch, flags)))
    tasks.append((program.begin, (variables, *team.entering)))
    masks = program.views and jax.eval_shape(program.views.jitted, state.control)
    for split in (name for name in team.begun.found.splits if name != "train"):
        for batch in {one["input_ids"].shape: one for one in team.members[0].batches[split].epoch()}.values():
            forms = [None, *([next(iter(masks.values()))] if masks else [])]
            tasks += [(program.evaluate, (state.trainable, common, own, values, batch, form)) for form in forms]
    tasks.append((program.choose, (flags, chosen, chosen)))
    if program.views:
        tasks.append((program.views, (state.control,)))
    with ThreadPoolExecutor(len(tasks)) as pool:
        for done in [what.ahead(pool, tracing, *args) for what, args in tasks]:
            done.result()


SEQUENCES = ("input_ids", "attention_mask", "token_type_ids")


def better_of(improved: jax.Array, new: Any, old: Any) -> Any:
    pick = lambda n, o: jnp.where(improved.reshape(-1, *[1] * (n.ndim - 1)), n, o)  # noqa: E731
    return jax.tree.map(pick, new, old)
