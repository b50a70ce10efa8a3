"""Which axis of the mesh each dimension of a base weight lies along: ordered rules per model family.

A rule is (regex on the whole path, entries). Entries name a mesh axis, several, or None for each of the weight's LAST
dimensions; dimensions before these (scanned layers, experts) are replicated. So one rule serves a per-layer tree and a
scanned one. The first rule that matches wins.

The defaults are those of Megatron (arXiv 1909.08053) along `tensor`: projections into heads and into the feed-forward
layer by their columns, those out of them by their rows. `fsdp` (ZeRO stage 3, arXiv 1910.02054) lies along the other
dimension of each: where both cut one dimension, XLA gathers the whole weight and not a device's part of it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from lorajax.core.sites import table
from lorajax.shard.mesh import AXES, MeshError

Entry = str | tuple[str, ...] | None
Rule = tuple[str, tuple[Entry, ...]]

COLUMN: tuple[Entry, ...] = ("fsdp", "tensor")
ROW: tuple[Entry, ...] = ("tensor", "fsdp")
INTO, OUT = r"(query|key|value|query_key_value|gate|up)", r"(attention|cross_attention|ffn)/(output|down)"
LAYERS: tuple[Rule, ...] = (
    (rf".*/(attention|cross_attention|ffn)/{INTO}/kernel", COLUMN),
    (rf".*/(attention|cross_attention|ffn)/{INTO}/bias", ("tensor",)),
    (rf".*/{OUT}/kernel", ROW),
)
"""What the layers of all transformers here have."""
REST: Rule = (".*", ())
"""Norms, biases of row-sharded weights, heads of classification, positions: replicated."""
VOCABULARY: Rule = (".*/embed/embedding", ("tensor", "fsdp"))
"""A table whose rows divide. Where the vocabulary is an odd number, only its width is sharded."""
WIDTH: tuple[Entry, ...] = (None, "fsdp")

FAMILIES: Mapping[str, tuple[Rule, ...]] = {
    "llama": (VOCABULARY, (".*/head/kernel", COLUMN), *LAYERS, REST),
    "gpt2": ((".*/(embed|positions)/embedding", WIDTH), *LAYERS, REST),
    "bert": ((".*/embeddings/word/embedding", WIDTH), *LAYERS, REST),
    "t5": (VOCABULARY, (".*/head/kernel", COLUMN), *LAYERS, REST),
    "vit": LAYERS + (REST,),
    "whisper": ((".*/embed/embedding", WIDTH), *LAYERS, REST),
}
"""Family -> rules; those that a member has no weight for (no bias, a tied head) pass."""


MEMBERS: Mapping[str, str] = {
    **dict.fromkeys(("bert", "roberta", "deberta-v2"), "bert"),
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma"), "llama"),
    **dict.fromkeys(("t5", "mt5"), "t5"), **dict.fromkeys(("vit", "dinov2"), "vit"),
    "gpt2": "gpt2", "whisper": "whisper",
}  # fmt: skip
"""`model_type` of Hugging Face -> family; others have no rules here, and their weights are replicated."""


def defaults(model_type: str) -> tuple[Rule, ...]:
    """The rules of a model's family."""
    return FAMILIES[MEMBERS[model_type]] if model_type in MEMBERS else (REST,)


