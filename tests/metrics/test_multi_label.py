import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from vlm3d_ext.metrics import bootstrap_interval, macro_auroc, per_label_auroc

NAN = float("nan")


def _random_case(num=60, num_labels=3, seed=0):
    generator = np.random.default_rng(seed)
    labels = (generator.random((num, num_labels)) < 0.4).astype(float)
    return labels, generator.standard_normal((num, num_labels)) + labels


def test_auroc_by_hand():
    """Two positives (0.9, 0.3) and two negatives (0.5, 0.1): three of the four pairs are in order."""
    labels = np.array([[1.0], [0.0], [1.0], [0.0]])
    scores = np.array([[0.9], [0.5], [0.3], [0.1]])
    assert per_label_auroc(labels, scores)[0] == pytest.approx(0.75)
    assert per_label_auroc(labels, np.zeros((4, 1)))[0] == pytest.approx(0.5)  # ties count as half


def test_auroc_equals_scikit_learn():
    labels, scores = _random_case()
    expected = [roc_auc_score(labels[:, column], scores[:, column]) for column in range(3)]
    np.testing.assert_allclose(per_label_auroc(labels, scores), expected)
    assert macro_auroc(labels, scores) == pytest.approx(np.mean(expected))


def test_auroc_does_not_depend_on_the_scale_of_scores():
    labels, scores = _random_case()
    np.testing.assert_allclose(per_label_auroc(labels, np.exp(3 * scores) - 7), per_label_auroc(labels, scores))


def test_unknown_labels_take_no_part():
    """A huge, wrong score at an unknown label changes nothing."""
    labels, scores = _random_case()
    unknown = np.zeros_like(labels, dtype=bool)
    unknown[[3, 17, 40], [0, 1, 1]] = True
    known = labels.copy()
    known[unknown] = NAN
    expected = [roc_auc_score(labels[~unknown[:, c], c], scores[~unknown[:, c], c]) for c in range(3)]
    np.testing.assert_allclose(per_label_auroc(known, scores), expected)
    scores[unknown] = 1e9
    np.testing.assert_allclose(per_label_auroc(known, scores), expected)


def test_a_label_of_one_class_is_undefined_and_left_out_of_the_mean():
    labels = np.array([[1.0, 1.0, NAN], [0.0, NAN, NAN], [1.0, 1.0, NAN], [0.0, 1.0, NAN]])
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.2, 0.2], [0.3, 0.3, 0.2], [0.1, 0.4, 0.2]])
    np.testing.assert_array_equal(np.isnan(per_label_auroc(labels, scores)), [False, True, True])
    assert macro_auroc(labels, scores) == pytest.approx(0.75)
    assert np.isnan(macro_auroc(labels[:, 1:], scores[:, 1:]))


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution():
    """The mean of 400 draws of variance 1 has a standard error of 0.05, so 95 % lie within 0.098 of it."""
    values = np.random.default_rng(0).standard_normal((400, 1))
    values = (values - values.mean()) / values.std()

    def mean_score(labels, scores):
        return float(scores.mean())

    low, high = bootstrap_interval(np.zeros((400, 1)), values, mean_score, num_resamples=2000)
    assert low == pytest.approx(-0.098, abs=0.01) and high == pytest.approx(0.098, abs=0.01)
    narrow_low, narrow_high = bootstrap_interval(
        np.zeros((400, 1)), values, mean_score, num_resamples=2000, confidence=0.5
    )
    assert narrow_high - narrow_low == pytest.approx(2 * 0.6745 * 0.05, abs=0.01)


def test_bootstrap_resamples_cases_and_is_seeded():
    labels, scores = _random_case()
    first = bootstrap_interval(labels, scores)
    assert first == bootstrap_interval(labels, scores)
    assert first != bootstrap_interval(labels, scores, seed=1)
    assert first[0] < macro_auroc(labels, scores) < first[1]
    perfect = bootstrap_interval(labels, labels)  # whichever cases are drawn, labels and scores stay together
    assert perfect == (1.0, 1.0)
