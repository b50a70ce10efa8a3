"""What the configs of an experiment share: data, model, optimizer and loop. A method's own file sets the rest.

The arguments after the name of a method's config are the same for all: `task`, `model`, `rank`, `targets` (a preset,
`all`, or a regex on paths), `recipe` (`fair` for that of the comparison, the same for every method) and `smoke`, the
form that takes seconds.
"""

import importlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lorajax import config

# task: (batch, epochs, lr, max length). The LoRA paper's table for RoBERTa-base, its 512 tokens cut to the task's need.
PAPER = {
    "mnli": (16, 30, 5e-4, 256),
    "sst2": (16, 60, 5e-4, 128),
    "mrpc": (16, 30, 4e-4, 128),
    "cola": (32, 80, 4e-4, 64),
    "qnli": (32, 25, 4e-4, 256),
    "qqp": (16, 25, 5e-4, 128),
    "rte": (32, 80, 5e-4, 256),
    "stsb": (16, 40, 4e-4, 128),
}
# Not in the paper: RTE's recipe for the other task of a few hundred pairs, and the default task.
PAPER |= {"wnli": (32, 80, 5e-4, 256), "reviews": (32, 2, 5e-4, 64)}
# For `minilm`, a small encoder: fewer epochs and a larger learning rate.
SMALL = {
    "mnli": (32, 3, 1e-3, 128),
    "sst2": (32, 10, 3e-4, 64),
    "mrpc": (32, 20, 1e-3, 128),
    "cola": (32, 20, 1e-3, 64),
    "qnli": (32, 5, 1e-3, 128),
    "qqp": (32, 3, 1e-3, 128),
    "rte": (32, 20, 1e-3, 256),
    "stsb": (32, 20, 1e-3, 128),
    "wnli": (32, 20, 1e-3, 128),
    "reviews": (32, 2, 1e-3, 64),
}

# Tasks that have four padded lengths: the default one, whose run is short, and WNLI, an epoch of which is 20 batches.
FEW = ("reviews", "wnli")

# recipe=fair, over whatever the method's own file says: what is no part of a method is the same for all. No dropout and
# no decay, which act on unlike arrays in unlike methods; a rate of its own for the head, so that `lr` is the method's;
# one padded length and one number of steps, so that tasks share compiled programs; and one evaluation, at the end: the
# best of several would be chosen on the split that it is reported for.
FAIR = {"batch": 16, "steps": 600, "eval_every": 600, "shapes": 0, "dropout": 0.0, "head_dropout": 0.0,
        "weight_decay": 0.0, "head_lr": 1e-3, "warmup": 0.06, "schedule": "linear", "steps_per_call": 10,
        "log_every": 50, "probe": False}  # fmt: skip
FAIR_LENGTH = {"sst2": 48, "cola": 48, "stsb": 64, "reviews": 64, "mrpc": 96, "rte": 96}  # the others: 128


def arguments(arg: str | None, rank: int | None = 8, targets: str = "all-linear", **more: Any) -> ConfigDict:
    """What stands after the config's name. rank: None for a method that has none. more: a method's own arguments."""
    ranked = {} if rank is None else {"rank": rank}
    given: dict[str, Any] = {"task": "reviews", "model": "minilm", **ranked, "targets": targets, "recipe": "own"}
    return config.arguments(arg, **given, smoke=False, **more)


