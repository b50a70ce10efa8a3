"""From a config to the parts of a text classification run, a function each: data, model, rules, optimizer, controller.

The functions take the config (`configs/*.py` says what every key means) and the parts they need; the experiment calls
them one by one, so that what is built, and in which order, stays visible there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from lorajax import control, data, optim, quant
from lorajax.config import ConfigError, choose, nearest
from lorajax.core.adapt import Adapt
from lorajax.core.adapt import adapt as make_adapt
from lorajax.core.fingerprint import fingerprint
from lorajax.core.packed import is_packed
from lorajax.core.rules import PRESETS, Rule
from lorajax.core.sites import by_path
from lorajax.core.variant import Full, Variant
from lorajax.io import adapter, assets, hf
from lorajax.models import Bert, BertConfig, fresh_params, params_from_hf
from lorajax.models.settings import REMAT
from lorajax.models.short_attention import short_attention
from lorajax.shard.mesh import make_mesh
from lorajax.shard.placement import LOCAL, Placement
from lorajax.shard.rules import defaults as sharding_rules
from lorajax.variants import INITIALIZERS, NAMES, o_lora
from lorajax.variants.initializer import Initializer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Pretrained(Protocol):
    """What rules, optimizer and earlier adapters need of a model: its parameters, the paths of those that are new, and
    the fingerprint of the others."""

    @property
    def variables(self) -> dict[str, Any]: ...
    @property
    def fresh(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...


class Data(NamedTuple):
    """task: the row of the table of tasks. splits: 'train' and the evaluation splits that exist, the headline one next,
    each `data.Examples` (or `data.Images`). fingerprint: of all of it."""

    task: data.Task
    splits: dict[str, Any]
    fingerprint: str


class Model(NamedTuple):
    """net, variables: the encoder with a head as a Linen module and its pretrained parameters.
    fresh: paths of the parameters that are new (the head). folder: where tokenizer and weights are.
    fingerprint: of the pretrained parameters, whatever the head. place: where everything lies."""

    net: Bert
    variables: dict[str, Any]
    fresh: tuple[str, ...]
    folder: Path
    fingerprint: str
    place: Placement = LOCAL


def load_data(config: ConfigDict) -> Data:
    """The task's splits, from `config.data`, LORAJAX_DATA, the cache, the hub or (reviews) the package registry."""
    task = choose("task", config.args.task, data.TASKS)
    if task.name == "reviews":
        splits = data.load_reviews(config.data or assets.resolve("reviews").path)
    else:
        splits = data.load_glue(task.name, config.data or None)
    if config.examples:
        splits = {name: _some(examples, config.examples) for name, examples in splits.items()}
    digests = "".join(f"{name}:{examples.fingerprint()}," for name, examples in splits.items())
    return Data(task, splits, hashlib.sha256(digests.encode()).hexdigest()[:32])


def spaced(rows: int, count: int) -> np.ndarray:
    """`count` of so many rows, evenly spaced; all of them for 0 or where there are no more."""
    every = not count or count >= rows
    return np.arange(rows) if every else np.unique(np.linspace(0, rows - 1, count).astype(np.int64))


def _some(examples: data.Examples, count: int) -> data.Examples:
    """`count` rows, evenly spaced."""
    rows = spaced(len(examples.labels), count)
    return data.Examples(tuple([column[row] for row in rows] for column in examples.texts), examples.labels[rows])


def tokens(config: ConfigDict, found: Data, folder: Path) -> dict[str, data.Tokens]:
    """Every split tokenised, cut to `config.max_length`."""
    tokenizer = data.load_tokenizer(folder)
    return {name: data.tokenize(split, tokenizer, config.max_length) for name, split in found.splits.items()}


EVALUATION = 4
"""Padded lengths of a split that is only evaluated, at most, where training has lengths of its own."""


