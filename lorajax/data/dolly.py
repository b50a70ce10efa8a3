"""Dolly (databricks-dolly-15k, Conover et al., 2023): instructions that people wrote, some with a text to read."""

from __future__ import annotations

import os

from lorajax.data.parquet import read_columns
from lorajax.data.reviews import in_validation


def load_dolly(source: str | os.PathLike[str] | None = None) -> dict[str, list[tuple[str, str]]]:
    """'train' and 'validation' -> (prompt, response) pairs in the file's order. There is one official split; one prompt
    in ten is held out, by `lorajax.data.reviews.in_validation`. A prompt is the instruction and, behind an empty line,
    the text that goes with it.

    source: a folder that holds `train.parquet`, itself or below `dolly/`; None for the one that LORAJAX_DATA names.
    Errors: FileNotFoundError for a missing folder or file; ValueError for other columns.
    """
    found: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    columns = ("instruction", "context", "response")
    for instruction, context, response in read_columns("dolly", "train", columns, source):
        prompt = f"{instruction.strip()}\n\n{context.strip()}".strip()
        found["validation" if in_validation(prompt) else "train"].append((prompt, response.strip()))
    return found
