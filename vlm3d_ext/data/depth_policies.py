"""How a chest of any length becomes a fixed number of slices: the policies, by name.

`resample` squeezes the whole chest into the grid (spacing differs from scan to scan), `crop` keeps a spacing and takes
the middle, `windows` keeps a spacing and takes several grids that overlap along z and together cover the scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = ["DEPTH_POLICIES", "target_geometry"]

DEPTH_POLICIES = ("resample", "crop", "windows")

# A scan that is longer than its windows by less than this does not get one more of them because of rounding.
_ROUNDING_MM = 1e-6


def target_geometry(
    geometry: VolumeGeometry,
    spatial_size: Sequence[int],
    policy: str = "resample",
    spacing_mm: Sequence[float] | None = None,
    overlap: float = 0.25,
) -> list[VolumeGeometry]:
    """Return the grids onto which a scan is sampled. They share the scan's axes, rotated or not.

    Args:
        geometry: the scan's canonical grid.
        spatial_size: `(D, H, W)` of every grid.
        policy: "resample": D slices fill the scan's extent from outer voxel edge to outer voxel edge; in plane the
            spacing is isotropic, the larger of extent_y / H and extent_x / W, and the other direction is padded around
            its centre. "crop": `spacing_mm`, centred on the scan. "windows": `spacing_mm`, centred in plane, evenly
            spread along z from the scan's lower to its upper edge; a scan shorter than one window gets one, centred.
        spacing_mm: `[z, y, x]` in mm of the grids; needed by "crop" and "windows", refused by "resample", which derives
            it.
        overlap: least share of a window, in [0, 1), that its neighbour shares; used by "windows" alone.

    Returns:
        One grid for "resample" and "crop"; one or more for "windows", from the lowest to the highest.

    Raises:
        ValueError: for an unknown policy, a size, spacing or overlap outside its range, or a spacing that is missing or
            without effect.
    """
    size = tuple(int(n) for n in spatial_size)
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"spatial_size must be three positive integers (D, H, W), got {tuple(spatial_size)}.")
    if policy not in DEPTH_POLICIES:
        raise ValueError(f"no depth policy is called {policy!r}; the names are {list(DEPTH_POLICIES)}.")
    depth, height, width = size
    extent_z, extent_y, extent_x = geometry.extent_mm
    if policy == "resample":
        if spacing_mm is not None:
            raise ValueError(
                f"policy 'resample' derives its spacing from the scan, got spacing_mm {list(spacing_mm)}; pass none."
            )
        in_plane = max(extent_y / height, extent_x / width)
        return [_centred_grid(geometry, (depth, height, width), (extent_z / depth, in_plane, in_plane))]
    if spacing_mm is None:
        raise ValueError(f"policy {policy!r} needs spacing_mm [z, y, x] in mm, got None.")
    spacing = tuple(float(value) for value in spacing_mm)
    if len(spacing) != 3 or not all(math.isfinite(value) and value > 0 for value in spacing):
        raise ValueError(f"spacing_mm must be three positive numbers [z, y, x] in mm, got {list(spacing_mm)}.")
    z, y, x = spacing
    centred = _centred_grid(geometry, (depth, height, width), (z, y, x))
    if policy == "crop":
        return [centred]
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be in [0, 1), got {overlap}.")
    surplus = extent_z - depth * z
    if surplus <= _ROUNDING_MM:
        return [centred]
    num_windows = math.ceil((surplus - _ROUNDING_MM) / (depth * z * (1 - overlap))) + 1
    upward = geometry.directions[:, 2]
    return [_moved(centred, upward * offset) for offset in np.linspace(-surplus / 2, surplus / 2, num_windows)]


def _centred_grid(
    geometry: VolumeGeometry, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> VolumeGeometry:
    axes = geometry.directions * np.array(spacing_mm[::-1])
    centre = geometry.positions_lps((np.array(geometry.shape)[None] - 1) / 2)[0]
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = centre - axes @ ((np.array(shape[::-1]) - 1) / 2)
    return VolumeGeometry(shape, affine)


def _moved(geometry: VolumeGeometry, offset_lps: np.ndarray) -> VolumeGeometry:
    affine = geometry.affine_lps.copy()
    affine[:3, 3] += offset_lps
    return VolumeGeometry(geometry.shape, affine)