def glue(args: ConfigDict, lr: float = 0.0, lr_times: float = 1.0, **values: Any) -> ConfigDict:
    """A run's config without its method. lr: for every task, 0 for the task's own times `lr_times`, the ratio of a
    method's learning rate to LoRA's. values: any other key, in place of the default."""
    batch, epochs, usual, length = config.choose("task", args.task, SMALL if args.model == "minilm" else PAPER)
    c = ConfigDict()
    c.args = args
    c.study = "glue"
    c.seed = 0
    # Data. data: folder of parquet files in the hub's layout, '' for LORAJAX_DATA or the hub. examples: of each split,
    # 0 for all. shapes: how many padded lengths at most, that is how many programs are compiled; 0: one, of max_length.
    # padding: as few lengths as leave at most this share of the training batches' token slots empty; 0: `shapes`.
    # GLUE's tasks take 11 to 23, and four for evaluation. Four in all (shapes=4, padding=0) pay where compiling costs
    # more than a fifth of the steps.
    c.data = ""
    c.examples = 0
    c.max_length = length
    c.batch = batch
    c.eval_batch = 128
    c.shapes, c.padding = (4, 0.0) if args.task in FEW else (32, 0.05)
    # Model. dropout: of the encoder, -1 for the checkpoint's own. compute_dtype: auto is bfloat16 on an accelerator and
    # float32 on a CPU.
    c.pooling = "mean"
    c.dropout = 0.0 if args.task == "reviews" else 0.1
    c.head_dropout = 0.0
    c.compute_dtype = "auto"
    c.scan_layers = False
    # attention: auto is on one NVIDIA GPU, in 16 bits, a fused kernel (short's up to 128 tokens, cuDNN's above), else
    # XLA's; xla, cudnn and short ask for one, '' for JAX's choice. Passes with attention dropout take XLA's.
    c.attention = "auto"
    # remat: what the backward pass computes again: none; attention, all but the products with weights and the fused
    # attention; fused, all but the fused attention; full; auto, the first of none, attention and full whose compiled
    # step fits `memory` GiB of a device, 0 for all it has.
    c.remat = "none"
    c.memory = 0.0
    # Devices: how many each axis of the mesh has, -1 for the rest. No number of a run depends on it. shard: rules for
    # weights before those of the model's family, in the order of their names: name -> {"paths": a regex, "axes": an
    # axis for each of the last dimensions, such as "fsdp,tensor", "tensor+fsdp,-"}.
    c.mesh = {"data": 1, "fsdp": 1, "tensor": 1, "trial": 1}
    c.shard = {}
    # Optimizer: a row of lorajax.optim.NAMES with its settings. warmup: a fraction of the run. head_lr: 0 is lr.
    # steps: in place of epochs, 0 for these.
    c.optimizer = {"name": "adamw"}
    c.lr = lr or usual * lr_times
    c.head_lr = 0.0
    c.epochs = float(epochs)
    c.steps = 0
    c.warmup = 0.06
    c.schedule = "linear"
    c.weight_decay = 0.1
    c.clip = 1.0
    c.accumulate = 1
    c.label_smoothing = 0.0
    # neftune: size of the noise on the input embeddings in training, 0 for none.
    c.neftune = 0.0
    # balance: weight of the loss that keeps the experts of a mixture in use, 0 for none, and its kind: switch or cv
    # (lorajax.variants.balance). What is reported as loss is the task's alone.
    c.balance = {"coefficient": 0.0, "kind": "switch"}
    # Further rules, which come before `targets`, in the order of their names: name -> {"paths": a preset or a regex,
    # "name": a variant or "full", and its hyperparameters}.
    c.also = {}
    # The frozen base in fewer bits (lorajax.quant). format: nf4, fp4, int8, gguf (a GGUF file's own) or '' for none.
    # block: elements that share a scale, 0 for the format's own. double: the scales are quantised too. targets: which
    # weights, as those of rules. once: a regex on paths; under remat=full the recomputation and the backward pass of a
    # layer share the dequantised form of these: quicker, for the memory of it in one layer (`lorajax.lift`).
    c.quant = {"format": "", "block": 0, "double": True, "targets": "all-linear", "once": ""}
    # Adapters of earlier runs on the same base, frozen and summed with the new one (O-LoRA). folders: <run>/adapter
    # (several as in PATH). orth, l2: weights of the penalties.
    c.earlier = {"folders": "", "orth": 0.5, "l2": 0.0}
    # Ranks by importance: budget, the average rank of a matrix, is shared out by the scores of the first batches
    # (lorajax.control.importance), 0 for the same rank everywhere. keep: `alpha` or the `scale` stays.
    c.ranks = {"budget": 0.0, "metric": "gradient_norm", "batches": 8, "minimum": 1, "keep": "alpha"}
    # What a start that reads data reads: so many batches of the training data, in their order. at_once: how many
    # weights to collect at a time, 0 for all. redistribute: EVA's ranks go where they explain most.
    c.calibrate = {"batches": 32, "at_once": 0, "redistribute": True}
    # Controller: a row of lorajax.control.NAMES with its settings.
    c.controller = {"name": "identity"}
    # Loop. eval_every and save_every: steps; 0 is once an epoch. steps_per_call: optimizer steps in one jitted call.
    c.eval_every = 0
    c.save_every = 0
    c.log_every = 10
    c.steps_per_call = 1
    c.probe = True
    c.update(values)
    if config.choose("recipe", args.recipe, {"own": False, "fair": True}):
        c.update(FAIR, max_length=FAIR_LENGTH.get(args.task, 128))
    if args.smoke:
        c.update(examples=128, max_length=16, shapes=1, batch=16, eval_batch=64, epochs=1.0, log_every=1)
        c.update(steps=min(c.steps, 8), eval_every=min(c.eval_every, 8), steps_per_call=min(c.steps_per_call, 4))
    return c


def method(name: str, **arguments: Any) -> ConfigDict:
    """The config of a method's own file, for the recipe of another experiment. arguments: of it, those that are set."""
    files = {p.stem for p in Path(__file__).parent.glob("*.py")} - {"__init__", "base"}
    config.choose("variant", name, dict.fromkeys(files))
    get_config = importlib.import_module(f"configs.{name}").get_config
    found = get_config(None)
    if found.get("study") != "glue":
        raise config.ConfigError(f"variant {name!r} is a recipe, not a method: name a method's file, such as lora")
    given = {key: value for key, value in arguments.items() if value}
    for key in given.keys() - set(found.args):
        raise config.ConfigError(f"variant={name!r} has no {key}: leave it out, or take another method, such as lora")
    return get_config(",".join(f"{key}={value}" for key, value in given.items())) if given else found


