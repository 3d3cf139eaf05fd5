"""Anatomical masks of several makers, mapped onto the 20 regions of `vlm3d_ext.data.anatomical_regions`.

Read are: a multi-label NIfTI file of TotalSegmentator (v1 or v2 class ids; the names in its header decide where they
are there), a folder of one NIfTI file per class, and a MedSAM2-style NPZ with the labels as ``gts``.
"""

from __future__ import annotations

import difflib
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from data_prep.mask_grid import read_mask_of_scan
from data_prep.raw_case import RawCase
from vlm3d_ext.data.anatomical_regions import (
    LUNG_REGION_INDICES,
    NUM_REGIONS,
    PLEURA_REGION_INDEX,
    region_of_totalsegmentator_class,
)
from vlm3d_ext.data.scan import Scan, UnusableScanError
from vlm3d_ext.data.totalsegmentator_classes import (
    TOTALSEGMENTATOR_VERSIONS,
    region_lookup_table,
    totalsegmentator_class_names,
)

__all__ = [
    "PLEURA_THICKNESS_MM",
    "MaskCoding",
    "add_pleura",
    "find_anatomical_mask",
    "label_names",
    "read_anatomical_mask",
]

PLEURA_THICKNESS_MM = 4.0
"""Thickness of the derived pleura: pleura is below 1 mm, but one voxel of a prepared grid is 0.7 to 4 mm wide."""

_LABEL_NAME = re.compile(r"<Label\b[^>]*\bKey=\"(\d+)\"[^>]*>\s*<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
_CLASS_FILE_EXTENSIONS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class MaskCoding:
    """What the numbers of a mask mean that does not say so itself.

    Args:
        labels: ``"totalsegmentator"`` (class ids) or ``"regions"`` (already 0 to 20).
        totalsegmentator_version: 1 or 2.
    """

    labels: str = "totalsegmentator"
    totalsegmentator_version: int = 2


def find_anatomical_mask(case: RawCase, folders: Sequence[Path], beside_scan: bool) -> Path | None:
    """Return the anatomical mask of a case, or None where there is none.

    Looked for in each folder, by volume id and by the scan's own path below the data set's root: ``<id>.nii.gz``,
    ``<id>.nii``, ``<id>.npz``, ``<id>/segmentations/``, ``<id>/``.

    Args:
        case: the case.
        folders: folders that hold masks.
        beside_scan: look also for ``segmentations/`` in the scan's own folder, where TotalSegmentator's data set has
            it.

    Raises:
        UnusableScanError: if there are several.
    """
    relative = Path(case.source)
    mirrored = relative.with_name(re.sub(r"(\.nii(\.gz)?)$", "", relative.name, flags=re.IGNORECASE))
    found: list[Path] = []
    for folder in folders:
        # CT-RATE has masks for its v2 folders only; they fit the v1 volumes, voxel for voxel.
        fixed = Path(f"{mirrored.parts[0]}_fixed", *mirrored.parts[1:])
        for stem in dict.fromkeys((folder / case.volume_id, folder / mirrored, folder / fixed)):
            files = [stem.with_name(stem.name + extension) for extension in (*_CLASS_FILE_EXTENSIONS, ".npz")]
            found += [path for path in files if path.is_file()]
            found += [path for path in (stem / "segmentations", stem) if _holds_class_files(path)][:1]
    if beside_scan and case.path.is_file() and _holds_class_files(case.path.parent / "segmentations"):
        found.append(case.path.parent / "segmentations")
    found = list(dict.fromkeys(found))
    if len(found) > 1:
        names = " and ".join(str(path) for path in found)
        raise UnusableScanError(
            f"{names}: several anatomical masks of {case.volume_id}, expected one; keep the right one."
        )
    return found[0] if found else None


def _holds_class_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.name.endswith(_CLASS_FILE_EXTENSIONS) for path in folder.iterdir())


def read_anatomical_mask(path: Path, scan: Scan, case: RawCase, coding: MaskCoding) -> np.ndarray:
    """Read a mask and map it onto the 20 regions; the pleura, which no maker has, is not there yet (see `add_pleura`).

    Args:
        path: NIfTI file, NPZ file, or folder of class files.
        scan: the scan that the mask belongs to.
        case: the scan's entry.
        coding: what the numbers mean where the file has no names.

    Returns:
        (D, H, W) uint8 region indices on `scan.geometry`, 0 outside the 20 regions.

    Raises:
        UnusableScanError: if the mask cannot be read, lies on another grid, or holds a class that is not known.
    """
    if path.is_dir():
        return _read_class_folder(path, scan, case)
    if path.suffix.lower() == ".npz":
        labels = _read_npz_labels(path, scan)
        names = None
    else:
        labels = read_mask_of_scan(path, scan, case)
        names = label_names(path)
    return _to_regions(path, labels, names, coding)


def _to_regions(path: Path, labels: np.ndarray, names: dict[int, str] | None, coding: MaskCoding) -> np.ndarray:
    # Slice by slice, here and below: numpy would make 8 bytes of every voxel of the volume at once.
    present = np.array(sorted({int(label) for plane in labels for label in np.flatnonzero(np.bincount(plane.ravel()))}))
    if names is not None:
        table = np.zeros(int(present[-1]) + 1, dtype=np.uint8)
        for label in present[present > 0].tolist():
            if label not in names:
                raise UnusableScanError(
                    f"{path}: holds label {label}, which its own header does not name; expected one of the "
                    f"{len(names)} labels named there; make the mask again with TotalSegmentator."
                )
            table[label] = _region_of_class(path, names[label])
        return _looked_up(table, labels)
    if coding.labels == "regions":
        table, what = np.arange(NUM_REGIONS + 1, dtype=np.uint8), "region indices"
    else:
        table = region_lookup_table(coding.totalsegmentator_version)
        what = f"class ids of TotalSegmentator v{coding.totalsegmentator_version}"
    if present[-1] >= len(table):
        raise UnusableScanError(
            f"{path}: holds label {int(present[-1])}, expected {what} from 0 to {len(table) - 1}; check "
            f"--totalsegmentator-version "
            "and --anatomical-mask-labels, or make the mask with TotalSegmentator's task 'total'."
        )
    return _looked_up(table, labels)


