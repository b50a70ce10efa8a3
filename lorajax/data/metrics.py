"""Scores of a task from model outputs, by scikit-learn and scipy, which are imported when one is asked for.

Constant predictions (or constant labels) have no correlation; Matthews, Pearson and Spearman are then defined as 0, and
F1 without predicted or true positives as 0. No warning is given.
"""

from collections.abc import Callable, Mapping

import numpy as np

from lorajax.data.tasks import Task


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal (n,) class codes."""
    from sklearn import metrics as sk

    return float(sk.accuracy_score(labels, predictions))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, as GLUE has it for MRPC and QQP."""
    from sklearn import metrics as sk

    return float(sk.f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0.0))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of (n,) class codes."""
    from sklearn import metrics as sk

    return 0.0 if _constant(predictions, labels) else float(sk.matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation of (n,) scores."""
    from scipy import stats

    return 0.0 if _constant(predictions, labels) else float(stats.pearsonr(predictions, labels)[0])


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation of (n,) scores, ties at their mean rank."""
    from scipy import stats

    return 0.0 if _constant(predictions, labels) else float(stats.spearmanr(predictions, labels)[0])


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def _constant(*arrays: np.ndarray) -> bool:
    return any(np.all(array == array[0]) for array in arrays)


def evaluate(task: Task, outputs: np.ndarray, labels: np.ndarray, weight: np.ndarray | None = None) -> dict[str, float]:
    """All metrics of a task; ``[task.headline]`` is the one that ranks runs.

    Args:
        outputs: (n, classes) logits; (n, 1) or (n,) scores for regression, taken as they are (not clipped).
        labels: (n,) class codes or scores.
        weight: (n,) rows with 0 are left out (the empty rows of batches).

    Raises:
        ValueError: shapes that do not belong together, or no examples.
        FloatingPointError: outputs that are not finite, with their number.
    """
    outputs, labels = np.asarray(outputs, np.float32), np.asarray(labels)
    shapes = [(len(labels), task.outputs)] + [(len(labels),)] * task.regression
    if labels.ndim != 1 or outputs.shape not in shapes or (weight is not None and np.shape(weight) != labels.shape):
        raise ValueError(
            f"task {task.name!r} wants outputs of shape (n, {task.outputs}) and labels (and weight) of shape (n,); "
            f"got {outputs.shape}, {labels.shape}, {None if weight is None else np.shape(weight)}"
        )
    if weight is not None:
        outputs, labels = outputs[np.asarray(weight) > 0], labels[np.asarray(weight) > 0]
    if len(labels) == 0:
        raise ValueError(f"task {task.name!r}: there are no examples to score")
    broken = int(np.sum(~np.isfinite(outputs).reshape(len(labels), -1).all(axis=1)))
    if broken:
        raise FloatingPointError(f"task {task.name!r}: outputs of {broken} of {len(labels)} examples are not finite")
    if task.regression:
        # float32 first: values that differ there differ by more than scipy's near-constant threshold in float64
        predictions, labels = outputs.reshape(-1).astype(np.float64), labels.astype(np.float32).astype(np.float64)
    else:
        predictions = np.argmax(outputs, axis=1)
    return {name: METRICS[name](predictions, labels) for name in task.metrics}


def majority(task: Task, train_labels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of a model that always says the training split's most frequent class (regression: its mean score)."""
    if task.regression:
        outputs = np.full((len(labels), 1), np.mean(train_labels), np.float32)
    else:
        outputs = np.tile(np.bincount(train_labels, minlength=task.outputs).astype(np.float32), (len(labels), 1))
    return evaluate(task, outputs, labels)
