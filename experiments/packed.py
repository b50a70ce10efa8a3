"""One pack of a study: its runs as members of one program, their folders, and what each leaves.

`experiments.sweep` decides which runs share a program and calls `train`.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorajax as lj
from experiments import glue
from experiments.members import Member, assemble, narrow, numbers, prepared, record, shared_config
from lorajax import build, config, data, sweep
from lorajax.data.feed import ahead, calls
from lorajax.models import adapter_names
from lorajax.shard import hosts
from lorajax.train.checkpoint import Checkpoints
from lorajax.train.footprint import step_bytes
from lorajax.train.pack import Pack, make_packed_eval, make_packed_step, pack, unpack
from lorajax.train.progress import Progress
from lorajax.train.run import Run


def train(group: sweep.Group, stop: Any) -> None:
    # One base and one tokenisation for all.
    c = shared_config(group)
    begun = prepared(c)
    found, model = begun.found, begun.model
    members, make, total = assemble(group, c, begun)
    predict = lj.lift(model.net.apply)
    # On a mesh runs lie along `trial`. Where they do not fill it, the last one stands in the empty places, inactive.
    place, width = model.place, model.place.sizes.get("trial", 1)
    all_ = members + members[-1:] * (-len(members) % width)
    packed, where = spread(pack([(m.state, m.frozen, numbers(group, m.launch)) for m in all_]), members[0].adapt, place)
    step_fn = make_packed_step(make, clip=c.clip or None, accumulate=c.accumulate, steps_per_call=c.steps_per_call,
                               shardings=where and (where, place.whole))
    evaluate = make_packed_eval(lambda bound, batch: predict(bound, *glue.inputs(batch)), make, place.whole)

    names = hashlib.sha256(json.dumps(sorted(str(m.folder) for m in members)).encode()).hexdigest()[:16]
    folder = Path(group.launches[0].options["workdir"]) / c.study / "packs" / names
    folder.mkdir(parents=True, exist_ok=True)
    prints = {"base": model.fingerprint, "data": found.fingerprint}
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(Run(m.folder, config.to_dict(m.launch.config), fingerprints=prints,
                                        ignore=glue.FREE, tensorboard=False)) for m in members]  # fmt: skip
        saved = stack.enter_context(Checkpoints(folder))
        lost: dict[int, str] = {}  # runs that came to nothing, and why: they stand still from there
        best: list[dict[str, Any]] = [{"step": 0, "scores": {}, "views": {}} for _ in members]
        chosen = where and (where.trainable, where.control)
        choose = jax.jit(better_of, out_shardings=chosen)
        kept = jax.tree.map(jnp.copy, (packed.state.trainable, packed.state.control))
        step = 0
        if saved.latest() is not None:
            (state, kept), told = saved.restore((packed.state, kept))
            packed, best, step = packed._replace(state=state), told["best"], told["step"]
            lost = {int(i): why for i, why in told["lost"].items()}
        for run in runs:
            run.rewind(step)

        n, epoch = c.steps_per_call, len(members[0].batches["train"])
        eval_every, log_every = (build.every(p, epoch, n) for p in (c.eval_every, c.log_every))
        share, rows = place.share(c.batch, c.accumulate), c.batch // c.accumulate
        lead = 1 + (n > 1) + (c.accumulate > 1)
        makers = [calls(m.batches["train"].part(share), accumulate=c.accumulate, steps_per_call=n) for m in all_]
        made = lambda step: place.batch(side_by_side([one(step) for one in makers]), lead, rows, trial=True)  # noqa: E731
        widest: Any = None  # the longest batch, whose program needs the most memory
        with Progress(total, done=step, stream=None if hosts.writes() else sys.stdout) as bar:
            for first, batch in ahead(made, range(step, total, n)):
                active = np.array([i not in lost and i < len(members) for i in range(len(all_))])
                packed, metrics = step_fn(packed, batch, active)
                step = first + n
                widest = glue.longer(widest, batch)
                bar.update(n, examples=n * c.batch * len(members))
                if step % log_every == 0:
                    last = jax.device_get(jax.tree.map(lambda x: x[:, -1] if n > 1 else x, metrics))
                    broken = np.flatnonzero(~last["finite"][:len(members)])
                    lost = {int(i): f"step {step} was not finite" for i in broken} | lost
                    for i, run in enumerate(runs):
                        if i in lost:
                            continue
                        run.log(step, {k: last[k][i] for k in sorted(last) if k not in ("finite", "weight")})
                if step % eval_every == 0 or step == total:
                    scores = score(evaluate, packed, None, found, members[0].batches, place)[:len(members)]
                    lost = {i: f"step {step}: {s}" for i, s in enumerate(scores) if isinstance(s, str)} | lost
                    views = further(evaluate, packed, found, members, place)
                    control = hosts.fetch(packed.state.control)
                    improved = np.zeros(len(all_), bool)
                    for i, (m, run) in enumerate(zip(members, runs, strict=True)):
                        if i in lost:
                            continue
                        extra = m.controller.report(unpack(control, i))
                        run.log(step, scores[i] | glue.flat(views[i]) | extra, prefix="eval/")
                        better = scores[i][found.task.headline] > best[i]["scores"].get(found.task.headline, -np.inf)
                        if better and step >= m.controller.settled:
                            improved[i] = True
                            best[i] = {"step": step, "scores": scores[i], "views": views[i]}
                    kept = choose(improved, (packed.state.trainable, packed.state.control), kept)
                leaving = stop.now()
                if (step % eval_every == 0 and step < total) or leaving:
                    told = {"best": best, "step": step, "lost": {str(i): why for i, why in lost.items()}}
                    saved.save(step, (packed.state, kept), told)
                if stop:
                    saved.wait()
                    return

        seconds = bar.elapsed / len(members)
        memory = alone(step_fn.jitted, packed, widest, active) if widest else 0  # type: ignore[attr-defined]
        steps, kept = np.asarray(hosts.fetch(packed.state.step)), hosts.fetch(kept)
        labels = [found.splits[name].labels for name in (found.task.evaluation[0], "train")]
        baselines = {"majority class": data.majority(found.task, labels[1], labels[0])}
        for i, (m, run) in enumerate(zip(members, runs, strict=True)):
            if i in lost or steps[i] < total:
                record(m.folder, lost.get(i, f"step {steps[i] + 1} of {total} was not finite"))
                continue
            trainable, state = unpack(kept, i)
            trainable = narrow(trainable, m.adapt.plan)
            glue.save(m.folder / "adapter", m.adapt, trainable, m.frozen, base=model.fingerprint,
                      names=adapter_names(model.net.config), task_type="SEQ_CLS")
            told = {"seconds": round(seconds, 1), "packed_with": len(members) - 1, "memory": memory}
            extra = m.controller.report(state)
            run.finish(glue.summary(m.launch, found.task, best[i], total, baselines, m.trained, extra) | told)
    hosts.wait("pack")
    if hosts.writes():
        shutil.rmtree(folder)  # the pack's checkpoints: every member has left what it leaves


def alone(jitted: Any, packed: Pack, batch: Any, active: Any) -> int:
    # Bytes of one member's step, as if it were alone: all that is shared, and its part of the rest.
    shared = sum(x.nbytes for x in jax.tree.leaves(packed.common))
    whole = step_bytes(jitted, packed.state, packed[1:], batch, active)
    return shared + (whole - shared) // len(active) if whole else 0


def spread(packed: Pack, adapt: Any, place: Any) -> tuple[Pack, Any]:
    # The pack on the mesh, and the shardings of its state; None without a mesh.
    where = place.pack(adapt, (packed.state, packed.own, packed.values))
    if where is None:
        return packed, None
    state, own, values = jax.jit(lambda x: x, out_shardings=where)((packed.state, packed.own, packed.values))
    return packed._replace(state=state, own=own, values=values), where[0]


def side_by_side(batches: list[Any]) -> Any:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def better_of(improved: jax.Array, new: Any, old: Any) -> Any:
    pick = lambda n, o: jnp.where(improved.reshape(-1, *[1] * (n.ndim - 1)), n, o)  # noqa: E731
    return jax.tree.map(pick, new, old)


def score(evaluate: Any, packed: Pack, masks: Any, found: build.Data, batches: Any, place: Any) -> list[Any]:
    # Of each run; in place of the scores of a run whose outputs are not finite, a text that says so.
    scores: list[Any] = [{} for _ in range(len(packed.state.step))]
    for split in (name for name in found.splits if name != "train"):
        passed = list(batches[split].epoch())
        outputs = np.concatenate(jax.device_get([evaluate(packed, place.batch(batch), masks) for batch in passed]), 1)
        label, weight = (np.concatenate([batch[name] for batch in passed]) for name in ("label", "weight"))
        prefix = "" if split == found.task.evaluation[0] else f"{split}_"
        for i, mine in enumerate(scores):
            try:
                row = data.evaluate(found.task, outputs[i], label, weight)
                scores[i] = mine | {prefix + k: v for k, v in row.items()} if isinstance(mine, dict) else mine
            except FloatingPointError as error:
                scores[i] = str(error)
    return scores


def further(evaluate: Any, packed: Pack, found: build.Data, members: list[Member], place: Any) -> list[dict[str, Any]]:
    control, count = hosts.fetch(packed.state.control), len(packed.state.step)
    each = [m.controller.views(unpack(control, i)) for i, m in enumerate(members)]
    each += each[-1:] * (count - len(each))
    rows: list[dict[str, Any]] = [{} for _ in members]
    for name in each[0]:
        masks = jax.tree.map(lambda *xs: jnp.stack(xs), *[views[name] for views in each])
        scored = score(evaluate, packed, masks, found, members[0].batches, place)[:len(members)]
        for row, mine in zip(rows, scored, strict=True):
            row[name] = mine
    return rows
