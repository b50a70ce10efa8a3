"""LoRA+: B learns faster than A (Hayou et al., arXiv 2402.12354)."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import jax
import optax

from lorajax.optim.recipe import NO_DECAY

Labels = dict[str, Any]
"""Like the trainable partition (site path -> NamedTuple), with strings for leaves: `adapt.labels`."""


def lora_plus(learning_rate: optax.ScalarOrSchedule, ratio: float = 16.0, *, labels: Labels, grouping: str = "official",
              embeddings: Collection[str] = (), embedding_lr: optax.ScalarOrSchedule = 1e-6, weight_decay: float = 0.0,
              no_decay: str = NO_DECAY, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
              ) -> optax.GradientTransformation:
    """AdamW with learning rate `learning_rate` for A and ``ratio * learning_rate`` for B.

    learning_rate: of A; a number or a schedule. A good one is about half of plain LoRA's (the authors' README).
    ratio: the paper's lambda >= 1; larger for harder tasks (its default 16; 80 for MNLI, 10 for GPT-2).
    labels, grouping, embeddings, no_decay: see `groups`. embedding_lr: for the factors at `embeddings` (1e-6 in both
    codes); a number stays constant also where `learning_rate` is a schedule.
    weight_decay: decoupled; acts in every group but `fast_no_decay`. PEFT reads it from ``loraplus_weight_decay`` and
    silently ignores the usual ``weight_decay``; here there is one argument.
    """
    fast = _times(learning_rate, ratio)
    transforms = {
        name: optax.adamw(lr, b1=b1, b2=b2, eps=eps, weight_decay=decay)
        for name, lr, decay in (
            ("slow", learning_rate, weight_decay), ("slow_no_decay", learning_rate, 0.0),
            ("fast", fast, weight_decay), ("fast_no_decay", fast, 0.0), ("embedding", embedding_lr, weight_decay),
        )
    }
    return optax.multi_transform(
        transforms, lambda params: groups(params, labels, grouping=grouping, embeddings=embeddings, no_decay=no_decay))


def groups(params: dict[str, Any], labels: Labels, *, grouping: str = "official", embeddings: Collection[str] = (),
           no_decay: str = NO_DECAY) -> Labels:
    """Like `labels`, naming each leaf's group: slow, fast (B's learning rate), either with _no_decay, or embedding.

    grouping:
      - ``official``: the authors' code, which PEFT follows. In this order: both factors at `embeddings` -> embedding;
        B and every vector (a head's bias, DoRA's magnitude) -> fast, undecayed where the path matches `no_decay`; all
        else (A, AdaLoRA's E, a head's matrix) -> slow. So one head learns at two rates.
      - ``paper``: fast is B alone, also in embeddings. Everything else -> slow, undecayed where `no_decay` matches.
    embeddings: paths of adapted lookup tables, ``[p for p, s in sites.items() if s.op == 'lookup']``.
    no_decay: regex (fullmatch) on site paths. A path ending in bias or scale is a vector also when it is stacked.
    """
    if grouping not in ("official", "paper"):
        raise ValueError(f"grouping={grouping!r} is unknown; there are 'official' (also PEFT's) and 'paper'")
    if missing := sorted(set(embeddings) - set(labels)):
        raise ValueError(f"embeddings={missing} are not adapted; the adapted paths are {sorted(labels)}")

    def group(path: str, label: str, leaf: jax.Array) -> str:
        plain = re.fullmatch(no_decay, path) is not None
        vector = label in VECTORS or (label == "full" and (leaf.ndim == 1 or _ends_as_vector(path)))
        if grouping == "paper":
            return "fast" if label == "b" else "slow_no_decay" if plain else "slow"
        if path in embeddings and label != "full":
            return "embedding"
        if label == "b" or vector:
            return "fast_no_decay" if plain else "fast"
        return "slow"

    return {path: jax.tree.map(lambda label, leaf, path=path: group(path, label, leaf), labels[path], params[path])
            for path in labels}


VECTORS = ("magnitude", "gate", "vector")
"""Labels of leaves that are one vector per matrix, stacked or not. Not AdaLoRA's E, which is (rank, 1) in torch."""


def _ends_as_vector(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in ("bias", "scale")


def _times(learning_rate: optax.ScalarOrSchedule, ratio: float) -> optax.ScalarOrSchedule:
    return (lambda step: ratio * learning_rate(step)) if callable(learning_rate) else ratio * learning_rate
