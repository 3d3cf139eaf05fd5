"""ReXGroundingCT: findings of CT-RATE reports, drawn by people, one channel of a 4D file per finding.

A release folder holds ``dataset.json`` (and ``MICCAI_challenge_dataset.json``, with more validation and test cases) and
``segmentations/<volume>.nii.gz``. The JSON has ``train``, ``val`` and ``test`` lists of entries such as::

    {"name": "train_1741_b_2.nii.gz", "findings": {"0": "5 mm nodule in the right upper lobe", ...},
     "categories": {"0": "2d", ...}, "entity_counts": {"0": 1, ...}, "shape": [512, 512, 264], "pixels": {...}}

Sources: Baharoon et al., arXiv 2507.22030; the categories are those of the prompt in
github.com/rajpurkarlab/ReXGroundingCT (``categorize.py``); keys and axes as public users of the release document them.

Confirmed there: the keys above, the finding as the first NIfTI axis, instances as 1 to N, at most three drawn instances
a finding in training, all of them in validation, masks withheld in test. Assumed: the other three axes are those of
CT-RATE's v2 file as stored (users report that the masks' own affine says nothing, so it is not read), and channel
``n`` is finding ``"n"``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.lesion_masks import DRAWN_DISEASES, MASK_EXTENSIONS, LesionMask, LesionMaskIndex
from data_prep.raw_case import LayoutError, RawCase
from data_prep.readable_folders import walk_readable

__all__ = ["CATEGORY_DISEASES", "REXGROUNDINGCT", "ReXGroundingRelease", "disease_of_finding", "read_rexgrounding"]

REXGROUNDINGCT = "rexgroundingct"
"""Name of this source."""

CATEGORY_DISEASES = {
    "2b": "consolidation",  # "Atelectasis, consolidation"
    "2c": "ground_glass_opacity",  # "Groundglass opacity"
    "2d": "lung_nodule",  # "Pulmonary nodules/masses"
    "2e": "pleural_effusion",  # "Pleural effusion or thickening"
    "8f": "pericardial_effusion",  # outside the lung, so in no release so far
}
"""Category -> the disease that it may be; in all but 2c the finding's text has to say so too."""

_JSON_NAMES = ("dataset.json", "MICCAI_challenge_dataset.json")
_SPLITS = ("train", "val", "test")
_CATEGORY_OF_ONE_DISEASE = "2c"
_PATIENT = re.compile(r"[A-Za-z]+_\d+")
_NEXT_STEP = "download the file again, or leave --rexgrounding out."


@dataclass(frozen=True)
class ReXGroundingRelease:
    """What a release says of CT-RATE's volumes.

    Args:
        index: the masks; those of training cases are partial.
        held_out: patient id -> ``"val"`` or ``"test"``, where the benchmark measures on that patient.
    """

    index: LesionMaskIndex
    held_out: Mapping[str, str]

    def exclude_held_out(self, case: RawCase) -> RawCase:
        """Return the case, excluded if it would be trained or validated on and its patient is the benchmark's."""
        split = self.held_out.get(case.patient_id) or self.held_out.get(_patient_of(case.volume_id))
        if case.split == "test" or split is None:
            return case
        return case.excluded(f"its patient is in ReXGroundingCT's {split} split, which is not to be trained on")


def disease_of_finding(text: str, category: str | None = None) -> str | None:
    """Return the disease that a finding's mask shows, or None.

    None also where the text names several of the drawn diseases: their voxels cannot be told apart. A mass without a
    nodule, atelectasis without a consolidation and pleural thickening without an effusion are no drawn disease.

    Args:
        text: the finding.
        category: its category, such as ``"2d"``; None where the release has none: then the text alone decides.

    Example:
        >>> disease_of_finding("Ground-glass opacity around a nodule", "2c") is None
        True
    """
    named = _named_diseases(text)
    if category is None:
        return next(iter(named)) if len(named) == 1 else None
    disease = CATEGORY_DISEASES.get(category)
    if named == {disease} or (not named and category == _CATEGORY_OF_ONE_DISEASE):
        return disease
    return None


def _named_diseases(text: str) -> set[str]:
    lowered = text.lower()
    named = set()
    if re.search(r"\beffusions?\b", lowered):
        pericardial = "pericardi" in lowered
        named |= {"pericardial_effusion"} if pericardial else set()
        named |= {"pleural_effusion"} if "pleura" in lowered or not pericardial else set()
    if "consolidat" in lowered:
        named.add("consolidation")
    if re.search(r"\b(ground|frosted)[- ]?glass", lowered):
        named.add("ground_glass_opacity")
    if re.search(r"\b(micro)?nodules?\b", lowered):
        named.add("lung_nodule")
    return named


