"""Multi-label metrics that leave unknown labels out.

Labels are 1, 0 or NaN. NaN takes no part in any figure, and a figure that is undefined (a label with one class only) is
NaN, not 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

__all__ = ["bootstrap_interval", "macro_auroc", "per_label_auroc"]


def per_label_auroc(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each label, (L,); NaN where the known labels hold one class only.

    Computed from ranks, which is quick enough for thousands of bootstrap resamples; ties count half.

    Source: Hanley and McNeil 1982 (the area is the Mann-Whitney statistic).

    Args:
        labels: (N, L) of 1, 0 or NaN.
        scores: (N, L), any scale, higher for positive.
    """
    result = np.full(labels.shape[1], np.nan)
    for column in range(labels.shape[1]):
        known = ~np.isnan(labels[:, column])
        positive = labels[known, column] == 1
        num_positive = int(positive.sum())
        num_negative = len(positive) - num_positive
        if num_positive and num_negative:
            rank_sum = rankdata(scores[known, column])[positive].sum()
            result[column] = (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)
    return result


def macro_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean of `per_label_auroc` over the labels where it is defined; NaN if there is none."""
    values = per_label_auroc(labels, scores)
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def bootstrap_interval(
    labels: np.ndarray,
    scores: np.ndarray,
    metric: Callable[[np.ndarray, np.ndarray], float] = macro_auroc,
    num_resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a metric over resampled cases.

    Source: Efron 1979; percentile method.

    Args:
        labels: (N, L).
        scores: (N, L).
        metric: function of labels and scores.
        num_resamples: resamples of N cases with replacement.
        confidence: coverage, 0 to 1.
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_resamples):
        rows = generator.integers(0, len(labels), len(labels))
        values.append(metric(labels[rows], scores[rows]))
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)
