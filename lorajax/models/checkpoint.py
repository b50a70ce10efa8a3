"""Hugging Face state dicts (tensor name -> array) to the parameters of a model, and back.

Every tensor is accounted for: it becomes a parameter, or it is known to be unused, or the caller named it as ignored;
anything else is an error. What a family's checkpoint looks like is its `Layout`, one per configuration class.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from lorajax.models.parts import onto, stacked_part
from lorajax.models.settings import Execution
from lorajax.models.stacking import stack_layers, unstack_layers


class Fused(NamedTuple):
    """Where `transformers` 5 keeps stacked matrices as one parameter of its own: names, one for each layer of a scanned
    stack; (experts, out, in), of which this is part `part` of `parts` equal ones along out."""

    names: tuple[str, ...]
    part: int = 0
    parts: int = 1


class Tensor(NamedTuple):
    """Where a parameter is in a checkpoint: one name or, if `stacked`, one for each index of its first axis (experts).

    form: 'same', 'linear' ((out, in) there, (in, out) here) or 'conv' ((out, in, *window) there, (*window, in, out)
    here); of each part where there are several. fused: the one parameter that transformers 5 has for them.
    """

    names: tuple[str, ...]
    form: str = "same"
    stacked: bool = False
    fused: Fused | None = None


class Layout(NamedTuple):
    """The checkpoint of one configuration.

    tensors: path of each parameter of per-layer trees -> Tensor, names without `prefix`. model, inputs: the module and
    the shapes of its inputs, for the parameters' shapes. prefix: what `transformers` writes before names, other than
    those that `bare` matches. modules: (regex, replacement) where transformers 5 names modules otherwise than files.
    renames: (regex, replacement) on the names of a checkpoint, `prefix` removed first.
    unused: regexes of names that are dropped without asking. tied: copies of another tensor that a checkpoint may hold
    (name -> of which), dropped if they are equal. head: regex of the parts that a checkpoint may lack as a
    whole (top-level modules), which are then initialised; its first group names the part.
    """

    tensors: dict[str, Tensor]
    model: nn.Module
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    prefix: str = ""
    bare: str = r"(?!)"
    modules: tuple[tuple[str, str], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    tied: Mapping[str, str] = {}
    head: str = r"(?!)"
    init_std: float = 0.02


class Loaded(NamedTuple):
    """Result of `params_from_hf`.

    variables: `{'params': ...}` for the model's `apply`, leaves of dtype `config.param_dtype`.
    fresh: paths of head parameters that the checkpoint does not hold, newly initialised from the key.
    ignored: names of checkpoint tensors that were not used.
    """

    variables: dict[str, Any]
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]


@functools.singledispatch
def layout(config: Any) -> Layout:
    """The `Layout` of a configuration; each family registers its own."""
    raise TypeError(f"{type(config).__name__} is the configuration of no model here")


def linears(modules: Mapping[str, str], *, kernel: str = "linear") -> dict[str, Tensor]:
    """Kernel and bias of each module (our path -> their name)."""
    found = {}
    for ours, theirs in modules.items():
        found[f"{ours}/kernel"] = Tensor((f"{theirs}.weight",), kernel)
        found[f"{ours}/bias"] = Tensor((f"{theirs}.bias",))
    return found


def norms(modules: Mapping[str, str]) -> dict[str, Tensor]:
    """Scale and bias of each LayerNorm (our path -> their name)."""
    found = {}
    for ours, theirs in modules.items():
        found[f"{ours}/scale"] = Tensor((f"{theirs}.weight",))
        found[f"{ours}/bias"] = Tensor((f"{theirs}.bias",))
    return found


def hf_names(config: Any) -> dict[str, tuple[str, ...]]:
    """Path of each per-layer parameter ('params/layer_0/attention/query/kernel') -> its names in a checkpoint that
    `transformers` writes; several where one parameter here stacks several tensors. In the model's order."""
    found = layout(config)
    return {path: tuple(_written(found, name) for name in tensor.names) for path, tensor in found.tensors.items()}


