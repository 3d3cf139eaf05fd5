"""Lesion masks of raw scans: which there are, by volume and disease, and how the user's own folder is searched.

Two forms are found in a folder: ``<disease>/<volume_id>.nii.gz`` and, flat, ``<volume_id>_<disease>_mask.nii.gz``.
Other sources (`data_prep.totalsegmentator_lesions`, `data_prep.rexgrounding`) return the same `LesionMaskIndex`;
`data_prep.lesion_mask_sources` puts them together.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.raw_case import RawCase
from data_prep.readable_folders import walk_readable
from vlm3d_ext.data.scan import UnusableScanError
from vlm3d_ext.text.disease_set import load_disease_set

__all__ = [
    "DISEASE_SET",
    "DRAWN_DISEASES",
    "FOLDER",
    "MASK_EXTENSIONS",
    "LesionMask",
    "LesionMaskIndex",
    "find_lesion_masks",
    "flat_mask_parts",
]

DISEASE_SET = load_disease_set("chest_ct_5")
DRAWN_DISEASES = DISEASE_SET.keys
"""Disease keys, in the order of mask channels."""
FOLDER = "folder"
"""Name of the source that `find_lesion_masks` reads."""
MASK_EXTENSIONS = (".nii.gz", ".nii")

_SHOWN_NAMES = 5


@dataclass(frozen=True)
class LesionMask:
    """Where the mask of one disease of one volume is, and which of the file's voxels it is.

    Args:
        path: the NIfTI file; several diseases may share one.
        source: which source it comes from.
        task: TotalSegmentator's task, where `class_name` names one of its classes; None where every label above 0 is
            lesion.
        class_name: that class.
        findings: channels of a 4D file that are the disease; empty for a 3D file.
        num_findings: channels that the 4D file must have.
        partial: whether lesions of this disease may be missing in it.
    """

    path: Path
    source: str = FOLDER
    task: str | None = None
    class_name: str | None = None
    findings: tuple[int, ...] = ()
    num_findings: int = 0
    partial: bool = False

    def selection(self) -> dict[str, Any]:
        """Return what else than the file decides the mask, as plain JSON content."""
        return {"class_name": self.class_name, "findings": list(self.findings), "partial": self.partial}


@dataclass(frozen=True)
class LesionMaskIndex:
    """The lesion masks of one source.

    Args:
        by_volume: volume id -> disease key -> masks (more than one is a mistake).
        remarks: what was found and is not used.
        source: name of the source.
    """

    by_volume: Mapping[str, Mapping[str, tuple[LesionMask, ...]]]
    remarks: tuple[str, ...] = ()
    source: str = FOLDER

    def masks_of(self, case: RawCase) -> dict[str, LesionMask]:
        """Return disease key -> mask of a case, in the order of `DRAWN_DISEASES`.

        Raises:
            UnusableScanError: if a disease has two files.
        """
        masks = {}
        found = self.by_volume.get(case.volume_id, {})
        for disease in DRAWN_DISEASES:
            of_disease = found.get(disease, ())
            if len(of_disease) > 1:
                names = " and ".join(str(mask.path) for mask in of_disease)
                raise UnusableScanError(
                    f"{names}: two {disease} masks of {case.volume_id}, expected one; keep the right one."
                )
            if of_disease:
                masks[disease] = of_disease[0]
        return masks


def find_lesion_masks(folder: Path) -> LesionMaskIndex:
    """Index the lesion masks of a folder by volume id and disease; opens no file.

    Subfolders are searched at any depth below a disease's folder, so
    ``lung_nodule/train_1/train_1_a/train_1_a_1.nii.gz`` is found too. Folders and suffixes that are no disease are
    named in the remarks, with the nearest disease.
    """
    found: dict[str, dict[str, list[LesionMask]]] = defaultdict(lambda: defaultdict(list))
    unused: set[str] = set()
    remarks: list[str] = []
    for directory, _, names in walk_readable(folder, ".", remarks):
        relative = directory.relative_to(folder)
        disease_folder = relative.parts[0] if relative.parts else None
        for name in names:
            extension = next((end for end in MASK_EXTENSIONS if name.endswith(end)), None)
            if extension is None:
                continue
            stem = name.removesuffix(extension)
            flat = flat_mask_parts(name)
            if flat is not None:
                found[flat[0]][flat[1]].append(LesionMask(Path(directory, name)))
            elif disease_folder in DRAWN_DISEASES:
                found[stem][disease_folder].append(LesionMask(Path(directory, name)))
            else:
                unused.add(disease_folder or name)
    if unused:
        shown = [_with_nearest(name) for name in sorted(unused)[:_SHOWN_NAMES]]
        remarks.append(
            f"lesion masks: {len(unused)} name(s) such as {', '.join(shown)} are none of {list(DRAWN_DISEASES)} and "
            f"are not used"
        )
    return LesionMaskIndex(
        {volume: {key: tuple(masks) for key, masks in of_volume.items()} for volume, of_volume in found.items()},
        tuple(remarks),
    )


def flat_mask_parts(name: str) -> tuple[str, str] | None:
    """Return (volume id, disease key) of a flat name, ``<volume_id>_<disease>_mask.nii.gz``; None for another name."""
    extension = next((end for end in MASK_EXTENSIONS if name.endswith(end)), None)
    if extension is None:
        return None
    stem = name.removesuffix(extension)
    for disease in DRAWN_DISEASES:
        volume_id = stem.removesuffix(f"_{disease}_mask")
        if volume_id and volume_id != stem:
            return volume_id, disease
    return None


def _with_nearest(name: str) -> str:
    """The name, with the disease that was probably meant."""
    stem = name
    for extension in MASK_EXTENSIONS:
        stem = stem.removesuffix(extension)
    stem = stem.removesuffix("_mask").lower().replace("-", "_").replace(" ", "_")
    words = stem.split("_")
    # A flat name begins with the volume id, so its ends of one to four words are compared.
    ends = ["_".join(words[start:]) for start in range(max(0, len(words) - 4), len(words))]
    ranked = [
        (difflib.SequenceMatcher(None, end, disease).ratio(), disease) for end in ends for disease in DRAWN_DISEASES
    ]
    ratio, disease = max(ranked)
    return f"{name!r} (nearest: {disease!r})" if ratio >= 0.6 else repr(name)
