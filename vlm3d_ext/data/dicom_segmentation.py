"""Masks of lesions as a DICOM segmentation (SEG) that refers to the slices of its CT series."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.sr.codedict import codes
from pydicom.uid import SegmentationStorage
from pydicom.valuerep import DSfloat

from vlm3d_ext.data.dicom_finding_codes import ABNORMAL_STRUCTURE, PRIVATE_SCHEME, finding_code
from vlm3d_ext.data.dicom_source_slices import (
    SourceSeries,
    check_long_string,
    derived_uid,
    read_source_series,
    write_dicom_object,
)
from vlm3d_ext.data.scan import UnusableScanError
from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = ["read_dicom_segmentation", "write_dicom_segmentation"]

_PRODUCT = "VLM3D"
# Far from the numbers that scanners give to their own series.
_SERIES_NUMBER = 9001
# Series are accepted whose slices lie a little off an even grid (`vlm3d_ext.data.dicom_series`); a grid that is another
# one, or runs the other way, is off by at least a whole voxel.
_LARGEST_OFFSET_OF_SPACING = 0.75
_ORIENTATION_TOLERANCE = 1e-2


def write_dicom_segmentation(
    path: str | os.PathLike,
    series_files: Sequence[Path],
    masks: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    geometry: VolumeGeometry,
    *,
    algorithm_version: str,
    copy_patient_module: bool = False,
    created: datetime.datetime | None = None,
) -> Path | None:
    """Write masks as one binary SEG, one segment for each disease that was drawn.

    A disease without a voxel gets no segment: a segment without frames is not allowed, and frames without a voxel say
    nothing. Whether it was looked for is in the report and in the predictions. Only slices with a voxel have a frame,
    and each frame refers to its one slice; the list of referenced instances holds all slices of the series along k,
    since all were looked at.

    Names, numbers and dates of the patient and the study are left empty unless `copy_patient_module` is set; the UIDs
    of study, series, slices and frame of reference stay in either case. An archive that files by PatientID needs them
    set, and the file is then as confidential as the scan.

    UIDs follow from the series, the masks, the names and the version, so writing again gives the same object, not a
    second one. The bytes are the same, too, where `created` is; highdicom names its version in them.

    Args:
        path: the file.
        series_files: (D,) the files of the slices along k, `DicomSeries.files`.
        masks: disease key -> (D, H, W) bool on the series' own grid.
        names: disease key -> name of the finding, the segment's label; at most 64 characters.
        geometry: grid of the masks, `DicomSeries.geometry`, "source_geometry" in a prepared case's sidecar.
        algorithm_version: of what drew them; at most 64 characters.
        copy_patient_module: copy what identifies the patient and the study from the series.
        created: date that the file gives as its own; None is now.

    Returns:
        `path`, or None where nothing is drawn and no file is written; one that was there before is removed, because it
        would speak of other masks.

    Raises:
        UnusableScanError: if the slices cannot be referred to, or do not lie on `geometry`.
        ValueError: if a mask has another shape or type, a name is missing, or a text is too long.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    check_long_string(path, "algorithm_version", algorithm_version)
    _check_masks(path, masks, names, geometry)
    source = read_source_series(path, series_files, copy_patient_module)
    _check_grid(path, source, geometry)
    drawn = [key for key in masks if masks[key].any()]
    if not drawn:
        path.unlink(missing_ok=True)
        return None
    content = _digest(source, {key: masks[key] for key in drawn}, names, algorithm_version, copy_patient_module)
    dataset = _segmentation(source, {key: masks[key] for key in drawn}, names, geometry, algorithm_version, content)
    write_dicom_object(path, dataset, source, created or datetime.datetime.now())
    return path


def _check_masks(
    path: Path, masks: Mapping[str, np.ndarray], names: Mapping[str, str], geometry: VolumeGeometry
) -> None:
    for key, mask in masks.items():
        if mask.shape != geometry.shape or mask.dtype != np.bool_:
            raise ValueError(
                f"{path}: the mask of {key!r} is {mask.dtype} of shape {mask.shape}, expected bool of shape "
                f"{geometry.shape}, the series' own grid; bring it back to that grid first."
            )
        if key not in names:
            raise ValueError(f"{path}: {key!r} has a mask but no name, expected one in names; add it.")
        check_long_string(path, f"the name of {key!r}", names[key])
    labels = [names[key] for key in masks]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ValueError(f"{path}: two masks are called {repeated[0]!r}, expected names of their own; rename one.")


def _check_grid(path: Path, source: SourceSeries, geometry: VolumeGeometry) -> None:
    depth, height, width = geometry.shape
    first = source.slices[0]
    found = (len(source.slices), first.Rows, first.Columns)
    if found != geometry.shape:
        raise UnusableScanError(
            f"{path}: the series has {found[0]} slices of {found[1]} x {found[2]}, but the masks' grid is {depth} x "
            f"{height} x {width}; pass DicomSeries.files and DicomSeries.geometry of the same series."
        )
    orientation = np.array(first.ImageOrientationPatient, dtype=float).reshape(2, 3)
    turned = float(np.abs(orientation - geometry.directions[:, :2].T).max())
    positions = np.array([one.ImagePositionPatient for one in source.slices], dtype=float)
    corners = np.zeros((depth, 3))
    corners[:, 0] = np.arange(depth)
    largest = float(np.linalg.norm(positions - geometry.positions_lps(corners), axis=1).max())
    if turned > _ORIENTATION_TOLERANCE or largest > _LARGEST_OFFSET_OF_SPACING * min(geometry.spacing_mm):
        raise UnusableScanError(
            f"{path}: slices lie up to {largest:.4g} mm from the masks' grid, and their axes differ by {turned:.2g}, "
            f"expected less than a voxel ({min(geometry.spacing_mm):.4g} mm) and the same axes; pass the files along "
            "k, as DicomSeries.files has them."
        )


