"""Adapts an image classifier, a vision transformer or a ResNet, with any method.

    python -m experiments.vision --config configs/vit.py[:variant=dora,rank=4,smoke] [--config.lr=1e-3 ...]
                                 [--workdir=runs] [--no-resume] [--config.mesh.data=-1 ...]
                                 [--coordinator=host:port --processes=2 --process=0]
    python -m experiments.vision --config configs/resnet.py

Images travel as uint8; flip, crop, scaling and resizing are part of the step, drawn from the run's seed and the step's
number. The run's folder, resuming and exit codes are those of `experiments.glue`.
"""

import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import lorajax as lj
from experiments.glue import EXPLAINED, FREE, aside, evaluate, flat, further, report, save, summary
from experiments.pixels import augmented, prepared
from experiments.resnet_base import layout, resnet
from lorajax import build, config, control, data, start
from lorajax.core.fingerprint import fingerprint
from lorajax.data.feed import ahead, calls
from lorajax.io import assets, hf
from lorajax.io.onnx import open_dinov2
from lorajax.models import adapter_names, model_from_hf, params_from_hf
from lorajax.shard import hosts
from lorajax.shard.placement import LOCAL
from lorajax.train.blame import diagnosis
from lorajax.train.checkpoint import Checkpoints
from lorajax.train.compiled import PRESETS, compile_cache, compiler_flags
from lorajax.train.progress import Progress
from lorajax.train.remat import fitted
from lorajax.train.run import EXIT_INTERRUPTED, Run, run_folder, stop_on_signal
from lorajax.train.step import init_state, make_eval, make_step
from lorajax.train.watch import Watch


