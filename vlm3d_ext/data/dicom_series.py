"""One CT series from a folder of DICOM files: chosen, sorted and checked by its headers, decoded by GDCM.

Decoding, JPEG 2000 and the other transfer syntaxes included, and slope and intercept are GDCM's work (through
SimpleITK). Which files make up the series, their order and their spacing is decided here from position and orientation,
because a series reader stacks whatever it is given at one even distance. Nothing that identifies a patient, a study or
a date is read beyond this file or put into a message.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from vlm3d_ext.data.chest_check import LEAST_CHEST_EXTENT_MM, MINIMUM_SLICES
from vlm3d_ext.data.scan import UnusableScanError
from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = ["DicomSeries", "dicom_series_files", "read_dicom_series"]

# Orientation and position are decimal strings of at most 16 characters; scanners round positions to 0.1 mm or finer.
_ORIENTATION_TOLERANCE = 1e-3
_POSITION_ROUNDING_MM = 0.1
_POSITION_ROUNDING_OF_SPACING = 0.1
_SAME_POSITION_MM = 1e-3
_MAXIMUM_LISTED_GAPS = 3
_CT_STORAGE_CLASSES = (b"1.2.840.10008.5.1.4.1.1.2",)
_MEDIA_STORAGE_CLASS = re.compile(rb"\x02\x00\x02\x00UI..([0-9.]+)", re.DOTALL)
_SERIES_NUMBER = re.compile(r"[+-]?\d{1,11}")
_MODALITY = re.compile(r"[A-Z0-9_]{1,16}")
_LOOKS_LIKE_UID = re.compile(r"\d+(\.\d+){4,}")


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """A CT series as one volume.

    Args:
        values: (D, H, W) in HU as the files' own slope and intercept give them; slices along k, rows along j, columns
            along i.
        geometry: the grid of the series as acquired; k grows along the normal of the slices.
        notes: what was noticed and put right, in words.
        files: (D,) the file of each slice along k, to refer back to; their names can hold identifiers, so they are for
            reading only.
    """

    values: np.ndarray
    geometry: VolumeGeometry
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class _Slice:
    """The header of one file; `series` separates series inside this module and goes nowhere else."""

    path: Path
    series: str
    series_number: str
    modality: str
    image_type: str
    num_rows: int
    num_columns: int
    num_frames: int
    samples_per_pixel: int
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    pixel_spacing: tuple[float, ...]
    slice_thickness: tuple[float, ...]
    rescale: tuple[str, str]


def read_dicom_series(folder: Path, series_number: int | None = None) -> DicomSeries:
    """Read the one CT series in `folder` (subfolders are not searched).

    Localizer images and objects without pixels are left out with a note, and so are exact copies of a slice.

    Args:
        folder: folder with one file per slice, in any transfer syntax that GDCM decodes.
        series_number: DICOM SeriesNumber of the series to take, where the folder holds several; None takes the only
            one, or the only one that can be a chest scan, with a note.

    Raises:
        UnusableScanError: if there is no image, more than one series that may be meant, another modality than CT,
            slices that differ in size, spacing or orientation, a tilted or irregular stack, two different slices at one
            position, or a file that cannot be decoded.
    """
    chosen, geometry, notes = _ordered_slices(folder, series_number)
    return DicomSeries(_decoded(folder, chosen), geometry, notes, tuple(one.path for one in chosen))


def dicom_series_files(folder: Path, series_number: int | None = None) -> tuple[Path, ...]:
    """Return the files that `read_dicom_series` would read, one for each slice along k, without their pixels.

    Args:
        folder: folder with one file per slice.
        series_number: DICOM SeriesNumber of the series to take, where the folder holds several.

    Raises:
        UnusableScanError: as `read_dicom_series`, except for pixels that cannot be decoded.
    """
    chosen, _, _ = _ordered_slices(folder, series_number)
    return tuple(one.path for one in chosen)


def _ordered_slices(folder: Path, series_number: int | None) -> tuple[list[_Slice], VolumeGeometry, tuple[str, ...]]:
    """Return the slices of the one series in the order of k, their grid, and what was noticed."""
    slices, notes = _read_headers(folder)
    slices, localizer_notes = _without_localizers(folder, slices)
    chosen, choice_notes = _chosen_series(folder, slices, series_number)
    _check_uniform(folder, chosen)
    normal = _slice_normal(folder, chosen[0])
    chosen = sorted(chosen, key=lambda one: (float(np.dot(one.position, normal)), one.path.name))
    chosen, copy_notes = _without_copies(folder, chosen, normal)
    if len(chosen) < 2:
        raise UnusableScanError(f"{folder}: has fewer than 2 slices, {len(chosen)}; expected a volume; leave it out.")
    geometry = _stack_geometry(folder, chosen, normal)
    return chosen, geometry, (*notes, *localizer_notes, *choice_notes, *copy_notes)


def _read_headers(folder: Path) -> tuple[list[_Slice], tuple[str, ...]]:
    if not folder.is_dir():
        raise UnusableScanError(f"{folder}: no such folder, expected one with the slices of a series; check the path.")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    slices, num_without_image = [], 0
    # GDCM warns on stderr about odd tags, and may quote their values, which can be a patient's.
    warnings_shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        for number, path in enumerate(paths, start=1):
            reader = sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(str(path))
            try:
                reader.ReadImageInformation()
            except RuntimeError:
                if _claims_to_be_ct(path):
                    raise UnusableScanError(
                        f"{folder}: {_file_name(path, number, len(paths))} is a CT slice that cannot be read; "
                        "expected a whole file; copy the series again."
                    ) from None
                num_without_image += 1
                continue
            slices.append(_slice_header(path, reader))
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warnings_shown)
    if not slices:
        raise UnusableScanError(
            f"{folder}: no DICOM images among its {len(paths)} files, expected one series of CT slices; "
            "pass the folder that holds the slices themselves (or the .nii.gz file, if it is NIfTI)."
        )
    notes = (f"{num_without_image} files without a DICOM image ignored",) if num_without_image else ()
    return slices, notes


def _claims_to_be_ct(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            found = _MEDIA_STORAGE_CLASS.search(file.read(2048))
    except OSError:
        # What cannot even be opened may be a slice; leaving it out in silence could shorten the scan.
        return True
    return found is not None and found.group(1) in _CT_STORAGE_CLASSES


def _slice_header(path: Path, reader: sitk.ImageFileReader) -> _Slice:
    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in text(tag).split("\\")) if text(tag) else ()
        except ValueError:
            return ()

    def integer(tag: str, default: int) -> int:
        values = numbers(tag)
        return int(values[0]) if values and np.isfinite(values[0]) else default

    return _Slice(
        path=path,
        series=text("0020|000e"),
        # These two are quoted in messages, so they may be nothing but what the standard allows.
        series_number=text("0020|0011") if _SERIES_NUMBER.fullmatch(text("0020|0011")) else "unknown",
        modality=text("0008|0060") if _MODALITY.fullmatch(text("0008|0060")) else "unknown",
        image_type=text("0008|0008").upper(),
        num_rows=integer("0028|0010", 0),
        num_columns=integer("0028|0011", 0),
        num_frames=integer("0028|0008", 1),
        samples_per_pixel=integer("0028|0002", 1),
        position=numbers("0020|0032"),
        orientation=numbers("0020|0037"),
        pixel_spacing=numbers("0028|0030"),
        slice_thickness=numbers("0018|0050"),
        rescale=(text("0028|1053"), text("0028|1052")),
    )


def _file_name(path: Path, number: int, total: int) -> str:
    """Name a file of the folder, by its place where exporters have put an identifier into its name."""
    return f"file {number} of {total} (by name)" if _LOOKS_LIKE_UID.search(path.name) else path.name


def _without_localizers(folder: Path, slices: list[_Slice]) -> tuple[list[_Slice], tuple[str, ...]]:
    kept = [one for one in slices if "LOCALIZER" not in one.image_type.split("\\")]
    num_localizers = len(slices) - len(kept)
    if not kept:
        raise UnusableScanError(
            f"{folder}: all {num_localizers} images are localizers, expected a CT series; pass the folder of the scan "
            "itself."
        )
    return kept, ((f"{num_localizers} localizer images skipped",) if num_localizers else ())


def _chosen_series(
    folder: Path, slices: list[_Slice], series_number: int | None
) -> tuple[list[_Slice], tuple[str, ...]]:
    """Return the one series to read, and how it was chosen where there was a choice.

    Of several, the only one that can be a chest scan is taken: thin and thick reconstructions of one scan are for the
    user to choose from, but a scout in a series of its own, a dose report or a bolus track need no question.
    """
    by_series: dict[str, list[_Slice]] = defaultdict(list)
    for one in slices:
        by_series[one.series].append(one)
    groups = list(by_series.values())
    notes: tuple[str, ...] = ()
    if series_number is not None:
        groups = [group for group in groups if group[0].series_number == str(series_number)]
    elif len(groups) > 1:
        candidates = [group for group in groups if _can_be_a_chest_scan(group)]
        if len(candidates) == 1:
            left_out = sorted(_series_description(group) for group in groups if group is not candidates[0])
            notes = (
                f"of {len(groups)} series the only one that can be a chest scan was taken, "
                f"{_series_description(candidates[0])}; left out: {'; '.join(left_out)}",
            )
            groups = candidates
    if len(groups) != 1:
        found = "; ".join(sorted(map(_series_description, by_series.values())))
        wanted = "one series" if series_number is None else f"one series with number {series_number}"
        raise UnusableScanError(
            f"{folder}: holds {len(by_series)} series ({found}), expected {wanted}; "
            "pass series_number (in a bundle --series_number), or put each series into its own folder."
        )
    group = groups[0]
    modalities = sorted({one.modality for one in group})
    if modalities != ["CT"]:
        raise UnusableScanError(
            f"{folder}: modality is {', '.join(modalities)}, expected CT; pass the folder of a CT series."
        )
    return group, notes


def _series_description(group: list[_Slice]) -> str:
    text = f"number {group[0].series_number}: {group[0].modality}, {len(group)} slices"
    if not _can_be_a_chest_scan(group):
        return text
    heights = _heights_mm(group)
    thickness = group[0].slice_thickness
    spacing = (heights[-1] - heights[0]) / (len(heights) - 1)
    return f"{text} every {spacing:.3g} mm" + (f", {thickness[0]:.3g} mm thick" if thickness else "")


def _can_be_a_chest_scan(group: list[_Slice]) -> bool:
    """Whether a series is CT, with slices enough and high enough."""
    if {one.modality for one in group} != {"CT"}:
        return False
    heights = _heights_mm(group)
    if len(heights) < MINIMUM_SLICES:
        return False
    # From outer edge to outer edge: the slices at both ends reach half a step further than their centres.
    return float(heights[-1] - heights[0]) * len(heights) / (len(heights) - 1) >= LEAST_CHEST_EXTENT_MM


def _heights_mm(group: list[_Slice]) -> np.ndarray:
    """Return the different heights of slices along their normal, ascending; none where a header does not say."""
    if any(len(one.position) != 3 or len(one.orientation) != 6 for one in group):
        return np.empty(0)
    normal = np.cross(group[0].orientation[:3], group[0].orientation[3:])
    heights = np.array([one.position for one in group]) @ normal
    return np.unique(np.round(heights, 2)) if np.isfinite(heights).all() else np.empty(0)


def _check_uniform(folder: Path, slices: list[_Slice]) -> None:
    for one in slices:
        if one.num_frames > 1 or one.samples_per_pixel != 1:
            raise UnusableScanError(
                f"{folder}: an image has {one.num_frames} frames and {one.samples_per_pixel} samples per pixel, "
                "expected one grey frame per file; convert enhanced multi-frame DICOM to NIfTI or to single frames."
            )
        if len(one.position) != 3 or len(one.orientation) != 6 or len(one.pixel_spacing) != 2:
            raise UnusableScanError(
                f"{folder}: a slice lacks ImagePositionPatient, ImageOrientationPatient or PixelSpacing, expected all "
                "three; export the original axial images."
            )
        if not np.isfinite([*one.position, *one.orientation]).all() or min(one.pixel_spacing) <= 0:
            raise UnusableScanError(
                f"{folder}: a slice has pixel spacing {list(one.pixel_spacing)} mm, expected positive numbers and a "
                "finite position; export the series again."
            )
    sizes = Counter((one.num_rows, one.num_columns) for one in slices)
    if len(sizes) > 1:
        found = ", ".join(f"{count} of {rows} x {columns}" for (rows, columns), count in sorted(sizes.items()))
        raise UnusableScanError(
            f"{folder}: slices differ in size ({found}), expected one size; remove the images of another "
            "reconstruction."
        )
    first = slices[0]
    for name, tolerance in (("pixel_spacing", 1e-4), ("orientation", _ORIENTATION_TOLERANCE)):
        values = np.array([getattr(one, name) for one in slices])
        largest = float(np.abs(values - getattr(first, name)).max())
        if largest > tolerance:
            raise UnusableScanError(
                f"{folder}: slices differ in {name.replace('_', ' ')} by up to {largest:.4g}, expected at most "
                f"{tolerance:g}; put each reconstruction into its own folder."
            )


def _slice_normal(folder: Path, one: _Slice) -> np.ndarray:
    row, column = np.array(one.orientation[:3]), np.array(one.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if (
        max(abs(length - 1) for length in lengths) > _ORIENTATION_TOLERANCE
        or abs(row @ column) > _ORIENTATION_TOLERANCE
    ):
        raise UnusableScanError(
            f"{folder}: image orientation {np.round(one.orientation, 4).tolist()} is not orthogonal, expected two unit "
            "vectors at right angles; export the series again."
        )
    normal = np.cross(row, column)
    return normal / np.linalg.norm(normal)


def _without_copies(folder: Path, slices: Sequence[_Slice], normal: np.ndarray) -> tuple[list[_Slice], tuple[str, ...]]:
    """Drop slices that repeat their predecessor exactly, and refuse different pictures at one position."""
    kept: list[_Slice] = []
    for one in slices:
        height = float(np.dot(one.position, normal))
        if not kept or height - float(np.dot(kept[-1].position, normal)) > _SAME_POSITION_MM:
            kept.append(one)
            continue
        same_place = np.allclose(one.position, kept[-1].position, rtol=0, atol=_SAME_POSITION_MM)
        if not same_place or not np.array_equal(_decoded(folder, [one]), _decoded(folder, [kept[-1]])):
            raise UnusableScanError(
                f"{folder}: two different slices at {height:.2f} mm along the slice normal, expected one per position; "
                "put each phase or reconstruction into its own folder."
            )
    num_copies = len(slices) - len(kept)
    return kept, ((f"{num_copies} duplicate slices dropped",) if num_copies else ())


def _stack_geometry(folder: Path, slices: Sequence[_Slice], normal: np.ndarray) -> VolumeGeometry:
    """Return the grid of sorted slices, after checking that they are evenly spaced along their normal."""
    positions = np.array([one.position for one in slices])
    heights = positions @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    missing = np.maximum(np.rint(gaps / usual).astype(int) - 1, 0)
    if missing.any():
        places = [f"{heights[n]:.2f} to {heights[n + 1]:.2f}" for n in np.flatnonzero(missing)]
        listed = ", ".join(places[:_MAXIMUM_LISTED_GAPS]) + (", ..." if len(places) > _MAXIMUM_LISTED_GAPS else "")
        raise UnusableScanError(
            f"{folder}: {int(missing.sum())} slices missing at {listed} mm along the slice normal, expected one every "
            f"{usual:.4g} mm; complete the series."
        )
    spacing = float((heights[-1] - heights[0]) / (len(slices) - 1))
    largest_offset = float(np.abs(heights - heights[0] - spacing * np.arange(len(slices))).max())
    allowed = max(_POSITION_ROUNDING_MM, _POSITION_ROUNDING_OF_SPACING * spacing)
    if largest_offset > allowed:
        raise UnusableScanError(
            f"{folder}: irregular slice spacing, {gaps.min():.4g} to {gaps.max():.4g} mm, slices lie up to "
            f"{largest_offset:.3g} mm from an even grid, expected at most {allowed:.3g}; resample the series evenly "
            "first."
        )
    first = slices[0]
    row_spacing, column_spacing = first.pixel_spacing
    drift = positions - positions[0] - np.outer(heights - heights[0], normal)
    largest_drift = float(np.linalg.norm(drift, axis=1).max())
    if largest_drift > max(_POSITION_ROUNDING_MM, 0.5 * min(row_spacing, column_spacing)):
        degrees = float(np.degrees(np.arctan2(largest_drift, heights[-1] - heights[0])))
        raise UnusableScanError(
            f"{folder}: the stack leans {degrees:.2f} degrees from the slice normal ({largest_drift:.3g} mm, gantry "
            "tilt), expected a right-angled stack; resample it to one first."
        )
    affine = np.eye(4)
    # The first in-plane vector is the direction of a row: along it the column index i grows, by the spacing between
    # columns.
    affine[:3, 0] = np.array(first.orientation[:3]) * column_spacing
    affine[:3, 1] = np.array(first.orientation[3:]) * row_spacing
    affine[:3, 2] = normal * spacing
    affine[:3, 3] = positions[0]
    return VolumeGeometry((len(slices), first.num_rows, first.num_columns), affine)


def _decoded(folder: Path, slices: Sequence[_Slice]) -> np.ndarray:
    """Return the slices' pixels (D, H, W) in HU."""
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(one.path) for one in slices])
    if len({one.rescale for one in slices}) > 1:
        # The first slice would otherwise choose the type of all, and cut off what does not fit it.
        reader.SetOutputPixelType(sitk.sitkFloat32)
    warnings_shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        volume = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError:
        # The reader's own message quotes paths and tags, so find the file by reading one at a time.
        if len(slices) > 1:
            for one in slices:
                _decoded(folder, [one])
        names = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        name = _file_name(slices[0].path, names.index(slices[0].path) + 1, len(names))
        raise UnusableScanError(
            f"{folder}: the pixels of {name} cannot be decoded, expected a whole file in a standard transfer syntax; "
            "copy the series again."
        ) from None
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warnings_shown)
    return volume.reshape(len(slices), slices[0].num_rows, slices[0].num_columns)
