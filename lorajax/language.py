"""From a config to the parts of a language model's run: the model with its tokenizer, examples, prompts, other text.

What it has in common with other runs (rules, optimizer, controller) is `lorajax.build`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lorajax import build, data
from lorajax.config import ConfigError, choose
from lorajax.core.fingerprint import fingerprint
from lorajax.core.sites import by_path
from lorajax.data.chat import NoTemplate
from lorajax.data.prompts import Prompts, encode_prompts
from lorajax.data.text_tasks import TEXT_TASKS, Pairs, TextTask, grouped, load_pairs
from lorajax.data.text_tasks import fingerprint as pairs_fingerprint
from lorajax.io import assets, gguf, hf
from lorajax.models import GPT2Config, LlamaConfig, hf_names, model_from_hf, params_from_hf
from lorajax.models.checkpoint import layout
from lorajax.shard.placement import Placement

TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True}  # fmt: skip
"""The config of the model `tiny`: random weights, a token for each byte. For tests and smoke runs."""


class Model(NamedTuple):
    """net, variables: a decoder as a Linen module and its pretrained parameters. fresh: paths of new parameters, none.
    tokenizer: without truncation or padding. template: its chat template, or None. begin: the text that the tokenizer
    puts before others ('' for none); end: the token that ends a text. fingerprint: of the parameters. place: where
    everything lies."""

    net: Any
    variables: dict[str, Any]
    fresh: tuple[str, ...]
    tokenizer: Any
    template: data.ChatTemplate | None
    begin: str
    end: str
    fingerprint: str
    place: Placement

    @property
    def end_id(self) -> int:
        """Id of `end`."""
        return self.tokenizer.token_to_id(self.end)

    @property
    def head(self) -> str:
        """Path of the matrix that makes the logits: the head's, or the table of embeddings where they are tied."""
        return "params/embed/embedding" if self.net.config.tie_embeddings else "params/head/kernel"


class Data(NamedTuple):
    """task: the row of the table of tasks. splits: name -> pairs. fingerprint: of all of it."""

    task: TextTask
    splits: dict[str, Pairs]
    fingerprint: str


def load_data(config: ConfigDict) -> Data:
    """The task's pairs, from `config.data` (a folder, 'made-up', or '' for LORAJAX_DATA). `config.examples` cuts the
    splits that likelihoods are of."""
    task = choose("task", config.args.task, TEXT_TASKS)
    splits = load_pairs(task, config.data or None)
    if config.examples:
        splits |= {name: spaced(pairs, config.examples) for name, pairs in splits.items() if name != task.generated}
    return Data(task, splits, pairs_fingerprint(splits)[:32])


def spaced(rows: Any, count: int) -> list[Any]:
    """The rows that `build.spaced` names."""
    return [rows[i] for i in build.spaced(len(rows), count)]


def load_model(config: ConfigDict) -> Model:
    """The model `config.args.model`, on the mesh: 'tiny', an alias, a path (a Hugging Face folder, a GGUF file or a
    folder with model.gguf) or a hub id. ConfigError for a model that is no decoder."""
    tensors: Any
    dtype = build.compute_dtype(config)
    overrides: dict[str, Any] = {"dtype": dtype, "scan_layers": config.scan_layers,
                                 "remat": build.remat(config)}
    overrides |= {"attention": build.attention(config)}
    if config.args.model == "tiny":
        return _tiny(overrides, build.placement(config, str(TINY["model_type"])))
    folder = assets.resolve(config.args.model).path
    file = folder if folder.suffix == ".gguf" else folder / "model.gguf"
    if file.is_file():
        found = gguf.open_gguf(file)
        tokenizer: Any = found.tokenizer
        end = tokenizer.id_to_token(found.special["eos"])
        template = data.ChatTemplate(found.chat_template, found.special_tokens) if found.chat_template else None
        settings, tensors = found.config, found.tensors
    else:
        settings, tensors = hf.open_checkpoint(folder)
        tokenizer, template = data.load_tokenizer(folder), _template(folder)
        end = _end(folder, settings, tokenizer, template)
    if settings.get("model_type") == "gpt2" and config.dropout >= 0:  # negative: the checkpoint's own
        overrides |= {"hidden_dropout": config.dropout, "attention_dropout": config.dropout}
    place = build.placement(config, str(settings.get("model_type")))
    net: Any = model_from_hf(settings, **overrides, rows=place.rows())
    if not isinstance(net.config, GPT2Config | LlamaConfig):
        raise ConfigError(f"model {config.args.model!r} is a {type(net).__name__}; a language model is of the Llama "
                          f"family or a GPT-2, such as smollm2")
    keep = _as_loaded(config, net.config, tensors)
    spread = place.base if place.mesh and keep is None else None
    variables: Any = params_from_hf(net.config, tensors, place=keep, shardings=spread).variables
    if keep is not None:  # what is in the host's memory until here are the file's bits
        leaves, tree = by_path(variables)
        there = place.put(leaves) if place.mesh else jax.tree.map(jnp.asarray, leaves)
        variables = jax.tree.unflatten(tree, list(there.values()))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    first = tokenizer.encode("").ids
    begin = tokenizer.id_to_token(first[0]) if first else ""
    return Model(net, variables, (), tokenizer, template, begin, end, fingerprint(variables), place)