def _looked_up(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    regions = np.empty(labels.shape, dtype=np.uint8)
    for out, plane in zip(regions, labels, strict=True):
        np.take(table, plane, out=out)
    return regions


def _region_of_class(path: Path, name: str) -> int:
    known = {name for version in TOTALSEGMENTATOR_VERSIONS for name in totalsegmentator_class_names(version).values()}
    if name not in known:
        nearest = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f" (nearest: {nearest[0]!r})" if nearest else ""
        raise UnusableScanError(
            f"{path}: class {name!r} is unknown, expected class names of TotalSegmentator's task 'total'{hint}; "
            f"rename it or take it out."
        )
    return region_of_totalsegmentator_class(name)


def label_names(path: Path) -> dict[int, str] | None:
    """Return label -> class name from the label table that TotalSegmentator writes into the header, or None."""
    for extension in nib.load(path).header.extensions:  # type: ignore[attr-defined]
        content = extension.get_content()
        text = content.decode("utf-8", errors="replace") if isinstance(content, bytes) else str(content)
        names = {int(key): name.strip() for key, name in _LABEL_NAME.findall(text)}
        if names:
            return names
    return None


def _read_class_folder(folder: Path, scan: Scan, case: RawCase) -> np.ndarray:
    regions = np.zeros(scan.geometry.shape, dtype=np.uint8)
    for path in sorted(folder.iterdir()):
        extension = next((end for end in _CLASS_FILE_EXTENSIONS if path.name.endswith(end)), None)
        if extension is None or path.name.startswith("."):
            continue
        region = _region_of_class(path, path.name.removesuffix(extension))
        if region == 0:
            continue
        labels = read_mask_of_scan(path, scan, case)
        if labels.max() > 1:
            raise UnusableScanError(
                f"{path}: holds labels up to {int(labels.max())}, expected 0 and 1 in a file of one class; make "
                f"it again."
            )
        # Makers' classes exclude each other; should two touch, the first keeps the voxel, whatever the file system's
        # order.
        regions[(labels == 1) & (regions == 0)] = region
    return regions


def _read_npz_labels(path: Path, scan: Scan) -> np.ndarray:
    """Read ``gts`` of a MedSAM2-style NPZ; such a file has no affine, so its axes are taken as those of the scan's
    file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "gts" not in archive.files:
                raise UnusableScanError(
                    f"{path}: has the arrays {archive.files}, expected 'gts'; save the mask under that name."
                )
            labels = archive["gts"]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, UnusableScanError):
            raise
        raise UnusableScanError(
            f"{path}: cannot be read as an NPZ of plain numbers ({str(error).splitlines()[0]}); save it again "
            f"without Python objects."
        ) from None
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0 or labels.max(initial=0) > 65535:
        raise UnusableScanError(
            f"{path}: 'gts' is {labels.dtype}, expected whole labels from 0 to 65535; save it as uint8."
        )
    if labels.shape != scan.source_geometry.shape:
        raise UnusableScanError(
            f"{path}: 'gts' has shape {list(labels.shape)}, but its scan {list(scan.source_geometry.shape)} [D, H, W]; "
            "expected one shape; make the mask from this scan."
        )
    return scan.source_geometry.to_canonical(labels)


def add_pleura(
    regions: np.ndarray, spacing_mm: Sequence[float], thickness_mm: float = PLEURA_THICKNESS_MM
) -> np.ndarray:
    """Return the mask with region 19 (pleura) added: background voxels within `thickness_mm` of the union of the lungs.

    Distances are between voxel centres, in mm. Where a grid is so coarse that no neighbour lies within the thickness,
    the shell is as thick as the finest spacing, so that it does not vanish. Other regions are never overwritten.

    Args:
        regions: (D, H, W) uint8 region indices.
        spacing_mm: [z, y, x].
        thickness_mm: thickness of the shell.
    """
    lungs = np.isin(regions, LUNG_REGION_INDICES)
    if not lungs.any():
        return regions
    thickness_mm = max(thickness_mm, min(spacing_mm))
    box = _bounding_box(lungs, [int(thickness_mm / spacing) + 1 for spacing in spacing_mm])
    image = sitk.GetImageFromArray(lungs[box].astype(np.uint8))
    image.SetSpacing([float(spacing) for spacing in reversed(spacing_mm)])
    # Maurer's distance is measured from the lung's boundary voxels' centres, exactly, in mm.
    distance = sitk.GetArrayFromImage(
        sitk.SignedMaurerDistanceMap(image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
    )
    with_pleura = regions.copy()
    inside_box = with_pleura[box]
    # 1e-3 mm: distances come in float32, and a neighbour exactly at the thickness belongs to the shell.
    inside_box[(distance <= thickness_mm + 1e-3) & (inside_box == 0)] = PLEURA_REGION_INDEX
    return with_pleura


def _bounding_box(mask: np.ndarray, margins: Sequence[int]) -> tuple[slice, slice, slice]:
    slices = []
    for axis, margin in enumerate(margins):
        filled = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        slices.append(slice(max(0, int(filled[0]) - margin), int(filled[-1]) + margin + 1))
    return slices[0], slices[1], slices[2]
