"""Overlap lesion by lesion, so that a small lesion counts beside a large one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.ndimage

from ..data.connected_components import foreground_box, label_lesions
from .mask_overlap import check_masks

__all__ = ["dice_by_lesion"]


def dice_by_lesion(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)
) -> tuple[float, ...]:
    """Return the Dice of each true lesion with what was predicted of it; 0 for a lesion that nothing touches.

    What was predicted of a lesion are the predicted connected components that touch it. A component that touches
    several lesions is divided among them, each voxel going to the nearest, so that no lesion pays for what was
    predicted of its neighbour. With one lesion and one component that touches it, this is the Dice of the two; a
    perfect prediction has 1 for every lesion. Components that touch no lesion are no lesion's affair: they are false
    positives.

    Args:
        prediction: (D, H, W) bool.
        truth: (D, H, W) bool.
        spacing_mm: `[z, y, x]`, for distances.

    Returns:
        One value in [0, 1] for each true lesion, in the order of `label_lesions`.

    Raises:
        TypeError: if a mask is not bool.
        ValueError: if a mask is not 3D, or the shapes differ.
    """
    check_masks(prediction, truth)
    common = foreground_box(prediction | truth)
    if common is None or not truth.any():
        return ()
    prediction, truth = prediction[common], truth[common]
    lesions, num_lesions = label_lesions(truth)
    components, num_components = label_lesions(prediction)
    true_voxels = np.bincount(lesions[truth], minlength=num_lesions + 1)
    both = prediction & truth
    overlap = np.zeros((num_components + 1, num_lesions + 1), dtype=np.int64)
    np.add.at(overlap, (components[both], lesions[both]), 1)
    touched = overlap > 0
    predicted_voxels = np.bincount(components[prediction], minlength=num_components + 1)
    predicted_of = np.zeros(num_lesions + 1, dtype=np.int64)
    boxes = scipy.ndimage.find_objects(components)
    for component in range(1, num_components + 1):
        those = np.flatnonzero(touched[component])
        if len(those) == 1:
            predicted_of[those[0]] += predicted_voxels[component]
        elif len(those) > 1:
            # Each lesion that it touches has a voxel in it, but the nearest voxel may lie outside its bounding box; the
            # distances are taken in a box that holds both.
            box = _joined([boxes[component - 1], *_boxes_of(lesions, those)])
            nearest = _nearest_label(lesions[box], those, spacing_mm)
            np.add.at(predicted_of, nearest[components[box] == component], 1)
    hits = overlap.sum(axis=0)
    return tuple(float(2 * hits[n] / (true_voxels[n] + predicted_of[n])) for n in range(1, num_lesions + 1))


def _boxes_of(lesions: np.ndarray, labels: np.ndarray) -> list[tuple[slice, ...]]:
    boxes = scipy.ndimage.find_objects(lesions)
    return [boxes[label - 1] for label in labels]


def _joined(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    return tuple(slice(min(s.start for s in along), max(s.stop for s in along)) for along in zip(*boxes, strict=True))


def _nearest_label(lesions: np.ndarray, labels: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Return for each voxel the nearest of `labels`."""
    chosen = np.where(np.isin(lesions, labels), lesions, 0)
    places = scipy.ndimage.distance_transform_edt(
        chosen == 0, sampling=tuple(spacing_mm), return_distances=False, return_indices=True
    )
    return chosen[tuple(places)]
