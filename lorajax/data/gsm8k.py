"""GSM8K (Cobbe et al., 2021, arXiv 2110.14168): school maths in words, and the exact match of the last number.

An answer is a few sentences with the calculator's marks (`<<48/2=24>>`) and, behind `####`, the number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from lorajax.data.batches import permutation
from lorajax.data.parquet import read_columns
from lorajax.data.reviews import in_validation

_FINAL = re.compile(r"#### (\-?[0-9\.\,]+)")  # of the official `extract_answer`, openai/grade-school-math
_NUMBER = re.compile(r"-?\$?\d(?:[\d,]*\d)?(?:\.\d+)?")


def load_gsm8k(
    source: str | os.PathLike[str] | None = None, *, annotations: bool = True
) -> dict[str, list[tuple[str, str]]]:
    """'train', 'validation', 'test' -> (question, answer) pairs in the file's order. `validation` is taken out of the
    official training split, one question in ten, by `lorajax.data.reviews.in_validation`; `test` is the official one.

    source: a folder that holds `<split>.parquet`, itself or below `gsm8k/`; None for the one that LORAJAX_DATA names.
    annotations: whether answers keep the calculator's marks.
    Errors: FileNotFoundError for a missing folder or split; ValueError for other columns or an answer without number.
    """
    found: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for split in ("train", "test"):
        for question, answer in read_columns("gsm8k", split, ("question", "answer"), source):
            if extract_answer(answer) is None:
                raise ValueError(f"gsm8k: an answer of split {split!r} has no number behind '####': {answer[-60:]!r}")
            name = "validation" if split == "train" and in_validation(question) else split
            found[name].append((question, answer if annotations else without_annotations(answer)))
    return found


def without_annotations(answer: str) -> str:
    """The answer without the calculator's marks."""
    return re.sub(r"<<[^<>]*>>", "", answer)


def extract_answer(text: str) -> str | None:
    """The number behind the first `#### `, without commas, as the official evaluation reads it: a sign and decimals
    stay, and so does a point at the end; another character before the number (`$`) makes it none."""
    found = _FINAL.search(text)
    return found.group(1).replace(",", "") if found else None


def last_number(text: str) -> str | None:
    """The last number anywhere, without commas and dollar signs: for models that were not taught to write `####`."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").replace("$", "") if found else None


def gsm8k_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match: share of texts whose `extract_answer` is, letter for letter, that of (one of) their references, the
    official measure; last_number: the same for `last_number` of the text, compared as numbers."""
    exact = loose = 0
    for text, answers in zip(texts, references, strict=True):
        wanted = {answer for answer in map(extract_answer, answers) if answer is not None}
        exact += extract_answer(text) in wanted
        number = last_number(text)
        loose += number is not None and float(number) in {float(answer) for answer in wanted}
    return {"exact_match": exact / len(texts), "last_number": loose / len(texts)}


def wrong_answers(pairs: Sequence[tuple[str, str]], *, seed: int = 0) -> list[tuple[str, str, str]]:
    """CONSTRUCTED preferences (question, answer, wrong answer): the reasoning is the right one's, and only the number
    behind `####` is another, off by 1 to 10 either way (a fraction keeps its decimals). Not judged by anyone.

    Raises ValueError for an answer without a number.
    """
    draws = permutation(len(pairs), seed)
    found = []
    for (question, answer), draw in zip(pairs, draws.tolist(), strict=True):
        match = _FINAL.search(answer)
        if match is None:
            raise ValueError(f"there is no number behind '####' to be made wrong: {answer[-60:]!r}")
        whole, point, rest = match.group(1).replace(",", "").partition(".")
        off = draw % 10 + 1 if draw % 20 < 10 else -(draw % 10 + 1)
        wrong = f"{int(whole) + off}{point}{rest}"
        found.append((question, answer, answer[: match.start(1)] + wrong + answer[match.end(1) :]))
    return found
