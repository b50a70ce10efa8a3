"""Fine-tunes a pretrained encoder on a GLUE task or on `reviews`, with any variant.

    python -m experiments.glue --config configs/adalora.py[:task=rte,model=minilm,rank=8,smoke] [--config.lr=1e-3 ...]
                               [--workdir=runs] [--no-resume] [--xla=quick] [--config.mesh.data=-1 ...]
                               [--coordinator=host:port --processes=2 --process=0]

The run's folder is <workdir>/<study>/<config and overrides>/seed=<n>; the same command again resumes it. Exit code 75:
a signal came, the run is saved, the same command goes on. Exit code 1: the loss is not finite, or the command is wrong.
"""

import datetime
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorajax as lj
from experiments.balance import in_use
from experiments.neftune import noisy
from lorajax import build, config, control, data, start
from lorajax.data.feed import ahead, calls, widths
from lorajax.io import adapter, assets
from lorajax.models import Bert, adapter_names
from lorajax.shard import hosts
from lorajax.shard.mesh import MeshError
from lorajax.train.blame import diagnosis
from lorajax.train.checkpoint import CheckpointMismatch, Checkpoints
from lorajax.train.compiled import PRESETS, Ahead, Ready, compile_cache, compiler_flags, wake
from lorajax.train.progress import Progress
from lorajax.train.remat import TooLarge, fitted
from lorajax.train.run import EXIT_INTERRUPTED, Run, RunError, run_folder, stop_on_signal
from lorajax.train.step import init_state, make_eval, make_step
from lorajax.train.watch import Watch

# Keys that change no number: a run may be resumed with other values.
FREE = ("log_every", "probe", "remat", "attention", "kernels", "quant.once", "memory", "mesh.data", "mesh.fsdp",
        "mesh.tensor", "mesh.trial")
# Errors that say what to do: no traceback.
EXPLAINED = (config.ConfigError, lj.RuleError, RunError, CheckpointMismatch, adapter.AdapterMismatch, FileNotFoundError,
             ConnectionError, MeshError, TooLarge)


