import json

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import f1_score

from tests.metrics.random_labels import NAN, random_case
from vlm3d_ext.metrics import (
    ClassifierCalibration,
    decide,
    fit_calibration,
    fit_thresholds,
    negative_log_likelihood,
    per_label_auroc,
    per_label_calibration_error,
    rescale_to_half,
)


def shifted_logits(num=4000, seed=0, temperature=0.5, shifts=(2.0, 0.0, -1.0)):
    """True logits, labels drawn from them, and what an over-confident, class-weighted model would give."""
    generator = np.random.default_rng(seed)
    true = generator.normal(-1.0, 2.0, (num, len(shifts)))
    labels = (generator.random(true.shape) < expit(true)).astype(float)
    return true, labels, (true - np.array(shifts)) * temperature


def test_the_fit_finds_temperature_and_offsets():
    """The model's logits are (true - shift) / 2, so T = 1/2 and the offset of a label is its shift."""
    _, labels, logits = shifted_logits()
    calibration = fit_calibration(logits, labels)
    assert calibration.temperature == pytest.approx(0.5, rel=0.08)
    np.testing.assert_allclose(calibration.offsets, [2.0, 0.0, -1.0], atol=0.2)
    before = per_label_calibration_error(labels, expit(logits))
    after = per_label_calibration_error(labels, calibration.probabilities(logits))
    assert after.max() < 0.03 < before.min()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num", [6, 40])
def test_validation_likelihood_is_never_worse(seed, num):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1 + 3 * seed, (num, 5))
    labels = (generator.random((num, 5)) < 0.3).astype(float)
    labels[generator.random((num, 5)) < 0.2] = NAN
    calibration = fit_calibration(logits, labels)
    usable = (labels == 1).any(axis=0) & (labels == 0).any(axis=0)
    calibrated = logits / calibration.temperature + calibration.offsets
    assert negative_log_likelihood(calibrated[:, usable], labels[:, usable]) <= (
        negative_log_likelihood(logits[:, usable], labels[:, usable]) + 1e-12
    )


def test_a_calibrated_model_stays_as_it_is():
    generator = np.random.default_rng(0)
    true = generator.normal(-1.0, 2.0, (20_000, 3))
    calibration = fit_calibration(true, (generator.random(true.shape) < expit(true)).astype(float))
    assert calibration.temperature == pytest.approx(1.0, abs=0.05)
    np.testing.assert_allclose(calibration.offsets, 0.0, atol=0.1)


def test_rare_and_missing_positives_stay_sane():
    _, labels, logits = shifted_logits(shifts=(1.0, 1.0, 1.0, 1.0))
    labels[:, 1] = 0.0  # no positives
    labels[:, 2] = NAN  # nothing known
    labels[:, 3] = 0.0
    labels[5, 3] = 1.0  # one positive in 4,000
    calibration = fit_calibration(logits, labels)
    assert calibration.offsets[1] == calibration.offsets[2]
    assert min(calibration.offsets[[0, 3]]) < calibration.offsets[1] < max(calibration.offsets[[0, 3]])
    assert calibration.thresholds[1] == calibration.thresholds[2] == 0.5
    assert np.isfinite(calibration.offsets).all() and abs(calibration.offsets[3]) < 12


def test_nothing_known_changes_nothing():
    calibration = fit_calibration(np.ones((3, 2)), np.array([[0.0, NAN]] * 3))
    assert calibration.temperature == 1.0
    np.testing.assert_array_equal(calibration.offsets, [0, 0])
    np.testing.assert_array_equal(calibration.thresholds, [0.5, 0.5])


def test_separable_data_do_not_make_the_temperature_vanish():
    logits = np.array([[-1.0], [-0.5], [0.5], [1.0]])
    calibration = fit_calibration(logits, (logits > 0).astype(float))
    assert 0.05 <= calibration.temperature < 1.0


def test_unknown_labels_do_not_take_part():
    _, labels, logits = shifted_logits(num=300)
    labels[::3, 1] = NAN
    expected = fit_calibration(logits, labels)
    for planted in (1e9, NAN):
        changed = fit_calibration(np.where(np.isnan(labels), planted, logits), labels)
        assert changed.to_dict() == expected.to_dict()


def test_threshold_by_hand_lies_midway():
    """Cut below 0.6: 2 of 2 found, 1 false: F1 0.8; other cuts are worse. Midway between 0.6 and 0.2."""
    probabilities = np.array([[0.9], [0.7], [0.6], [0.2], [0.1]])
    labels = np.array([[1.0], [0.0], [1.0], [0.0], [NAN]])
    assert fit_thresholds(probabilities, labels)[0] == pytest.approx(0.4)


