"""Two witnesses of a finding, weighed by a logistic regression with a prior."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from vlm3d_ext.metrics.lesion_fusion import LesionFusion, fit_lesion_fusion


def draws(num=400, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, num).astype(float)
    return 2 * labels + random.normal(size=num), 30 * labels + 10 * random.normal(size=num) + 5, labels


def test_it_is_the_regularised_regression_of_scikit_learn():
    logits, evidence, labels = draws()
    fusion = fit_lesion_fusion(logits, evidence, labels)
    inputs = np.stack([logits, evidence], 1)
    standard = (inputs - inputs.mean(0)) / inputs.std(0)
    # the prior holds the offset, too, so it is an input here
    model = LogisticRegression(C=4.0, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(np.column_stack([standard, np.ones(len(labels))]), labels)
    expected = model.predict_proba(np.column_stack([standard, np.ones(len(labels))]))[:, 1]
    np.testing.assert_allclose(fusion.probabilities(logits, evidence), expected, atol=1e-4)
    np.testing.assert_allclose(
        fusion.probabilities(logits, evidence),
        expit(fusion.classifier * logits + fusion.lesion * evidence + fusion.offset),
    )


def test_the_better_witness_gets_the_larger_say():
    logits, evidence, labels = draws()
    noise = np.random.default_rng(1).normal(size=len(labels))
    trusts_lesions = fit_lesion_fusion(noise, evidence, labels)
    trusts_classifier = fit_lesion_fusion(logits, noise, labels)
    assert abs(trusts_lesions.classifier) * noise.std() < 0.2 * trusts_lesions.lesion * evidence.std()
    assert trusts_classifier.lesion * noise.std() < 0.2 * trusts_classifier.classifier * logits.std()


def test_evidence_against_a_lesion_never_speaks_for_it():
    logits, evidence, labels = draws()
    assert fit_lesion_fusion(logits, -evidence, labels).lesion == 0


def test_weights_stay_finite_where_a_witness_parts_the_cases_perfectly():
    labels = np.array([0.0, 0, 0, 0, 1, 1, 1])
    logits, evidence = np.array([1.0, -1, 1, -1, 1, -1, 0]), np.where(labels == 1, 8.0, -8.0)
    probabilities = fit_lesion_fusion(logits, evidence, labels).probabilities(logits, evidence)
    assert (probabilities[labels == 1] > 0.8).all() and (probabilities[labels == 0] < 0.2).all()
    assert probabilities.max() < 0.999


def test_units_of_a_witness_do_not_matter_and_unknown_labels_are_left_out():
    logits, evidence, labels = draws()
    fusion = fit_lesion_fusion(logits, evidence, labels)
    scaled = fit_lesion_fusion(logits, 100 * evidence - 7, labels)
    np.testing.assert_allclose(
        scaled.probabilities(logits, 100 * evidence - 7), fusion.probabilities(logits, evidence), atol=1e-4
    )
    more = fit_lesion_fusion(np.append(logits, 1e6), np.append(evidence, -1e6), np.append(labels, np.nan))
    assert more == fusion


@pytest.mark.parametrize(
    ("labels", "evidence"),
    [([1.0, 0, 0, 0], [1.0, 2, 3, 4]), ([1.0, 1, 1, 0], [1.0, 2, 3, 4]), ([1.0, 1, 0, 0], [2.0, 2, 2, 2])],
)
def test_too_few_cases_or_a_witness_that_says_nothing_are_not_fused(labels, evidence):
    assert fit_lesion_fusion(np.arange(4.0), np.array(evidence), np.array(labels)) is None


def test_plain_values():
    assert LesionFusion(2.0, 1.0, -3.0).probabilities(np.array([1.0]), np.array([1.0])) == pytest.approx(0.5)
