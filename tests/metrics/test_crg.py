import numpy as np
import pytest

from tests.metrics.random_labels import NAN, random_case
from vlm3d_ext.metrics import count_decisions, crg_from_counts, crg_score, resampling_weights


def published_formula(labels, decisions):
    """arXiv 2505.17167, entry by entry."""
    X = A = TP = FN = FP = 0
    for truth, decided in zip(labels.ravel(), decisions.ravel(), strict=True):
        if truth != truth:
            continue
        X += 1
        A += truth == 1
        TP += truth == 1 and decided
        FN += truth == 1 and not decided
        FP += truth == 0 and decided
    r = (X - A) / (2 * A)
    U = (X - A) / 2
    s = r * TP - r * FN - FP
    return U / (2 * U - s)


@pytest.mark.parametrize("seed", range(20))
def test_crg_equals_the_published_formula(seed):
    labels, probabilities = random_case(num=37, num_labels=5, seed=seed, unknown=0.25 * (seed % 2))
    decisions = probabilities > 0.2 + 0.03 * seed
    assert crg_score(labels, decisions) == pytest.approx(published_formula(labels, decisions), abs=1e-9)


def test_crg_by_hand():
    """X = 8, A = 2, TP = 1, FN = 1, FP = 2: r = 1.5, U = 3, s = 1.5 - 1.5 - 2 = -2, so 3 / 8."""
    labels = np.array([[1, 0], [1, 0], [0, 0], [0, 0]])
    decisions = np.array([[1, 1], [0, 1], [0, 0], [0, 0]])
    assert crg_score(labels, decisions) == pytest.approx(3 / 8)


def test_crg_of_perfect_constant_and_wrong_decisions():
    labels, _ = random_case(unknown=0.2)
    assert crg_score(labels, labels == 1) == 1.0
    assert crg_score(labels, np.zeros(labels.shape)) == 1 / 3
    assert crg_score(labels, np.ones(labels.shape)) == 1 / 3
    assert crg_score(labels, labels == 0) == pytest.approx(1 / 5)


def test_a_coin_that_treats_labels_alike_scores_a_third_on_average():
    labels, _ = random_case(num=200)
    generator = np.random.default_rng(0)
    for rate in (0.1, 0.5):
        scores = [crg_score(labels, generator.random(labels.shape) < rate) for _ in range(2000)]
        assert np.mean(scores) == pytest.approx(1 / 3, abs=0.001)


def test_treating_labels_differently_scores_more_than_a_third_without_looking():
    """30 and 10 of 40 cases are positive: always saying the first label has t = 30 / 40 and f = 10 / 40."""
    labels = np.zeros((40, 2))
    labels[:30, 0] = labels[:10, 1] = 1
    commonest = np.tile([True, False], (40, 1))
    assert crg_score(labels, commonest) == pytest.approx(1 / (3 - 2 * 0.5)) == pytest.approx(1 / 2)
    assert crg_score(labels, ~commonest) == pytest.approx(1 / (3 + 2 * 0.5))
    for column in range(2):
        alone = labels[:, [column]]
        assert crg_score(alone, commonest[:, [column]]) == crg_score(alone, ~commonest[:, [column]]) == 1 / 3


def test_unknown_entries_change_nothing():
    labels, probabilities = random_case(unknown=0.3)
    for planted in (True, False):
        changed = np.where(np.isnan(labels), planted, probabilities > 0.5)
        assert crg_score(labels, changed) == crg_score(labels, probabilities > 0.5)


@pytest.mark.parametrize("labels", [np.zeros((3, 2)), np.ones((3, 2)), np.full((3, 2), NAN)])
def test_crg_of_one_class_is_undefined(labels):
    assert np.isnan(crg_score(labels, np.eye(3, 2)))


def test_crg_of_resamples():
    labels, probabilities = random_case(unknown=0.1)
    weights = resampling_weights(len(labels), 4)
    scores = crg_from_counts(count_decisions(labels, probabilities > 0.5, weights))
    for row, score in zip(weights, scores, strict=True):
        chosen = np.repeat(np.arange(len(labels)), row)
        assert score == pytest.approx(crg_score(labels[chosen], probabilities[chosen] > 0.5))
