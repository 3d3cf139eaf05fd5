"""How far one report agrees with the truth: its findings with the labels, its sides with the reference report."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

__all__ = ["finding_f1", "side_agreement"]


def finding_f1(named: np.ndarray, labels: np.ndarray) -> float:
    """Return the F1 of the findings that one report names, over those whose label is known.

    Args:
        named: (L,) of 1 and 0, what the report says is there.
        labels: (L,) of 1, 0 and NaN.

    Returns:
        In [0, 1]; 1 for a case without findings of which none is named, 0 if one is; NaN if no label is known.

    Raises:
        ValueError: if the shapes differ, or a label is none of 1, 0 and NaN.
    """
    if labels.ndim != 1 or named.shape != labels.shape:
        raise ValueError(f"labels of a report are {labels.shape}, expected one for each of {named.shape} findings.")
    known = ~np.isnan(labels)
    if not np.isin(labels[known], (0, 1)).all():
        raise ValueError(f"labels must be 1, 0 or NaN (unknown), got {labels[known].tolist()}.")
    if not known.any():
        return math.nan
    present, said = labels[known] == 1, named[known] == 1
    num_either = int(present.sum() + said.sum())
    return 2 * int((present & said).sum()) / num_either if num_either else 1.0


def side_agreement(
    named: Collection[str], sides: Mapping[str, frozenset[str]], reference_sides: Mapping[str, frozenset[str]]
) -> float:
    """Return how well the sides fit, over the findings that the report names and the reference gives a side of.

    Each finding counts the sides that both give over the sides that either gives: left for bilateral is a half, and
    no side for left is 0, so that leaving sides out is no way round.

    Args:
        named: keys of the findings that the report says are there.
        sides: key -> sides the report gives; a key without a side may be missing.
        reference_sides: the same of the reference report.

    Returns:
        In [0, 1], or NaN if there is no such finding.
    """
    agreements = []
    for key, expected in reference_sides.items():
        if expected and key in named:
            given = sides.get(key, frozenset())
            agreements.append(len(given & expected) / len(given | expected))
    return sum(agreements) / len(agreements) if agreements else math.nan
