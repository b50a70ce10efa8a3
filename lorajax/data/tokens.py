"""Texts to token ids with ``tokenizers``: one flat array per split, no padding stored."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from lorajax.data.tasks import Examples

_USUAL_PADS = ("[PAD]", "<pad>", "<|pad|>")
_CHUNK = 8192  # texts encoded at once: bounds the memory of the tokenizer's own objects


class Tokens(NamedTuple):
    """A tokenised split of n examples.

    Attributes:
        ids: (t,) int32, the examples' token ids end to end.
        types: (t,) int32, 0 for the first text of a pair and for single texts, 1 for the second (0 for RoBERTa).
        offsets: (n + 1,) int64; example i is ``ids[offsets[i]:offsets[i + 1]]``.
        labels: (n,) int32 or float32.
        pad_id: token id for padding.
        truncated: how many examples were longer than ``max_length``.
    """

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    pad_id: int
    truncated: int

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens per example, special tokens included."""
        return np.diff(self.offsets)

    def batch(self, rows: np.ndarray, real: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """What a step takes:

        * ``input_ids``, ``attention_mask``, ``token_type_ids``: (B, L) int32;
        * ``label``: (B,) int32 or float32;
        * ``weight``: (B,) float32, 1 for an example and 0 for a row that is not `real`.
        """
        start, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        column = np.arange(length)
        inside = column < lengths[:, None]
        source = np.where(inside, start[:, None] + column, 0)
        return {
            "input_ids": np.where(inside, self.ids[source], np.int32(self.pad_id)),
            "attention_mask": inside.astype(np.int32),
            "token_type_ids": np.where(inside, self.types[source], np.int32(0)),
            "label": self.labels[rows],
            "weight": real.astype(np.float32),
        }


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads ``tokenizer.json`` of a model folder; its padding token comes from there or from ``tokenizer_config.json``.

    Raises:
        FileNotFoundError: the folder has no ``tokenizer.json``; says what it has.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        there = ", ".join(sorted(item.name for item in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json ({there}). `AutoTokenizer.from_pretrained(...).save_pretrained(...)` "
            f"of the package transformers writes one."
        )
    tokenizer = Tokenizer.from_file(str(path))
    config = folder / "tokenizer_config.json"
    if tokenizer.padding is None and config.is_file():
        token = json.loads(config.read_text(encoding="utf-8")).get("pad_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None and tokenizer.token_to_id(token) is not None:
            tokenizer.enable_padding(pad_id=tokenizer.token_to_id(token), pad_token=token)
    return tokenizer


def pad_id(tokenizer: Tokenizer) -> int:
    """The tokenizer's padding id, else the id of a usual padding token. Raises ValueError when there is neither."""
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    for token in _USUAL_PADS:
        if (found := tokenizer.token_to_id(token)) is not None:
            return int(found)
    raise ValueError(
        f"the tokenizer names no padding token and has none of {', '.join(_USUAL_PADS)}; "
        f"call tokenizer.enable_padding(pad_id=..., pad_token=...) with a token that it has"
    )


def tokenize(examples: Examples, tokenizer: Tokenizer, max_length: int = 128) -> Tokens:
    """Encodes a split, with special tokens; the longer text of a pair is cut first. The tokenizer is left as it was.

    Raises:
        ValueError: ``max_length`` leaves no room for text beside the special tokens, or no padding token is known.
    """
    pair = len(examples.texts) == 2
    special = tokenizer.num_special_tokens_to_add(pair)
    if max_length <= special:
        raise ValueError(f"max_length={max_length} leaves no room for text: {special} special tokens are added")
    padding = pad_id(tokenizer)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    inputs = list(zip(*examples.texts, strict=True)) if pair else examples.texts[0]
    ids, types, lengths, truncated = [], [], [], 0
    for start in range(0, len(inputs), _CHUNK):
        chunk: tuple[list[int], list[int]] = ([], [])
        for encoding in tokenizer.encode_batch_fast(inputs[start : start + _CHUNK]):
            chunk[0].extend(found := encoding.ids)
            chunk[1].extend(encoding.type_ids)
            lengths.append(len(found))
            truncated += bool(encoding.overflowing)
        ids.append(np.array(chunk[0], np.int32))
        types.append(np.array(chunk[1], np.int32))
    none = np.zeros(0, np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return Tokens(
        np.concatenate([none, *ids]), np.concatenate([none, *types]), offsets, examples.labels, padding, truncated
    )
