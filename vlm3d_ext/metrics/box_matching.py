"""Matching predicted with true boxes, as the localisation task of the VLM3D challenge does.

Boxes are `[xmin, ymin, zmin, dx, dy, dz]` in mm, N of them an array (N, 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from .froc import FrocCandidates

__all__ = ["BoxMatches", "box_candidates", "box_iou", "centroid_distances_mm", "match_boxes"]


@dataclass(frozen=True, eq=False)
class BoxMatches:
    """Pairs of boxes, in the order of the predicted ones.

    Args:
        predicted: (K,), index of the predicted box.
        truth: (K,), index of the true box.
        iou: (K,), each at least the IoU that was asked for.
        centroid_distance_mm: (K,), between the boxes' centres.
        num_predicted: all predicted boxes; those in no pair are false positives.
        num_truth: all true boxes; those in no pair are missed.
    """

    predicted: np.ndarray
    truth: np.ndarray
    iou: np.ndarray
    centroid_distance_mm: np.ndarray
    num_predicted: int
    num_truth: int

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the pairs; NaN if there are none."""
        return float(self.iou.mean()) if len(self.iou) else float("nan")

    @property
    def mean_centroid_distance_mm(self) -> float:
        """Mean distance of the pairs' centres in mm; NaN if there are none."""
        return float(self.centroid_distance_mm.mean()) if len(self.iou) else float("nan")


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of each box of `a` (N, 6) with each of `b` (M, 6): (N, M), 0 to 1.

    Raises:
        ValueError: if an array is not (N, 6), or a box has a size that is not positive.
    """
    a, b = _checked(a, "a"), _checked(b, "b")
    low = np.maximum(a[:, None, :3], b[None, :, :3])
    high = np.minimum((a[:, :3] + a[:, 3:])[:, None], (b[:, :3] + b[:, 3:])[None])
    intersection = np.clip(high - low, 0, None).prod(axis=2)
    volumes = a[:, 3:].prod(axis=1)[:, None] + b[:, 3:].prod(axis=1)[None]
    return intersection / (volumes - intersection)


def centroid_distances_mm(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the distance between the centres of each box of `a` (N, 6) and each of `b` (M, 6) in mm: (N, M).

    Raises:
        ValueError: as `box_iou`.
    """
    a, b = _checked(a, "a"), _checked(b, "b")
    return np.linalg.norm((a[:, :3] + a[:, 3:] / 2)[:, None] - (b[:, :3] + b[:, 3:] / 2)[None], axis=2)


def match_boxes(predicted: np.ndarray, truth: np.ndarray, min_iou: float = 0.10) -> BoxMatches:
    """Pair boxes one to one so that the sum of the pairs' IoU is the largest possible, with IoU >= `min_iou` each.

    Pairs below `min_iou` have weight 0 in the assignment (Hungarian method): leaving both boxes alone costs the same,
    so they never take the place of a pair that is allowed.

    Args:
        predicted: (N, 6).
        truth: (M, 6).
        min_iou: above 0, at most 1.

    Raises:
        ValueError: as `box_iou`, or if `min_iou` is out of range.
    """
    _check_min_iou(min_iou)
    iou = box_iou(predicted, truth)
    allowed = np.where(iou >= min_iou, iou, 0.0)
    rows, columns = linear_sum_assignment(allowed, maximize=True)
    kept = allowed[rows, columns] > 0
    rows, columns = rows[kept], columns[kept]
    distances = centroid_distances_mm(predicted, truth)[rows, columns]
    return BoxMatches(rows, columns, iou[rows, columns], distances, *iou.shape)


def box_candidates(
    predicted: np.ndarray, probabilities: np.ndarray, truth: np.ndarray, min_iou: float = 0.10
) -> FrocCandidates:
    """Return one scan's boxes as candidates for `froc`.

    The surest box first (among equal ones that with the higher IoU), each finds the true box it overlaps most of those
    still free, if with IoU >= `min_iou`; otherwise it is a false positive, a second box on one lesion too. Which boxes
    match then does not depend on the threshold, as it would if all were assigned at once.

    Args:
        predicted: (N, 6).
        probabilities: (N,).
        truth: (M, 6).
        min_iou: above 0, at most 1.

    Raises:
        ValueError: as `match_boxes`, or if there is not one probability for each box.
    """
    _check_min_iou(min_iou)
    iou = box_iou(predicted, truth)
    scores = np.asarray(probabilities, dtype=np.float64)
    if scores.shape != (len(iou),):
        raise ValueError(f"probabilities must be ({len(iou)},), one for each predicted box, got {scores.shape}.")
    is_true = np.zeros(len(iou), dtype=bool)
    best = np.full(iou.shape[1], np.nan)
    for row in np.lexsort((-iou.max(axis=1, initial=0.0), -scores)):
        free = np.where(np.isnan(best), iou[row], 0.0)
        if free.max(initial=0.0) >= min_iou:
            is_true[row] = True
            best[free.argmax()] = scores[row]
    return FrocCandidates(scores, is_true, best)


def _checked(boxes: np.ndarray, name: str) -> np.ndarray:
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.size == 0:
        return boxes.reshape(0, 6)
    if boxes.ndim != 2 or boxes.shape[1] != 6:
        raise ValueError(f"boxes {name} must be (N, 6) = [xmin, ymin, zmin, dx, dy, dz], got shape {boxes.shape}.")
    if not np.isfinite(boxes).all() or not (boxes[:, 3:] > 0).all():
        row = int(np.argmax(~np.isfinite(boxes).all(axis=1) | (boxes[:, 3:] <= 0).any(axis=1)))
        raise ValueError(
            f"box {row} of {name} must be finite with positive sizes dx, dy, dz, got {boxes[row].tolist()}."
        )
    return boxes


def _check_min_iou(min_iou: float) -> None:
    if not 0 < min_iou <= 1:
        raise ValueError(f"min_iou must be above 0 and at most 1, got {min_iou}.")
