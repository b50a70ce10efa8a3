"""Fine-tunes a decoder (Llama family, GPT-2) to answer prompts, with any variant: E2E NLG, GSM8K, instructions.

    python -m experiments.lm --config configs/e2e.py[:variant=dora,model=smollm2,rank=4,targets=qv,smoke]
                             [--config.lr=1e-4 ...] [--workdir=runs] [--no-resume] [--config.mesh.fsdp=-1 ...]
                             [--coordinator=host:port --processes=2 --process=0]

The loss is that of the completions. The run's folder is <workdir>/<study>/<config and overrides>/seed=<n>; the same
command again resumes it. Exit code 75: a signal came, the run is saved, the same command goes on. Exit code 1: the loss
is not finite, or the command is wrong.
"""

import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorajax as lj
from experiments import glue
from experiments.balance import in_use
from experiments.glue import EXPLAINED, FREE, save
from experiments.objective import likelihood, make_dpo, make_sft, preference, ranked, tokens
from experiments.writing import make_writer, table, written
from lorajax import build, config, control, data, language, start
from lorajax.data.feed import ahead, calls, widths
from lorajax.models import adapter_names
from lorajax.shard import hosts
from lorajax.train.blame import diagnosis
from lorajax.train.checkpoint import Checkpoints
from lorajax.train.compiled import PRESETS, Ahead, Ready, compile_cache, compiler_flags
from lorajax.train.dpo import WithReference
from lorajax.train.progress import Progress
from lorajax.train.remat import fitted
from lorajax.train.run import EXIT_INTERRUPTED, Run, run_folder, stop_on_signal, write_json
from lorajax.train.step import init_state, make_eval, make_step
from lorajax.train.watch import Watch

# What ranks the states of a run: the mean log-probability of a held-out token, or of held-out preferences.
RANKING = {"sft": "log_likelihood", "dpo": "preference"}


