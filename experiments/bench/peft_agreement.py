r"""LoRA, DoRA and AdaLoRA trained twice: by PEFT (PyTorch) and by lorajax, from one start, on the same batches.

    python -m experiments.bench.peft_agreement --tasks mrpc --seeds 1 --steps 50 --config.batch=8
    XLA_PYTHON_CLIENT_PREALLOCATE=false \
    python -m experiments.bench.peft_agreement --tasks mrpc rte --seeds 5 --device cuda --json agreement.json

Everything but the framework is the same: the base (BertForSequenceClassification with its pooler, float32, matmuls in
full float32), head and adapters (drawn by lorajax, handed over as a PEFT folder), batches and their order, the settings
of `configs/<method>.py` with every dropout at 0, AdamW with decay on all but biases, linear schedule with warm-up,
clipping at norm 1, AdaLoRA's penalty and budgets. Differences that are left, all of them in the last bits: the
order of sums; PEFT clips by (norm + 1e-6); its DoRA forms W + AB for the norms and lorajax expands them.

Several processes share the work by `--first` (the first of the seeds), `--methods` and `--tasks`, each with a file of
its own, and `--merge FILE FILE ...` makes one table of the files. The seeds of one process share our compiled step; a
file has every seed that is finished.

steps: 0 is the task's recipe; `--config.KEY=VALUE` changes a setting for both sides. Needs the extra `peft`. On a busy
CPU set OMP_NUM_THREADS=1: PyTorch's threads spin while they wait.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lorajax as lj
from experiments import glue
from experiments.bench.setting import markdown, setting
from lorajax import build, config, data
from lorajax.io import peft
from lorajax.models import adapter_names
from lorajax.train.step import init_state, make_eval, make_step

METHODS = ("lora", "dora", "adalora")
CURVE = 50  # steps whose losses are compared


class Trained(NamedTuple):
    losses: list[float]  # of each step, without AdaLoRA's penalty
    scores: dict[str, float]
    kept: dict[str, list[bool]]  # AdaLoRA: module -> which ranks are left


def settings(method: str, *words: str) -> Any:
    # The method's own config; what one side only could do is off. Few lengths: nothing is compiled ahead here.
    off = [f"--config.{name}dropout=0.0" for name in ("", "head_", "variant.")]
    flags = [*off, "--config.pooling=first", "--config.compute_dtype=float32", "--config.shapes=4",
             "--config.padding=0.0"]  # fmt: skip
    return config.parse([f"--config=configs/{method}.py:{words[0]}", *flags, *words[1:]]).config


class Shared(NamedTuple):
    # What the seeds of one method on one task have in common: shapes and schedule, so the compiled programs too.
    found: build.Data
    tokens: dict[str, data.Tokens]
    model: build.Model
    total: int
    adapt: lj.Adapt
    begin: Any
    tx: Any
    controller: Any
    step: Any
    predict: Any


def shared(c: Any, steps: int) -> Shared:
    found = build.load_data(c)
    model = build.load_model(c, found.task, jax.random.key(0))  # each seed draws a head of its own
    tokens = build.tokens(c, found, model.folder)
    train = build.batches(c, tokens)["train"]
    total = steps or build.total_steps(c, len(train))
    adapt = lj.adapt(lj.sites(model.net.apply, model.variables, *glue.inputs(train.batch(0, 0))), build.rules(c, model))
    tx, controller = build.optimizer(c, adapt, model, total), build.controller(c, adapt, total)
    step = make_step(glue.make_loss(model.net, found.task, c), adapt, tx, controller, clip=c.clip)
    forward = lj.lift(model.net.apply)
    predict = make_eval(lambda bound, batch: forward(bound, *glue.inputs(batch)), adapt)
    return Shared(found, tokens, model, total, adapt, jax.jit(adapt.init), tx, controller, step, predict)


def compare(c: Any, device: str, all_: Shared) -> tuple[Trained, Trained]:
    # (PEFT's, ours) of the seed in `c`
    head_key, adapter_key, train_key = jax.random.split(jax.random.key(c.seed), 3)
    model, adapt, batches = all_.model, all_.adapt, build.batches(c, all_.tokens)
    trainable, frozen = all_.begin(adapter_key, build.with_head(model, head_key))
    names = adapter_names(model.net.config)
    with tempfile.TemporaryDirectory() as folder:
        peft.write(folder, adapt, trainable, frozen, names, task_type="SEQ_CLS")
        theirs = by_peft(c, all_.found.task, folder, model.folder, batches, all_.total, device)

    state = init_state(train_key, trainable, all_.tx, all_.controller)
    losses = []  # fetched at the end, so that no step waits for the one before
    for i in range(all_.total):
        state, metrics = all_.step(state, frozen, batches["train"].batch(*batches["train"].position(i)))
        losses.append(metrics["loss"])
    scores = glue.evaluate(all_.predict, state.trainable, frozen, all_.found, batches, model.place)
    kept = {names[path].names[0].removesuffix(".weight"): np.asarray(row).tolist()
            for path, row in (state.control.kept.items() if c.controller.name == "adalora" else ())}
    return theirs, Trained([float(x) for x in jax.device_get(losses)], scores, kept)


def by_peft(c: Any, task: data.Task, folder: str, base: Path, batches: Any, total: int, device: str) -> Trained:
    import peft as theirs
    import torch
    import transformers

    torch.manual_seed(c.seed)  # nothing is drawn: every start is in the folder
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=task.outputs, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0, attn_implementation="eager", dtype=torch.float32,
    )  # fmt: skip
    how = theirs.PeftConfig.from_pretrained(folder)
    if c.variant.name == "adalora":
        b, ratio = c.controller, total / c.controller.of_steps
        how.total_step, how.target_r, how.orth_reg_weight = total, b.target_rank, c.variant.orth
        how.tinit, how.tfinal, how.deltaT = round(b.t_initial * ratio), round(b.t_final * ratio), max(
            1, round(b.delta_t * ratio))
        how.beta1, how.beta2 = b.beta1, b.beta2
    model = theirs.PeftModel.from_pretrained(model, folder, config=how, is_trainable=True).to(device).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    biases = [p for name, p in trained.items() if name.endswith("bias")]
    rest = [p for name, p in trained.items() if not name.endswith("bias")]
    groups = [{"params": rest, "weight_decay": c.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=c.lr)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(c.warmup * total), total)

    def inputs(batch: data.Batch) -> dict[str, Any]:
        real = batch["weight"] > 0  # no empty rows here
        names = ("input_ids", "attention_mask", "token_type_ids", "label")
        return {name.replace("label", "labels"): torch.tensor(batch[name][real]).long().to(device) for name in names}

    losses = []
    for i in range(total):
        given = inputs(batches["train"].batch(*batches["train"].position(i)))
        out = model(**given)  # its loss has AdaLoRA's penalty in it
        out.loss.backward()
        losses.append(torch.nn.functional.cross_entropy(out.logits.detach(), given["labels"]))
        torch.nn.utils.clip_grad_norm_(trained.values(), c.clip)
        optimizer.step()
        schedule.step()
        if c.variant.name == "adalora":
            model.base_model.update_and_allocate(i)
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        passed = list(batches[task.evaluation[0]].epoch())
        outputs = np.concatenate([model(**inputs(batch)).logits.cpu().numpy() for batch in passed])
    labels = np.concatenate([batch["label"][batch["weight"] > 0] for batch in passed])
    kept = {name.removeprefix("base_model.model.").removesuffix(".lora_E.default"): row
            for name, row in (getattr(model.peft_config["default"], "rank_pattern", None) or {}).items()
            if c.variant.name == "adalora"}  # fmt: skip
    return Trained(torch.stack(losses).tolist(), data.evaluate(task, outputs, labels), kept)


def row(task: str, method: str, pairs: list[tuple[Trained, Trained]]) -> dict[str, Any]:
    # One line of the table: the seeds of one method on one task. The deviation is the mean of PEFT's and ours.
    curves = [np.abs(np.subtract(a.losses[:CURVE], b.losses[:CURVE])) for a, b in pairs]
    name = data.task(task).headline
    scores = np.array([[a.scores[name], b.scores[name]] for a, b in pairs])
    spread = float(np.sqrt(scores.var(axis=0, ddof=1).mean())) if len(pairs) > 1 else None
    return {"task": task, "method": method, "seeds": len(pairs), "steps": len(pairs[0][0].losses),
            f"largest loss difference, first {len(curves[0])} steps": f"{max(x.max() for x in curves):.1e}",
            "first and last loss": f"{pairs[0][0].losses[0]:.3f}, {pairs[0][0].losses[-1]:.3f}",
            f"{name}, PEFT": float(scores[:, 0].mean()), f"{name}, lorajax": float(scores[:, 1].mean()),
            "deviation over seeds": "one seed" if spread is None else f"{spread:.3f}",
            "ranks alike": " ".join(alike(a, b) for a, b in pairs if a.kept) or "-"}  # fmt: skip


def alike(a: Trained, b: Trained) -> str:
    same = [x == y for module in a.kept for x, y in zip(a.kept[module], b.kept[module], strict=True)]
    return f"{sum(same)} of {len(same)}"


def merge(files: list[Path], to: Path | None) -> None:
    found = [json.loads(file.read_text()) for file in files]
    runs = sorted((run for one in found for run in one["runs"]), key=lambda r: (r["task"], r["method"], r["seed"]))
    pairs: dict[tuple[str, str], list[tuple[Trained, Trained]]] = {}
    for run in runs:
        pairs.setdefault((run["task"], run["method"]), []).append((Trained(**run["peft"]), Trained(**run["lorajax"])))
    if to:
        to.write_text(json.dumps({"setting": found[0]["setting"], "runs": runs}, indent=1) + "\n")
    print(markdown([row(*key, mine) for key, mine in pairs.items()], found[0]["setting"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "rte"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="train nothing: one table of these files")
    parser.add_argument("--steps", type=int, default=0, help="of each run; 0: the recipe of the task")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--device", default="cpu", help="torch's; JAX's is JAX_PLATFORMS'")
    parser.add_argument("--json", type=Path, help="write every loss and score there")
    options, words = parser.parse_known_args()  # the rest is for the config: --config.batch=16
    if options.merge:
        merge(options.merge, options.json)
        return
    if missing := [name for name in ("torch", "peft", "transformers") if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"error: {', '.join(missing)} not installed: pip install 'lorajax[peft]'")
    jax.config.update("jax_default_matmul_precision", "highest")  # as torch's, which has TF32 off
    where = setting() | {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")}
    rows, runs = [], []
    for task in options.tasks:
        for method in options.methods:
            pairs, all_ = [], None
            for seed in range(options.first, options.first + options.seeds):
                c = settings(method, f"task={task},model={options.model}", f"--config.seed={seed}", *words)
                all_ = all_ or shared(c, options.steps)
                pairs.append(compare(c, options.device, all_))
                runs.append({"task": task, "method": method, "seed": seed,
                             "peft": pairs[-1][0]._asdict(), "lorajax": pairs[-1][1]._asdict()})  # fmt: skip
                print(json.dumps(row(task, method, pairs)), flush=True)
                if options.json:
                    options.json.write_text(json.dumps({"setting": where, "runs": runs}, indent=1) + "\n")
            rows.append(row(task, method, pairs))
    print(markdown(rows, where))


if __name__ == "__main__":
    main()
