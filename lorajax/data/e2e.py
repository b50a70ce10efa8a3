"""E2E NLG (Novikova et al., 2017, arXiv 1706.09254): restaurants' attributes to text, several references each.

A meaning representation, `name[Blue Spice], eatType[coffee shop]`, becomes the prompt `name : Blue Spice | eatType :
coffee shop ||`, the form of LoRA's data; the texts stay as they are (LoRA's copy is tokenised by spaCy).
"""

from __future__ import annotations

import os
import re

from lorajax.data.parquet import read_columns

SPLITS = ("train", "validation", "test")
COLUMNS = ("meaning_representation", "human_reference")
_SLOT = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")


def load_e2e(source: str | os.PathLike[str] | None = None) -> dict[str, list[tuple[str, str]]]:
    """Split -> (prompt, text) pairs in the file's order; one meaning stands in as many pairs as it has references.

    source: a folder that holds `<split>.parquet`, itself or below `e2e_nlg/`; None for the one that LORAJAX_DATA names.
    Errors: FileNotFoundError for a missing folder or split; ValueError for other columns or a meaning of another form.
    """
    found = {split: read_columns("e2e_nlg", split, COLUMNS, source) for split in SPLITS}
    return {split: [(linearised(meaning), text.strip()) for meaning, text in rows] for split, rows in found.items()}


def linearised(meaning: str) -> str:
    """The prompt of a meaning representation. ValueError if it is no list of `slot[value]`."""
    slots = _SLOT.findall(meaning)
    if not slots or _SLOT.sub("", meaning).strip():
        raise ValueError(f"{meaning!r} is no meaning representation such as 'name[Blue Spice], area[riverside]'")
    return " | ".join(f"{slot.strip()} : {value.strip()}" for slot, value in slots) + " ||"