def main(argv: list[str]) -> None:
    began = time.monotonic()
    launch = config.parse(argv, workdir="runs", resume=True, xla="none", **hosts.FLAGS)
    c = launch.config
    config.needs(c, "lr", "configs/e2e.py")
    compiler_flags(config.choose("xla", launch.options["xla"], PRESETS))
    compile_cache()
    hosts.start(**{name: launch.options[name] for name in hosts.FLAGS})

    # Everything below is a function of the config and of these two keys.
    adapter_key, train_key = jax.random.split(jax.random.key(c.seed))
    found = language.load_data(c)
    model = language.load_model(c)
    task, splits, place = found.task, found.splits, model.place
    if c.generate >= 0:  # where a package is missing that scores texts, here, not behind the training
        _, text = splits[task.generated][0]
        task.score([text], [[text]])
    learned = {name: language.examples(c, model, task, splits[name]) for name in ("train", task.held_out)}
    packed = data.pack(learned["train"], c.max_length, seed=c.seed) if c.packing else learned["train"]
    train, held_out = batched(c, packed, True), batched(c, learned[task.held_out])
    other = language.unrelated(c, model)
    # What the steps learn from: the completions, or pairs of them.
    steps, by_pairs = train, config.choose("loss", c.loss, {"sft": False, "dpo": True})
    if by_pairs:
        if c.packing:
            raise config.ConfigError("loss='dpo' learns from pairs, which are not packed: leave packing out")
        pairs = {name: language.preferences(c, model, task, splits[name]) for name in ("train", task.held_out)}
        steps, held_out_pairs = batched(c, pairs["train"], True), batched(c, pairs[task.held_out])
        for name, rows in pairs.items():
            if rows.dropped:
                print(f"{rows.dropped} pairs of {name} with a text of more than max_length={c.max_length} tokens are "
                      f"left out")
    ranking, total = RANKING[c.loss], build.total_steps(c, len(steps))
    # What does not fit is told before training, not after it.
    place.held(c.eval_batch)
    if c.generate >= 0:
        place.held(c.generate_batch)
        prompts, references = language.prompts(c, model, task, splits[task.generated])
        jax.eval_shape(partial(model.net.empty_cache, 1, int(prompts.lengths.max()) + c.max_new))
        if prompts.dropped:
            print(f"{prompts.dropped} prompts of more than max_length={c.max_length} tokens are left out")

    # What is adapted: decided by rules on the traced model, shown before anything is computed. A start that reads data
    # reads completions (of pairs the better ones).
    sites = lj.sites(model.net.apply, model.variables, train.batch(0, 0)["input_ids"])
    adapt = lj.adapt(sites, build.rules(c, model))
    folder = run_folder(launch.options["workdir"], c.study, launch.name, c.seed)
    resumed = hosts.agreed(launch.options["resume"] and (folder / "start").exists())
    if place.mesh or place.rules:
        print(place.describe(sites.leaves))
    if c.ranks.budget and not resumed:
        adapt = start.by_importance(c, adapt, model, make_sft(c, model, adapt), train, adapter_key)
    adapt = build.after(c, adapt, model)
    model, rounded = build.quantized(c, adapt, model)
    plain = make_sft(c, model, adapt, training=False)
    if resumed:
        adapt, trainable, frozen = start.read(c, adapt, model, folder / "start", place)
    else:
        adapt, trainable, frozen = start.make(c, adapt, model, plain, train, adapter_key, tokens, place, made=rounded)
    print(adapt.on(model.variables))
    trained = adapt.count(trainable)

    tx = build.optimizer(c, adapt, model, total)
    controller = build.controller(c, adapt, total)
    if by_pairs and controller.restart:
        raise config.ConfigError(f"loss='dpo' compares with the base, into which the controller {c.controller.name!r} "
                                 f"merges: take another variant, or loss=sft")
    # DPO's reference is the base under the adapter, of which there is one copy.
    policy: Any = WithReference(adapt) if by_pairs else adapt
    if by_pairs and c.balance.coefficient:
        raise config.ConfigError("balance.coefficient is for loss=sft: DPO's rows run under the reference too")
    make_loss = make_dpo if by_pairs else make_sft
    learn = lambda model: in_use(c, adapt, make_loss(c, model, adapt), tokens)  # noqa: E731
    learn(model)  # or it says now what does not fit together
    begin = lambda key, trainable: init_state(key, trainable, tx, controller)  # noqa: E731
    where = place.state(adapt, jax.eval_shape(begin, train_key, trainable))
    stepper = partial(make_step, adapt=policy, tx=tx, controller=controller, clip=c.clip or None,
                      accumulate=c.accumulate, steps_per_call=c.steps_per_call, shardings=(where, place.whole))
    both = lambda params, batch: (plain(params, batch, None)[0], jnp.sum(batch["weight"]))  # noqa: E731
    judge = make_eval(both, adapt, place.whole)
    judge_base = partial(jax.jit(both, out_shardings=place.whole), model.variables)
    if by_pairs:
        calm = make_dpo(c, model, adapt, training=False)
        judge_pairs = make_eval(lambda params, batch: ranked(calm(params, batch, None), batch["weight"]),
                                policy, place.whole)  # fmt: skip

    def evaluate(trainable: Any, frozen: Any, masks: Any = None) -> dict[str, float]:
        scores = likelihood(partial(judge, trainable, frozen, masks=masks), held_out, place)
        if by_pairs:
            scores |= preference(partial(judge_pairs, trainable, frozen, masks=masks), held_out_pairs, place)
        return scores

    prints = {"base": model.fingerprint, "data": found.fingerprint}
    with (
        Run(folder, config.to_dict(c), fingerprints=prints, ignore=FREE, fresh=not launch.options["resume"]) as run,
        Checkpoints(run.checkpoints) as saved,
        stop_on_signal() as stop,
        Ahead() as compiling,
    ):
        print(f"{folder}: {len(steps)} steps an epoch, {total} in all, {c.batch} rows each; {describe(learned, steps)}",
              flush=True)
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

        # The loop, as in experiments.glue: metrics are written before the checkpoint of their step, so that a run
        # killed anywhere goes on from its last checkpoint as if nothing had happened.
        n, epoch = c.steps_per_call, len(steps)
        eval_every, save_every = (build.every(p, epoch, n) for p in (c.eval_every, c.save_every))
        log_every = build.every(c.log_every, epoch, n)
        share = place.share(c.batch, c.accumulate)  # of each batch, this process' rows
        made = calls(steps.part(share), accumulate=c.accumulate, steps_per_call=n)
        lead, rows = (n > 1) + (c.accumulate > 1), c.batch // c.accumulate
        watch = Watch(n, place.whole)
        fit = lambda: (state, frozen, place.batch(made(steps.longest), lead, rows), watch.good)  # noqa: E731
        loss = learn(fitted(c.remat, c.memory, model, lambda model: stepper(learn(model)), fit))
        step_fn = Ready(stepper(loss))
        if place.mesh is None:
            for first in widths(steps, range(step, min(step + 2 * epoch, total), n), n).values():
                compiling(step_fn, state, frozen, place.batch(made(first), lead, rows), watch.good)

        def sound(state: Any, behind: int = 0) -> None:
            # Looks at the calls of a step since the last time and logs them, but for the newest `behind`: the device is
            # at work on these meanwhile, and need not wait for the host.
            fine, bad = watch.look(behind)
            for call in fine:
                if (at := call.begun + n) % log_every == 0:
                    run.log(at, call.last())
                    run.log_time(at, {"examples_per_second": bar.examples_per_second})
            if bad is None:
                return
            saved.save(bad.begun + int(np.sum(np.asarray(bad.metrics["finite"]))), state, best)
            raise SystemExit(diagnosis(loss, policy, state, frozen, bad.batch, bad.metrics, controller,
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
                        scores = evaluate(state.trainable, frozen)
                        views = {name: evaluate(state.trainable, frozen, masks)
                                 for name, masks in controller.views(state.control).items()}  # fmt: skip
                    run.log(step, scores | glue.flat(views) | controller.report(state.control), prefix="eval/")
                    for name, row in ({"": scores} | views).items():
                        bar.write(f"step {step}: {name} " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()))
                    better = scores[ranking] > best["scores"].get(ranking, -np.inf)
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

        # The best state is what the run leaves; then what it writes, and what it has forgotten, beside the base.
        state, _ = saved.restore(state, best["step"])
        frozen = restart.rebase(base, state.control) if restart else base
        left = control.exported(controller, adapt, model.variables, state.trainable, base, state.control)
        save(folder / "adapter", *left, base=model.fingerprint, names=adapter_names(model.net.config),
             task_type="CAUSAL_LM")
        baselines = {"base": likelihood(judge_base, held_out, place)}
        forgotten: dict[str, Any] = {}
        if other:
            texts = batched(c, other)
            before, after = (-likelihood(one, texts, place)["log_likelihood"]
                             for one in (judge_base, partial(judge, state.trainable, frozen)))  # fmt: skip
            forgotten = {"text": c.unrelated.text, "before": before, "after": after, "change": after - before}
        if c.generate >= 0:
            write = make_writer(c, model)
            mine = written(partial(make_eval(write, adapt, place.whole), state.trainable, frozen), c, model, prompts)
            best["scores"] |= task.score(mine, references)
            if c.baseline:
                theirs = written(partial(jax.jit(write, out_shardings=place.whole), model.variables), c, model, prompts)
                baselines["base"] |= task.score(theirs, references)
            if hosts.writes():
                write_json(folder / "texts.json", table(model, prompts, mine, references))
        seconds = time.monotonic() - began
        report(c, task, baselines, best, forgotten, trained, seconds)
        run.finish({
            "task": task.name, "headline": task.headline if c.generate >= 0 else ranking, "scores": best["scores"],
            "best_step": best["step"], "steps": total, "baselines": baselines, "forgetting": forgotten,
            "prompts_left_out": prompts.dropped if c.generate >= 0 else 0,
            "pairs_left_out": sum(rows.dropped for rows in pairs.values()) if by_pairs else 0,
            "trainable_parameters": trained, **controller.report(state.control), "views": best["views"],
            "device": jax.devices()[0].device_kind, "seed": c.seed, "name": launch.name, "seconds": round(seconds, 1),
            "examples_per_second": round(bar.examples_per_second, 1), "padding": round(steps.padding(), 4),
            "time": glue.aside(bar),
        })  # fmt: skip


def batched(c: Any, rows: Any, train: bool = False) -> data.Batches:
    # Packed rows are all of about one length.
    size, shapes = (c.batch, 1 if c.packing else c.shapes) if train else (c.eval_batch, c.shapes)
    return data.Batches(rows, size, seed=c.seed, shuffle=train, shapes=shapes,
                        together=c.steps_per_call if train else 1)


def describe(learned: dict[str, data.Supervised], steps: data.Batches) -> str:
    cut = ", ".join(f"{name}: {rows.truncated} cut, {rows.dropped} left out" for name, rows in learned.items()
                    if rows.truncated or rows.dropped)  # fmt: skip
    return f"padded lengths {', '.join(map(str, steps.lengths))}, {100 * steps.padding():.0f} % padding" + (
        f" ({cut})" if cut else "")


def report(c: Any, task: Any, baselines: Any, best: Any, forgotten: Any, trained: int, seconds: float) -> None:
    glue.report(c, task, baselines, best, trained, seconds)
    if forgotten:
        print(f"  loss on {forgotten['text']}: {forgotten['before']:.4f} before, {forgotten['after']:.4f} after")


if __name__ == "__main__":
    hosts.run(main, EXPLAINED)
