"""The figures of predicted boxes of one disease over a set of scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .box_matching import box_candidates, match_boxes
from .froc import froc, pool_candidates

__all__ = ["FALSE_POSITIVES", "BoxScores", "BoxesOfScan", "score_boxes"]

FALSE_POSITIVES = (0.5, 1, 2, 4)
"""False positives a scan at which sensitivity is given."""


@dataclass(frozen=True, eq=False)
class BoxesOfScan:
    """Boxes of one disease in one scan.

    Args:
        predicted: (N, 6), `[xmin, ymin, zmin, dx, dy, dz]` in mm.
        probabilities: (N,).
        truth: (M, 6).
    """

    predicted: np.ndarray
    probabilities: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class BoxScores:
    """Figures of one disease.

    Args:
        num_scans: scans of which it is known whether they have lesions.
        num_lesions: true boxes.
        num_boxes: predicted boxes.
        num_matched: pairs.
        mean_iou: of the pairs; NaN if there are none.
        centroid_distance_mm: mean of the pairs; NaN if there are none.
        sensitivity: at each of `FALSE_POSITIVES`; NaN if there is no lesion.
    """

    num_scans: int
    num_lesions: int
    num_boxes: int
    num_matched: int
    mean_iou: float
    centroid_distance_mm: float
    sensitivity: tuple[float, ...]


def score_boxes(scans: Sequence[BoxesOfScan], min_iou: float = 0.10) -> BoxScores:
    """Score one disease's boxes over scans.

    Args:
        scans: at least one for figures; none gives NaN and counts of 0.
        min_iou: least IoU of a pair.

    Raises:
        ValueError: if a box is none, or `min_iou` is out of range.
    """
    matches = [match_boxes(scan.predicted, scan.truth, min_iou) for scan in scans]
    iou = np.concatenate([np.zeros(0), *(match.iou for match in matches)])
    distances = np.concatenate([np.zeros(0), *(match.centroid_distance_mm for match in matches)])
    pooled = pool_candidates(box_candidates(scan.predicted, scan.probabilities, scan.truth, min_iou) for scan in scans)
    curve = froc(pooled.scores, pooled.is_true, pooled.lesion_best_score, max(len(scans), 1))
    return BoxScores(
        num_scans=len(scans),
        num_lesions=sum(match.num_truth for match in matches),
        num_boxes=sum(match.num_predicted for match in matches),
        num_matched=len(iou),
        mean_iou=float(iou.mean()) if len(iou) else float("nan"),
        centroid_distance_mm=float(distances.mean()) if len(iou) else float("nan"),
        sensitivity=curve.sensitivity_at(FALSE_POSITIVES),
    )