def lm(arg: str | None, *, task: str, lr: float, rank: int, targets: str, **values: Any) -> ConfigDict:
    """A run of `experiments.lm`: a recipe, with the method that `variant` names (configs/<variant>.py).

    lr: the recipe's rate for LoRA; another method's has its own ratio to it. rank, targets: the recipe's, for methods
    that have LoRA's defaults; the others keep their own unless the command says otherwise. values: any other key.
    """
    args = config.arguments(arg, task=task, model="smollm2", variant="lora", rank=0, targets="", smoke=False)
    usual = method(args.variant).args
    if "rank" in usual:
        usual.rank = rank if usual.rank == method("lora").args.rank else usual.rank
        args.rank = args.rank or min(usual.rank, 4 if args.smoke else usual.rank)
    args.targets = args.targets or (targets if usual.targets == "all-linear" else usual.targets)
    c = method(args.variant, rank=args.rank, smoke=args.smoke)
    for key in ("padding", "pooling", "head_dropout", "head_lr", "probe"):  # a decoder gets no new head
        del c[key]
    if args.smoke and args.model == "smollm2":
        args.model = "tiny"
    c.args, c.study = args, "lm"
    c.lr = float(f"{lr * c.lr / SMALL['reviews'][2]:.6g}")
    if c.weight_decay == 0:  # the method's own recipe has none
        values["weight_decay"] = 0.0
    plain = method("lora")
    values |= {key: c[key] for key in ("schedule", "clip") if c[key] != plain[key]}  # part of the method
    # Data. examples: of each split but the one that is generated for. max_length: tokens of a pair, which is cut
    # behind them. packing: several pairs in a row of that length.
    c.update(examples=0, max_length=512, shapes=4, batch=8, eval_batch=32, epochs=1.0, eval_every=0, log_every=10)
    c.packing = False
    # Model. attention: as for encoders, JAX's choice unless asked. dropout: of a GPT-2, -1 for the checkpoint's own.
    # kernels: auto adds the updates of both sides of silu(gate) * up where they are read, by a kernel of Pallas for
    # Triton, on one NVIDIA GPU in 16 bits (lorajax.core.gated_kernel); '' leaves all to XLA.
    c.attention = ""
    c.kernels = "auto"
    c.dropout = 0.0
    # Loss: sft, or dpo on constructed preferences, with the settings of lorajax.train.dpo.
    c.loss = "sft"
    c.dpo = {"beta": 0.1, "kind": "dpo", "label_smoothing": 0.0}
    # Generation, at the end, from the best state. generate: how many prompts, 0 for all, -1 for none; those of more
    # than max_length tokens are left out, and counted. beams: 1 is greedy, without what follows. baseline: also from
    # the base, before training.
    c.generate = 0
    c.generate_batch = 32
    c.max_new = 64
    c.beams = 1
    c.length_penalty = 1.0
    c.no_repeat_ngram = 0
    c.baseline = True
    # What is forgotten: the loss on other text, before and after. text: a row of lorajax.language.TEXTS, or none.
    c.unrelated = {"text": "reviews" if args.task == "dolly" else "dolly", "examples": 256, "max_length": 256}
    c.update(warmup=0.06)
    c.update(values)
    if args.smoke:
        c.update(data="made-up", max_length=128, shapes=1, batch=4, eval_batch=8, epochs=1.0, warmup=0.06, log_every=1)
        c.update(generate=2, generate_batch=2, max_new=8)
        c.unrelated.update(text="made-up")
    return c


# What a method's config says of text.
TEXT = ("max_length", "shapes", "padding", "pooling", "dropout", "head_dropout", "scan_layers", "attention", "neftune",
        "balance")


def vision(arg: str | None, *, task: str, model: str, lr: float, targets: str, **values: Any) -> ConfigDict:
    """A run of `experiments.vision`: a recipe, with the method that `variant` names (configs/<variant>.py).

    lr: the recipe's rate for LoRA; another method's has its own ratio to it. targets: for methods that name none
    themselves. values: any other key.
    """
    args = config.arguments(arg, task=task, model=model, variant="lora", rank=0, targets="", smoke=False)
    c = method(args.variant, rank=args.rank)
    if c.neftune:
        raise config.ConfigError(f"variant={args.variant!r} adds noise to word embeddings: leave it out, or take "
                                 f"another method, such as lora")
    args.targets = args.targets or (targets if c.args.targets == "all-linear" else c.args.targets)
    heads = c.head_lr / c.lr
    for key in TEXT:
        del c[key]
    c.args, c.study = args, "vision"
    c.lr = float(f"{lr * c.lr / SMALL['reviews'][2]:.6g}")
    c.head_lr = float(f"{c.lr * heads:.6g}")
    c.weight_decay = 0.0
    # size: of the images that the model reads, resized on the device. pad, flip: of the augmentation, pixels of the
    # random shift before resizing and whether images are mirrored. execution: how the model is run (its fields).
    c.size, c.pad, c.flip = 32, 4, True
    c.execution = {}
    c.base = {}
    c.update(values)
    if args.smoke:
        c.update(examples=32, batch=16, eval_batch=32, epochs=1.0, log_every=1)
    return c
