"""Figures of yes / no decisions: precision, recall, F1, specificity, accuracy, from counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .label_arrays import checked_labels

__all__ = ["DecisionCounts", "count_decisions", "decide"]


def decide(probabilities: np.ndarray, thresholds: np.ndarray | float) -> np.ndarray:
    """Return the decisions, bool (N, L): a probability at its label's threshold or above is a yes.

    Args:
        probabilities: (N, L).
        thresholds: (L,), or one for all labels.
    """
    return np.asarray(probabilities) >= np.asarray(thresholds)


@dataclass(frozen=True)
class DecisionCounts:
    """Known cases by what was decided and what is true, and the figures that follow.

    A figure is NaN where it is undefined: precision, recall and F1 of a label without known positives, specificity
    of one without known negatives, accuracy of one without known cases. Where positives are known but none was
    decided, precision is 0 (scikit-learn's ``zero_division=0``, which is also the challenge's), so that a label
    cannot leave the mean by never being predicted.

    Args:
        true_positives: (..., L).
        false_positives: (..., L).
        false_negatives: (..., L).
        true_negatives: (..., L).
    """

    true_positives: np.ndarray
    false_positives: np.ndarray
    false_negatives: np.ndarray
    true_negatives: np.ndarray

    @property
    def positives(self) -> np.ndarray:
        """Known positives, (..., L)."""
        return self.true_positives + self.false_negatives

    @property
    def negatives(self) -> np.ndarray:
        """Known negatives, (..., L)."""
        return self.false_positives + self.true_negatives

    @property
    def precision(self) -> np.ndarray:
        """Positives among the yes decisions, (..., L)."""
        decided = self.true_positives + self.false_positives
        return np.where(self.positives > 0, self.true_positives / np.maximum(decided, 1), np.nan)

    @property
    def recall(self) -> np.ndarray:
        """Yes decisions among the positives, also called sensitivity, (..., L)."""
        return _share(self.true_positives, self.positives)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, of the positive class only, (..., L)."""
        wrong = self.false_positives + self.false_negatives
        return np.where(self.positives > 0, _share(2 * self.true_positives, 2 * self.true_positives + wrong), np.nan)

    @property
    def specificity(self) -> np.ndarray:
        """No decisions among the negatives, (..., L)."""
        return _share(self.true_negatives, self.negatives)

    @property
    def accuracy(self) -> np.ndarray:
        """Right decisions among the known cases, (..., L)."""
        return _share(self.true_positives + self.true_negatives, self.positives + self.negatives)


def count_decisions(
    labels: np.ndarray, decisions: np.ndarray, case_weights: np.ndarray | None = None
) -> DecisionCounts:
    """Count decisions label by label.

    Args:
        labels: (N, L) of 1, 0 or NaN; NaN is counted nowhere.
        decisions: (N, L) of bool.
        case_weights: (R, N), how often each case is in each of R resamples; None for every case once.

    Returns:
        Counts (L,), or (R, L) with weights.

    Raises:
        ValueError: if the shapes differ, or a label is neither 1, 0 nor NaN.
    """
    labels = checked_labels(labels)
    decided = np.asarray(decisions, dtype=bool)
    if decided.shape != labels.shape:
        raise ValueError(f"decisions must have the labels' shape {labels.shape}, got {decided.shape}.")
    cells = [(labels == truth) & (decided == decision) for decision, truth in ((1, 1), (1, 0), (0, 1), (0, 0))]
    if case_weights is None:
        return DecisionCounts(*(cell.sum(axis=0) for cell in cells))
    return DecisionCounts(*(np.asarray(case_weights, dtype=np.float64) @ cell for cell in cells))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