def main(argv: list[str]) -> None:
    began = time.monotonic()
    launch = config.parse(argv, workdir="runs", resume=True, xla="none", **hosts.FLAGS)
    c = launch.config
    config.needs(c, "lr", "configs/vit.py")
    compiler_flags(config.choose("xla", launch.options["xla"], PRESETS))
    compile_cache()
    hosts.start(**{name: launch.options[name] for name in hosts.FLAGS})

    # Everything below is a function of the config and of these three keys.
    head_key, adapter_key, train_key = jax.random.split(jax.random.key(c.seed), 3)
    found = load_data(c)
    model = load_model(c, found.task, head_key, launch.options["workdir"])
    place = model.place
    batches = {"train": data.ImageBatches(found.splits["train"], c.batch, seed=c.seed),
               "test": data.ImageBatches(found.splits["test"], c.eval_batch, shuffle=False)}  # fmt: skip
    share = place.share(c.batch, c.accumulate)  # of each batch, this process' rows
    place.held(c.eval_batch)  # or it says now, not after an epoch, what fits the mesh
    total = build.total_steps(c, len(batches["train"]))

    # What is adapted: decided by rules on the traced model, shown before anything is computed.
    forward = lj.lift(model.net.apply)
    adapt = plan(c, model, jnp.zeros((c.batch, c.size, c.size, 3)))
    folder = run_folder(launch.options["workdir"], c.study, launch.name, c.seed)
    resumed = hosts.agreed(launch.options["resume"] and (folder / "start").exists())
    if place.mesh or place.rules:
        print(place.describe(adapt.sites.leaves))
    loss = make_loss(forward, found.task, c)
    if c.ranks.budget and not resumed:
        adapt = start.by_importance(c, adapt, model, loss, batches["train"], adapter_key)
    adapt = build.after(c, adapt, model)
    model, rounded = build.quantized(c, adapt, model)
    if resumed:
        adapt, trainable, frozen = start.read(c, adapt, model, folder / "start", place)
    else:
        adapt, trainable, frozen = start.make(c, adapt, model, loss, batches["train"], adapter_key, real(c, model),
                                              place, made=rounded)
    print(adapt.on(model.variables))
    trained = adapt.count(trainable)

    tx = build.optimizer(c, adapt, model, total)
    controller = build.controller(c, adapt, total)
    begin = lambda key, trainable: init_state(key, trainable, tx, controller)  # noqa: E731
    where = place.state(adapt, jax.eval_shape(begin, train_key, trainable))
    stepper = partial(make_step, adapt=adapt, tx=tx, controller=controller, clip=c.clip or None,
                      accumulate=c.accumulate, steps_per_call=c.steps_per_call, shardings=(where, place.whole))
    predict = make_eval(lambda bound, batch: forward(bound, prepared(batch["pixels"], c.size)), adapt, place.whole)

    prints = {"base": model.fingerprint, "data": found.fingerprint}
    with (
        Run(folder, config.to_dict(c), fingerprints=prints, ignore=FREE, fresh=not launch.options["resume"]) as run,
        Checkpoints(run.checkpoints) as saved,
        stop_on_signal() as stop,
    ):
        print(f"{folder}: {len(batches['train'])} steps an epoch, {total} in all, {c.batch} images each", flush=True)
        for line in run.changed:
            print(f"resumed elsewhere: {line}")
        if run.finished:
            print(f"finished already: {(folder / 'summary.json').read_text()}")
            return
        if not resumed and (adapt.kept(frozen) or start.reads_data(c, adapt)):
            save(folder / "start", adapt, trainable, frozen, base=model.fingerprint)
        state = jax.jit(begin, out_shardings=where)(train_key, trainable)
        best: dict[str, Any] = {"step": 0, "scores": {}, "views": {}}
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
        n, epoch = c.steps_per_call, len(batches["train"])
        eval_every, save_every = (build.every(p, epoch, n) for p in (c.eval_every, c.save_every))
        log_every = build.every(c.log_every, epoch, n)
        made = calls(batches["train"].part(share), accumulate=c.accumulate, steps_per_call=n)
        lead, rows = (n > 1) + (c.accumulate > 1), c.batch // c.accumulate
        watch = Watch(n, place.whole)
        learn = lambda model: make_loss(lj.lift(model.net.apply, once=c.quant.once), found.task, c)  # noqa: E731
        fit = lambda: (state, frozen, place.batch(made(0), lead, rows), watch.good)  # noqa: E731
        loss = learn(fitted(c.remat, c.memory, model, lambda model: stepper(learn(model)), fit))
        step_fn = stepper(loss)

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

        with Progress(total, done=step, stream=None if hosts.writes() else sys.stdout) as bar:
            for begun, batch in bar.fed(ahead(lambda step: place.batch(made(step), lead, rows), range(step, total, n))):
                state, metrics = step_fn(state, frozen, batch, watch.good)
                step = begun + n
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
                    bar.write(f"step {step}: accuracy {scores['accuracy']:.4f}")
                    better = scores["accuracy"] > best["scores"].get("accuracy", -np.inf)
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

        # The best state is what the run leaves; the comparison says what it is worth.
        state, _ = saved.restore(state, best["step"])
        left, arrays, rest = control.exported(controller, adapt, model.variables, state.trainable, base, state.control)
        save(folder / "adapter", left, arrays, rest, base=model.fingerprint, names=adapter_names(model.net.config))
        labels = [found.splits[split].labels for split in ("train", "test")]
        baselines = {"majority class": data.majority(found.task, *labels)}
        if c.probe:
            baselines |= frozen_features(c, model, found, batches)
        seconds = time.monotonic() - began
        report(c, found.task, baselines, best, trained, seconds)
        told = {"seconds": round(seconds, 1), "examples_per_second": round(bar.examples_per_second, 1),
                "time": aside(bar)}
        extra = controller.report(state.control)
        run.finish(summary(launch, found.task, best, total, baselines, trained, extra) | told)


def load_data(c: Any) -> build.Data:
    # examples: so many of each split, evenly spaced.
    task = config.choose("task", c.args.task, data.IMAGES)
    splits = data.load_images(task.name, c.data or None)
    for name, x in splits.items() if c.examples else ():
        rows = build.spaced(len(x.labels), c.examples)
        splits[name] = data.Images(x.pixels[rows], x.labels[rows])
    return build.Data(task, splits, "+".join(x.fingerprint()[:16] for x in splits.values()))


