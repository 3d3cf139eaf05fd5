"""The figures that the VLM3D challenge's own evaluation of localisation gives, for comparison with its leaderboard.

They differ from those of `match_boxes` and `froc`, and from what their names say:

- boxes are assigned by the least sum of 1 - IoU, and pairs below the limit are dropped only afterwards, so that one of
  them can take the place of a pair that counts;
- a disease whose lesions are all missed has the IoU 0 and the distance 768 mm, the diagonal of a volume of 512 × 512 ×
  256 mm, instead of none;
- sensitivity "at b false positives a scan" lets *each scan* have its own b false positives, over all diseases, and
  skips the scan's further boxes; at b = 0.5 and b = 1 that is one false positive, so the two figures are equal.

Source: github.com/forithmus/VLM3D-Dockers, ``deprecated_challenges/abnloc_evaluation/evaluation.py`` at commit a945908.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from .box_matching import box_iou, centroid_distances_mm
from .box_scores import FALSE_POSITIVES, BoxesOfScan

__all__ = ["ChallengeBoxFigures", "challenge_box_figures"]

_MISSED_DISTANCE_MM = float(np.linalg.norm([512.0, 512.0, 256.0]))


@dataclass(frozen=True)
class ChallengeBoxFigures:
    """What the challenge's evaluation gives.

    Args:
        iou: disease -> mean IoU of its pairs; NaN for a disease without lesions.
        distance_mm: disease -> mean distance of its pairs' centres; NaN for a disease without lesions.
        sensitivity: for each number of false positives, the share of all lesions found; NaN without lesions.
    """

    iou: dict[str, float]
    distance_mm: dict[str, float]
    sensitivity: tuple[float, ...]

    @property
    def macro_iou(self) -> float:
        """Mean over diseases with lesions; NaN if there are none."""
        return _mean([value for value in self.iou.values() if not np.isnan(value)])

    @property
    def macro_distance_mm(self) -> float:
        """Mean over diseases with lesions; NaN if there are none."""
        return _mean([value for value in self.distance_mm.values() if not np.isnan(value)])


def challenge_box_figures(
    scans: Sequence[Mapping[str, BoxesOfScan]],
    diseases: Sequence[str],
    min_iou: float = 0.10,
    false_positives: Sequence[float] = FALSE_POSITIVES,
) -> ChallengeBoxFigures:
    """Return the figures of the challenge's evaluation.

    Args:
        scans: for each scan, disease -> boxes; a disease that was not scored there is absent.
        diseases: all of them, in the order in which boxes of equal probability are taken.
        min_iou: least IoU of a pair.
        false_positives: how many false positives each scan may have.
    """
    iou, distance = {}, {}
    for disease in diseases:
        pairs = [_pairs(scan[disease], min_iou) for scan in scans if disease in scan]
        of_disease = np.concatenate([np.zeros((0, 2)), *pairs])
        has_lesions = any(len(scan[disease].truth) for scan in scans if disease in scan)
        if len(of_disease):
            iou[disease], distance[disease] = (float(value) for value in of_disease.mean(axis=0))
        else:
            iou[disease], distance[disease] = (0.0, _MISSED_DISTANCE_MM) if has_lesions else (np.nan, np.nan)
    total = sum(len(boxes.truth) for scan in scans for boxes in scan.values())
    found = [sum(_num_found(scan, diseases, min_iou, budget) for scan in scans) for budget in false_positives]
    return ChallengeBoxFigures(iou, distance, tuple(number / total if total else float("nan") for number in found))


def _pairs(boxes: BoxesOfScan, min_iou: float) -> np.ndarray:
    """Return (IoU, distance in mm) of each pair that counts: (K, 2)."""
    iou = box_iou(boxes.predicted, boxes.truth)
    rows, columns = linear_sum_assignment(1.0 - iou)
    counts = iou[rows, columns] >= min_iou
    distances = centroid_distances_mm(boxes.predicted, boxes.truth)[rows, columns]
    return np.stack([iou[rows, columns], distances], axis=1)[counts]


def _num_found(scan: Mapping[str, BoxesOfScan], diseases: Sequence[str], min_iou: float, budget: float) -> int:
    given = [disease for disease in diseases if disease in scan]
    overlaps = {disease: box_iou(scan[disease].predicted, scan[disease].truth) for disease in given}
    free = {disease: np.ones(len(scan[disease].truth), dtype=bool) for disease in given}
    boxes = [
        (-float(score), disease, row) for disease in given for row, score in enumerate(scan[disease].probabilities)
    ]
    num_found, num_false = 0, 0
    for _, disease, row in sorted(boxes, key=lambda box: box[0]):
        if num_false >= budget:
            break
        candidates = np.where(free[disease], overlaps[disease][row], 0.0)
        if candidates.max(initial=0.0) >= min_iou:
            free[disease][candidates.argmax()] = False
            num_found += 1
        else:
            num_false += 1
    return num_found


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