def _digest(
    source: SourceSeries,
    masks: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    algorithm_version: str,
    copy_patient_module: bool,
) -> tuple[str, ...]:
    """Return what the UIDs follow from."""
    hashes = [f"{key}={names[key]}:{hashlib.sha256(np.packbits(masks[key]).tobytes()).hexdigest()}" for key in masks]
    return (source.series_uid, *source.instance_uids, *hashes, algorithm_version, str(copy_patient_module))


def _segmentation(
    source: SourceSeries,
    masks: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    geometry: VolumeGeometry,
    algorithm_version: str,
    content: tuple[str, ...],
) -> Dataset:
    # Slices without a voxel are left out before the masks are stacked, which would take one byte a voxel and segment.
    heights = np.flatnonzero(np.any([mask.any(axis=(1, 2)) for mask in masks.values()], axis=0))
    pixels = np.stack([mask[heights] for mask in masks.values()], axis=-1).astype(np.uint8)
    algorithm = hd.AlgorithmIdentificationSequence(
        name=_PRODUCT, family=codes.DCM.ArtificialIntelligence, version=algorithm_version, source=_PRODUCT
    )
    descriptions, has_private = [], False
    for number, key in enumerate(masks, start=1):
        code = finding_code(key, names[key])
        has_private = has_private or code.is_private
        segment = hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=names[key],
            segmented_property_category=ABNORMAL_STRUCTURE,
            segmented_property_type=code.property_type,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            anatomic_regions=None if code.region is None else [code.region],
        )
        segment.SegmentDescription = names[key]
        descriptions.append(segment)
    dataset = hd.seg.Segmentation(
        source_images=[_with_shared_grid(source.slices[k], source.slices[0], geometry) for k in heights],
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=derived_uid("segmentation series", *content),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=derived_uid("segmentation", *content),
        instance_number=1,
        manufacturer=_PRODUCT,
        manufacturer_model_name=_PRODUCT,
        software_versions=algorithm_version,
        # Software has no serial number, but the attribute may not be empty.
        device_serial_number="none",
        series_description=f"{_PRODUCT} lesions, not for clinical use",
        content_label="LESIONS",
        content_description="Lesions drawn by software; not for clinical use",
        coding_schemes=[CodingSchemeIdentificationItem(PRIVATE_SCHEME, name=_PRODUCT)] if has_private else None,
    )
    dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence = [_reference(one) for one in source.slices]
    dataset.SourceImageSequence = [_reference(one) for one in source.slices]
    # The library draws this one at random.
    organization = derived_uid("segmentation dimensions", *content)
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    return dataset


def _with_shared_grid(one: Dataset, first: Dataset, geometry: VolumeGeometry) -> Dataset:
    """Return a copy of a slice's header for the library, which takes from it what all frames share."""
    shared = Dataset()
    shared.update(one)
    # Equal but for rounding, or the series would have been refused; the library asks for the same digits.
    shared.ImageOrientationPatient = first.ImageOrientationPatient
    shared.PixelSpacing = first.PixelSpacing
    # Of the series, not of the frames: those without a voxel are left out.
    shared.SpacingBetweenSlices = DSfloat(geometry.spacing_mm[0], auto_format=True)
    shared.SliceThickness = first.get("SliceThickness") or shared.SpacingBetweenSlices
    return shared


def _reference(one: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = one.SOPClassUID
    item.ReferencedSOPInstanceUID = one.SOPInstanceUID
    return item


def read_dicom_segmentation(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a segmentation that `write_dicom_segmentation` wrote.

    Returns:
        label of the segment -> (D, H, W) bool, the slices in the order of the instances that the file refers to.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no binary DICOM segmentation, or a frame refers to no slice of the list or to several.
    """
    path = Path(path)
    try:
        dataset = dcmread(path)
    except InvalidDicomError:
        raise ValueError(f"{path}: is no DICOM file, expected a segmentation; check the path.") from None
    if dataset.get("SOPClassUID") != SegmentationStorage or dataset.get("SegmentationType") != "BINARY":
        raise ValueError(f"{path}: is no binary DICOM segmentation, expected one; check the path.")
    listed = dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    place = {str(item.ReferencedSOPInstanceUID): k for k, item in enumerate(listed)}
    shape = (len(place), dataset.Rows, dataset.Columns)
    by_number = {int(item.SegmentNumber): np.zeros(shape, dtype=bool) for item in dataset.SegmentSequence}
    frames = dataset.pixel_array.reshape(-1, *shape[1:]).astype(bool)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for number, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        # A file with one segment says so once for all its frames.
        identification = groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
        referred = [
            place.get(str(image.ReferencedSOPInstanceUID))
            for derivation in groups.DerivationImageSequence
            for image in derivation.SourceImageSequence
        ]
        if len(referred) != 1 or referred[0] is None:
            raise ValueError(
                f"{path}: frame {number + 1} refers to {len(referred)} slices ({referred}), expected one that the file "
                "lists; read it with another program."
            )
        by_number[int(identification[0].ReferencedSegmentNumber)][referred[0]] |= frames[number]
    return {str(item.SegmentLabel): by_number[int(item.SegmentNumber)] for item in dataset.SegmentSequence}