def main(argv: list[str]) -> None:
    began = time.monotonic()
    launch = config.parse(argv, workdir="runs", resume=True, xla="none", **hosts.FLAGS)
    c = launch.config
    config.needs(c, "lr", "configs/lora.py")
    compiler_flags(config.choose("xla", launch.options["xla"], PRESETS))
    compile_cache()
    hosts.start(**{name: launch.options[name] for name in hosts.FLAGS})
    wake()

    found = build.load_data(c)
    batches = build.batches(c, build.tokens(c, found, assets.resolve(c.args.model).path))
    # Everything below is a function of the config and of these three keys.
    head_key, adapter_key, train_key = jax.random.split(jax.random.key(c.seed), 3)
    model = build.load_model(c, found.task, head_key)
    place = model.place
    share = place.share(c.batch, c.accumulate)  # of each batch, this process' rows
    place.held(c.eval_batch)  # or it says now, not after an epoch, what fits the mesh
    total = build.total_steps(c, len(batches["train"]))

    # What is adapted: decided by rules on the traced model.
    one = batches["train"].batch(0, 0)
    sites = lj.sites(model.net.apply, model.variables, *inputs(one))
    adapt = lj.adapt(sites, build.rules(c, model))
    folder = run_folder(launch.options["workdir"], c.study, launch.name, c.seed)
    resumed = hosts.agreed(launch.options["resume"] and (folder / "start").exists())
    if place.mesh or place.rules:
        print(place.describe(sites.leaves))
    loss = make_loss(model.net, found.task, c)
    if c.ranks.budget and not resumed:
        adapt = start.by_importance(c, adapt, model, loss, batches["train"], adapter_key)
    adapt = build.after(c, adapt, model)
    model, rounded = build.quantized(c, adapt, model)
    # Where the adapters begin is computed in a thread, for that and the step take as long to compile; but data may move
    # the ranks, and then it comes first.
    compiling = Ahead()
    if resumed:
        making = compiling.beside(partial(start.read, c, adapt, model, folder / "start", place))
    else:
        plain = make_loss(model.net, found.task, c, training=False)
        making = compiling.beside(partial(start.make, c, adapt, model, plain, batches["train"], adapter_key, tokens,
                                          place, made=rounded))  # fmt: skip
    if start.reads_data(c, adapt) or place.mesh:
        adapt = making.result()[0]
    trainable, frozen = adapt.on(model.variables).shapes
    trained = adapt.count(trainable)

    tx = build.optimizer(c, adapt, model, total)
    controller = build.controller(c, adapt, total)
    begin = lambda key, trainable: init_state(key, trainable, tx, controller)  # noqa: E731
    state = jax.eval_shape(begin, train_key, trainable)
    where = place.state(adapt, state)
    learn = lambda model: in_use(c, adapt, make_loss(model.net, found.task, c), tokens)  # noqa: E731
    learn(model)  # or it says now what does not fit together
    stepper = partial(make_step, adapt=adapt, tx=tx, controller=controller, clip=c.clip or None,
                      accumulate=c.accumulate, steps_per_call=c.steps_per_call, shardings=(where, place.whole))
    forward = lj.lift(model.net.apply)
    predict = Ready(make_eval(lambda bound, batch: forward(bound, *inputs(batch)), adapt, place.whole))

    prints = {"base": model.fingerprint, "data": found.fingerprint}
    with (
        Run(folder, config.to_dict(c), fingerprints=prints, ignore=FREE, fresh=not launch.options["resume"]) as run,
        Checkpoints(run.checkpoints) as saved,
        stop_on_signal() as stop,
        compiling,
    ):
        print(f"{folder}: {len(batches['train'])} steps an epoch, {total} in all, {c.batch} examples each; "
              f"padded lengths {', '.join(map(str, batches['train'].lengths))}, "
              f"{100 * batches['train'].padding():.1f} % padding", flush=True)
        for line in run.changed:
            print(f"resumed elsewhere: {line}")
        if run.finished:
            print(f"finished already: {(folder / 'summary.json').read_text()}")
            return
        n, epoch, step = c.steps_per_call, len(batches["train"]), saved.latest() or 0
        made = calls(batches["train"].part(share), accumulate=c.accumulate, steps_per_call=n)
        watch, loss = Watch(n, place.whole), learn(model)
        step_fn = Ready(stepper(loss))

        def programs() -> None:
            # XLA compiles in threads: what the first call does not need is ready, or nearly, when it is asked for.
            for first in widths(batches["train"], range(step, min(step + 2 * epoch, total), n), n).values():
                compiling(step_fn, state, frozen, made(first), watch.good, here=first == step)
            for split in batches.keys() - {"train"}:
                for first in widths(batches[split], range(len(batches[split]))).values():
                    compiling(predict, state.trainable, frozen, batches[split].batch(0, first), None)

        # Of the shapes of arrays that are still to come, which do not say which of them lie in the host's memory.
        early = place.mesh is None and c.remat != "auto" and c.optimizer.name != "adamw_paged"
        if early:
            programs()
        print(adapt.on(model.variables), flush=True)
        labels = [found.splits[name].labels for name in (found.task.evaluation[0], "train")]
        baselines = {"majority class": data.majority(found.task, labels[1], labels[0])}

        _, trainable, frozen = making.result()
        if not resumed and (adapt.kept(frozen) or start.reads_data(c, adapt)):
            save(folder / "start", adapt, trainable, frozen, base=model.fingerprint)
        state = jax.jit(begin, out_shardings=where)(train_key, trainable)
        best: dict[str, Any] = {"step": 0, "scores": {}, "views": {}}  # by the task's headline metric
        if saved.latest() is not None:
            state, best = saved.restore(state)
        # ReLoRA merges into the weights as it goes: what has moved is part of the state, the base stays as it was.
        base, restart = frozen, controller.restart
        frozen = restart.rebase(base, state.control) if restart else base
        anew = jax.jit(restart.restart if restart else lambda state: state, donate_argnums=0, out_shardings=where)
        step = int(state.step)
        run.rewind(step)

        # The loop. A checkpoint is written after the evaluation of its step, and metrics before the checkpoint, so that
        # a run killed anywhere goes on from its last checkpoint as if nothing had happened.
        eval_every, save_every = (build.every(p, epoch, n) for p in (c.eval_every, c.save_every))
        log_every = build.every(c.log_every, epoch, n)
        lead, rows = (n > 1) + (c.accumulate > 1), c.batch // c.accumulate
        if c.remat == "auto":
            fit = lambda: (state, frozen, place.batch(made(batches["train"].longest), lead, rows), watch.good)  # noqa: E731
            model = fitted(c.remat, c.memory, model, lambda model: stepper(learn(model)), fit)
            loss = learn(model)
            step_fn = Ready(stepper(loss))
        if place.mesh is None and not early:
            programs()
        widest: Any = None  # the longest batch, whose program needs the most memory

        def sound(state: Any, behind: int = 0) -> None:
            # Looks at the calls of a step since the last time and logs them, but for the newest `behind`: the device is
            # at work on these meanwhile, and need not wait for the host.
            fine, bad = watch.look(behind)
            for call in fine:
                if (at := call.begun + n) % log_every == 0:
                    run.log(at, {name: x for name, x in call.last().items() if name != "weight"})
                    run.log_time(at, {"examples_per_second": bar.examples_per_second})
            if bad is None:
                return
            saved.save(bad.begun + int(np.sum(np.asarray(bad.metrics["finite"]))), state, best)
            raise SystemExit(diagnosis(loss, adapt, state, frozen, bad.batch, bad.metrics, controller,
                                       accumulate=c.accumulate, steps_per_call=n))

        before = time.monotonic() - began
        with Progress(total, done=step, stream=None if hosts.writes() else sys.stdout) as bar:
            for begun, batch in bar.fed(ahead(lambda step: place.batch(made(step), lead, rows), range(step, total, n))):
                state, metrics = step_fn(state, frozen, batch, watch.good)
                step = begun + n
                widest = longer(widest, batch)
                if watch.add(begun, batch, metrics) or begun % log_every == 0:
                    sound(state, behind=1)
                if restart and step % restart.every == 0 and step < total:
                    sound(state)
                    state = anew(state)
                    frozen = restart.rebase(base, state.control)
                bar.update(n, examples=n * c.batch, loss=metrics["loss"])
                improved = False
                if step % eval_every == 0 or step == total:
                    sound(state)
                    with bar.aside("evaluation"):
                        scores = evaluate(predict, state.trainable, frozen, found, batches, place)
                        views = further(predict, state, frozen, found, batches, controller, place)
                    run.log(step, scores | flat(views) | controller.report(state.control), prefix="eval/")
                    bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
                    for name, row in views.items():
                        bar.write(f"    {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()))
                    better = scores[found.task.headline] > best["scores"].get(found.task.headline, -np.inf)
                    improved = better and step >= controller.settled
                    best = {"step": step, "scores": scores, "views": views} if improved else best
                leaving = stop.now()
                if leaving or improved or step % save_every == 0 or step == total:
                    sound(state)
                    with bar.aside("checkpoints"):
                        saved.save(step, state, best, best=improved)
                if leaving:
                    saved.wait()
                    print(f"{stop.signal}: saved at step {step} of {total}; the same command resumes it", flush=True)
                    raise SystemExit(EXIT_INTERRUPTED)

        memory = step_fn.bytes(state, frozen, widest, watch.good) if widest else 0
        # The best state is what the run leaves; the comparison says what it is worth.
        state, _ = saved.restore(state, best["step"])
        left, arrays, rest = control.exported(controller, adapt, model.variables, state.trainable, base, state.control)
        save(folder / "adapter", left, arrays, rest, base=model.fingerprint, names=adapter_names(model.net.config),
             task_type="SEQ_CLS")
        if c.probe:
            baselines["head on the frozen encoder"] = probe(model, found, batches)
        seconds = time.monotonic() - began
        report(c, found.task, baselines, best, trained, seconds)
        told = {"seconds": round(seconds, 1), "examples_per_second": round(bar.examples_per_second, 1),
                "memory": memory, "padding": round(batches["train"].padding(), 4),
                "time": aside(bar) | {"start": round(before, 2), "compiling": round(step_fn.waited, 2)}}
        extra = controller.report(state.control)
        run.finish(summary(launch, found.task, best, total, baselines, trained, extra) | told)


def save(folder: Path, adapt: Any, trainable: Any, frozen: Any, **how: Any) -> None:
    # By process 0, of arrays that may be spread over all.
    trainable, aux, shared = hosts.fetch((trainable, frozen.aux, frozen.shared))
    if hosts.writes():
        adapter.save(folder, adapt, trainable, frozen._replace(aux=aux, shared=shared), **how)


def summary(launch: config.Launch, task: data.Task, best: Any, steps: int, baselines: Any, trained: int,
            extra: Any) -> dict[str, Any]:
    # What a finished run says of itself, trained alone or in a pack. extra: the controller's numbers at the best step.
    row = {"task": task.name, "headline": task.headline, "scores": best["scores"], "best_step": best["step"]}
    row |= {"steps": steps, "baselines": baselines, "trainable_parameters": trained, **extra}
    row |= {"views": best["views"]} if best["views"] else {}
    row |= {"device": jax.devices()[0].device_kind, "seed": launch.config.seed, "name": launch.name}
    return row | {"said": dict(launch.said), "date": datetime.date.today().isoformat()}


def aside(bar: Progress) -> dict[str, float]:
    # Of the loop's time, what was no step. Waiting for data is the most that the device stood idle for want of it.
    shares = {what: round(share, 4) for what, share in bar.shares().items()}
    print(f"of the loop's {bar.elapsed:.1f} s: "
          + ", ".join(f"{what} {100 * share:.2f} %" for what, share in shares.items()))
    return shares | {"loop": round(bar.elapsed, 2)}


def longer(one: Any, other: Any) -> Any:
    return one if one and one["input_ids"].size >= other["input_ids"].size else other


def inputs(batch: data.Batch) -> tuple[Any, Any, Any]:
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]


