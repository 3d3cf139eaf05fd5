"""Reading a mask and making sure that it lies on its scan's grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.raw_case import RawCase
from vlm3d_ext.data.nifti_volume import read_nifti
from vlm3d_ext.data.scan import Scan, UnusableScanError
from vlm3d_ext.data.scan_reader import read_mask
from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = ["check_same_grid", "check_whole_labels", "describe_grid", "is_same_grid", "read_mask_of_scan", "read_placed"]

_TOLERANCE_VOXELS = (
    0.25  # writers round affines differently; a quarter of the finest spacing moves no voxel onto its neighbour
)
_HIGHEST_LABEL = 65535
_NEXT_STEP = "make the mask from this scan, or resample it onto the scan."


def read_mask_of_scan(path: Path, scan: Scan, case: RawCase) -> np.ndarray:
    """Read a NIfTI mask as an array on `scan.geometry`.

    The grid is compared with the scan's; see `read_placed` for CT-RATE v1.

    Returns:
        (D, H, W) unsigned labels, LPS canonical like `scan.hu`.

    Raises:
        UnusableScanError: if the mask cannot be read, holds anything but whole numbers, or lies on another grid.
    """
    labels, geometry = read_placed(path, scan, case)
    check_same_grid(path, geometry, scan.geometry)
    return labels


def read_placed(path: Path, scan: Scan, case: RawCase) -> tuple[np.ndarray, VolumeGeometry]:
    """Read a NIfTI mask and say where it lies, whatever the scan's grid.

    A CT-RATE v1 scan has a blank header: its place in space is unknown, so the mask is put where the scan is taken to
    be, and only size, spacing and axes can be compared there.

    Returns:
        labels: (D, H, W) unsigned labels, LPS canonical.
        geometry: their canonical grid.

    Raises:
        UnusableScanError: if the mask cannot be read or holds anything but whole numbers.
    """
    if case.spacing_mm is None:
        return read_mask(path)
    volume = read_nifti(path, blank_header_spacing_mm=case.spacing_mm)
    geometry = volume.geometry.canonical()
    affine = geometry.affine_lps.copy()
    affine[:3, 3] = scan.geometry.affine_lps[:3, 3]
    values = volume.geometry.to_canonical(volume.values)
    check_whole_labels(path, values)
    return np.ascontiguousarray(values, dtype=np.uint16), VolumeGeometry(geometry.shape, affine)


def check_whole_labels(path: Path, values: np.ndarray) -> None:
    """Check that values are labels: whole numbers from 0 to 65535.

    Raises:
        UnusableScanError: with the lowest and the highest value, if they are not.
    """
    lowest, highest = float(values.min()), float(values.max())
    # Slice by slice, so that a comparison of floats costs one slice of memory.
    whole = values.dtype.kind in "iu" or all(np.array_equal(part, np.rint(part)) for part in values)
    if not whole or not 0 <= lowest <= highest <= _HIGHEST_LABEL:
        kind = "whole numbers" if whole else "numbers that are not whole"
        raise UnusableScanError(
            f"{path}: holds {kind} ({values.dtype}) from {lowest:g} to {highest:g}, expected "
            f"whole labels from 0 to {_HIGHEST_LABEL}; threshold a probability map first."
        )


def is_same_grid(mask_geometry: VolumeGeometry, scan_geometry: VolumeGeometry) -> bool:
    """Whether the shapes agree and no voxel lies more than a quarter of the finest spacing from its counterpart."""
    return mask_geometry.is_close(scan_geometry, tolerance_mm=_TOLERANCE_VOXELS * min(scan_geometry.spacing_mm))


def check_same_grid(
    path: Path, mask_geometry: VolumeGeometry, scan_geometry: VolumeGeometry, next_step: str = _NEXT_STEP
) -> None:
    """Check that a mask's grid is its scan's, both canonical.

    Raises:
        UnusableScanError: if it is not (`is_same_grid`), with both shapes and affines, and `next_step` at the end.
    """
    if not is_same_grid(mask_geometry, scan_geometry):
        raise UnusableScanError(
            f"{path}: the mask has {describe_grid(mask_geometry)}, but its scan {describe_grid(scan_geometry)}; "
            f"expected one grid; {next_step}"
        )


def describe_grid(geometry: VolumeGeometry) -> str:
    """Return shape and affine in one line, as ``shape [D, H, W] = ..., affine (LPS) ...``, to 4 decimals."""
    affine = np.round(geometry.affine_lps[:3], 4).tolist()
    return f"shape [D, H, W] = {list(geometry.shape)}, affine (LPS) {affine}"
