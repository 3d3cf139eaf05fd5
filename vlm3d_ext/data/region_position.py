"""Where an anatomical region lies in a scan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from .anatomical_regions import region_by_name
from .volume_geometry import VolumeGeometry

__all__ = ["position_of_regions", "regions_in_scan"]


def regions_in_scan(
    regions: np.ndarray, prepared_geometry: VolumeGeometry, scan_geometry: VolumeGeometry
) -> np.ndarray:
    """Return the regions of a prepared grid, without what lies outside the scan.

    A prepared grid of fixed spacing reaches beyond a small scan, and there the network sees air that is no air.

    Args:
        regions: (d, h, w), the region of each voxel; may be filled up at the ends of its axes.
        prepared_geometry: grid of the regions, (D, H, W).
        scan_geometry: the scan's, in any axis order.

    Returns:
        (D, H, W); 0 outside the scan.
    """
    kept = regions[tuple(slice(0, size) for size in prepared_geometry.shape)]
    to_scan = np.linalg.inv(scan_geometry.affine_lps) @ prepared_geometry.affine_lps
    last = np.array(scan_geometry.shape[::-1]) - 0.5
    corners = np.array(list(product(*((0, size - 1) for size in prepared_geometry.shape[::-1]))))
    indices = corners @ to_scan[:3, :3].T + to_scan[:3, 3]
    if ((indices >= -0.5) & (indices <= last)).all():
        return kept
    k, j, i = np.ogrid[tuple(slice(0, size) for size in kept.shape)]
    inside = np.ones(kept.shape, dtype=bool)
    for (by_i, by_j, by_k, offset), end in zip(to_scan[:3], last, strict=True):
        index = by_i * i + by_j * j + by_k * k + offset
        inside &= (index >= -0.5) & (index <= end)
    return np.where(inside, kept, 0)


def position_of_regions(regions: np.ndarray, names: Sequence[str], geometry: VolumeGeometry) -> list[float] | None:
    """Return the position `[x, y, z]` (LPS, mm) of the voxel of the largest of some regions that lies nearest its
    centre; None where there is none of them.

    A voxel of the region, so that the place lies in it even where its shape is a shell.

    Args:
        regions: (D, H, W), the region of each voxel.
        names: of the regions that are meant.
        geometry: grid of `regions`.
    """
    indices = [region_by_name(name).index for name in names]
    counts = np.bincount(regions.ravel(), minlength=max(indices, default=0) + 1)
    largest = max(indices, key=lambda index: counts[index], default=None)
    if largest is None or not counts[largest]:
        return None
    voxels = np.argwhere(regions == largest)
    positions = geometry.positions_lps(voxels)
    return positions[np.linalg.norm(positions - positions.mean(0), axis=1).argmin()].tolist()
