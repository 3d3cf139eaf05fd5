import warnings

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from tests.metrics.random_labels import NAN, random_case
from vlm3d_ext.metrics import (
    bootstrap_interval,
    count_decisions,
    decide,
    macro_auroc,
    per_label_auroc,
    per_label_average_precision,
    per_label_brier,
    per_label_calibration_error,
    percentile_interval,
    reliability_curve,
    resampling_weights,
    weighted_auroc_and_average_precision,
)
from vlm3d_ext.metrics.label_arrays import mean_over_defined

DECISION_FIGURES = ("precision", "recall", "f1", "specificity", "accuracy")


def every_figure(labels, probabilities, thresholds):
    counts = count_decisions(labels, decide(probabilities, thresholds))
    return {
        "auroc": per_label_auroc(labels, probabilities),
        "average_precision": per_label_average_precision(labels, probabilities),
        "brier": per_label_brier(labels, probabilities),
        "calibration_error": per_label_calibration_error(labels, probabilities),
        **{name: getattr(counts, name) for name in DECISION_FIGURES},
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_figures_equal_scikit_learn(seed, unknown):
    labels, probabilities = random_case(seed=seed, unknown=unknown)
    thresholds = np.array([0.3, 0.5, 0.71, 0.99])
    figures = every_figure(labels, probabilities, thresholds)
    for column in range(4):
        known = ~np.isnan(labels[:, column])
        truth, scores = labels[known, column], probabilities[known, column]
        decided = scores >= thresholds[column]
        expected = {
            "auroc": roc_auc_score(truth, scores),
            "average_precision": average_precision_score(truth, scores),
            "brier": brier_score_loss(truth, scores),
            "precision": precision_score(truth, decided, zero_division=0),
            "recall": recall_score(truth, decided),
            "f1": f1_score(truth, decided),
            "specificity": recall_score(truth, decided, pos_label=0),
            "accuracy": accuracy_score(truth, decided),
        }
        for name, value in expected.items():
            assert figures[name][column] == pytest.approx(value, abs=1e-12), name


def test_unknown_labels_change_nothing():
    """A huge wrong score, and even one that is not a number, leaves every figure bit-equal."""
    labels, probabilities = random_case(unknown=0.2)
    labels[:, 3] = NAN
    unknown = np.isnan(labels)
    expected = every_figure(labels, probabilities, np.full(4, 0.5))
    assert not np.isnan(expected["f1"][:3]).any() and np.isnan(expected["brier"][3])
    for planted in (1.0, 0.0, 1e9, -1e9, NAN):
        changed = np.where(unknown, planted, probabilities)
        for name, values in every_figure(labels, changed, np.full(4, 0.5)).items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_what_is_undefined_is_nan():
    """Columns: no positives, no negatives, nothing known, both classes but no positive decision."""
    labels = np.array([[0, 1, NAN, 1], [0, 1, NAN, 0], [0, 1, NAN, 0]])
    probabilities = np.array([[0.9, 0.9, 0.9, 0.1], [0.1, 0.9, 0.1, 0.4], [0.2, 0.1, 0.1, 0.2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = every_figure(labels, probabilities, 0.5)
    expected = {
        "auroc": [NAN, NAN, NAN, 0.0],
        "average_precision": [NAN, 1.0, NAN, 1 / 3],
        "precision": [NAN, 1.0, NAN, 0.0],
        "recall": [NAN, 2 / 3, NAN, 0.0],
        "f1": [NAN, 0.8, NAN, 0.0],
        "specificity": [2 / 3, NAN, NAN, 1.0],
        "accuracy": [2 / 3, 2 / 3, NAN, 2 / 3],
        "brier": [(0.81 + 0.01 + 0.04) / 3, (0.01 + 0.01 + 0.81) / 3, NAN, (0.81 + 0.16 + 0.04) / 3],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(figures[name], values, err_msg=name)
    assert mean_over_defined(figures["precision"]) == pytest.approx(0.5)
    assert np.isnan(mean_over_defined(np.array([NAN, NAN])))


def test_calibration_error_by_hand():
    """Bins of width 0.5: {0.1, 0.3} with no positive, gap 0.2; {0.6, 0.8} with both, gap 0.3."""
    labels = np.array([[0.0], [0.0], [1.0], [1.0]])
    probabilities = np.array([[0.1], [0.3], [0.6], [0.8]])
    assert per_label_calibration_error(labels, probabilities, num_bins=2)[0] == pytest.approx((2 * 0.2 + 2 * 0.3) / 4)
    assert per_label_calibration_error(labels, labels)[0] == 0.0
    assert per_label_calibration_error(labels, 1 - labels)[0] == 1.0
    mean, share, count = reliability_curve(labels, probabilities, num_bins=2)
    np.testing.assert_allclose([mean, share, count], [[0.2, 0.7], [0.0, 1.0], [2, 2]])


def test_calibration_error_of_calibrated_probabilities_is_near_zero():
    generator = np.random.default_rng(0)
    probabilities = generator.random((40_000, 2))
    labels = (generator.random(probabilities.shape) < probabilities).astype(float)
    assert per_label_calibration_error(labels, probabilities).max() < 0.015
    assert per_label_calibration_error(labels, probabilities**2).min() > 0.1


def test_calibration_error_equals_the_sum_over_the_reliability_curve():
    labels, probabilities = random_case(num_labels=1, unknown=0.2)
    mean, share, count = reliability_curve(labels, probabilities)
    expected = (np.abs(mean - share) * count).sum() / count.sum()
    assert per_label_calibration_error(labels, probabilities)[0] == pytest.approx(expected)


def test_weights_are_repetitions():
    """A case of weight 3 counts like three equal cases, one of weight 0 not at all."""
    labels, probabilities = random_case(unknown=0.1)
    weights = resampling_weights(len(labels), num_resamples=3, seed=2)
    auroc, average_precision = weighted_auroc_and_average_precision(labels, probabilities, weights)
    brier = per_label_brier(labels, probabilities, weights)
    error = per_label_calibration_error(labels, probabilities, case_weights=weights)
    counts = count_decisions(labels, decide(probabilities, 0.5), weights)
    for resample, row in enumerate(weights):
        chosen = np.repeat(np.arange(len(labels)), row)
        expected = every_figure(labels[chosen], probabilities[chosen], 0.5)
        np.testing.assert_allclose(auroc[resample], expected["auroc"])
        np.testing.assert_allclose(average_precision[resample], expected["average_precision"])
        np.testing.assert_allclose(brier[resample], expected["brier"])
        np.testing.assert_allclose(error[resample], expected["calibration_error"])
        for name in DECISION_FIGURES:
            np.testing.assert_allclose(getattr(counts, name)[resample], expected[name])


def test_intervals_of_weights_equal_those_of_drawn_rows():
    labels, probabilities = random_case(unknown=0.1)
    weights = resampling_weights(len(labels), num_resamples=50, seed=5)
    values = mean_over_defined(weighted_auroc_and_average_precision(labels, probabilities, weights)[0])
    expected = bootstrap_interval(labels, probabilities, macro_auroc, num_resamples=50, seed=5)
    np.testing.assert_allclose(percentile_interval(values), expected)


def test_groups_are_drawn_whole_and_widen_the_interval():
    """Every case four times over says nothing new: drawn by group, the interval is that of the single cases."""
    labels, probabilities = random_case(num=60, num_labels=1)
    repeated = np.repeat(np.arange(60), 4)
    weights = resampling_weights(240, 300, seed=1, groups=[f"patient_{index:02d}" for index in repeated])
    assert (weights.reshape(300, 60, 4) == weights.reshape(300, 60, 4)[:, :, :1]).all() and weights.max() > 1
    auroc = weighted_auroc_and_average_precision(labels[repeated], probabilities[repeated], weights)[0]
    single = weighted_auroc_and_average_precision(labels, probabilities, resampling_weights(60, 300, seed=1))[0]
    np.testing.assert_allclose(auroc, single)
    with pytest.raises(ValueError, match="one group for each of the 240 cases, got 2"):
        resampling_weights(240, groups=["a", "b"])


def test_interval_leaves_undefined_resamples_out():
    low, high = percentile_interval(np.array([[1.0, NAN], [NAN, NAN], [3.0, NAN]]), confidence=1.0)
    np.testing.assert_array_equal([low, high], [[1.0, NAN], [3.0, NAN]])
    assert np.isnan(percentile_interval(np.zeros((0, 2)))).all()


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([[2.0]], [[0.5]], r"labels must be 1, 0 or NaN \(unknown\), got \[2.0\]"),
        ([1.0], [0.5], r"shape \(cases, labels\), got \(1,\)"),
        ([[1.0]], [[0.5, 0.5]], r"labels' shape \(1, 1\), got \(1, 2\)"),
        ([[1.0]], [[1.5]], r"must lie in \[0, 1\], got 1.5 for case 0, label 0"),
        ([[1.0]], [[NAN]], "scores must be finite, got nan for case 0, label 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        per_label_brier(np.array(labels), np.array(probabilities))
