"""The table of tasks that a language model generates text for: where pairs come from, and how texts are scored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lorajax.data.dolly import load_dolly
from lorajax.data.e2e import load_e2e
from lorajax.data.gsm8k import gsm8k_scores, load_gsm8k, wrong_answers
from lorajax.data.made_up import made_up
from lorajax.data.preferences import mismatched
from lorajax.data.text_scores import text_scores

Pairs = Sequence[tuple[str, str]]
"""(prompt, text to learn); a prompt with several texts stands in several pairs."""
MADE_UP = "made-up"
"""In place of a folder: the few pairs of `made_up`, which need no file."""


@dataclass(frozen=True)
class TextTask:
    """load: folder or None -> split -> pairs. chat: whether a prompt is a user's turn, for the model's chat template.
    held_out, generated: the split whose likelihood is measured, and the one whose prompts texts are generated for.
    score: (texts, references of each) -> metrics, higher is better. headline: the metric that ranks runs.
    preferences: pairs -> (prompt, better, worse), constructed."""

    name: str
    load: Callable[[str | os.PathLike[str] | None], Mapping[str, Pairs]]
    chat: bool
    held_out: str
    generated: str
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]
    headline: str
    preferences: Callable[[Pairs], list[tuple[str, str, str]]]


_TASKS = (
    TextTask("e2e", load_e2e, False, "validation", "test", text_scores, "bleu", mismatched),
    TextTask("gsm8k", load_gsm8k, True, "validation", "test", gsm8k_scores, "exact_match", wrong_answers),
    TextTask("dolly", load_dolly, True, "validation", "validation", text_scores, "rouge_l", mismatched),
)
TEXT_TASKS: Mapping[str, TextTask] = {task.name: task for task in _TASKS}


def load_pairs(task: TextTask, source: str | os.PathLike[str] | None = None) -> dict[str, Pairs]:
    """The task's splits; `source` as its `load` takes it, or `MADE_UP`."""
    return dict(made_up(task.name) if source == MADE_UP else task.load(source))


def grouped(pairs: Pairs) -> tuple[list[str], list[list[str]]]:
    """The prompts, each once, in order of appearance, and all texts of each."""
    groups: dict[str, list[str]] = {}
    for prompt, text in pairs:
        groups.setdefault(prompt, []).append(text)
    return list(groups), list(groups.values())


def fingerprint(splits: Mapping[str, Pairs]) -> str:
    """sha256 (hex) over all pairs in order: equal exactly when two runs saw the same data."""
    digest = hashlib.sha256()
    for name, pairs in splits.items():
        for text in (name, *(text for pair in pairs for text in pair)):
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
