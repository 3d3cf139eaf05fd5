"""How far probabilities are from frequencies: expected calibration error and Brier score."""

from __future__ import annotations

import numpy as np

from .label_arrays import checked_labels, checked_probabilities

__all__ = ["NUM_CALIBRATION_BINS", "per_label_brier", "per_label_calibration_error", "reliability_curve"]

NUM_CALIBRATION_BINS = 15  # as in Guo et al. 2017


def per_label_calibration_error(
    labels: np.ndarray,
    probabilities: np.ndarray,
    num_bins: int = NUM_CALIBRATION_BINS,
    case_weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return the expected calibration error of each label, NaN for a label without known cases.

    Cases are sorted into bins of equal width by the probability of the finding; the error is the mean over cases of
    |mean probability - share of positives| of their bin. It is 0 for calibrated probabilities, 1 at worst.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3, with the finding's probability in
    the place of the confidence of a multi-class prediction.

    Args:
        labels: (N, L) of 1, 0 or NaN.
        probabilities: (N, L) in [0, 1].
        num_bins: bins of equal width; a probability at an edge belongs to the lower one.
        case_weights: (R, N), how often each case is in each of R resamples; None for every case once.

    Returns:
        (L,), or (R, L) with weights.

    Raises:
        ValueError: if the arrays do not fit each other, or a probability is outside [0, 1].
    """
    probabilities, gap, known, weights = _gaps(labels, probabilities, case_weights)
    bins = _bins(probabilities, num_bins)
    total = np.zeros((len(weights), gap.shape[1]))
    for number in range(num_bins):
        total += np.abs(weights @ np.where(bins == number, gap, 0.0))
    return _mean_over_known(total, weights @ known, case_weights is None)


def per_label_brier(
    labels: np.ndarray, probabilities: np.ndarray, case_weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean squared difference of probability and label (Brier 1950), NaN for a label without known cases.

    Args:
        labels: (N, L) of 1, 0 or NaN.
        probabilities: (N, L) in [0, 1].
        case_weights: (R, N), how often each case is in each of R resamples; None for every case once.

    Returns:
        (L,), or (R, L) with weights.

    Raises:
        ValueError: if the arrays do not fit each other, or a probability is outside [0, 1].
    """
    _, gap, known, weights = _gaps(labels, probabilities, case_weights)
    return _mean_over_known(weights @ gap**2, weights @ known, case_weights is None)


def reliability_curve(
    labels: np.ndarray, probabilities: np.ndarray, num_bins: int = NUM_CALIBRATION_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, of all known entries together, what a reliability diagram shows.

    Args:
        labels: (N, L) of 1, 0 or NaN.
        probabilities: (N, L) in [0, 1].
        num_bins: bins of equal width.

    Returns:
        Mean probability, share of positives, and number of entries of each bin that is not empty; each (num bins,).

    Raises:
        ValueError: if the arrays do not fit each other, or a probability is outside [0, 1].
    """
    labels = checked_labels(labels)
    probabilities = checked_probabilities(labels, probabilities)
    known = ~np.isnan(labels)
    bins = _bins(probabilities[known], num_bins)
    count = np.bincount(bins, minlength=num_bins)
    used = count > 0
    mean_probability = np.bincount(bins, probabilities[known], num_bins)[used] / count[used]
    share = np.bincount(bins, labels[known], num_bins)[used] / count[used]
    return mean_probability, share, count[used]


def _gaps(
    labels: np.ndarray, probabilities: np.ndarray, case_weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return checked probabilities, their differences from the labels (0 where unknown), what is known, and weights."""
    labels = checked_labels(labels)
    probabilities = checked_probabilities(labels, probabilities)
    weights = np.ones((1, len(labels))) if case_weights is None else np.asarray(case_weights, dtype=np.float64)
    known = ~np.isnan(labels)
    return probabilities, np.where(known, probabilities - np.where(known, labels, 0.0), 0.0), known, weights


def _bins(probabilities: np.ndarray, num_bins: int) -> np.ndarray:
    edges = np.linspace(0.0, 1.0, num_bins + 1)[1:-1]
    return np.searchsorted(edges, probabilities, side="left")


def _mean_over_known(total: np.ndarray, count: np.ndarray, single: bool) -> np.ndarray:
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean[0] if single else mean
