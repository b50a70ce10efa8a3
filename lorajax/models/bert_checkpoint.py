"""Hugging Face state dict (tensor name -> array) of a BERT or RoBERTa to the parameters of `Bert`, and back.

Every tensor is accounted for: it becomes a parameter, or it is known to be unused, or the caller named it as ignored;
anything else is an error. Linear weights are (out, in) in a checkpoint and (in, out) here.
"""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lorajax.models.bert import Bert
from lorajax.models.bert_config import BertConfig
from lorajax.models.stacking import stack_layers, unstack_layers

KNOWN_UNUSED = (r"embeddings\.position_ids", r"embeddings\.token_type_ids", r"cls\..*", r"lm_head\..*")
"""Names (prefix removed, full match) that are dropped without asking: index buffers and the heads of pretraining."""

_HEAD = re.compile(r"(pooler|classifier)\..*")
_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn/up": "intermediate.dense",
    "ffn/down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
}


class Loaded(NamedTuple):
    """Result of `params_from_hf`.

    variables: `{'params': ...}` for `Bert.apply`, leaves of dtype `config.param_dtype`.
    fresh: paths of head parameters that the checkpoint does not hold, newly initialised from the key.
    ignored: names of checkpoint tensors that were not used.
    """

    variables: dict[str, Any]
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]


def hf_names(config: BertConfig) -> dict[str, str]:
    """Path of each per-layer parameter ('params/layer_0/attention/query/kernel') -> its name in a checkpoint.

    Names carry no `bert.` / `roberta.` prefix. The order is that of the encoder, the head last.
    """
    modules = dict(_EMBEDDINGS)
    for i in range(config.num_layers):
        modules |= {f"layer_{i}/{ours}": f"encoder.layer.{i}.{theirs}" for ours, theirs in _LAYER.items()}
    if config.has_pooler:
        modules["pooler"] = "pooler.dense"
    if config.family == "roberta":
        modules |= {"classifier/dense": "classifier.dense", "classifier/out_proj": "classifier.out_proj"}
    else:
        modules["classifier"] = "classifier"
    names: dict[str, str] = {}
    for ours, theirs in modules.items():
        if ours.startswith("embeddings/") and not ours.endswith("norm"):
            leaves = {"embedding": "weight"}
        else:
            leaves = {"scale" if ours.endswith("norm") else "kernel": "weight", "bias": "bias"}
        names |= {f"params/{ours}/{leaf}": f"{theirs}.{name}" for leaf, name in leaves.items()}
    return names


def params_from_hf(
    config: BertConfig, tensors: Mapping[str, Any], key: jax.Array | None = None, ignore: Sequence[str] = ()
) -> Loaded:
    """Builds the parameters of `Bert(config)` from `tensors`: name -> array, `bert.`/`roberta.` prefix or none.

    `key` initialises head modules (pooler, classifier) that the checkpoint lacks, and only those. `ignore` holds
    regexes (full match on the name without prefix) of tensors to leave out: `r'pooler\\..*'` where pooling is 'mean' or
    the family RoBERTa, `r'classifier\\..*'` to start from a fresh head. `tensors` may read lazily.

    Errors: ValueError that names every unused tensor, every missing one, each wrong shape, or an `ignore` regex that
    matches nothing; ValueError if the head is missing and there is no key.
    """
    by_name = _normalised(tensors)
    unmatched = [regex for regex in ignore if not any(re.fullmatch(regex, name) for name in by_name)]
    if unmatched:
        raise ValueError(f"ignore {unmatched} matches no tensor of the checkpoint; it holds {_some(sorted(by_name))}")
    dropped = [name for name in by_name if any(re.fullmatch(regex, name) for regex in (*KNOWN_UNUSED, *ignore))]
    present = {name: original for name, original in by_name.items() if name not in dropped}
    names, shapes = hf_names(config), _shapes(config)
    _check(names, shapes, present, tensors)

    flat, fresh = {}, []
    for path, name in names.items():
        if name in present:
            array = np.asarray(tensors[present[name]])
            flat[path] = jnp.asarray(array.T if path.endswith("/kernel") else array, dtype=config.param_dtype)
        else:
            fresh.append(path)
            flat[path] = _initial(config, path, shapes[path], key)
    variables = traverse_util.unflatten_dict(flat, sep="/")
    if config.scan_layers:
        variables = stack_layers(variables)
    return Loaded(variables, tuple(fresh), tuple(sorted(by_name[name] for name in dropped)))