def load_model(c: Any, task: data.Task, key: jax.Array, workdir: str) -> build.Model:
    # A folder or hub id in the Hugging Face layout, a folder with an ONNX file, or the base that is made here.
    if c.args.model == "base":  # what cannot be adapted is said before the base is trained
        plan(c, unmade(c, task), jnp.zeros((1, c.size, c.size, 3)))
    folder = resnet(c, workdir) if c.args.model == "base" else assets.resolve(c.args.model).path
    exported = folder / "model.onnx"
    checkpoint = open_dinov2(exported) if exported.exists() else hf.open_checkpoint(folder)
    place = build.placement(c, str(checkpoint.config.get("model_type")))
    how = {**c.execution, "rows": place.rows()} if c.execution else {}  # a ResNet has none
    net: Any = model_from_hf(checkpoint.config, num_labels=task.outputs, dtype=build.compute_dtype(c),
                             remat=build.remat(c), **how)
    # A head of the checkpoint answers another task, and so does the decoder of the ONNX file.
    heads = [rf"{top}\..*" for top in ("classifier", "decoder")]
    ignore = [head for head in heads if any(re.fullmatch(head, name) for name in checkpoint.tensors)]
    shardings = place.base if place.mesh else None
    loaded = params_from_hf(net.config, checkpoint.tensors, key, ignore=ignore, shardings=shardings)
    leaves = traverse_util.flatten_dict(loaded.variables, sep="/")
    pretrained = {path: leaf for path, leaf in leaves.items() if path not in loaded.fresh}
    return build.Model(net, loaded.variables, loaded.fresh, folder, fingerprint(pretrained), place)


def unmade(c: Any, task: data.Task) -> build.Model:
    # The model on the base of `c.base`, its arrays' shapes alone.
    net: Any = model_from_hf(layout(c.base), num_labels=task.outputs)
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, c.size, c.size, 3)))
    fresh = tuple(path for path in traverse_util.flatten_dict(variables, sep="/") if "/classifier/" in path)
    return build.Model(net, variables, fresh, Path(), "", LOCAL)


def plan(c: Any, model: build.Model, images: jax.Array) -> lj.Adapt:
    # Running statistics are no weights: they stay the base's, whatever the method.
    statistics: list[Any] = [("batch_stats/.*", None)] if "batch_stats" in model.variables else []
    sites = lj.sites(model.net.apply, model.variables, images)
    return lj.adapt(sites, [*statistics, *build.rules(c, model)])


def real(c: Any, model: build.Model) -> Any:
    # For starts that read the inputs of matmuls: 1 for the tokens of an image, 0 in empty rows.
    patch = getattr(model.net.config, "patch_size", None)
    tokens = 1 + (c.size // patch) ** 2 if patch else 0
    whole = lambda batch: jnp.broadcast_to(batch["weight"][:, None], (len(batch["weight"]), tokens))  # noqa: E731
    return whole if tokens else None


def make_loss(forward: Any, task: data.Task, c: Any) -> Any:
    def loss(bound: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = forward(bound, prepared(augmented(batch["pixels"], key, c.pad, c.flip), c.size))
        target = optax.smooth_labels(jax.nn.one_hot(batch["label"], task.outputs), c.label_smoothing)
        weight = batch["weight"]  # 0 in empty rows
        return jnp.sum(optax.softmax_cross_entropy(logits, target) * weight) / jnp.sum(weight), {}

    return loss


def frozen_features(c: Any, model: build.Model, found: build.Data, batches: Any) -> dict[str, dict[str, float]]:
    # What the model knew before: a linear probe, and the 20 nearest images by the cosine, on its frozen features.
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    @partial(jax.jit, out_shardings=model.place.whole)
    def features(variables: Any, pixels: jax.Array) -> Any:
        return lj.lift(model.net.apply)(variables, prepared(pixels, c.size), method="features")

    def seen(split: str) -> np.ndarray:
        whole = data.ImageBatches(batches[split].images, c.eval_batch, shuffle=False)
        passed = [np.asarray(features(model.variables, batch["pixels"])) for batch in whole.epoch()]
        return np.concatenate(passed)[: len(whole.images.labels)]

    known, asked = seen("train"), seen("test")
    truth, labels = found.splits["test"].labels, found.splits["train"].labels
    near = KNeighborsClassifier(min(20, len(labels)), metric="cosine", weights="distance")
    heads = {"linear probe": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)),
             "20 nearest images": near}  # fmt: skip
    guesses = {name: np.eye(found.task.outputs)[head.fit(known, labels).predict(asked)] for name, head in heads.items()}
    return {name: data.evaluate(found.task, outputs, truth) for name, outputs in guesses.items()}


if __name__ == "__main__":
    hosts.run(main, EXPLAINED)
