"""Single lesions of a mask: its connected components.

Work is done inside the bounding box of the foreground, which is a small part of a scan: that makes it seconds instead
of minutes over a data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

__all__ = ["Lesion", "foreground_box", "label_lesions", "lesions_of", "without_faint_lesions"]

_TOUCHING = np.ones((3, 3, 3), dtype=bool)
"""Voxels that share a face, an edge or a corner are of one lesion (26 neighbours)."""


@dataclass(frozen=True)
class Lesion:
    """One connected component of a mask.

    Args:
        label: its value in what `label_lesions` returns, from 1.
        num_voxels: at least 1.
        slices: its bounding box, along (D, H, W).
        centroid_vox: mean index (k, j, i) of its voxels.
    """

    label: int
    num_voxels: int
    slices: tuple[slice, slice, slice]
    centroid_vox: tuple[float, float, float]


def foreground_box(mask: np.ndarray) -> tuple[slice, slice, slice] | None:
    """Return the smallest box (slices along D, H, W) that holds every non-zero voxel of a (D, H, W) array; None if
    there is none.

    Raises:
        ValueError: if the array is not 3D.
    """
    if mask.ndim != 3:
        raise ValueError(f"a mask must be (D, H, W), got shape {mask.shape}.")
    # Slice by slice along the axis that is contiguous in memory; each further pass only sees the box found so far.
    box = [slice(0, size) for size in mask.shape]
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        occupied = np.flatnonzero(mask[tuple(box)].any(axis=others))
        if not len(occupied):
            return None
        box[axis] = slice(int(occupied[0]), int(occupied[-1]) + 1)
    return box[0], box[1], box[2]


def label_lesions(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the lesions of a mask.

    Args:
        mask: (D, H, W); non-zero is lesion. Lesions that touch, be it by a corner, are one.

    Returns:
        labels: (D, H, W) int32; 0 is background, lesions are 1 to `count` in the order of their first voxel.
        count: number of lesions.

    Raises:
        ValueError: if the mask is not 3D.
    """
    labels = np.zeros(mask.shape, dtype=np.int32)
    box = foreground_box(mask)
    if box is None:
        return labels, 0
    labels[box], count = ndimage.label(mask[box], structure=_TOUCHING)
    return labels, int(count)


def lesions_of(mask: np.ndarray) -> list[Lesion]:
    """Return the lesions of a mask (D, H, W) in the order of `label_lesions`; empty for an empty mask.

    Raises:
        ValueError: if the mask is not 3D.
    """
    box = foreground_box(mask)
    if box is None:
        return []
    labels, count = ndimage.label(mask[box], structure=_TOUCHING)
    starts = np.array([side.start for side in box])
    indices = np.nonzero(labels)
    values = labels[indices]
    sizes = np.bincount(values, minlength=count + 1)[1:]
    sums = np.array([np.bincount(values, weights=index, minlength=count + 1)[1:] for index in indices])
    centroids = (sums / sizes).T + starts
    lesions = []
    for number, inside in enumerate(ndimage.find_objects(labels)):
        d, h, w = (
            slice(side.start + int(start), side.stop + int(start)) for side, start in zip(inside, starts, strict=True)
        )
        k, j, i = (float(value) for value in centroids[number])
        lesions.append(Lesion(number + 1, int(sizes[number]), (d, h, w), (k, j, i)))
    return lesions


def without_faint_lesions(probabilities: np.ndarray, threshold: float, presence_threshold: float) -> np.ndarray:
    """Return probabilities in which every lesion that nowhere reaches `presence_threshold` lies at half of `threshold`.

    Args:
        probabilities: (D, H, W) in [0, 1].
        threshold: a voxel is of a lesion from it on.
        presence_threshold: a lesion is believed if one of its voxels reaches it; without effect up to `threshold`.
    """
    if presence_threshold <= threshold:
        return probabilities
    drawn = probabilities >= threshold
    box = foreground_box(drawn)
    if box is None:
        return probabilities
    labels, count = label_lesions(drawn[box])
    largest = ndimage.maximum(probabilities[box], labels, np.arange(1, count + 1))
    faint = np.concatenate([[False], np.asarray(largest) < presence_threshold])[labels]
    kept = probabilities.copy()
    kept[box][faint] = threshold / 2
    return kept
