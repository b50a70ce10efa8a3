"""Preferences: a prompt with a better and a worse answer, side by side in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from lorajax.data.batches import permutation
from lorajax.data.supervised import Marked, Supervised, TooLong, supervise


class Preferences(NamedTuple):
    """n pairs of rows: `Batches(preferences, 8)` makes batches of them. dropped: how many were left out."""

    chosen: Supervised
    rejected: Supervised
    dropped: int = 0

    @property
    def pad_id(self) -> int:
        return self.chosen.pad_id

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, tokens of the longer one."""
        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    def fingerprint(self) -> str:
        """sha256 (hex): equal exactly when two runs learn from the same pairs in the same order."""
        return hashlib.sha256((self.chosen.fingerprint() + self.rejected.fingerprint()).encode()).hexdigest()

    def batch(self, rows: np.ndarray, real: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """Chosen and rejected along axis 1:

        * ``input_ids``, ``positions``, ``segments``, ``labels``: (B, 2, L) int32, as `Supervised.batch` says;
        * ``completion``: (B, 2, L) float32, 1 where the label is a token of the answer;
        * ``weight``: (B,) float32, 0 for a row that is not `real`.
        """
        both = [side.batch(rows, np.ones_like(real), length) for side in (self.chosen, self.rejected)]
        found = {name: np.stack([side[name] for side in both], axis=1) for name in both[0]}
        return {**found, "completion": found.pop("weight"), "weight": real.astype(np.float32)}


def prefer(
    pairs: Sequence[tuple[Marked, Marked]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: TooLong = "error",
    drop: bool = False,
    pad_id: int = 0,
) -> Preferences:
    """Encodes (chosen, rejected) texts with the arguments and errors of `supervise`; a pair of which one side is left
    out is left out."""
    def encoded(texts: Sequence[Marked]) -> Supervised:
        return supervise(texts, tokenizer, max_length=max_length, too_long=too_long, drop=drop, pad_id=pad_id)

    chosen, rejected = (encoded([pair[side] for pair in pairs]) for side in (0, 1))
    rows, *at = np.intersect1d(chosen.rows, rejected.rows, return_indices=True)
    if not len(rows):
        raise ValueError(f"none of {len(pairs)} pairs is left to learn from ({max_length=}, {too_long=})")
    return Preferences(chosen.take(at[0]), rejected.take(at[1]), len(pairs) - len(rows))


def mismatched(pairs: Sequence[tuple[str, str]], *, seed: int = 0) -> list[tuple[str, str, str]]:
    """CONSTRUCTED preferences (prompt, text, text of another prompt) from (prompt, text) pairs. Not judged by anyone:
    what makes the third worse is that it answers something else (E2E: it is not faithful to the meaning).

    Each text is rejected about as often as it is chosen. Raises ValueError where all texts belong to one prompt.
    """
    order = permutation(len(pairs), seed)
    own: dict[str, set[str]] = {}
    for prompt, text in pairs:
        own.setdefault(prompt, set()).add(text)
    place = np.argsort(order)
    found = []
    for i, (prompt, text) in enumerate(pairs):
        walk = (pairs[order[(place[i] + step) % len(order)]][1] for step in range(1, len(order)))
        other = next((other for other in walk if other not in own[prompt]), None)
        if other is None:
            raise ValueError(f"every text of these {len(pairs)} pairs is one of the prompt {prompt[:60]!r}: there is "
                             f"none to reject")  # fmt: skip
        found.append((prompt, text, other))
    return found
