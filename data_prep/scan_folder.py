"""The second entrance: a folder of NIfTI files or DICOM series, or a single one, without tables.

Names come from the path, never from DICOM headers, which would carry a patient's identity into the outputs.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from data_prep.lesion_masks import flat_mask_parts
from data_prep.raw_case import LayoutError, RawCase, RawDataset
from data_prep.readable_folders import walk_readable
from data_prep.scan_kind import NIFTI_EXTENSIONS, NPZ_EXTENSION, is_dicom_file
from vlm3d_ext.data.patient_split import split_patients

__all__ = ["read_scan_folder"]

MASK_FOLDERS = ("segmentations", "lesion_masks", "lesion_masks_original_grid", "anatomical_masks")
"""Folders of masks, as TotalSegmentator's data set and we ourselves call them; what is in them is no scan."""

# A file name may have 255 bytes, and extensions and the suffix of a half-written file come on top. Exports of a picture
# archive nest folders whose names are 64 characters long.
_LONGEST_ID = 160
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9-]+")


def read_scan_folder(
    source: Path,
    *,
    split: str = "test",
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    num_labels: int = 0,
    skip: Iterable[Path] = (),
    with_prepared: bool = False,
    taken_ids: Iterable[str] = (),
) -> RawDataset:
    """Find the scans of a folder; opens no volume.

    A scan is a ``.nii`` or ``.nii.gz`` file that is not named like a lesion mask, at any depth, or a folder that
    holds DICOM files itself. The volume id is the path inside the folder with everything but letters, digits and
    hyphen replaced by ``_``; where two paths give one id, all of them get a hash of their path as a suffix, and so
    does the end of one that is too long for a file name. The patient is the first folder below those that all scans
    share, or the scan itself where it lies in none.

    Args:
        source: a folder, a NIfTI file, or a folder with one DICOM series.
        split: ``"training"``, ``"validation"`` or ``"test"`` for all, or ``"by_patient"``.
        seed: for ``"by_patient"``.
        validation_fraction: for ``"by_patient"``, share of the patients outside test.
        test_fraction: for ``"by_patient"``, share of all patients.
        num_labels: number of labels of each case, all unknown.
        skip: folders that hold no scans (masks, the output).
        with_prepared: take ``.npz`` files for scans, too, as cases that are prepared already, with the ``.json`` of
            the same name as their sidecar.
        taken_ids: volume ids that no scan may have; one whose path gives such an id gets a hash as a suffix, too.

    Raises:
        LayoutError: if there is no scan.
    """
    single_file = source.is_file()
    root = source.parent if single_file else source
    remarks: list[str] = []
    skipped = {path.resolve() for path in skip}
    paths, ignored = ([source], 0) if single_file else _find_scans(source, skipped, remarks, with_prepared)
    if not paths:
        raise LayoutError(
            f"{source.name or source}: holds neither a NIfTI file (.nii, .nii.gz) nor a DICOM series; check --source."
        )
    if source in paths and not single_file:
        # A series folder given as such: its own name is the only name there is.
        root = source.parent
    parts_of = {path: _name_parts(path, root) for path in paths}
    patients = _patients(parts_of)
    splits = (
        split_patients(
            patients.values(), validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed
        )
        if split == "by_patient"
        else dict.fromkeys(patients.values(), split)
    )
    cases = []
    for path, volume_id in _volume_ids(parts_of, root, taken_ids).items():
        patient_id = patients[path]
        cases.append(
            RawCase(
                volume_id=volume_id,
                scan_id=volume_id,
                patient_id=patient_id,
                split=splits[patient_id],
                path=path,
                source=path.relative_to(root).as_posix(),
                labels=(None,) * num_labels,
            )
        )
    return RawDataset(
        root=root,
        layout="scan_folder",
        release=None,
        cases=tuple(sorted(cases, key=lambda case: case.volume_id)),
        remarks=tuple(remarks),
        ignored_files=ignored,
    )


def _find_scans(folder: Path, skip: set[Path], remarks: list[str], with_prepared: bool) -> tuple[list[Path], int]:
    scans: list[Path] = []
    ignored = 0
    for here, subfolders, names in walk_readable(folder, ".", remarks):
        subfolders[:] = [
            name for name in subfolders if name not in MASK_FOLDERS and (here / name).resolve() not in skip
        ]
        others = []
        sidecars = {Path(name).with_suffix(".json").name for name in names if with_prepared and _is_npz(name)}
        for name in names:
            if flat_mask_parts(name) is not None:
                ignored += 1
            elif name.lower().endswith(NIFTI_EXTENSIONS) or (with_prepared and _is_npz(name)):
                scans.append(here / name)
            elif name not in sidecars:
                others.append(here / name)
        if any(is_dicom_file(path) for path in others):
            scans.append(here)
        else:
            ignored += len(others)
    return scans, ignored


def _is_npz(name: str) -> bool:
    return name.lower().endswith(NPZ_EXTENSION)


def _name_parts(path: Path, root: Path) -> tuple[str, ...]:
    """The path below `root` as name parts, without the extension of a scan's file."""
    parts = list(path.relative_to(root).parts)
    for extension in (*NIFTI_EXTENSIONS, NPZ_EXTENSION):
        if parts[-1].lower().endswith(extension) and path.is_file():
            parts[-1] = parts[-1][: -len(extension)]
            break
    cleaned = (_NOT_IN_A_NAME.sub("_", part).strip("_-") for part in parts)
    return tuple(part or "scan" for part in cleaned)


def _patients(parts_of: dict[Path, tuple[str, ...]]) -> dict[Path, str]:
    folders = [parts[:-1] for parts in parts_of.values()]
    shared = _num_shared(folders) if len(folders) > 1 else 0
    return {
        path: parts[shared] if len(parts) > shared + 1 and len(folders) > 1 else "_".join(parts)
        for path, parts in parts_of.items()
    }


def _volume_ids(parts_of: dict[Path, tuple[str, ...]], root: Path, taken_ids: Iterable[str]) -> dict[Path, str]:
    taken = {name.lower() for name in taken_ids}
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path, parts in parts_of.items():
        # Two names that differ in case only are one file on some systems.
        by_name["_".join(parts).lower()].append(path)
    ids = {}
    for key, group in by_name.items():
        for path in group:
            name = "_".join(parts_of[path])
            if len(group) > 1 or key in taken or len(name) > _LONGEST_ID:
                digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()[:8]
                # The end of a path tells scans apart, its beginning is what they share.
                name = f"{name[-(_LONGEST_ID - 9) :].lstrip('_-')}_{digest}"
            ids[path] = name
    return ids


def _num_shared(folders: list[tuple[str, ...]]) -> int:
    """Number of leading folders that all paths have in common."""
    for number, names in enumerate(zip(*folders, strict=False)):
        if len(set(names)) > 1:
            return number
    return min(len(folder) for folder in folders)