def batches(config: ConfigDict, tokens: dict[str, data.Tokens]) -> dict[str, data.Batches]:
    """Batches of every split, 'train' shuffled by the seed. Without `config.padding` all are padded to the same
    lengths, `config.shapes` of them at most (0: all to `config.max_length`). With it 'train' has as few as keep its
    padding below, batches that share a call counted as they are padded, and each other split `EVALUATION` of its own.
    """
    if not 0 <= config.padding < 1:
        raise ConfigError(f"padding={config.padding:g} is a share of token slots, 0 to 1: 0.05 for at most 5 %")
    every = np.concatenate([t.lengths for t in tokens.values()])
    lengths = data.bucket_lengths(every, config.shapes, config.batch) if config.shapes else (config.max_length,)
    rest: dict[str, Any] = {"lengths": lengths}
    if config.padding and config.shapes:
        lengths = data.fewest_lengths(tokens["train"].lengths, config.shapes, config.batch * config.steps_per_call,
                                      config.padding)
        rest = {"shapes": min(config.shapes, EVALUATION)}
    evaluation = {
        name: data.Batches(t, config.eval_batch, shuffle=False, **rest)
        for name, t in tokens.items()
        if name != "train"
    }
    return {"train": data.Batches(tokens["train"], config.batch, seed=config.seed, lengths=lengths,
                                  together=config.steps_per_call), **evaluation}


def placement(config: ConfigDict, model_type: str) -> Placement:
    """Where things lie on `config.mesh`."""
    return Placement(make_mesh(dict(config.mesh)), *sharding(config, model_type))


