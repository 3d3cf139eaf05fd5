"""Reading the lesion masks of one scan, whatever their source, as binary arrays on the scan's grid."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from data_prep.lesion_masks import LesionMask
from data_prep.mask_grid import check_same_grid, check_whole_labels, describe_grid, is_same_grid, read_placed
from data_prep.raw_case import RawCase
from data_prep.totalsegmentator_lesions import class_voxels
from vlm3d_ext.data.scan import Scan, UnusableScanError
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import resample_binary_mask

__all__ = ["ScanLesions", "read_lesion_masks"]

_RESAMPLE = "make the mask from this scan, or pass --resample-lesion-masks to have it resampled onto the scan."


@dataclass(frozen=True, eq=False)
class ScanLesions:
    """The lesions of one scan.

    Args:
        masks: disease key -> (D, H, W) uint8, 0 or 1, on the scan's canonical grid.
        partial: diseases whose annotation may lack lesions.
        notes: what was done to the masks, for the log.
    """

    masks: Mapping[str, np.ndarray]
    partial: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_lesion_masks(
    masks: Mapping[str, LesionMask], scan: Scan, case: RawCase, resample: bool = False
) -> ScanLesions:
    """Read all lesion masks of a scan; instances (1 to N) become one mask.

    Args:
        masks: disease key -> where its mask is.
        scan: the scan.
        case: its entry.
        resample: bring masks on another grid onto the scan's, instead of refusing them. Masks of 4D files and of
            CT-RATE v1 scans cannot be: where they lie is not known.

    Raises:
        UnusableScanError: if a mask cannot be read, holds anything but whole numbers from 0, holds a label that its
            source does not know, or lies on another grid.
    """
    by_file: dict[Path, dict[str, LesionMask]] = defaultdict(dict)
    for disease, mask in masks.items():
        by_file[mask.path][disease] = mask
    arrays: dict[str, np.ndarray] = {}
    notes: list[str] = []
    for path, of_file in by_file.items():
        if any(mask.findings for mask in of_file.values()):
            arrays |= _read_finding_channels(path, of_file, scan)
            continue
        labels, geometry = read_placed(path, scan, case)
        fits = is_same_grid(geometry, scan.geometry)
        if not fits and (not resample or case.spacing_mm is not None):
            check_same_grid(path, geometry, scan.geometry, _next_step(case))
        for disease, mask in of_file.items():
            array = _disease_voxels(labels, mask)
            if not fits:
                array = _resampled(path, array, geometry, scan)
                notes.append(f"{disease}: mask resampled onto the scan from {describe_grid(geometry)}")
            arrays[disease] = array
    return ScanLesions(
        {disease: arrays[disease] for disease in masks},
        tuple(disease for disease, mask in masks.items() if mask.partial),
        tuple(notes),
    )


def _next_step(case: RawCase) -> str:
    return _RESAMPLE if case.spacing_mm is None else "make the mask from this scan; a v1 scan's place is not known."


def _disease_voxels(labels: np.ndarray, mask: LesionMask) -> np.ndarray:
    if mask.task is not None and mask.class_name is not None:
        return class_voxels(mask.path, labels, mask.task, mask.class_name)
    return (labels > 0).astype(np.uint8)


def _resampled(path: Path, array: np.ndarray, geometry: VolumeGeometry, scan: Scan) -> np.ndarray:
    resampled = resample_binary_mask(array, geometry, scan.geometry)
    if array.any() and not resampled.any():
        raise UnusableScanError(
            f"{path}: its {int(array.sum())} voxels all lie outside the scan, with {describe_grid(geometry)} against "
            f"{describe_grid(scan.geometry)}; expected a mask of this scan; check which scan it belongs to."
        )
    return resampled


def _read_finding_channels(path: Path, masks: Mapping[str, LesionMask], scan: Scan) -> dict[str, np.ndarray]:
    """Read a 4D file whose first axis, in NIfTI's order, is the finding, and whose other axes are the scan's as stored.

    Its affine is not looked at: a NIfTI affine places the first three axes, and here the first is none of space.
    """
    num_findings = next(iter(masks.values())).num_findings
    values = _values_4d(path)
    expected = (num_findings, *reversed(scan.source_geometry.shape))
    if scan.source_format != "nifti" or values.shape != expected:
        raise UnusableScanError(
            f"{path}: has shape {list(values.shape)}, but {num_findings} findings on its {scan.source_format} scan "
            f"stored as [i, j, k] = {list(expected[1:])}, expected {list(expected)} of a NIfTI scan; get the file of "
            f"this very reconstruction, or leave it out."
        )
    arrays = {}
    for disease, mask in masks.items():
        union = np.zeros(scan.source_geometry.shape, dtype=bool)
        for finding in mask.findings:
            channel = values[finding].T
            check_whole_labels(path, channel)
            union |= channel > 0
        arrays[disease] = np.ascontiguousarray(scan.source_geometry.to_canonical(union), dtype=np.uint8)
    return arrays


def _values_4d(path: Path) -> np.ndarray:
    try:
        return np.asanyarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnusableScanError(
            f"{path}: cannot be read as NIfTI ({reason}), expected a 4D file of findings; copy it again."
        ) from None