def _as_loaded(config: ConfigDict, settings: Any, tensors: Any) -> Any:
    """`place` of `params_from_hf` that keeps a GGUF file's quantised tensors, for quant.format='gguf'; else None."""
    if config.quant.format != "gguf":
        return None
    if not isinstance(tensors, gguf.GgufTensors):
        raise ConfigError(f"quant.format='gguf' keeps the bits of a GGUF file, and model {config.args.model!r} is "
                          f"none: take a GGUF file, or quant.format=nf4")
    names, forms, dtype = hf_names(settings), layout(settings).tensors, settings.param_dtype

    def place(path: str, array: Any) -> Any:
        kept = tensors.packed(names[path][0], dtype, forms[path].form == "linear") if array.ndim == 2 else None
        return np.asarray(array, dtype) if kept is None else kept

    return place


def tiny_tokenizer() -> Any:
    """A token for each byte, and ChatML's two marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ("<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return tokenizer


def _tiny(overrides: dict[str, Any], place: Placement) -> Model:
    tokenizer, end = tiny_tokenizer(), "<|im_end|>"
    net: Any = model_from_hf(TINY | {"vocab_size": tokenizer.get_vocab_size()}, **overrides, rows=place.rows())
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    flat, rng = traverse_util.flatten_dict(shapes, sep="/"), np.random.default_rng(0)
    where = place.base(flat) if place.mesh else {}
    drawn = {path: np.ones(x.shape) if path.endswith("scale") else rng.normal(0, 0.2, x.shape)
             for path, x in flat.items()}  # fmt: skip
    made = {path: jax.device_put(x.astype(np.float32), where.get(path)) for path, x in drawn.items()}
    variables = traverse_util.unflatten_dict(made, sep="/")
    template = data.ChatTemplate(data.CHATML, {"eos_token": end})
    return Model(net, variables, (), tokenizer, template, "", end, fingerprint(variables), place)


def _template(folder: Path) -> data.ChatTemplate | None:
    try:
        return data.load_chat_template(folder)
    except NoTemplate:  # an error only for a task that needs one
        return None


def _end(folder: Path, settings: dict[str, Any], tokenizer: Any, template: data.ChatTemplate | None) -> str:
    """The end-of-text token: the tokenizer's, else the model's."""
    token = template.tokens.get("eos_token") if template else None
    ids = settings.get("eos_token_id")
    token = token or (tokenizer.id_to_token(ids[0] if isinstance(ids, list) else ids) if ids is not None else None)
    if not token or tokenizer.token_to_id(token) is None:
        raise ConfigError(f"{folder} names no end-of-text token: neither eos_token in tokenizer_config.json nor "
                          f"eos_token_id in config.json is one of its tokenizer's")
    return token


def examples(config: ConfigDict, model: Model, task: TextTask, pairs: Pairs) -> data.Supervised:
    """The pairs as token ids, of which the texts are to be learned; those that do not fit are cut behind."""
    texts = [_marked(model, task, prompt, text) for prompt, text in pairs]
    return data.supervise(texts, model.tokenizer, max_length=config.max_length, too_long="keep_start", drop=True)


def preferences(config: ConfigDict, model: Model, task: TextTask, pairs: Pairs) -> data.Preferences:
    """Pairs of a better and a worse text, constructed from the task's own (`TextTask.preferences`).

    A pair with a text of more than `config.max_length` tokens is left out: what cutting leaves of two answers need not
    be in that order (two that differ in their last number are the same)."""
    both = [(_marked(model, task, prompt, better), _marked(model, task, prompt, worse))
            for prompt, better, worse in task.preferences(pairs)]  # fmt: skip
    return data.prefer(both, model.tokenizer, max_length=config.max_length, too_long="drop", drop=True)


def _marked(model: Model, task: TextTask, prompt: str, text: str) -> data.Marked:
    if not task.chat:
        return data.completion(model.begin + prompt, f" {text}{model.end}")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return _chat(model, task).marked(turns)


def _chat(model: Model, task: TextTask) -> data.ChatTemplate:
    if model.template is None:
        raise ConfigError(f"task {task.name!r} is a conversation, and this model has no chat template: take one that "
                          f"was taught turns, such as smollm2")
    return model.template


def prompts(config: ConfigDict, model: Model, task: TextTask, pairs: Pairs) -> tuple[Prompts, list[list[str]]]:
    """`config.generate` prompts (0: all), as generation starts from them, and the texts of each. Those of more than
    `config.max_length` tokens are left out."""
    both = spaced(list(zip(*grouped(pairs), strict=True)), config.generate)
    starts = [model.begin + prompt if not task.chat else
              _chat(model, task).render([{"role": "user", "content": prompt}], add_generation_prompt=True)
              for prompt, _ in both]  # fmt: skip
    found = encode_prompts(starts, model.tokenizer, config.max_length, drop=True)
    return found, [both[i][1] for i in found.rows]


def unrelated(config: ConfigDict, model: Model) -> data.Supervised | None:
    """Text that has nothing to do with the task, every token of it to be predicted (`config.unrelated`), or None."""
    c = config.unrelated
    if c.text == "none":
        return None
    texts = spaced(choose("text", c.text, TEXTS)(config), c.examples)
    marked = [data.Marked(model.begin + text, ((0, len(model.begin + text)),)) for text in texts]
    return data.supervise(marked, model.tokenizer, max_length=c.max_length, too_long="keep_start", drop=True)


def _dolly(config: ConfigDict) -> list[str]:
    return ["\n".join(pair) for pair in data.load_dolly(config.data or None)["validation"]]


def _reviews(config: ConfigDict) -> list[str]:
    return data.load_reviews(assets.resolve("reviews").path)["validation"].texts[0]


def _made_up(config: ConfigDict) -> list[str]:
    return [f"The {noun} is {adjective}." for noun in ("sky", "sea", "sun") for adjective in ("blue", "far", "old")]


TEXTS = {"dolly": _dolly, "reviews": _reviews, "made-up": _made_up}