def params_to_hf(config: BertConfig, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverse of `params_from_hf`: tensors by the names that Hugging Face's `...ForSequenceClassification` writes.

    Errors: ValueError that names parameters which `config` does not expect or which are missing.
    """
    if config.scan_layers:
        variables = unstack_layers(variables)
    flat, names = traverse_util.flatten_dict(dict(variables), sep="/"), hf_names(config)
    if set(flat) != set(names):
        extra, missing = sorted(set(flat) - set(names)), sorted(set(names) - set(flat))
        raise ValueError(f"parameters do not fit the config: unexpected {_some(extra)}, missing {_some(missing)}")
    tensors = {}
    for path, name in names.items():
        array = np.asarray(flat[path])
        prefix = "" if name.startswith("classifier.") else f"{config.family}."
        tensors[prefix + name] = np.ascontiguousarray(array.T if path.endswith("/kernel") else array)
    return tensors


def _normalised(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Name without prefix, and with LayerNorm's old names (gamma, beta) renewed -> name in the checkpoint."""
    by_name: dict[str, str] = {}
    for original in tensors:
        name = re.sub(r"^(bert|roberta)\.", "", original)
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if name in by_name:
            raise ValueError(f"the checkpoint holds {name!r} twice: as {by_name[name]!r} and as {original!r}")
        by_name[name] = original
    return by_name


def _shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each per-layer parameter, from an abstract initialisation (no memory)."""
    model = Bert(BertConfig(**{**vars(config), "scan_layers": False, "remat": "none"}))
    tree = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def _check(
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    present: Mapping[str, str],
    tensors: Mapping[str, Any],
) -> None:
    """Raises unless `present` and the parameters account for one another (a wholly absent head module is allowed)."""
    known, problems = set(names.values()), []
    unused = sorted(set(present) - known)
    if unused:
        problems.append(f"{len(unused)} tensors of the checkpoint have no place in the model: {_some(unused)}")
        problems += [
            f"  {name!r}: nearest in the model is {near!r}" for name in unused[:4] if (near := _near(name, known))
        ]
        if any(_HEAD.fullmatch(name) for name in unused):
            regexes = sorted({name.split(".")[0] + r"\..*" for name in unused if _HEAD.fullmatch(name)})
            problems.append(f"  to leave these head tensors out on purpose: ignore={regexes}")
    heads_present = {name.split(".")[0] for name in present if _HEAD.fullmatch(name)}
    missing = sorted(n for n in known - set(present) if not _HEAD.fullmatch(n) or n.split(".")[0] in heads_present)
    if missing:
        problems.append(f"{len(missing)} tensors that the model needs are not in the checkpoint: {_some(missing)}")
    for path, name in names.items():
        if name not in present:
            continue
        want = shapes[path][::-1] if path.endswith("/kernel") else shapes[path]
        have = _shape(tensors, present[name])
        if have != want:
            way_out = "; set num_labels, or ignore=['classifier\\..*'] for a fresh head" if "classifier" in name else ""
            problems.append(f"{name!r} has shape {have}, the model expects {want}{way_out}")
    if problems:
        raise ValueError("checkpoint and model do not fit:\n" + "\n".join(problems))


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it where the mapping can tell (`tensors.shape(name)`)."""
    lazy = getattr(tensors, "shape", None)
    return tuple(lazy(name)) if callable(lazy) else tuple(np.shape(tensors[name]))


def _initial(config: BertConfig, path: str, shape: tuple[int, ...], key: jax.Array | None) -> jax.Array:
    """A fresh head parameter: kernels normal(initializer_range), biases zero; the key is folded with the path."""
    if key is None:
        raise ValueError(f"the checkpoint has no {path!r}: give a `key` to initialise a fresh head")
    if path.endswith("/bias"):
        return jnp.zeros(shape, config.param_dtype)
    noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), shape, jnp.float32)
    return (noise * config.initializer_range).astype(config.param_dtype)


def _near(name: str, known: set[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def _some(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f", and {len(names) - limit} more" if len(names) > limit else "")
