"""Metrics against values worked out by hand; constant predictions; rows of weight 0; the majority baseline."""

import math

import numpy as np
import pytest

from lorajax.data import METRICS, TASKS, evaluate, majority, task

# true positives 3, false positives 1, false negatives 2, true negatives 4
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], np.int32)
PREDICTED = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
LOGITS = np.eye(2, dtype=np.float32)[PREDICTED] * 3 - 1

SCORES = np.array([1, 2, 3, 4], np.float32)
OUTPUTS = np.array([[2], [1], [4], [13]], np.float32)  # outside [0, 5]: not clipped


def test_table_names_known_metrics():
    assert {name for spec in TASKS.values() for name in spec.metrics} == set(METRICS)


def test_accuracy_and_f1():
    assert evaluate(task("mrpc"), LOGITS, LABELS) == pytest.approx({"accuracy": 0.7, "f1": 2 * 3 / (2 * 3 + 1 + 2)})


def test_matthews():
    expected = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert evaluate(task("cola"), LOGITS, LABELS)["matthews"] == pytest.approx(expected)


def test_three_classes():
    logits = np.array([[0, 1, 2], [5, 0, 0], [0, -1, -2], [-3, -1, -2]], np.float32)
    assert evaluate(task("mnli"), logits, np.array([2, 0, 1, 1]))["accuracy"] == 0.75


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_correlations(shape):
    # means 2.5 and 5: products 1.5*3 + .5*4 - .5*1 + 1.5*8 = 18; sums of squares 5 and 90
    # ranks 2 1 3 4: 1 - 6*2/(4*15)
    scores = evaluate(task("stsb"), OUTPUTS.reshape(shape), SCORES)
    assert scores == pytest.approx({"pearson": 18 / math.sqrt(5 * 90), "spearman": 0.8})


@pytest.mark.parametrize("name, zero", [("cola", "matthews"), ("mrpc", "f1")])
def test_constant_classes_score_zero(name, zero):
    never = np.tile(np.array([1, 0], np.float32), (10, 1))
    assert evaluate(task(name), never, LABELS)[zero] == 0
    assert evaluate(task(name), never, np.zeros(10, np.int32)) == {zero: 0, "accuracy": 1}
    if name == "cola":
        assert evaluate(task(name), LOGITS, np.ones(10, np.int32))[zero] == 0


@pytest.mark.parametrize(
    "outputs, labels",
    [(np.full((4, 1), 2.7), SCORES), (OUTPUTS, np.full(4, 0.1, np.float32)), (OUTPUTS[:1], SCORES[:1])],
)
def test_constant_scores_have_correlation_zero(outputs, labels):
    assert evaluate(task("stsb"), outputs, labels) == {"pearson": 0, "spearman": 0}


def test_nearly_constant_scores():
    """The smallest float32 steps still count, without scipy's near-constant warning."""
    outputs = np.array([1, 1, 1, np.nextafter(np.float32(1), np.float32(2))], np.float32)
    # one apart from three: correlation with 1 2 3 4 is (4 - 2) * 3/4 / sqrt(3/4 * 5) = 1.5 / sqrt(3.75)
    assert evaluate(task("stsb"), outputs, SCORES)["pearson"] == pytest.approx(1.5 / math.sqrt(3.75))


def test_rows_of_weight_zero_do_not_count():
    logits = np.concatenate([LOGITS, np.full((3, 2), np.nan, np.float32)])
    labels, weight = np.append(LABELS, [0, 1, 0]), np.append(np.ones(10), np.zeros(3)).astype(np.float32)
    assert evaluate(task("mrpc"), logits, labels, weight) == evaluate(task("mrpc"), LOGITS, LABELS)


def test_errors():
    with pytest.raises(FloatingPointError, match="'cola': outputs of 2 of 10 examples are not finite"):
        evaluate(task("cola"), np.where(np.arange(10)[:, None] < 2, np.inf, LOGITS), LABELS)
    with pytest.raises(ValueError, match=r"'mnli' wants outputs of shape \(n, 3\).*got \(10, 2\), \(10,\), None"):
        evaluate(task("mnli"), LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"got \(10, 2\), \(10,\), \(9,\)"):
        evaluate(task("cola"), LOGITS, LABELS, np.ones(9))
    with pytest.raises(ValueError, match="no examples to score"):
        evaluate(task("cola"), LOGITS, LABELS, np.zeros(10))


def test_majority():
    train = np.array([1, 1, 0, 1], np.int32)
    assert majority(task("mrpc"), train, LABELS) == pytest.approx({"accuracy": 0.5, "f1": 2 * 5 / (2 * 5 + 5)})
    assert majority(task("mnli"), np.array([0, 2, 2]), np.array([0, 1, 2, 2]))["accuracy"] == 0.5
    assert majority(task("stsb"), SCORES, SCORES) == {"pearson": 0, "spearman": 0}
