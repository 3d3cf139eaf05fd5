"""The free-response ROC curve: how many lesions are found at how many false positives a scan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.connected_components import foreground_box, label_lesions
from .lesion_detection import match_lesions

__all__ = ["FrocCandidates", "FrocCurve", "candidates_of", "froc", "pool_candidates"]


@dataclass(frozen=True, eq=False)
class FrocCandidates:
    """Scored candidates of one scan, or of several.

    Args:
        scores: (N,), higher is surer.
        is_true: (N,) bool; the others are false positives.
        lesion_best_score: (L,), for each true lesion the highest score of a candidate that finds it; NaN if none does.
    """

    scores: np.ndarray
    is_true: np.ndarray
    lesion_best_score: np.ndarray


@dataclass(frozen=True, eq=False)
class FrocCurve:
    """One point for each distinct score, from the surest candidates to all of them.

    Args:
        thresholds: (K,), falling; a candidate enters where its score is at least the threshold, so equal scores enter
            together.
        false_positives_per_scan: (K,), rising.
        sensitivity: (K,), rising, 0 to 1; NaN if there is no lesion.
        num_scans: scans behind the curve, those without lesions included.
        num_lesions: lesions behind the curve.
    """

    thresholds: np.ndarray
    false_positives_per_scan: np.ndarray
    sensitivity: np.ndarray
    num_scans: int
    num_lesions: int

    def sensitivity_at(self, false_positives: Sequence[float] = (0.5, 1, 2, 4)) -> tuple[float, ...]:
        """Return the highest sensitivity with at most so many false positives a scan, for each number given.

        Nothing is interpolated: it is the sensitivity of a threshold that exists, 0 where even the surest candidates
        bring more false positives; NaN if there is no lesion.
        """
        if not self.num_lesions:
            return (float("nan"),) * len(false_positives)
        return tuple(
            float(self.sensitivity[self.false_positives_per_scan <= limit].max(initial=0.0))
            for limit in false_positives
        )


def froc(scores: np.ndarray, is_true: np.ndarray, lesion_best_score: np.ndarray, num_scans: int) -> FrocCurve:
    """Return the FROC curve of candidates pooled over scans.

    A lesion counts once, at the surest candidate that finds it; further candidates of it neither help nor harm.

    Source: Bunch et al., "A free response approach to the measurement and characterization of radiographic-observer
    performance", SPIE 0127, 1977.

    Args:
        scores: (N,), no NaN.
        is_true: (N,) bool.
        lesion_best_score: (L,), NaN for a lesion that no candidate finds.
        num_scans: number of scans, those without candidates and without lesions included.

    Raises:
        ValueError: if the shapes differ, a score is NaN, a lesion has a score that no candidate has, or there is no
            scan.
    """
    scores = np.asarray(scores, dtype=np.float64)
    is_true = np.asarray(is_true, dtype=bool)
    best = np.asarray(lesion_best_score, dtype=np.float64)
    if scores.ndim != 1 or scores.shape != is_true.shape or best.ndim != 1:
        raise ValueError(
            f"scores and is_true must be (N,), lesion_best_score (L,), got {scores.shape}, {is_true.shape}, "
            f"{best.shape}."
        )
    if np.isnan(scores).any():
        raise ValueError(f"scores must be numbers, but {int(np.isnan(scores).sum())} of {len(scores)} are NaN.")
    if num_scans < 1:
        raise ValueError(f"num_scans must be at least 1, got {num_scans}.")
    found = best[~np.isnan(best)]
    unknown = found[~np.isin(found, scores)]
    if len(unknown):
        raise ValueError(
            f"a lesion is found at the score {unknown[0]:g}, but no candidate has it; pass every candidate."
        )
    thresholds = np.unique(scores)[::-1]
    false_positives = _num_at_least(thresholds, scores[~is_true])
    sensitivity = _num_at_least(thresholds, found) / len(best) if len(best) else np.full(len(thresholds), np.nan)
    return FrocCurve(thresholds, false_positives / num_scans, sensitivity, num_scans, len(best))


def pool_candidates(candidates: Iterable[FrocCandidates]) -> FrocCandidates:
    """Return the candidates of several scans as one."""
    scans = list(candidates)
    return FrocCandidates(
        np.concatenate([np.zeros(0), *(scan.scores for scan in scans)]),
        np.concatenate([np.zeros(0, dtype=bool), *(scan.is_true for scan in scans)]),
        np.concatenate([np.zeros(0), *(scan.lesion_best_score for scan in scans)]),
    )


def candidates_of(
    probabilities: np.ndarray, truth_mask: np.ndarray, threshold: float, min_iou: float = 0.1
) -> FrocCandidates:
    """Return the candidates of one scan: the components of probabilities >= `threshold`.

    A component's score is the highest probability inside. Components and lesions are matched once, at `threshold`, by
    `match_lesions`; the curve then asks from which score on a component is shown. Choose the threshold low: what it
    cuts away cannot come back.

    Args:
        probabilities: (D, H, W), 0 to 1.
        truth_mask: (D, H, W) bool.
        threshold: above 0, at most 1.
        min_iou: of `match_lesions`.

    Raises:
        TypeError: if the truth is not bool.
        ValueError: if the shapes differ, or `threshold` or `min_iou` is out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be above 0 and at most 1, got {threshold}.")
    prediction = np.asarray(probabilities) >= threshold
    matches = match_lesions(prediction, truth_mask, min_iou)
    num = len(matches.true_prediction)
    scores = np.zeros(num)
    box = foreground_box(prediction)
    if box is not None:
        labels, _ = label_lesions(prediction[box])
        inside = labels > 0
        np.maximum.at(scores, labels[inside] - 1, probabilities[box][inside])
    best = np.full(len(matches.found), np.nan)
    for component, lesion in matches.contacts:
        if matches.found[lesion]:
            best[lesion] = np.fmax(best[lesion], scores[component])
    return FrocCandidates(scores, np.array(matches.true_prediction, dtype=bool), best)


def _num_at_least(thresholds: np.ndarray, values: np.ndarray) -> np.ndarray:
    return len(values) - np.searchsorted(np.sort(values), thresholds, side="left")
