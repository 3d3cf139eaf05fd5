"""Reads a CT scan, or a mask, into one canonical form; refuses what must not be used.

NIfTI's RAS positions and every maker's axis order end here: what leaves is LPS, `(D, H, W)`, in HU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm3d_ext.data.chunked_volume import CHUNKED_EXTENSION, ChunkedVolume, DamagedVolumeError, write_chunked_volume
from vlm3d_ext.data.dicom_series import read_dicom_series
from vlm3d_ext.data.hounsfield_units import (
    AIR_HU,
    check_hounsfield_units,
    check_rescale,
    replace_padding,
    to_hounsfield_units,
)
from vlm3d_ext.data.nifti_volume import is_nifti_name, read_nifti
from vlm3d_ext.data.scan import Rescale, Scan, UnusableScanError
from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = ["Rescale", "Scan", "UnusableScanError", "read_mask", "read_scan", "write_chunked_mask"]


def read_scan(
    path: str | os.PathLike,
    *,
    rescale: Rescale | tuple[float, float] | None = None,
    spacing_mm: Sequence[float] | None = None,
    check_hu: bool = True,
    series_number: int | None = None,
) -> Scan:
    """Read a chest CT in Hounsfield units, canonical LPS.

    Args:
        path: a .nii or .nii.gz file, or a folder that holds one DICOM series.
        rescale: slope and intercept, for NIfTI files of stored values (CT-RATE v1); never for files already in HU
            (CT-RATE v2), nor for DICOM, which carries its own.
        spacing_mm: `[z, y, x]` in mm, for NIfTI files with a blank header (CT-RATE v1), whose axes are then taken as
            LPS.
        check_hu: refuse a volume whose low percentile is not air; see `vlm3d_ext.data.hounsfield_units`. Switch it off
            only for crops that hold no air.
        series_number: which series to take from a DICOM folder that holds several.

    Raises:
        UnusableScanError: if the scan is missing, damaged or not a trustworthy CT volume; one line, naming file, value,
            expectation, next step.
        ValueError: if an argument does not fit the kind of input.

    Example:
        >>> scan = read_scan("train_fixed/train_1/train_1_a/train_1_a_1.nii.gz")
        >>> old = read_scan("train/train_1/train_1_a/train_1_a_1.nii.gz", rescale=(1, -8192), spacing_mm=[1.5, 0.7,
        0.7])
    """
    path = Path(path)
    if path.is_dir():
        if rescale is not None or spacing_mm is not None:
            raise ValueError(
                f"{path}: is a folder of DICOM files, which carry slope, intercept and spacing; pass neither."
            )
        series = read_dicom_series(path, series_number=series_number)
        return _finished_scan(path, series.values, Rescale(1, 0), series.geometry, "dicom", series.notes, check_hu)
    _check_nifti_name(path)
    if series_number is not None:
        raise ValueError(f"{path}: is a NIfTI file, and series_number {series_number} is for DICOM folders; pass none.")
    spacing = None if spacing_mm is None else _three_numbers(spacing_mm)
    volume = read_nifti(path, blank_header_spacing_mm=spacing)
    applied, notes = volume.rescale, volume.notes
    if rescale is not None:
        applied = Rescale(*(float(value) for value in rescale))
        check_rescale(path, "slope and intercept passed", applied)
        if volume.rescale != Rescale(1, 0):
            raise UnusableScanError(
                f"{path}: its header has slope {volume.rescale.slope:g} and intercept {volume.rescale.intercept:g} of "
                "its own, expected none beside a rescale; pass no rescale."
            )
        notes = (*notes, f"slope {applied.slope:g} and intercept {applied.intercept:g} applied as passed")
    return _finished_scan(path, volume.values, applied, volume.geometry, "nifti", notes, check_hu)


def read_mask(path: str | os.PathLike) -> tuple[np.ndarray, VolumeGeometry]:
    """Read a mask of whole-number labels: a NIfTI file, or one of `write_chunked_mask`.

    Returns:
        labels: (D, H, W), LPS canonical, uint8 if no label exceeds 255, otherwise uint16.
        geometry: its canonical grid.

    Raises:
        UnusableScanError: as `read_scan`, and for labels that are negative, above 65535 or no whole numbers.
    """
    path = Path(path)
    if path.suffix == CHUNKED_EXTENSION:
        return _read_chunked_mask(path)
    _check_nifti_name(path)
    volume = read_nifti(path)
    _check_finite(path, volume.values)
    values = volume.values
    if volume.rescale != Rescale(1, 0):
        values = values.astype(np.float64) * volume.rescale.slope + volume.rescale.intercept
    lowest, highest = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu" or all(np.array_equal(part, np.rint(part)) for part in values)
    if not whole or lowest < 0 or highest > 65535:
        kind = "whole numbers" if whole else "numbers that are not whole"
        raise UnusableScanError(
            f"{path}: holds {kind} from {lowest:g} to {highest:g}, expected labels that are whole numbers from 0 to "
            "65535; threshold a probability map first."
        )
    labels = volume.geometry.to_canonical(values).astype(np.uint8 if highest <= 255 else np.uint16, order="C")
    return labels, volume.geometry.canonical()


def write_chunked_mask(path: str | os.PathLike, mask: np.ndarray, geometry: VolumeGeometry) -> None:
    """Write a mask on a canonical grid in chunks, with its grid; the same content gives the same bytes.

    Args:
        path: name ending in .b2nd.
        mask: (D, H, W) on `geometry`, bool or uint8.
        geometry: the grid.

    Raises:
        ValueError: if the name, the dtype or the shape does not fit, or the grid is not canonical.
        OSError: if the file cannot be written.
    """
    if mask.shape != geometry.shape or not geometry.is_close(geometry.canonical()):
        raise ValueError(f"{path}: a mask of shape {mask.shape} must lie on a canonical grid of it, got {geometry}.")
    values = mask.astype(np.uint8) if mask.dtype == bool else mask
    write_chunked_volume(path, values, {"geometry": geometry.to_dict()})


def _read_chunked_mask(path: Path) -> tuple[np.ndarray, VolumeGeometry]:
    try:
        volume = ChunkedVolume(path)
        labels = volume.read()
        geometry = VolumeGeometry.from_dict(volume.description["geometry"])
    except DamagedVolumeError as error:
        raise UnusableScanError(str(error)) from None
    except (KeyError, TypeError, ValueError):
        geometry = None
    if geometry is None or geometry.shape != labels.shape:
        raise UnusableScanError(
            f"{path}: its description holds no grid of its {labels.shape} voxels, expected a mask; is it an image? "
            "Pass the mask's file, or prepare the scan again."
        )
    return labels, geometry


def _finished_scan(
    path: Path,
    stored: np.ndarray,
    rescale: Rescale,
    geometry: VolumeGeometry,
    source_format: str,
    notes: tuple[str, ...],
    check_hu: bool,
) -> Scan:
    lowest, highest = _check_finite(path, stored)
    if lowest == highest:
        raise UnusableScanError(f"{path}: every voxel is {lowest:g}, expected a picture; leave the file out.")
    hu = to_hounsfield_units(stored, rescale)
    if check_hu:
        check_hounsfield_units(path, hu)
    hu, num_padding = replace_padding(np.ascontiguousarray(geometry.to_canonical(hu)))
    if num_padding:
        notes = (*notes, f"{num_padding} padding voxels outside the field of view set to {AIR_HU} HU")
    return Scan(hu, geometry.canonical(), geometry, source_format, notes)


def _check_finite(path: Path, values: np.ndarray) -> tuple[float, float]:
    """Return (lowest, highest), both finite: NaN and infinities reach at least one of the two."""
    lowest, highest = float(values.min()), float(values.max())
    if not np.isfinite([lowest, highest]).all():
        num_bad = values.size - int(np.count_nonzero(np.isfinite(values)))
        raise UnusableScanError(
            f"{path}: {num_bad} of {values.size} voxels are NaN or infinite, expected numbers; "
            "export it again, with padding as a number."
        )
    return lowest, highest


def _check_nifti_name(path: Path) -> None:
    if path.exists() and not is_nifti_name(path):
        raise UnusableScanError(
            f"{path}: is neither a .nii nor a .nii.gz file; expected one of them, or the folder of a DICOM series; "
            "for a single DICOM file pass its folder."
        )


def _three_numbers(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    if len(spacing_mm) != 3:
        raise ValueError(f"spacing_mm must be three numbers [z, y, x] in mm, got {list(spacing_mm)}.")
    z, y, x = (float(value) for value in spacing_mm)
    return z, y, x