def test_of_equal_cuts_the_one_in_the_widest_gap_is_taken():
    """A cut after the first case has F1 2 * 1 / (1 + 2) = 2/3, one after the fourth 2 * 2 / (4 + 2) = 2/3."""
    probabilities = np.array([[0.9], [0.7], [0.6], [0.5], [0.1]])
    labels = np.array([[1.0], [0.0], [0.0], [1.0], [0.0]])
    assert fit_thresholds(probabilities, labels)[0] == pytest.approx(0.3)  # gap 0.4 against 0.2
    probabilities[4] = 0.45
    assert fit_thresholds(probabilities, labels)[0] == pytest.approx(0.8)  # gap 0.05 against 0.2


@pytest.mark.parametrize("seed", range(4))
def test_no_threshold_has_a_better_f1(seed):
    labels, probabilities = random_case(num=50, seed=seed)
    chosen = fit_thresholds(probabilities, labels)
    for column in range(4):
        truth, scores = labels[:, column], probabilities[:, column]
        best = max(f1_score(truth, scores >= cut) for cut in np.unique(scores))
        assert f1_score(truth, scores >= chosen[column]) == pytest.approx(best)
        assert chosen[column] not in scores


def test_neighbouring_floats_are_still_told_apart():
    high = 0.3
    probabilities = np.array([[high], [np.nextafter(high, 0)]])
    labels = np.array([[1.0], [0.0]])
    threshold = fit_thresholds(probabilities, labels)
    np.testing.assert_array_equal(decide(probabilities, threshold), labels == 1)


def test_rescaling_shifts_log_odds_and_keeps_the_ends():
    thresholds = np.array([0.2, 0.5, 0.93])
    probabilities = np.array([[0.0, 0.0, 0.0], [0.2, 0.5, 0.93], [0.6, 0.3, 0.4], [1.0, 1.0, 1.0]])
    rescaled = rescale_to_half(probabilities, thresholds)
    np.testing.assert_array_equal(rescaled[[0, 1, 3]], np.array([[0.0], [0.5], [1.0]]) * np.ones(3))
    np.testing.assert_allclose(logit(rescaled[2]), logit(probabilities[2]) - logit(thresholds))


def test_half_decides_after_rescaling_what_thresholds_decided_before():
    labels, _ = random_case(num=400, num_labels=6)
    probabilities = np.random.default_rng(1).beta(0.3, 2.0, labels.shape)
    thresholds = fit_thresholds(probabilities, labels)
    rescaled = rescale_to_half(probabilities, thresholds)
    np.testing.assert_array_equal(decide(rescaled, 0.5), decide(probabilities, thresholds))
    np.testing.assert_array_equal(per_label_auroc(labels, rescaled), per_label_auroc(labels, probabilities))
    order = np.argsort(probabilities, axis=0)
    assert (np.diff(np.take_along_axis(rescaled, order, axis=0), axis=0) > 0).all()
    # the neighbours of a threshold fall on its two sides even where rounding is coarsest
    for threshold in (1e-12, 0.1, 1 / 3, 0.5, 1 - 1e-12):
        beside = np.array([[np.nextafter(threshold, 0)], [threshold], [np.nextafter(threshold, 1)]])
        np.testing.assert_array_equal(decide(rescale_to_half(beside, np.array([threshold])), 0.5)[:, 0], [0, 1, 1])


def test_a_calibration_survives_json():
    calibration = fit_calibration(*reversed(shifted_logits(num=100)[1:]))
    again = ClassifierCalibration(**json.loads(json.dumps(calibration.to_dict())))
    logits = np.random.default_rng(3).normal(size=(4, 3))
    np.testing.assert_array_equal(again.probabilities(logits), calibration.probabilities(logits))
    identity = ClassifierCalibration.identity(3)
    np.testing.assert_array_equal(identity.probabilities(logits), expit(logits))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, [0.0], [0.5]), "temperature must be positive, got 0.0"),
        ((1.0, [0.0], [1.0]), r"thresholds must lie between 0 and 1, got \[1.0\]"),
        ((1.0, [0.0, 1.0], [0.5]), r"both be \(labels,\), got \(2,\) and \(1,\)"),
        ((1.0, [NAN], [0.5]), "offsets must be finite"),
    ],
)
def test_impossible_calibrations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassifierCalibration(*arguments)


def test_logits_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"logits must be \(cases, 3\), got \(2, 4\)"):
        ClassifierCalibration.identity(3).probabilities(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        rescale_to_half(np.array([[NAN]]), np.array([0.5]))
