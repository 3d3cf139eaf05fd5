"""Lesion masks of raw scans: which there are for a scan, and how they come onto the prepared grid.

Two forms are found: ``<disease>/<volume_id>.nii.gz`` and, flat, ``<volume_id>_<disease>_mask.nii.gz``. A further
source (other folder names, other codings) is a further function beside `find_lesion_masks` that returns the same
dictionary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.mask_grid import read_mask_of_scan
from data_prep.raw_case import RawCase
from data_prep.readable_folders import walk_readable
from vlm3d_ext.data.scan import Scan, UnusableScanError

__all__ = ["DRAWN_DISEASES", "LesionMaskIndex", "find_lesion_masks", "read_lesion_mask"]

DRAWN_DISEASES = (
    "pericardial_effusion",
    "pleural_effusion",
    "consolidation",
    "ground_glass_opacity",
    "lung_nodule",
)
_EXTENSIONS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class LesionMaskIndex:
    """The lesion masks of a folder.

    Args:
        by_volume: volume id -> disease key -> files (more than one is a mistake).
        remarks: what lies in the folder and was not used.
    """

    by_volume: Mapping[str, Mapping[str, tuple[Path, ...]]]
    remarks: tuple[str, ...] = ()

    def masks_of(self, case: RawCase) -> dict[str, Path]:
        """Return disease key -> mask file of a case, in the order of `DRAWN_DISEASES`.

        Raises:
            UnusableScanError: if a disease has two files.
        """
        masks = {}
        found = self.by_volume.get(case.volume_id, {})
        for disease in DRAWN_DISEASES:
            paths = found.get(disease, ())
            if len(paths) > 1:
                names = " and ".join(str(path) for path in paths)
                raise UnusableScanError(
                    f"{names}: two {disease} masks of {case.volume_id}, expected one; keep the right one."
                )
            if paths:
                masks[disease] = paths[0]
        return masks


def find_lesion_masks(folder: Path) -> LesionMaskIndex:
    """Index the lesion masks of a folder by volume id and disease; opens no file.

    Subfolders are searched at any depth below a disease's folder, so
    ``lung_nodule/train_1/train_1_a/train_1_a_1.nii.gz`` is found too.
    """
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    unused: set[str] = set()
    remarks: list[str] = []
    for directory, _, names in walk_readable(folder, ".", remarks):
        relative = directory.relative_to(folder)
        disease_folder = relative.parts[0] if relative.parts else None
        for name in names:
            extension = next((end for end in _EXTENSIONS if name.endswith(end)), None)
            if extension is None:
                continue
            stem = name.removesuffix(extension)
            flat = next((key for key in DRAWN_DISEASES if stem.endswith(f"_{key}_mask")), None)
            if flat is not None:
                found[stem.removesuffix(f"_{flat}_mask")][flat].append(Path(directory, name))
            elif disease_folder in DRAWN_DISEASES:
                found[stem][disease_folder].append(Path(directory, name))
            else:
                unused.add(disease_folder or name)
    if unused:
        shown = sorted(unused)[:5]
        remarks.append(
            f"lesion masks: {len(unused)} name(s) such as {shown} are none of {list(DRAWN_DISEASES)} and are not used"
        )
    return LesionMaskIndex(
        {volume: {key: tuple(paths) for key, paths in masks.items()} for volume, masks in found.items()}, tuple(remarks)
    )


def read_lesion_mask(path: Path, scan: Scan, case: RawCase) -> np.ndarray:
    """Read a lesion mask (0 / 1, or 1 to N for instances) as a binary array on the scan's grid.

    Returns:
        (D, H, W) uint8, 0 or 1.

    Raises:
        UnusableScanError: if the mask cannot be read, holds anything but whole numbers, or lies on another grid.
    """
    return (read_mask_of_scan(path, scan, case) > 0).astype(np.uint8)