def tokens(batch: data.Batch) -> jax.Array:
    # 1 for tokens, 0 for padding and in empty rows.
    real = (batch["weight"] > 0)[:, None]
    return jnp.where(real, jnp.asarray(batch["attention_mask"], jnp.float32), 0.0)


def make_loss(net: Bert, task: data.Task, c: Any, training: bool = True) -> Any:
    train = lj.lift(noisy(Bert(net.config, deterministic=False).apply, c.neftune) if training else net.apply,
                    once=c.quant.once)

    def loss(bound: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = train(bound, *inputs(batch), rngs={"dropout": key})
        if task.regression:
            each = jnp.square(logits[:, 0] - batch["label"])
        else:
            target = jax.nn.one_hot(batch["label"], task.outputs)
            each = optax.softmax_cross_entropy(logits, optax.smooth_labels(target, c.label_smoothing))
        weight = batch["weight"]  # 0 in empty rows
        return jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1.0), {}

    return loss


def evaluate(predict: Any, trainable: Any, frozen: Any, found: build.Data, batches: Any, place: Any,
             masks: Any = None) -> dict[str, float]:
    # The headline split's metrics go by their own names, those of a further split (MNLI) by "<split>_<metric>".
    scores: dict[str, float] = {}
    for split in found.splits:
        if split == "train":
            continue
        passed = [(predict(trainable, frozen, place.batch(batch), masks), batch["label"], batch["weight"])
                  for batch in batches[split].epoch()]  # the device predicts while the next batch is made
        outputs, label, weight = (np.concatenate(x) for x in zip(*jax.device_get(passed), strict=True))
        prefix = "" if split == found.task.evaluation[0] else f"{split}_"
        scores |= {prefix + k: v for k, v in data.evaluate(found.task, outputs, label, weight).items()}
    return scores


