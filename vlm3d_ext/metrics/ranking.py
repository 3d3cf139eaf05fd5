"""Areas under the ROC and precision-recall curves for many resamples at once.

A resample of the cases is a row of weights, how often each case was drawn. Scores are then sorted once, and all
resamples share the order, which makes a bootstrap about as dear as one evaluation.
"""

from __future__ import annotations

import numpy as np

from .label_arrays import checked_labels, checked_scores

__all__ = ["per_label_average_precision", "weighted_auroc_and_average_precision"]


def per_label_average_precision(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the average precision of each label, (L,); NaN for a label without known positives.

    The sum over thresholds of (increase in recall) x precision, without interpolation, as in scikit-learn, which gives
    0 where we give NaN. A score that does not order cases has the label's prevalence.

    Args:
        labels: (N, L) of 1, 0 or NaN.
        scores: (N, L), any scale, higher for positive.

    Raises:
        ValueError: if the arrays do not fit each other or hold anything else.
    """
    return weighted_auroc_and_average_precision(labels, scores, np.ones((1, len(labels))))[1][0]


def weighted_auroc_and_average_precision(
    labels: np.ndarray, scores: np.ndarray, case_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC and average precision of each label in each resample.

    Equal scores count as one threshold: for the AUROC a tied pair counts half (Hanley and McNeil 1982).

    Args:
        labels: (N, L) of 1, 0 or NaN.
        scores: (N, L), any scale, higher for positive.
        case_weights: (R, N), how often each case is in each of R resamples.

    Returns:
        Two arrays (R, L), with NaN where a resample lacks one of the classes (AUROC) or positives (average precision).

    Raises:
        ValueError: if the arrays do not fit each other or hold anything else.
    """
    labels = checked_labels(labels)
    scores = checked_scores(labels, scores)
    shape = (len(case_weights), labels.shape[1])
    auroc, average_precision = np.full(shape, np.nan), np.full(shape, np.nan)
    for column in range(labels.shape[1]):
        known = np.flatnonzero(~np.isnan(labels[:, column]))
        if not len(known):
            continue
        order = known[np.argsort(-scores[known, column], kind="stable")]
        descending = scores[order, column]
        starts = np.flatnonzero(np.append(True, descending[1:] != descending[:-1]))
        weights = case_weights[:, order].astype(np.float64)
        positive = labels[order, column] == 1
        positives = np.add.reduceat(weights * positive, starts, axis=1)
        negatives = np.add.reduceat(weights * ~positive, starts, axis=1)
        true_positives, false_positives = positives.cumsum(axis=1), negatives.cumsum(axis=1)
        num_positive, num_negative = true_positives[:, -1], false_positives[:, -1]
        below = num_negative[:, None] - false_positives + negatives / 2
        auroc[:, column] = _ratio((positives * below).sum(axis=1), num_positive * num_negative)
        # A resample may draw none of the best-scored cases; there precision is 0 / 0 but the recall gained is 0 too.
        precision = true_positives / np.maximum(true_positives + false_positives, 1)
        average_precision[:, column] = _ratio((positives * precision).sum(axis=1), num_positive)
    return auroc, average_precision


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    defined = denominator > 0
    return np.where(defined, numerator / np.where(defined, denominator, 1), np.nan)
