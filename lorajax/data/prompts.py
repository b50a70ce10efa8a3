"""Prompts to generate from: padded on the left, in batches of few lengths (`Batches(Prompts, ...)`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer


class Prompts(NamedTuple):
    """n prompts. ids: (t,) int32, end to end. offsets: (n + 1,) int64. rows: (n,) int64, which of the given texts.
    dropped: how many of them were left out. pad_id: id in padding, which is masked."""

    ids: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    dropped: int = 0
    pad_id: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens per prompt."""
        return np.diff(self.offsets)

    def batch(self, rows: np.ndarray, real: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask` (B, L) int32; `row` (B,) int32, which prompt it is, -1 where not `real`."""
        lengths = self.lengths[rows]
        column = np.arange(length) - (length - lengths)[:, None]
        inside = column >= 0
        source = np.where(inside, self.offsets[rows][:, None] + column, 0)
        return {
            "input_ids": np.where(inside, self.ids[source], np.int32(self.pad_id)),
            "attention_mask": inside.astype(np.int32),
            "row": np.where(real, rows, -1).astype(np.int32),
        }


def encode_prompts(texts: Sequence[str], tokenizer: Tokenizer, max_length: int, drop: bool = False) -> Prompts:
    """Encodes prompts; no special tokens are added. drop: whether those longer than `max_length` are left out.
    ValueError otherwise, for one that is empty, and if nothing is left."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    rows = [i for i, row in enumerate(ids) if not drop or len(row) <= max_length]
    ids = [ids[i] for i in rows] if rows else ids
    lengths = [len(row) for row in ids]
    if not lengths or min(lengths) == 0 or max(lengths) > max_length:
        raise ValueError(f"prompts have {min(lengths, default=0)} to {max(lengths, default=0)} tokens; what can be "
                         f"generated from has 1 to max_length={max_length}: raise it")
    flat = np.asarray([token for row in ids for token in row], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return Prompts(flat, offsets, np.asarray(rows, np.int64), len(texts) - len(rows))
