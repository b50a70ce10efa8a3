"""One pack of a study: its runs as members of one program, their folders, and what each leaves.

`experiments.sweep` decides which runs share a program and calls `train`.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import glue
from experiments.members import Member, narrow, record, shared_config
from experiments.programs import Programs, Team, batches_of
from lorajax import build, config, data, sweep
from lorajax.data.feed import ahead
from lorajax.models import adapter_names
from lorajax.shard import hosts
from lorajax.train.checkpoint import Checkpoints
from lorajax.train.pack import Pack, unpack
from lorajax.train.progress import Progress
from lorajax.train.run import Run


def train(group: sweep.Group, stop: Any, programs: Programs, later: Callable[[Callable[[], None]], Any]) -> None:
    # later: is handed what writes the runs' results, which needs no device.
    team = programs.get(group)
    program, members, found, total = team.program, team.members, team.begun.found, team.total
    c, model, place = shared_config(group), team.begun.model, team.begun.model.place
    packed = team.pack()

    names = hashlib.sha256(json.dumps(sorted(str(m.folder) for m in members)).encode()).hexdigest()[:16]
    folder = Path(group.launches[0].options["workdir"]) / c.study / "packs" / names
    with contextlib.ExitStack() as stack:
        runs = opened(stack, team)
        saved = stack.enter_context(Checkpoints(folder)) if hosts.agreed(folder.is_dir()) else None
        lost: dict[int, str] = {}  # runs that came to nothing, and why: they stand still from there
        best: list[dict[str, Any]] = [{"step": 0, "scores": {}, "views": {}} for _ in members]
        left = lambda state: (state.trainable if programs.adapters else {}, state.control)  # noqa: E731
        kept = program.choose(np.ones(len(team.all), bool), left(packed.state), left(packed.state))
        step = 0
        if saved is not None and saved.latest() is not None:
            (state, kept), told = saved.restore((packed.state, kept))
            packed, best, step = packed._replace(state=state), told["best"], told["step"]
            lost = {int(i): why for i, why in told["lost"].items()}
        for run in runs:
            run.rewind(step)

        n, epoch = c.steps_per_call, len(members[0].batches["train"])
        eval_every, log_every = (build.every(p, epoch, n) for p in (c.eval_every, c.log_every))
        side_by_side, rows, lead = batches_of(team, c), c.batch // c.accumulate, 1 + (n > 1) + (c.accumulate > 1)
        made = lambda step: place.batch(side_by_side(step), lead, rows, trial=True)  # noqa: E731
        widest: Any = None  # the longest batch, whose program needs the most memory
        with Progress(total, done=step, stream=None if hosts.writes() else sys.stdout) as bar:
            for first, batch in ahead(made, range(step, total, n)):
                training = [i not in lost and first < m.total for i, m in enumerate(members)]
                active = np.array([*training, *[False] * (len(team.all) - len(members))])
                state, metrics = program.step(packed.state, packed[1:], batch, active)
                packed = packed._replace(state=state)
                step = first + n
                widest = glue.longer(widest, batch)
                bar.update(n, examples=n * c.batch * len(members))
                if step % log_every == 0:
                    last = jax.device_get(jax.tree.map(lambda x: x[:, -1] if n > 1 else x, metrics))
                    broken = np.flatnonzero(~last["finite"][:len(members)] & training)
                    lost = {int(i): f"step {step} was not finite" for i in broken} | lost
                    for i, run in enumerate(runs):
                        if i in lost or not training[i]:
                            continue
                        run.log(step, {k: last[k][i] for k in sorted(last) if k not in ("finite", "weight")})
                ends = [step == m.total for m in members]
                if step % eval_every == 0 or any(ends):
                    scores = score(team, packed, None)[:len(members)]
                    lost = {i: f"step {step}: {s}" for i, s in enumerate(scores)
                            if isinstance(s, str) and training[i]} | lost
                    views = further(team, packed)
                    control = on_host(packed.state.control)
                    improved = np.zeros(len(team.all), bool)
                    for i, (m, run) in enumerate(zip(members, runs, strict=True)):
                        if i in lost or not training[i] or not (step % eval_every == 0 or ends[i]):
                            continue
                        extra = m.controller.report(unpack(control, i))
                        run.log(step, scores[i] | glue.flat(views[i]) | extra, prefix="eval/")
                        better = scores[i][found.task.headline] > best[i]["scores"].get(found.task.headline, -np.inf)
                        if better and step >= m.controller.settled:
                            improved[i] = True
                            best[i] = {"step": step, "scores": scores[i], "views": views[i]}
                    kept = program.choose(improved, left(packed.state), kept)
                leaving = stop.now()
                if (step % eval_every == 0 and step < total) or leaving:
                    told = {"best": best, "step": step, "lost": {str(i): why for i, why in lost.items()}}
                    saved = saved or stack.enter_context(Checkpoints(folder))
                    saved.save(step, (packed.state, kept), told)
                if stop:
                    return  # closing waits for what is being saved

        seconds = bar.elapsed / len(members)
        memory = alone(team, packed, widest, active) if widest else 0
        steps, kept, own = np.asarray(hosts.fetch(packed.state.step)), on_host(kept), on_host(packed.own)
        shared = on_host(packed.common.shared)
        held = stack.pop_all()

    def leave() -> None:
        with held:
            labels = [found.splits[name].labels for name in (found.task.evaluation[0], "train")]
            baselines = {"majority class": data.majority(found.task, labels[1], labels[0])}
            for i, (m, run) in enumerate(zip(members, runs, strict=True)):
                if i in lost or steps[i] < m.total:
                    record(m.folder, lost.get(i, f"step {steps[i] + 1} of {m.total} was not finite"))
                    continue
                trainable, state = unpack(kept, i)
                if trainable:
                    frozen = unpack(own, i)._replace(base=packed.common.base)
                    frozen = frozen._replace(shared=frozen.shared or shared)
                    glue.save(m.folder / "adapter", m.adapt, narrow(trainable, m.adapt.plan), frozen,
                              base=model.fingerprint, names=adapter_names(model.net.config), task_type="SEQ_CLS")
                told = {"seconds": round(seconds, 3), "packed_with": len(members) - 1,
                        "memory": memory}
                extra = m.controller.report(state)
                run.finish(glue.summary(m.launch, found.task, best[i], m.total, baselines, m.trained, extra) | told)
        hosts.wait("pack")
        if hosts.writes():
            shutil.rmtree(folder, ignore_errors=True)  # the pack's checkpoints: every member has left what it leaves

    later(leave)


def opened(stack: contextlib.ExitStack, team: Team) -> list[Run]:
    # The members' folders. Where this process is alone, several at a time: each waits for the disk.
    prints = {"base": team.begun.model.fingerprint, "data": team.begun.found.fingerprint}

    def open_(m: Member) -> Run:
        return Run(m.folder, config.to_dict(m.launch.config), fingerprints=prints, ignore=glue.FREE, tensorboard=False)

    if hosts.several():
        return [stack.enter_context(open_(m)) for m in team.members]
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(open_, m) for m in team.members]
    there = [stack.enter_context(one.result()) for one in waiting if one.exception() is None]
    return there if len(there) == len(waiting) else [one.result() for one in waiting]  # raises what went wrong


def on_host(tree: Any) -> Any:
    # NumPy arrays, but for keys: one run's part of them is a view.
    leaves, structure = jax.tree.flatten(hosts.fetch(tree))
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    there = iter(jax.device_get([x for x, key in zip(leaves, keys, strict=True) if not key]))
    return jax.tree.unflatten(structure, [x if key else next(there) for x, key in zip(leaves, keys, strict=True)])


def alone(team: Team, packed: Pack, batch: Any, active: Any) -> int:
    # Bytes of one member's step, as if it were alone: all that is shared, and its part of the rest.
    shared = sum(x.nbytes for x in jax.tree.leaves(packed.common))
    whole = team.program.step.bytes(packed.state, packed[1:], batch, active)
    return shared + (whole - shared) // len(active) if whole else 0


def score(team: Team, packed: Pack, masks: Any) -> list[Any]:
    # Of each run; in place of the scores of a run whose outputs are not finite, a text that says so.
    scores: list[Any] = [{} for _ in team.all]
    found, batches, place = team.begun.found, team.members[0].batches, team.begun.model.place
    evaluate = partial(team.program.evaluate, packed.state.trainable, packed.common, packed.own, packed.values)
    for split in (name for name in found.splits if name != "train"):
        passed = list(batches[split].epoch())
        outputs = np.concatenate(jax.device_get([evaluate(place.batch(batch), masks) for batch in passed]), 1)
        label, weight = (np.concatenate([batch[name] for batch in passed]) for name in ("label", "weight"))
        prefix = "" if split == found.task.evaluation[0] else f"{split}_"
        for i, mine in enumerate(scores):
            try:
                row = data.evaluate(found.task, outputs[i], label, weight)
                scores[i] = mine | {prefix + k: v for k, v in row.items()} if isinstance(mine, dict) else mine
            except FloatingPointError as error:
                scores[i] = str(error)
    return scores


def further(team: Team, packed: Pack) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in team.members]
    views = team.program.views(packed.state.control) if team.program.views else {}
    for name, masks in views.items():
        for row, mine in zip(rows, score(team, packed, masks), strict=False):
            row[name] = mine
    return rows