def sharding(config: ConfigDict, model_type: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The rules of `config.shard`, and those of the model's family, which come after them."""
    rows = [config.shard[name] for name in sorted(config.shard)]
    for name, row in zip(sorted(config.shard), rows, strict=True):
        if set(row) != {"paths", "axes"}:
            raise ConfigError(f"shard.{name} has {', '.join(sorted(row)) or 'nothing'}: a rule is "
                              f"{{'paths': a regex, 'axes': an axis for each of the last dimensions}}")
    own = tuple((row["paths"], tuple(_entry(word) for word in row["axes"].split(","))) for row in rows)
    return own, sharding_rules(model_type)


def _entry(word: str) -> Any:
    """`fsdp`, `tensor+fsdp`, or `-` for none."""
    names = tuple(name.strip() for name in word.split("+"))
    return None if names in (("-",), ("",)) else names if len(names) > 1 else names[0]


def load_model(config: ConfigDict, task: data.Task, key: jax.Array) -> Model:
    """The pretrained encoder with a fresh head for `task`, drawn from `key`, on the mesh."""
    folder = assets.resolve(config.args.model).path
    checkpoint = hf.open_checkpoint(folder)
    place = placement(config, str(checkpoint.config.get("model_type")))
    overrides: dict[str, Any] = {"num_labels": task.outputs, "pooling": config.pooling, "dtype": compute_dtype(config)}
    overrides |= {"head_dropout": config.head_dropout, "scan_layers": config.scan_layers, "remat": remat(config)}
    overrides |= {"rows": place.rows(), "attention": attention(config)}
    if config.dropout >= 0:  # negative: the checkpoint's own
        overrides |= {"hidden_dropout": config.dropout, "attention_dropout": config.dropout}
    settings = BertConfig.from_hf(checkpoint.config, **overrides)
    # A head that comes with the checkpoint answers another task; a pooler is used only where the pooling has one.
    unwanted = ["classifier"] if settings.has_pooler else ["classifier", "pooler"]
    ignore = [rf"{top}\..*" for top in unwanted if any(re.search(rf"(^|\.){top}\.", n) for n in checkpoint.tensors)]
    shardings = place.base if place.mesh else None
    loaded = params_from_hf(settings, checkpoint.tensors, key, ignore=ignore, shardings=shardings)
    flat = traverse_util.flatten_dict(loaded.variables, sep="/")
    pretrained = {path: leaf for path, leaf in flat.items() if path not in loaded.fresh}
    return Model(Bert(settings), loaded.variables, loaded.fresh, folder, fingerprint(pretrained), place)


def remat(config: ConfigDict) -> str:
    """`config.remat` as models know it; 'auto' is 'none' until `lorajax.train.remat.fitted` decides."""
    choose("remat", config.remat, dict.fromkeys(("auto", *REMAT)))
    if config.memory < 0 or (config.memory and config.remat != "auto"):
        raise ConfigError(f"memory={config.memory:g} is the GiB of a device that remat='auto' may use, and remat is "
                          f"{config.remat!r}: leave it 0, or set remat=auto and more than 0")
    return "none" if config.remat == "auto" else config.remat


def attention(config: ConfigDict) -> Any:
    """`config.attention` as models know it; older runs have none."""
    known: Any = choose("attention", config.get("attention", ""), {
        "": None, "xla": "xla", "cudnn": "cudnn", "auto": "auto", "short": short_attention})
    mesh = make_mesh(dict(config.mesh)) if known in ("auto", short_attention) else None
    if known == "auto":  # on a mesh XLA's: cuDNN's with a mask fails there unless the mask is split as the queries are
        return short_attention if mesh is None else None
    if mesh is not None:
        split = {axis: n for axis, n in dict(mesh.shape).items() if n > 1}
        raise ConfigError(f"attention=short is for one device, and config.mesh has {split}: take attention=auto")
    if known == "cudnn" and jnp.dtype(compute_dtype(config)).itemsize > 2:
        raise ConfigError("attention=cudnn computes in 16 bits, and compute_dtype is float32: take attention=auto, "
                          "which is cuDNN's where that runs, or compute_dtype=bfloat16")
    return known


def kernels(config: ConfigDict) -> str:
    """`config.kernels` as `lift` knows it, which takes no arrays that are split over a mesh; older runs have none."""
    known = choose("kernels", config.get("kernels", ""), {"": "", "auto": "triton"})
    return known if known and make_mesh(dict(config.mesh)) is None else ""


def with_head(model: Model, key: jax.Array) -> dict[str, Any]:
    """`model.variables` with the head that `load_model` would draw from `key`; the pretrained arrays are the same."""
    flat = traverse_util.flatten_dict(model.variables, sep="/")
    fresh = fresh_params(model.net.config, {path: flat[path] for path in model.fresh}, key)
    if model.place.mesh is not None:
        fresh = {path: jax.make_array_from_callback(x.shape, flat[path].sharding, np.asarray(x).__getitem__)
                 for path, x in fresh.items()}
    flat |= fresh
    return traverse_util.unflatten_dict(flat, sep="/")


def compute_dtype(config: ConfigDict) -> Any:
    """`auto` is bfloat16 on an accelerator and float32 on a CPU."""
    if config.compute_dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return choose("compute_dtype", config.compute_dtype, DTYPES)


def variant(config: ConfigDict) -> Variant | Full | None:
    """The method with its hyperparameters, `config.variant`; None for 'none', which trains the head alone."""
    fields = config.variant.to_dict()
    return None if fields["name"] == "none" else _variant(fields)


def also(config: ConfigDict) -> list[Rule]:
    """The rules of `config.also`."""
    rows = [config.also[name].to_dict() for name in sorted(config.also)]
    return [(fields.pop("paths"), _variant(fields)) for fields in rows]


def _variant(fields: dict[str, Any]) -> Variant | Full:
    """A wrapper (DoRA) names the variant inside as `of`, 'none' for none; the hyperparameters that are not its own are
    those of the one inside."""
    cls = choose("variant", fields.pop("name"), {**NAMES, "full": Full})
    settings = {field.name: field for field in dataclasses.fields(cls)}
    of = settings.pop("of", None)
    if isinstance(fields.get("initializer"), dict):
        fields["initializer"] = _initializer(fields["initializer"])
    own = {name: fields.pop(name) for name in list(fields) if name in settings}
    known = list(settings)
    if of is not None:
        plain = next(name for name, row in NAMES.items() if row is type(of.default))
        inside = choose("of", fields.pop("of", plain), {**NAMES, "none": None})
        names = [field.name for field in dataclasses.fields(inside)] if inside else []
        known += names
        inner = {name: fields.pop(name) for name in list(fields) if name in names}
        own["of"] = inside(**inner) if inside else None
    for name in fields:
        there = ", ".join(known) or "none"
        raise ConfigError(f"variant {cls.__name__} has no hyperparameter {name!r}{nearest(name, known)} "
                          f"It has: {there}")
    return cls(**own)


def _initializer(fields: dict[str, Any]) -> Initializer:
    """A start of LoRA with hyperparameters of its own."""
    cls = choose("initializer", fields.pop("name"), INITIALIZERS)
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields.keys() - set(known):
        raise ConfigError(f"initializer {cls.__name__} has no hyperparameter {name!r}{nearest(name, known)} "
                          f"It has: {', '.join(known) or 'none'}")
    return cls(**fields)


def rules(config: ConfigDict, model: Pretrained) -> list[Rule]:
    """The head is trained in full; `config.also` comes next; `targets` (a preset, 'all', or a regex on paths) get the
    variant."""
    tops = {"/".join(path.split("/")[:2]) for path in model.fresh}  # the fresh head: params/classifier
    targets = config.args.targets
    if targets not in (*PRESETS, "all") and re.fullmatch(r"[\w-]+", targets):
        known = [*PRESETS, "all"]
        raise ConfigError(f"unknown targets {targets!r}{nearest(targets, known)} There are: {', '.join(known)}, "
                          f"or a regular expression that matches whole paths, such as '.*/query/kernel'")
    head: list[Rule] = [(f"{re.escape(top)}/.*", Full()) for top in sorted(tops)]
    method = variant(config)
    return [*head, *also(config), *([(".*" if targets == "all" else targets, method)] if method else [])]


def quantized(config: ConfigDict, adapt: Adapt, model: Any) -> tuple[Any, dict[str, Any]]:
    """(`model` on a quantised base, what `start.make` takes as `made`) by `config.quant`; `model` itself where that
    names no format. The head and what is trained in full stay as they are. model: a NamedTuple like `Model`."""
    c = config.quant
    if not c.format:
        return model, {}
    if c.format == "gguf":
        if not any(map(is_packed, by_path(model.variables)[0].values())):
            raise ConfigError("quant.format='gguf' keeps what a GGUF file has quantised, and this model is from no "
                              "such file: take quant.format=nf4, or experiments.lm with a GGUF model")
        return model, {}
    if config.controller.name == "relora":
        raise ConfigError("ReLoRA merges into the base as it trains, and a quantised one would be rounded each time: "
                          "set quant.format='' or take another method")
    variables, made = quant_plan(config, adapt).start(adapt, model.variables)
    if getattr(getattr(model, "place", None), "mesh", None) is not None:
        laid = model.place.put(by_path(variables)[0])
        variables = jax.tree.unflatten(adapt.sites.tree, list(laid.values()))
    pretrained = {path: w for path, w in by_path(variables)[0].items() if path not in model.fresh}
    return model._replace(variables=variables, fingerprint=fingerprint(pretrained)), made


def quant_plan(config: ConfigDict, adapt: Adapt) -> quant.Plan:
    """What `config.quant` stores in fewer bits: its `targets`, but for what `adapt` trains in full."""
    c = config.quant
    form = choose("quant.format", c.format, quant.FORMATS)
    asked: dict[str, Any] = {"block": c.block} if c.block else {}
    asked |= {"double": c.double} if "double" in {field.name for field in dataclasses.fields(form)} else {}
    return quant.plan(adapt.sites, [(c.targets, form(**asked))]).without(adapt)


def after(config: ConfigDict, adapt: Adapt, model: Pretrained) -> Adapt:
    """`adapt` with the adapters of `config.earlier.folders` under it (O-LoRA), `adapt` itself if there are none."""
    c, found = config.earlier, []
    for folder in filter(None, c.folders.split(os.pathsep)):
        old = make_adapt(adapt.sites, [rule for rule in adapter.rules(folder) if isinstance(rule[1], Variant)])
        trainable, frozen = adapter.load(folder, old, model.variables, base=model.fingerprint, part=True)
        found.append(o_lora.Earlier(old, trainable, frozen))
    return o_lora.after(adapt, found, orth=c.orth, l2=c.l2) if found else adapt


def total_steps(config: ConfigDict, per_epoch: int) -> int:
    """Optimizer steps of the run: `config.steps`, or where that is 0 `config.epochs`, in whole calls of
    `config.steps_per_call`."""
    steps = config.steps or config.epochs * per_epoch
    if steps <= 0:
        raise ConfigError(f"steps={config.steps} and epochs={config.epochs:g} leave nothing to train: give more than 0")
    return max(1, round(steps / config.steps_per_call)) * config.steps_per_call


def every(steps: int, per_epoch: int, steps_per_call: int) -> int:
    """A period in steps (0: an epoch), rounded up to whole calls."""
    return -(-(steps or per_epoch) // steps_per_call) * steps_per_call


def schedule(config: ConfigDict, total: int) -> optax.Schedule:
    """The learning rate of every step. `restarts` is ReLoRA's, by the restarts of its controller. `config.schedule` may
    also be an array, which may be traced: of every step the share of `lr`."""
    if not isinstance(config.schedule, str):
        return lambda step: config.lr * config.schedule[step]
    if config.schedule == "restarts":
        c = config.controller
        if c.name != "relora":
            raise ConfigError(f"schedule='restarts' follows the restarts of the controller 'relora', and this run's is "
                              f"{c.name!r}: use linear, cosine or constant, or configs/relora.py")
        every = round(c.every * total) if c.every < 1 else int(c.every)
        return optim.restart_schedule(config.lr, total, every, config.warmup, c.restart_warmup)
    return optim.warmup_schedule(config.lr, total, config.warmup, config.schedule)


def optimizer(config: ConfigDict, adapt: Adapt, model: Pretrained, total: int) -> optax.GradientTransformation:
    """`config.optimizer`, a row of `optim.NAMES`, with warm-up and decay; the head learns at `head_lr` (0: `lr`).
    Ranks that the controller masks do not move."""
    settings = config.optimizer.to_dict()
    make = choose("optimizer", settings.pop("name"), optim.NAMES)
    tx = make(schedule(config, total), adapt=adapt, weight_decay=config.weight_decay, **settings)
    # The update, decay included, is proportional to its learning rate: scaling it is a learning rate of its own.
    heads = scale_paths({path: _head_ratio(config) for path in model.fresh})
    return optax.chain(tx, heads, optim.freeze_ranks(adapt.plan))


def _head_ratio(config: ConfigDict) -> Any:
    own_rate = not isinstance(config.head_lr, (int, float)) or config.head_lr != 0
    return config.head_lr / config.lr if own_rate else 1.0


def scale_paths(factors: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of whole paths; other paths pass through."""

    def update(updates: dict[str, Any], state: Any, params: Any = None) -> tuple[dict[str, Any], Any]:
        def scaled(path: str, tree: Any) -> Any:
            return jax.tree.map(lambda x: x * jnp.asarray(factors[path], x.dtype), tree) if path in factors else tree

        return {path: scaled(path, tree) for path, tree in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def controller(config: ConfigDict, adapt: Adapt, total: int) -> control.Controller:
    """What acts around the optimizer steps: `config.controller`, a row of `control.NAMES`. One that has a parameter
    `learning_rate` or `seed` is told the run's."""
    settings = config.controller.to_dict()
    make = choose("controller", settings.pop("name"), control.NAMES)
    known = {"learning_rate": schedule(config, total), "seed": config.seed}
    told = {name: value for name, value in known.items() if name in inspect.signature(make).parameters}
    made = make(adapt, total_steps=total, **(told | settings))
    if made.restart and made.restart.every % config.steps_per_call:
        raise ConfigError(f"a restart every {made.restart.every} steps falls within a call of steps_per_call="
                          f"{config.steps_per_call} steps: make controller.every a multiple of it")
    return made
