"""Which true lesions a predicted mask finds, and which predicted ones are true.

Lesions are connected components. One predicted blob may lie over two lesions, or two over one, so pairs alone do not
do. Components that overlap, directly or through others, form a *cluster*, and

- a cluster counts if the IoU of all its predicted with all its true voxels is at least `min_iou`;
- in a cluster that counts, a true lesion is found if at least `min_iou` of its voxels is predicted, and a predicted
  one is true if at least `min_iou` of its voxels is lesion.

Where one prediction meets one lesion this is plain IoU >= `min_iou`, because both shares are at least the IoU. Two
pieces of one lesion are both true and one blob over two lesions finds both, unless the whole overlaps badly; a large
lesion drawn well does not lend its score to a small neighbour that is only grazed. The rule is symmetric: with the
masks swapped, the found become the true. A cluster with a found lesion has a true prediction and the other way round
(were all shares on one side below `min_iou`, so would the IoU be).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..data.connected_components import foreground_box, label_lesions
from .lesion_components import SIZE_BINS, size_bin
from .mask_overlap import check_masks

__all__ = ["LesionMatches", "match_lesions", "pool_lesion_matches"]


@dataclass(frozen=True)
class LesionMatches:
    """What became of each lesion and of each predicted component, each in the order of `label_lesions`.

    Args:
        found: for each true lesion, whether it is found.
        lesion_voxels: for each true lesion, its size.
        true_prediction: for each predicted component, whether it is true; the others are false positives.
        prediction_voxels: for each predicted component, its size.
        contacts: (index of the prediction, index of the lesion), from 0, of all that share a voxel.
    """

    found: tuple[bool, ...]
    lesion_voxels: tuple[int, ...]
    true_prediction: tuple[bool, ...]
    prediction_voxels: tuple[int, ...]
    contacts: tuple[tuple[int, int], ...] = ()

    @property
    def num_false_positives(self) -> int:
        """Number of predicted components that are not true."""
        return len(self.true_prediction) - sum(self.true_prediction)

    @property
    def sensitivity(self) -> float:
        """Share of true lesions that are found; NaN if there are none."""
        return _share(self.found)

    @property
    def precision(self) -> float:
        """Share of predicted components that are true; NaN if there are none."""
        return _share(self.true_prediction)

    def sensitivity_by_size(self) -> dict[str, float]:
        """Return bin -> share of the true lesions of that size that are found; NaN for a bin without lesions."""
        return _share_by_size(self.found, self.lesion_voxels)

    def precision_by_size(self) -> dict[str, float]:
        """Return bin -> share of the predicted components of that size that are true; NaN for a bin without any."""
        return _share_by_size(self.true_prediction, self.prediction_voxels)


def match_lesions(prediction_mask: np.ndarray, truth_mask: np.ndarray, min_iou: float = 0.1) -> LesionMatches:
    """Match the lesions of two masks by the rule at the top of this file.

    Args:
        prediction_mask: (D, H, W) bool.
        truth_mask: (D, H, W) bool.
        min_iou: above 0, at most 1.

    Raises:
        TypeError: if a mask is not bool.
        ValueError: if a mask is not 3D, the shapes differ, or `min_iou` is out of range.
    """
    check_masks(prediction_mask, truth_mask)
    if not 0 < min_iou <= 1:
        raise ValueError(f"min_iou must be above 0 and at most 1, got {min_iou}.")
    predictions, num_predictions = _labels_in_box(prediction_mask)
    lesions, num_lesions = _labels_in_box(truth_mask)
    prediction_voxels, lesion_voxels = _sizes(predictions, num_predictions), _sizes(lesions, num_lesions)
    pairs, shared = _overlaps(prediction_mask, truth_mask, predictions, lesions, num_lesions)
    true_prediction = np.zeros(num_predictions, dtype=bool)
    found = np.zeros(num_lesions, dtype=bool)
    if len(shared):
        size = num_predictions + num_lesions
        edges = coo_array((np.ones(len(shared)), (pairs[:, 0], num_predictions + pairs[:, 1])), shape=(size, size))
        num_clusters, cluster = connected_components(edges, directed=False)
        intersection = np.bincount(cluster[pairs[:, 0]], weights=shared, minlength=num_clusters)
        voxels = np.bincount(cluster, weights=[*prediction_voxels, *lesion_voxels], minlength=num_clusters)
        counts = (intersection >= min_iou * (voxels - intersection))[cluster]
        covered_prediction = np.bincount(pairs[:, 0], weights=shared, minlength=num_predictions)
        covered_lesion = np.bincount(pairs[:, 1], weights=shared, minlength=num_lesions)
        true_prediction = counts[:num_predictions] & (covered_prediction >= min_iou * prediction_voxels)
        found = counts[num_predictions:] & (covered_lesion >= min_iou * lesion_voxels)
    return LesionMatches(
        tuple(found.tolist()),
        tuple(lesion_voxels.tolist()),
        tuple(true_prediction.tolist()),
        tuple(prediction_voxels.tolist()),
        tuple((int(prediction), int(lesion)) for prediction, lesion in pairs),
    )


def pool_lesion_matches(matches: Iterable[LesionMatches]) -> LesionMatches:
    """Return the matches of several scans as one, so that shares are over all their lesions."""
    found: list[bool] = []
    true_prediction: list[bool] = []
    lesion_voxels: list[int] = []
    prediction_voxels: list[int] = []
    contacts: list[tuple[int, int]] = []
    for scan in matches:
        contacts += [(len(true_prediction) + p, len(found) + t) for p, t in scan.contacts]
        found += scan.found
        lesion_voxels += scan.lesion_voxels
        true_prediction += scan.true_prediction
        prediction_voxels += scan.prediction_voxels
    return LesionMatches(
        tuple(found), tuple(lesion_voxels), tuple(true_prediction), tuple(prediction_voxels), tuple(contacts)
    )


_Box = tuple[slice, slice, slice]


def _labels_in_box(mask: np.ndarray) -> tuple[tuple[_Box, np.ndarray] | None, int]:
    box = foreground_box(mask)
    if box is None:
        return None, 0
    labels, count = label_lesions(mask[box])
    return (box, labels), count


def _sizes(boxed: tuple[_Box, np.ndarray] | None, count: int) -> np.ndarray:
    return np.zeros(0, dtype=np.int64) if boxed is None else np.bincount(boxed[1].ravel(), minlength=count + 1)[1:]


def _overlaps(
    prediction_mask: np.ndarray,
    truth_mask: np.ndarray,
    predictions: tuple[_Box, np.ndarray] | None,
    lesions: tuple[_Box, np.ndarray] | None,
    num_lesions: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return index pairs (N, 2) from 0 of predicted and true components that share voxels, and how many (N,)."""
    none = np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=np.int64)
    if predictions is None or lesions is None:
        return none
    both = tuple(
        slice(max(p.start, t.start), min(p.stop, t.stop)) for p, t in zip(predictions[0], lesions[0], strict=True)
    )
    if any(side.start >= side.stop for side in both):
        return none
    inside = prediction_mask[both] & truth_mask[both]
    p, t = (labels[_relative(both, box)][inside].astype(np.int64) - 1 for box, labels in (predictions, lesions))
    keys, shared = np.unique(p * num_lesions + t, return_counts=True)
    return np.stack([keys // num_lesions, keys % num_lesions], axis=1), shared


def _relative(inner: Sequence[slice], outer: Sequence[slice]) -> tuple[slice, ...]:
    return tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")


def _share_by_size(flags: Sequence[bool], voxels: Sequence[int]) -> dict[str, float]:
    bins = [size_bin(number) for number in voxels]
    return {name: _share([flag for flag, of in zip(flags, bins, strict=True) if of == name]) for name in SIZE_BINS}