def hf_modules(config: Any) -> dict[str, tuple[str, ...]]:
    """Path of each per-layer kernel or table -> the names of its module in `transformers`: as in checkpoints and in
    transformers 4, then as in transformers 5 where that differs. Without stacked parameters (experts)."""
    found = layout(config)
    names: dict[str, tuple[str, ...]] = {}
    for path, tensor in found.tensors.items():
        if tensor.stacked or not tensor.names[0].endswith(".weight"):
            continue
        old = new = _written(found, tensor.names[0]).removesuffix(".weight")
        for regex, replacement in found.modules:
            new = re.sub(regex, replacement, new)
        names[path] = (old,) if old == new else (old, new)
    return names


def params_from_hf(
    config: Any,
    tensors: Mapping[str, Any],
    key: jax.Array | None = None,
    ignore: Sequence[str] = (),
    place: Callable[[str, Any], Any] | None = None,
    shardings: Callable[[Mapping[str, jax.ShapeDtypeStruct]], Mapping[str, jax.sharding.Sharding]] | None = None,
) -> Loaded:
    """Builds the parameters of the model that `config` describes from `tensors`: name -> array, with the family's
    prefix or without.

    `key` initialises head modules that the checkpoint lacks, and only those. `ignore` holds regexes (full match on the
    name without prefix) of tensors to leave out, for example `r'classifier\\..*'` to start from a fresh head. `tensors`
    may read lazily: they are read one at a time, in the model's order. `place` (path, array in our layout) -> leaf
    replaces the conversion to `config.param_dtype` on the default device: for quantisation while loading.
    `shardings`, from path -> shape of the tree (scanned or not) to path -> sharding, puts every parameter on a mesh as
    it is read: a process reads what its own devices hold, one part at a time (a copy that should be tied is compared
    whole). `place` then gets each array as it lies there, so that no more than one weight is there unquantised.

    Errors: ValueError that names every unused tensor, every missing one, each wrong shape, or an `ignore` regex that
    matches nothing; ValueError if the head is missing and there is no key.
    """
    form = layout(config)
    by_name = _normalised(form, tensors)
    unmatched = [regex for regex in ignore if not any(re.fullmatch(regex, name) for name in by_name)]
    if unmatched:
        raise ValueError(f"ignore {unmatched} matches no tensor of the checkpoint; it holds {_some(sorted(by_name))}")
    dropped = {name for name in by_name if any(re.fullmatch(regex, name) for regex in (*form.unused, *ignore))}
    dropped |= _copies(form, {name: original for name, original in by_name.items() if name not in dropped}, tensors)
    present = {name: original for name, original in by_name.items() if name not in dropped}
    shapes = _shapes(form)
    _check(form, shapes, present, tensors)
    if shardings is not None:
        put = place or (lambda _, array: array)
        variables, new = _spread(form, config, shapes, present, tensors, shardings, put, key)
        return Loaded(variables, new, tuple(sorted(by_name[name] for name in dropped)))
    place = place or (lambda _, array: jnp.asarray(array, dtype=config.param_dtype))

    flat, fresh = {}, []
    for path, tensor in form.tensors.items():
        if all(name in present for name in tensor.names):
            parts = [to_ours(np.asarray(tensors[present[name]]), tensor.form) for name in tensor.names]
            flat[path] = place(path, np.stack(parts) if tensor.stacked else parts[0])
        else:
            fresh.append(path)
            flat[path] = _initial(path, shapes[path], form.init_std, config.param_dtype, key)
    variables = traverse_util.unflatten_dict(flat, sep="/")
    if getattr(config, "scan_layers", False):
        variables = stack_layers(variables)
    return Loaded(variables, tuple(fresh), tuple(sorted(by_name[name] for name in dropped)))


