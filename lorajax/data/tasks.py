"""The table of tasks: text columns, labels, splits and metrics of the nine GLUE tasks and of ``reviews``."""

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Task:
    """What a data set looks like and how it is scored.

    Attributes:
        name: key in ``TASKS``.
        text: column of the sentence, or the two columns of a sentence pair, in the order they are tokenised.
        labels: class names by label code; empty for regression.
        metrics: names in ``lorajax.data.metrics.METRICS``, the headline metric first; higher is better in all.
        evaluation: evaluation splits; the first always exists, later ones are used when the source has them.
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    evaluation: tuple[str, ...] = ("validation",)

    @property
    def regression(self) -> bool:
        """True where the label is a score; the model then has one output, trained with the squared error."""
        return not self.labels

    @property
    def outputs(self) -> int:
        """Width of the model's head: number of classes, or 1 for regression."""
        return len(self.labels) or 1

    @property
    def headline(self) -> str:
        """Name of the metric that ranks runs."""
        return self.metrics[0]


class Examples(NamedTuple):
    """One split in memory.

    Attributes:
        texts: one list of n strings, or two lists for sentence pairs.
        labels: (n,) int32 class codes, or (n,) float32 scores.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray

    def fingerprint(self) -> str:
        """sha256 (hex) over texts and labels in order: equal exactly when two runs saw the same data."""
        digest = hashlib.sha256(self.labels.astype(self.labels.dtype.newbyteorder("<")).tobytes())
        for column in self.texts:
            for text in column:
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()


# Headline metrics follow Hu et al. (2021), Table 2; the further ones are what the other papers add.
# CoLA: Matthews. STS-B: outputs are not clipped to [0, 5].
_TASKS = (
    Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
    Task("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    Task("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
    Task("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearman")),
    Task("qnli", ("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    Task(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("validation_matched", "validation_mismatched"),
    ),
    Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    Task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
    Task("reviews", ("sentence",), ("negative", "positive"), ("accuracy", "f1")),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}
GLUE = tuple(name for name in TASKS if name != "reviews")


def nearest(name: str, known: Sequence[str]) -> str:
    """Ends an error message: `` Nearest: 'rte'.``, or the empty string when nothing is near."""
    near = difflib.get_close_matches(name.lower().replace("-", ""), known, n=1)
    return f" Nearest: {near[0]!r}." if near else ""


def task(name: str) -> Task:
    """The row of ``TASKS`` called ``name``.

    Raises:
        ValueError: there is none; the message lists the tasks and names the nearest.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; tasks are {', '.join(TASKS)}.{nearest(name, list(TASKS))}")
    return TASKS[name]
