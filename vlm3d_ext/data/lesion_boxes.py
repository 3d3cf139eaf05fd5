"""Boxes in the patient around the lesions of a mask.

A box is `[xmin, ymin, zmin, dx, dy, dz]` in LPS mm: the corner with the lowest x, y, z, and the size. It reaches from
voxel edge to voxel edge, so a single voxel has the size of its spacing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from .connected_components import foreground_box, label_lesions, lesions_of
from .volume_geometry import VolumeGeometry

__all__ = ["box_of_voxels", "boxes_of_mask", "volume_box_mm"]


def box_of_voxels(slices: Sequence[slice], geometry: VolumeGeometry) -> list[float]:
    """Return the box in LPS mm around a block of voxels.

    The box's sides are the patient's axes: on an oblique grid it is the one around the block's eight corners.

    Args:
        slices: of the block, along (D, H, W), with start and stop.
        geometry: of the grid.
    """
    # Index 0 is the centre of the first voxel, so its outer edge is at -0.5, and that of the last at stop - 0.5.
    corners = np.array(list(product(*((side.start - 0.5, side.stop - 0.5) for side in slices))))
    positions = geometry.positions_lps(corners)
    low, high = positions.min(axis=0), positions.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]


def volume_box_mm(geometry: VolumeGeometry) -> list[float]:
    """Return the box in LPS mm around a whole volume; its first three numbers are the volume's corner."""
    return box_of_voxels([slice(0, size) for size in geometry.shape], geometry)


def boxes_of_mask(
    mask: np.ndarray, geometry: VolumeGeometry, probabilities: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Return one entry for each lesion (connected component) of a mask: the most probable first, then the largest.

    Args:
        mask: (D, H, W); non-zero is lesion.
        geometry: the mask's grid, in any orientation.
        probabilities: (D, H, W), 0 to 1; a lesion's probability is the highest inside. None gives each lesion 1.

    Returns:
        Of plain numbers: "bbox_mm" ([xmin, ymin, zmin, dx, dy, dz], LPS), "centroid_mm" ([x, y, z], LPS, mean of its
        voxels' centres), "probability", "num_voxels", "volume_ml".

    Raises:
        ValueError: if the mask or the probabilities have another shape than the geometry.
    """
    for name, array in (("mask", mask), ("probabilities", probabilities)):
        if array is not None and array.shape != geometry.shape:
            raise ValueError(f"the {name} must be on the geometry's grid {geometry.shape}, got shape {array.shape}.")
    lesions = lesions_of(mask)
    peaks = np.ones(len(lesions))
    box = foreground_box(mask)
    if probabilities is not None and box is not None:
        labels, _ = label_lesions(mask[box])
        inside = labels > 0
        peaks = np.full(len(lesions), -np.inf)
        np.maximum.at(peaks, labels[inside] - 1, probabilities[box][inside])
    voxel_ml = abs(np.linalg.det(geometry.affine_lps[:3, :3])) / 1000
    entries = [
        {
            "bbox_mm": box_of_voxels(lesion.slices, geometry),
            "centroid_mm": geometry.positions_lps(np.array([lesion.centroid_vox]))[0].tolist(),
            "probability": float(peak),
            "num_voxels": lesion.num_voxels,
            "volume_ml": float(lesion.num_voxels * voxel_ml),
        }
        for lesion, peak in zip(lesions, peaks, strict=True)
    ]
    return sorted(entries, key=lambda entry: (-entry["probability"], -entry["num_voxels"]))