def read_rexgrounding(folder: Path) -> ReXGroundingRelease:
    """Read a release's tables and find its files; opens no mask.

    Raises:
        LayoutError: if there is no table, or a table is not of the form above.
    """
    tables = [folder / name for name in _JSON_NAMES if (folder / name).is_file()]
    if not tables:
        raise LayoutError(f"{folder}: holds none of {list(_JSON_NAMES)}; check --rexgrounding.")
    entries: dict[str, tuple[str, Mapping[str, Any]]] = {}
    held_out: dict[str, str] = {}
    for table in tables:
        for split, entry in _entries(table):
            volume_id = _without_extension(entry["name"])
            entries.setdefault(volume_id, (split, entry))
            if split != "train":
                held_out.setdefault(_patient_of(volume_id), split)
    remarks: list[str] = []
    files = _mask_files(folder, remarks)
    by_volume: dict[str, dict[str, tuple[LesionMask, ...]]] = {}
    used, unused, absent = 0, Counter[str](), 0
    for volume_id, (split, entry) in entries.items():
        if split == "test":
            continue
        absent += volume_id not in files
        masks, not_used = _masks_of_entry(files.get(volume_id, []), split, entry)
        used += sum(len(of_disease[0].findings) for of_disease in masks.values())
        unused.update(not_used)
        by_volume[volume_id] = masks
    counts = ", ".join(f"{number} of {category}" for category, number in sorted(unused.items()))
    remarks.append(
        f"ReXGroundingCT: {used} findings used as masks, {sum(unused.values())} not, by category: {counts or 'none'}"
    )
    if absent:
        remarks.append(f"ReXGroundingCT: {absent} volume(s) of its train and val lists have no mask file here")
    return ReXGroundingRelease(LesionMaskIndex(by_volume, tuple(remarks), REXGROUNDINGCT), held_out)


def _masks_of_entry(
    paths: list[Path], split: str, entry: Mapping[str, Any]
) -> tuple[dict[str, tuple[LesionMask, ...]], Counter[str]]:
    """Return disease -> masks (several files are a mistake that `LesionMaskIndex` refuses), and unused findings."""
    categories = entry.get("categories") or {}
    findings: dict[str, list[int]] = {}
    also_named: set[str] = set()
    unused: Counter[str] = Counter()
    for key, text in entry["findings"].items():
        category = str(categories[key]) if key in categories else None
        disease = disease_of_finding(text, category)
        if paths and disease is not None:
            findings.setdefault(disease, []).append(int(key))
        elif paths:
            unused[category or "no category"] += 1
            also_named |= _named_diseases(text)
    masks = {
        disease: tuple(
            LesionMask(
                path,
                REXGROUNDINGCT,
                findings=tuple(sorted(findings[disease])),
                num_findings=len(entry["findings"]),
                # A finding that could not be used may show further lesions of the same disease.
                partial=split == "train" or disease in also_named,
            )
            for path in paths
        )
        for disease in DRAWN_DISEASES
        if disease in findings
    }
    return masks, unused


def _entries(table: Path) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        content = json.loads(table.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LayoutError(f"{table}: not JSON ({error}); {_NEXT_STEP}") from None
    if not isinstance(content, dict) or not any(isinstance(content.get(split), list) for split in _SPLITS):
        raise LayoutError(f"{table}: expected an object with the lists {list(_SPLITS)}; {_NEXT_STEP}")
    entries: list[tuple[str, Mapping[str, Any]]] = []
    for split in _SPLITS:
        for number, entry in enumerate(content.get(split) or []):
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise LayoutError(f"{table}: {split} entry {number} has no 'name', expected a volume; {_NEXT_STEP}")
            findings = entry.get("findings")
            if not isinstance(findings, dict) or sorted(findings) != sorted(str(n) for n in range(len(findings))):
                shown = sorted(findings) if isinstance(findings, dict) else findings
                raise LayoutError(
                    f"{table}: {entry['name']} has the findings {shown}, expected texts under '0', '1' and so on; "
                    f"{_NEXT_STEP}"
                )
            entries.append((split, entry))
    return entries


def _mask_files(folder: Path, remarks: list[str]) -> dict[str, list[Path]]:
    """Return volume id -> mask files."""
    # The scans themselves may lie beside the masks, under the same names.
    below = "segmentations" if (folder / "segmentations").is_dir() else "."
    files: dict[str, list[Path]] = {}
    for directory, _, names in walk_readable(folder, below, remarks):
        for name in names:
            if name.endswith(MASK_EXTENSIONS):
                files.setdefault(_without_extension(name), []).append(directory / name)
    return files


def _without_extension(name: str) -> str:
    for extension in MASK_EXTENSIONS:
        name = name.removesuffix(extension)
    return name


def _patient_of(volume_id: str) -> str:
    match = _PATIENT.match(volume_id)
    return match.group() if match else volume_id
