"""Texts whose completions are learned: token ids, which of them count, and batches of next-token targets.

An example is a text with marked spans (`ChatTemplate.marked`, or `completion` for a plain prompt). No token is on both
sides of a span's border: the ids before it are those that generation would start from. Where the tokenizer would put
one across (the prompt ends in a space, say), the text is encoded piece by piece, and `split` counts such texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

TooLong = Literal["error", "drop", "keep_start", "keep_end"]


class Marked(NamedTuple):
    """text, and the spans (start, stop) of characters in it that are to be learned, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


def completion(prompt: str, text: str) -> Marked:
    """A prompt with the text to learn behind it. The end-of-text token is the caller's: `answer + "<|endoftext|>"`."""
    return Marked(prompt + text, ((len(prompt), len(prompt) + len(text)),))


class Supervised(NamedTuple):
    """n rows of token ids, one example each, or several packed (`lorajax.data.packing`).

    ids: (t,) int32, the rows' token ids end to end. completion: (t,) bool, tokens that are to be learned. positions:
    (t,) int32, 0 where an example begins. offsets: (n + 1,) int64; row i is ``ids[offsets[i]:offsets[i + 1]]``.
    rows: (n,) int64, which of the given texts (of a packed row: its first).
    truncated, dropped, split: how many texts were cut, left out, and encoded piece by piece.
    pad_id: id in padding, any that the model has: padding is segment 0 and counts nowhere.
    """

    ids: np.ndarray
    completion: np.ndarray
    positions: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    pad_id: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens per row."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Supervised:
        """These rows, in this order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return self._replace(ids=self.ids[at], completion=self.completion[at], positions=self.positions[at],
                             offsets=offsets, rows=self.rows[rows])  # fmt: skip

    def fingerprint(self) -> str:
        """sha256 (hex) over all tokens: equal exactly when two runs learn from the same rows in the same order."""
        digest = hashlib.sha256()
        for array, kind in ((self.ids, "<i4"), (self.completion, "u1"), (self.positions, "<i4"), (self.offsets, "<i8")):
            digest.update(array.astype(kind).tobytes())
        return digest.hexdigest()

    def batch(self, rows: np.ndarray, real: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """What a step takes, all (B, L):

        * ``input_ids``, ``positions`` int32; ``segments`` int32, 1, 2, ... for the examples of a row, 0 in padding;
        * ``labels`` int32: the next token, 0 where there is none in the example;
        * ``weight`` float32: 1 where that token is to be learned. A loss is the mean over these tokens, and
          `lorajax.train.step` then weighs micro-batches by their number. All 0 in rows that are not `real`.
        """
        start, size = self.offsets[rows][:, None], self.lengths[rows][:, None]
        column = np.arange(length)[None, :]
        inside = column < size
        here, there = start + np.where(inside, column, 0), start + np.where(column + 1 < size, column + 1, 0)
        positions = np.where(inside, self.positions[here], np.int32(0))
        follows = (column + 1 < size) & (self.positions[there] > 0)
        segments = np.cumsum(inside & (positions == 0), axis=1, dtype=np.int32)
        return {
            "input_ids": np.where(inside, self.ids[here], np.int32(self.pad_id)),
            "positions": positions,
            "segments": np.where(inside, segments, np.int32(0)),
            "labels": np.where(follows, self.ids[there], np.int32(0)),
            "weight": (follows & self.completion[there] & real[:, None]).astype(np.float32),
        }


def supervise(
    texts: Sequence[Marked],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: TooLong = "error",
    drop: bool = False,
    pad_id: int = 0,
) -> Supervised:
    """Encodes marked texts. No special tokens are added: what the model needs stands in the text.

    too_long: what becomes of a text of more than `max_length` tokens: `error`; `drop`; `keep_start` or `keep_end`,
    that many of its tokens. drop: whether texts without a token to learn (after that) are left out; otherwise they are
    an error. What was left out is counted in `dropped`; `rows` says what is there.

    Raises ValueError for those errors, and if nothing is left.
    """
    if too_long not in ("error", "drop", "keep_start", "keep_end"):
        raise ValueError(f"too_long={too_long!r} is none of error, drop, keep_start, keep_end")
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: a token to learn needs one before it, so at least 2")
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    encoded = [_encode(text, tokenizer) for text in texts]
    long = [i for i, (ids, *_) in enumerate(encoded) if len(ids) > max_length]
    if long and too_long == "error":
        worst = max(long, key=lambda i: len(encoded[i][0]))
        raise ValueError(
            f"{len(long)} of {len(texts)} texts have more than max_length={max_length} tokens; the longest, number "
            f"{worst}, has {len(encoded[worst][0])}. Raise max_length, or say what to do with them: too_long='drop', "
            f"'keep_start' or 'keep_end'"
        )
    cut = slice(-max_length, None) if too_long == "keep_end" else slice(max_length)
    kept: list[int] = []
    empty: list[int] = []
    for i, (ids, learned, _) in enumerate(encoded):
        if len(ids) > max_length and too_long == "drop":
            continue
        encoded[i] = ids[cut], learned[cut], encoded[i][2]
        (kept if learned[cut][1:].any() else empty).append(i)
    if empty and not drop:
        raise ValueError(
            f"{len(empty)} of {len(texts)} texts, the first number {empty[0]}, have no token to learn within "
            f"{max_length=}: their completions are empty or cut off. Raise it, or give drop=True to leave them out"
        )
    if not kept:
        raise ValueError(f"none of {len(texts)} texts is left to learn from ({max_length=}, {too_long=})")
    lengths = [len(encoded[i][0]) for i in kept]
    return Supervised(
        np.concatenate([encoded[i][0] for i in kept]),
        np.concatenate([encoded[i][1] for i in kept]),
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        np.asarray(kept, np.int64),
        truncated=0 if too_long == "drop" else len(set(long) & set(kept)),
        dropped=len(texts) - len(kept),
        split=sum(encoded[i][2] for i in kept),
        pad_id=pad_id,
    )


def _encode(marked: Marked, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, bool]:
    """Ids, which of them are to be learned, and whether the text had to be encoded piece by piece."""
    text, spans = marked
    borders = [border for span in spans for border in span]
    if borders != sorted(borders) or (borders and not 0 <= borders[0] <= borders[-1] <= len(text)):
        raise ValueError(f"spans {spans} are not in order within a text of {len(text)} characters")

    def ids(part: str) -> list[int]:
        return tokenizer.encode(part, add_special_tokens=False).ids

    whole = ids(text)
    sizes = []
    for border in borders:
        head = whole if border == len(text) else ids(text[:border])
        if whole[: len(head)] != head:
            break
        sizes.append(len(head))
    split = len(sizes) < len(borders)
    if split:
        pieces = [ids(text[a:b]) for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]
        whole = [token for piece in pieces for token in piece]
        sizes = list(np.cumsum([len(piece) for piece in pieces[:-1]]))
    learned = np.zeros(len(whole), bool)
    for a, b in zip(sizes[::2], sizes[1::2], strict=True):
        learned[a:b] = True
    return np.asarray(whole, np.int32), learned, split
