"""Reading a mask and making sure that it lies on its scan's grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.raw_case import RawCase
from vlm3d_ext.data.nifti_volume import read_nifti
from vlm3d_ext.data.scan import Scan, UnusableScanError
from vlm3d_ext.data.scan_reader import read_mask
from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = ["check_same_grid", "describe_grid", "read_mask_of_scan"]

_TOLERANCE_VOXELS = (
    0.25  # writers round affines differently; a quarter of the finest spacing moves no voxel onto its neighbour
)
_HIGHEST_LABEL = 65535


def read_mask_of_scan(path: Path, scan: Scan, case: RawCase) -> np.ndarray:
    """Read a NIfTI mask as an array on `scan.geometry`.

    The grid is compared with the scan's. A CT-RATE v1 scan has a blank header: its place in space is unknown, so only
    size, spacing and axes can be compared there.

    Returns:
        (D, H, W) unsigned labels, LPS canonical like `scan.hu`.

    Raises:
        UnusableScanError: if the mask cannot be read, holds anything but whole numbers, or lies on another grid.
    """
    if case.spacing_mm is None:
        labels, geometry = read_mask(path)
        check_same_grid(path, geometry, scan.geometry)
        return labels
    volume = read_nifti(path, blank_header_spacing_mm=case.spacing_mm)
    geometry = volume.geometry.canonical()
    affine = geometry.affine_lps.copy()
    affine[:3, 3] = scan.geometry.affine_lps[:3, 3]
    check_same_grid(path, VolumeGeometry(geometry.shape, affine), scan.geometry)
    values = volume.geometry.to_canonical(volume.values)
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > _HIGHEST_LABEL:
        raise UnusableScanError(
            f"{path}: holds {values.dtype} from {values.min():g} to {values.max():g}, expected whole labels from 0 to "
            f"{_HIGHEST_LABEL}; save it with an integer type."
        )
    return np.ascontiguousarray(values, dtype=np.uint16)


def check_same_grid(path: Path, mask_geometry: VolumeGeometry, scan_geometry: VolumeGeometry) -> None:
    """Check that a mask's grid is its scan's, both canonical.

    Raises:
        UnusableScanError: if the shapes differ, or a voxel lies more than a quarter of the finest spacing from its
            counterpart.
    """
    if not mask_geometry.is_close(scan_geometry, tolerance_mm=_TOLERANCE_VOXELS * min(scan_geometry.spacing_mm)):
        raise UnusableScanError(
            f"{path}: the mask has {describe_grid(mask_geometry)}, but its scan {describe_grid(scan_geometry)}; "
            f"expected one "
            "grid; make the mask from this scan, or resample it onto the scan."
        )


def describe_grid(geometry: VolumeGeometry) -> str:
    """Return shape and affine in one line, as ``shape [D, H, W] = ..., affine (LPS) ...``, to 4 decimals."""
    affine = np.round(geometry.affine_lps[:3], 4).tolist()
    return f"shape [D, H, W] = {list(geometry.shape)}, affine (LPS) {affine}"
