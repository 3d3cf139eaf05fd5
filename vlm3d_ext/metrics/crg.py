"""The CRG score of the VLM3D challenge."""

from __future__ import annotations

import numpy as np

from .decisions import DecisionCounts, count_decisions

__all__ = ["crg_from_counts", "crg_score"]


def crg_score(labels: np.ndarray, decisions: np.ndarray) -> float:
    """Return the CRG score, pooled over all known (case, label) entries; NaN if they are all positive or all negative.

    With X known entries, A of them positive, r = (X - A) / 2A, U = (X - A) / 2 and s = r TP - r FN - FP, the score is
    U / (2U - s). Put in the pooled sensitivity t = TP / A and the pooled false-positive rate f = FP / (X - A): since
    r A = U, s = U (2t - 1 - 2f), and therefore

        CRG = 1 / (3 - 2 (t - f)),

    a function of t - f (Youden's index) alone. It is 1 for perfect decisions, 1/5 when each is wrong, and 1/3 exactly
    where t = f.

    What an image-blind predictor gets: t = f, hence 1/3, holds for all-negative, for all-positive, and for any constant
    or random decision when one label is scored alone. It holds for several labels when all are treated alike: tossing
    the same coin for each gives t = f on average (the mean score is above 1/3 by about (4/27) var(t - f), because
    1 / (3 - 2x) is convex). It does not hold for a predictor that ignores the image but treats labels differently: if
    label l with A_l positives and B_l negatives is said at the rate q_l,

        t - f = sum_l q_l (A_l / A - B_l / (X - A)),

    which is positive if common labels are said more often than rare ones. Always saying the commonest label beats 1/3
    without looking, so 1/3 is not the bar for the pooled score; the prevalence baseline of
    `vlm3d_ext.engines.classification_evaluation` is.

    Source: "CRG Score: A Distribution-Aware Clinical Metric for Radiology Report Generation", arXiv 2505.17167.

    Args:
        labels: (N, L) of 1, 0 or NaN; unknown entries are left out of X, A, TP, FN and FP.
        decisions: (N, L) of bool.

    Raises:
        ValueError: if the shapes differ, or a label is neither 1, 0 nor NaN.
    """
    return float(crg_from_counts(count_decisions(labels, decisions)))


def crg_from_counts(counts: DecisionCounts) -> np.ndarray:
    """Return the CRG score of counts (..., L), pooled over labels: (...).

    NaN where there is no positive (A = 0) or no negative (X = A, where the formula is 0 / 0).
    """
    positives, negatives = counts.positives.sum(axis=-1), counts.negatives.sum(axis=-1)
    sensitivity = counts.true_positives.sum(axis=-1) / np.maximum(positives, 1)
    false_positive_rate = counts.false_positives.sum(axis=-1) / np.maximum(negatives, 1)
    defined = (positives > 0) & (negatives > 0)
    return np.where(defined, 1.0 / (3.0 - 2.0 * (sensitivity - false_positive_rate)), np.nan)
