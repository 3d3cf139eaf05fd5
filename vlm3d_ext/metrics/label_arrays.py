"""Checks that arrays of labels and scores can be measured against each other."""

from __future__ import annotations

import numpy as np

__all__ = ["checked_labels", "checked_probabilities", "checked_scores", "mean_over_defined"]


def checked_labels(labels: np.ndarray) -> np.ndarray:
    """Return the labels as float64, (N, L).

    Raises:
        ValueError: if there are not two axes, or a value is neither 1, 0 nor NaN (unknown).
    """
    values = np.asarray(labels, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"labels must have the shape (cases, labels), got {values.shape}.")
    wrong = values[~np.isnan(values) & (values != 0) & (values != 1)]
    if wrong.size:
        raise ValueError(f"labels must be 1, 0 or NaN (unknown), got {sorted(set(wrong.tolist()))[:3]}.")
    return values


def checked_scores(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the scores as float64, (N, L), with 0 wherever the label is unknown, so that nothing there can count.

    Args:
        labels: (N, L), checked.
        scores: (N, L), any scale.

    Raises:
        ValueError: if the shapes differ, or a score with a known label is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != labels.shape:
        raise ValueError(f"scores must have the labels' shape {labels.shape}, got {values.shape}.")
    known = ~np.isnan(labels)
    if not np.isfinite(values[known]).all():
        row, column = np.argwhere(known & ~np.isfinite(values))[0]
        raise ValueError(f"scores must be finite, got {values[row, column]} for case {row}, label {column}.")
    return np.where(known, values, 0.0)


def checked_probabilities(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return what `checked_scores` returns, if it lies in [0, 1].

    Raises:
        ValueError: as `checked_scores`, or if a probability with a known label is outside [0, 1].
    """
    values = checked_scores(labels, probabilities)
    outside = (values < 0) | (values > 1)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(f"probabilities must lie in [0, 1], got {values[row, column]} for case {row}, label {column}.")
    return values


def mean_over_defined(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis of the values that are not NaN; NaN where there is none."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=-1)
    total = np.where(defined, values, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