def specs(leaves: Mapping[str, Any], sizes: Mapping[str, int], rules: Sequence[Rule] = (),
          defaults: Sequence[Rule] = (REST,)) -> dict[str, PartitionSpec]:
    """path -> PartitionSpec, an entry for each dimension.

    leaves: path -> anything with a shape. sizes: devices of each mesh axis; one of size 1 is left out of the specs.
    rules: the caller's own, which come first and must each take a weight. defaults: a row of `FAMILIES`, or others.
    Raises MeshError, naming the weight, the axis, the sizes and the nearest that would do, for a rule that takes
    nothing or is no regex, an unknown axis, too many entries, and a dimension that its axes do not divide; and for a
    weight that no rule matches.
    """
    every = [*rules, *defaults]
    for pattern, entries in every:
        try:
            re.compile(pattern)
        except re.error as error:
            raise MeshError(f"the sharding rule {pattern!r} is no regular expression: {error}") from error
        for axis in axes_of(entries):
            if axis not in AXES:
                near = difflib.get_close_matches(axis, AXES, n=1, cutoff=0.0)[0]
                raise MeshError(f"the rule {pattern!r} names a mesh axis {axis!r}: did you mean {near!r}? There are: "
                                f"{', '.join(AXES)}")
    found: dict[str, PartitionSpec] = {}
    taken = [0] * len(every)
    for path, leaf in leaves.items():
        number = next((i for i, (pattern, _) in enumerate(every) if re.fullmatch(pattern, path)), None)
        if number is None:
            raise MeshError(f"no sharding rule matches {path!r} {tuple(leaf.shape)}: add one, or ('.*', ()) at the end "
                            f"to replicate the rest")
        taken[number] += 1
        found[path] = _spec(path, tuple(leaf.shape), every[number], sizes)
    for i, (pattern, _) in enumerate(rules):
        if not taken[i]:
            plain = re.sub(r"\\.|[\[\](){}|?*+^$.]+", "", pattern)
            earlier = [rule for rule, _ in rules[:i] if any(re.fullmatch(rule, p) and re.fullmatch(pattern, p)
                                                            for p in leaves)]
            if earlier:
                raise MeshError(f"the sharding rule {pattern!r} takes nothing: {earlier[0]!r} before it took all that "
                                f"it matches. Move it up, or drop it")
            close = difflib.get_close_matches(plain, list(leaves), n=3, cutoff=0.0)
            raise MeshError(f"the sharding rule {pattern!r} matches no weight. A pattern must match a whole path; the "
                            f"nearest are {', '.join(map(repr, close))}")
    return found


def axes_of(entries: Sequence[Entry]) -> list[str]:
    """The mesh axes that entries name."""
    return [axis for entry in entries if entry for axis in ((entry,) if isinstance(entry, str) else entry)]


def present(entry: Entry, sizes: Mapping[str, int]) -> Entry:
    """The entry without axes of one device."""
    names = tuple(axis for axis in axes_of((entry,)) if sizes.get(axis, 1) > 1)
    return names[0] if len(names) == 1 else names or None


def ways(entry: Entry, sizes: Mapping[str, int]) -> int:
    """Into how many parts an entry cuts its dimension."""
    return math.prod(sizes.get(axis, 1) for axis in axes_of((entry,)))


def _spec(path: str, shape: tuple[int, ...], rule: Rule, sizes: Mapping[str, int]) -> PartitionSpec:
    pattern, entries = rule
    if len(entries) > len(shape):
        raise MeshError(f"the sharding rule {pattern!r} has {len(entries)} entries, and {path} has shape {shape}: give "
                        f"at most {len(shape)}")
    padded = (*[None] * (len(shape) - len(entries)), *(present(entry, sizes) for entry in entries))
    names = axes_of(padded)
    if len(set(names)) != len(names):
        raise MeshError(f"the sharding rule {pattern!r} names a mesh axis twice for {path}: once is all that it can do")
    for i, (size, entry) in enumerate(zip(shape, padded, strict=True)):
        if size % (n := ways(entry, sizes)):
            said = " x ".join(f"{axis} {sizes[axis]}" for axis in axes_of((entry,)))
            fits = max(d for d in range(1, n + 1) if size % d == 0)
            raise MeshError(f"{path} has shape {shape}, and {said} does not divide its dimension {i} of {size}: the "
                            f"nearest that does is {fits}; make the axis smaller, or put a rule for this path before "
                            f"{pattern!r}")
    return PartitionSpec(*padded)


def described(leaves: Mapping[str, Any], found: Mapping[str, PartitionSpec], sizes: Mapping[str, int]) -> str:
    """The table of where every weight lies; equal layers share a row."""
    rows: dict[tuple[str, ...], int] = {}
    held = total = 0
    for path, leaf in leaves.items():
        spec, shape = found[path], tuple(leaf.shape)
        part = tuple(size // ways(entry, sizes) for size, entry in zip(shape, spec, strict=True))
        number = leaf.dtype.itemsize
        held, total = held + math.prod(part) * number, total + math.prod(shape) * number
        name = re.sub(r"layer_\d+", "layer_*", path)
        said = ", ".join("-" if entry is None else "+".join(axes_of((entry,))) for entry in spec)
        row = (name, ",".join(map(str, shape)), said, ",".join(map(str, part)))
        rows[row] = rows.get(row, 0) + 1
    shown = [("path", "shape", "along", "on a device", "times"), *((*row, str(n)) for row, n in rows.items())]
    mesh = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"
    return f"{table(shown)}\nmesh {mesh}: {held / 2**20:.1f} of the base's {total / 2**20:.1f} MiB on each device"