def _spread(form: Layout, config: Any, shapes: Mapping[str, tuple[int, ...]], present: Mapping[str, str],
            tensors: Mapping[str, Any], shardings: Callable[..., Mapping[str, jax.sharding.Sharding]],
            put: Callable[[str, Any], Any], key: jax.Array | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Variables and the fresh paths of `params_from_hf`, on a mesh; layers are stacked as their parts are read."""
    scanned = getattr(config, "scan_layers", False)
    merged: dict[str, list[str]] = {}
    for path in form.tensors:
        merged.setdefault(re.sub(r"/layer_\d+/", "/layers/", path) if scanned else path, []).append(path)
    for layers in merged.values():
        layers.sort(key=lambda one: [int(n) for n in re.findall(r"/layer_(\d+)/", one)])
    lead = {path: (len(layers),) if "/layers/" in path else () for path, layers in merged.items()}
    whole = {path: (*lead[path], *shapes[layers[0]]) for path, layers in merged.items()}
    dtype = np.dtype(config.param_dtype)
    where = shardings({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in whole.items()})
    flat, fresh = {}, []
    for path, layers in merged.items():
        found = [form.tensors[layer] for layer in layers]
        if all(name in present for tensor in found for name in tensor.names):
            of_each: list[Any] = [[present[n] for n in t.names] if t.stacked else present[t.names[0]] for t in found]
            names, kind = of_each if lead[path] else of_each[0], found[0].form
            flat[path] = put(path, onto(where[path], whole[path], dtype, lambda index, names=names, kind=kind:
                                        stacked_part(tensors, names, kind, index)))
        else:
            fresh.append(path)
            new = np.asarray(_initial(path, whole[path], form.init_std, dtype, key))
            flat[path] = onto(where[path], whole[path], dtype, lambda index, new=new: new[index])
    return traverse_util.unflatten_dict(flat, sep="/"), tuple(fresh)


def fresh_params(config: Any, like: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """The head's parameters as `params_from_hf` initialises them from `key`; like: path -> an array of the shape."""
    std = layout(config).init_std
    return {path: _initial(path, x.shape, std, config.param_dtype, key) for path, x in like.items()}


def params_to_hf(config: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverse of `params_from_hf`: tensors by the names that Hugging Face's model class writes.

    Errors: ValueError that names parameters which `config` does not expect or which are missing.
    """
    form = layout(config)
    if getattr(config, "scan_layers", False):
        variables = unstack_layers(variables)
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    if set(flat) != set(form.tensors):
        extra, missing = sorted(set(flat) - set(form.tensors)), sorted(set(form.tensors) - set(flat))
        raise ValueError(f"parameters do not fit the config: unexpected {_some(extra)}, missing {_some(missing)}")
    tensors = {}
    for path, tensor in form.tensors.items():
        array = np.asarray(flat[path])
        for name, part in zip(tensor.names, array if tensor.stacked else [array], strict=True):
            tensors[_written(form, name)] = np.ascontiguousarray(_theirs(part, tensor.form))
    return tensors


def to_ours(array: np.ndarray, form: str) -> np.ndarray:
    """A tensor of a checkpoint in our layout."""
    if form == "linear":
        return array.T
    return array.transpose(*range(2, array.ndim), 1, 0) if form == "conv" else array


def _theirs(array: np.ndarray, form: str) -> np.ndarray:
    """Inverse of `to_ours`."""
    if form == "linear":
        return array.T
    return array.transpose(-1, -2, *range(array.ndim - 2)) if form == "conv" else array


def _expected(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the checkpoint of (each part of) a parameter of `shape`."""
    shape = shape[1:] if tensor.stacked else shape
    if tensor.form == "linear":
        return shape[::-1]
    return (shape[-1], shape[-2], *shape[:-2]) if tensor.form == "conv" else shape


def _written(form: Layout, name: str) -> str:
    return name if re.fullmatch(form.bare, name) else form.prefix + name


def _normalised(form: Layout, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Name without prefix and with old names renewed -> name in the checkpoint."""
    by_name: dict[str, str] = {}
    for original in tensors:
        name = original.removeprefix(form.prefix)
        for regex, replacement in form.renames:
            name = re.sub(regex, replacement, name)
        if name in by_name:
            raise ValueError(f"the checkpoint holds {name!r} twice: as {by_name[name]!r} and as {original!r}")
        by_name[name] = original
    return by_name


def _copies(form: Layout, by_name: Mapping[str, str], tensors: Mapping[str, Any]) -> set[str]:
    """The tied tensors that the checkpoint holds. Error: ValueError if one is no copy."""
    held = {name for name, of in form.tied.items() if name in by_name and of in by_name}
    for name in held:
        if not np.array_equal(np.asarray(tensors[by_name[name]]), np.asarray(tensors[by_name[form.tied[name]]])):
            raise ValueError(f"{name!r} differs from {form.tied[name]!r}, to which the config ties it: "
                             f"set tie_embeddings=False, or ignore=[{re.escape(name)!r}] to use the embeddings")
    return held


def _shapes(form: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of each per-layer parameter, from an abstract initialisation (no memory)."""
    model = form.model
    config = getattr(model, "config", None)
    if isinstance(config, Execution):
        model = model.clone(config=dataclasses.replace(config, scan_layers=False, remat="none"))
    tree = jax.eval_shape(model.init, jax.random.key(0), *form.inputs)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def _check(
    form: Layout, shapes: Mapping[str, tuple[int, ...]], present: Mapping[str, str], tensors: Mapping[str, Any]
) -> None:
    """Raises unless `present` and the parameters account for one another (a wholly absent head module is allowed)."""
    if set(shapes) != set(form.tensors):
        raise AssertionError(f"layout and model disagree: {_some(sorted(set(shapes) ^ set(form.tensors)))}")
    known, problems = {name for tensor in form.tensors.values() for name in tensor.names}, []

    def head(name: str) -> str | None:
        match = re.fullmatch(form.head, name)
        return match.group(1) if match else None

    unused = sorted(set(present) - known)
    if unused:
        problems.append(f"{len(unused)} tensors of the checkpoint have no place in the model: {_some(unused)}")
        problems += [
            f"  {name!r}: nearest in the model is {near!r}" for name in unused[:4] if (near := _near(name, known))
        ]
        if regexes := sorted({f"{part}\\..*" for name in unused if (part := head(name))}):
            problems.append(f"  to leave these head tensors out on purpose: ignore={regexes}")
    heads_present = {head(name) for name in present} - {None}
    missing = sorted(n for n in known - set(present) if head(n) is None or head(n) in heads_present)
    if missing:
        problems.append(f"{len(missing)} tensors that the model needs are not in the checkpoint: {_some(missing)}")
    for path, tensor in form.tensors.items():
        want = _expected(tensor, shapes[path])
        for name in tensor.names:
            have = _shape(tensors, present[name]) if name in present else want
            if have != want:
                part = head(name)
                way_out = f"; set num_labels, or ignore=['{part}\\\\..*'] for a fresh head" if part else ""
                problems.append(f"{name!r} has shape {have}, the model expects {want}{way_out}")
    if problems:
        raise ValueError("checkpoint and model do not fit:\n" + "\n".join(problems))


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it where the mapping can tell (`tensors.shape(name)`)."""
    lazy = getattr(tensors, "shape", None)
    return tuple(lazy(name)) if callable(lazy) else tuple(np.shape(tensors[name]))


def _initial(path: str, shape: tuple[int, ...], std: float, dtype: Any, key: jax.Array | None) -> jax.Array:
    """A fresh head parameter: kernels normal(std), biases zero; the key is folded with the path."""
    if key is None:
        raise ValueError(f"the checkpoint has no {path!r}: give a `key` to initialise a fresh head")
    if path.endswith("/bias"):
        return jnp.asarray(np.zeros(shape, dtype))
    return _normal(key, np.uint32(zlib.crc32(path.encode())), shape, std, dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _normal(key: jax.Array, salt: Any, shape: tuple[int, ...], std: float, dtype: Any) -> jax.Array:
    """One program. Behind the barrier, or XLA would multiply `std` with a constant of the normal distribution's."""
    noise = jax.random.normal(jax.random.fold_in(key, salt), shape, jnp.float32)
    return (jax.lax.optimization_barrier(noise) * std).astype(dtype)


def _near(name: str, known: set[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def _some(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f", and {len(names) - limit} more" if len(names) > limit else "")