def further(predict: Any, state: Any, frozen: Any, found: build.Data, batches: Any, controller: Any,
            place: Any) -> dict[str, dict[str, float]]:
    # The other forms of the adapter that the method promises, DyLoRA's ranks for one: the same arrays under masks.
    views = controller.views(state.control)
    return {name: evaluate(predict, state.trainable, frozen, found, batches, place, masks)
            for name, masks in views.items()}


def flat(views: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{name}/{metric}": value for name, row in views.items() for metric, value in row.items()}


def probe(model: build.Model, found: build.Data, batches: Any) -> dict[str, float]:
    # What the encoder knew before: a linear head on its frozen, pooled features.
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    net = lj.lift(partial(model.net.apply, method="embed"))
    embed = jax.jit(lambda variables, batch: net(variables, *inputs(batch)),
                    out_shardings=model.place.whole)

    def features(split: str, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        few = len(batches[split].lengths) <= build.EVALUATION
        whole = data.Batches(batches[split].tokens, batch_size, shuffle=False, shapes=build.EVALUATION,
                             lengths=batches[split].lengths if few else None)
        passed = list(whole.epoch())
        x = np.concatenate(jax.device_get([embed(model.variables, model.place.batch(batch)) for batch in passed]))
        real = np.concatenate([batch["weight"] for batch in passed]) > 0
        return x[real], np.concatenate([batch["label"] for batch in passed])[real]

    split = found.task.evaluation[0]
    x, y = features("train", batches[split].batch_size)
    x_eval, y_eval = features(split, batches[split].batch_size)
    head = RidgeCV(np.logspace(0, 5, 11)) if found.task.regression else LogisticRegression(C=0.1, max_iter=1000)
    fitted = make_pipeline(StandardScaler(), head).fit(x, y)
    outputs = fitted.predict(x_eval)
    if not found.task.regression:
        outputs = np.eye(found.task.outputs, dtype=np.float32)[outputs]
    return data.evaluate(found.task, outputs.astype(np.float32), y_eval)


def report(c: Any, task: data.Task, baselines: Any, best: Any, trained: int, seconds: float) -> None:
    print(f"\n{task.name}, {c.args.model}, {c.variant.name}, seed {c.seed}: {trained:,} trained parameters, "
          f"{seconds:.0f} s on {jax.devices()[0].device_kind}")
    rows = baselines | {f"this run (best, step {best['step']})": best["scores"]}
    for name, row in (rows | {f"  its {name}": row for name, row in best["views"].items()}).items():
        print(f"  {name:<28}" + "  ".join(f"{metric} {value:.4f}" for metric, value in row.items()))


if __name__ == "__main__":
    hosts.run(main, EXPLAINED)
