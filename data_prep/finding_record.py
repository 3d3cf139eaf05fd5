"""What a finding of a synthetic scan is on paper: its name, place and size, and which labels follow from it.

This is the ground truth behind pictures, masks, labels and reports alike; nothing here draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "CT_RATE_18",
    "DRAWN_LESIONS",
    "FINDING_PREVALENCE",
    "IMPLIED_FINDINGS",
    "VLM3D_18",
    "Finding",
    "ct_rate_labels",
    "present_keys",
    "vlm3d_labels",
]

CT_RATE_18 = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
"""Columns of CT-RATE's label files, in their order."""

VLM3D_18 = (
    "Lung nodule",
    "Pleural effusion",
    "Consolidation",
    "Ground-glass opacity",
    "Pericardial effusion",
    "Pneumothorax",
    "Atelectasis",
    "Pneumonia",
    "Pulmonary edema",
    "Emphysema",
    "Fibrosis",
    "Mass",
    "Cardiomegaly",
    "Mediastinal widening",
    "Pleural thickening",
    "Fracture",
    "Calcification",
    "Lymphadenopathy",
)

DRAWN_LESIONS = ("pericardial_effusion", "pleural_effusion", "consolidation", "ground_glass_opacity", "lung_nodule")
"""Diseases that come with a mask."""

FINDING_PREVALENCE: dict[str, float] = {
    "medical_material": 0.103,
    "arterial_wall_calcification": 0.285,
    "cardiomegaly": 0.107,
    "pericardial_effusion": 0.074,
    "coronary_artery_wall_calcification": 0.252,
    "hiatal_hernia": 0.137,
    "lymphadenopathy": 0.260,
    "emphysema": 0.197,
    "atelectasis": 0.235,
    "lung_nodule": 0.448,
    "ground_glass_opacity": 0.33,
    "pulmonary_fibrotic_sequela": 0.273,
    "pleural_effusion": 0.124,
    "mosaic_attenuation_pattern": 0.083,
    "peribronchial_thickening": 0.117,
    "consolidation": 0.191,
    "bronchiectasis": 0.109,
    "interlobular_septal_thickening": 0.082,
    "pneumothorax": 0.05,
    "mass": 0.06,
    "pneumonia": 0.06,
    "pulmonary_edema": 0.04,
    "pleural_thickening": 0.08,
    "fracture": 0.08,
    "mediastinal_widening": 0.05,
}
"""Share of positive scans, with those that another finding brings along. Of CT-RATE's own 18 names: its validation
set. Lung opacity has no entry, it follows from ground glass and consolidation; the others have no public count in CT-
RATE and are set by hand."""

IMPLIED_FINDINGS = {
    "pneumonia": ("consolidation", "ground_glass_opacity"),
    "pulmonary_edema": ("ground_glass_opacity", "interlobular_septal_thickening"),
}
"""What a finding shows besides itself."""


@dataclass(frozen=True)
class Finding:
    """One finding of one scan.

    Args:
        key: snake-case name, one of `FINDING_PREVALENCE`.
        side: "left", "right", "bilateral" or "" where sides do not apply.
        regions: names of the anatomical regions that it lies in.
        size_mm: largest diameter or thickness of the largest part in mm; None where a size says nothing.
        grade: "small" / "mild", "moderate" or "large" / "severe", "" where a size in mm is better.
        pattern: kind within the finding, such as "linear" for atelectasis.
        geometry: numbers that the painter needs, mm in the body frame.
    """

    key: str
    side: str
    regions: tuple[str, ...]
    size_mm: float | None = None
    grade: str = ""
    pattern: str = ""
    geometry: dict[str, Any] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the record for findings.json, without the drawing geometry except the number of parts."""
        return {
            "key": self.key,
            "side": self.side or None,
            "regions": list(self.regions),
            "size_mm": None if self.size_mm is None else round(self.size_mm, 1),
            "grade": self.grade or None,
            "pattern": self.pattern or None,
            "num_parts": len(self.geometry.get("centres", ())) or 1,
        }


def present_keys(findings: Iterable[Finding]) -> set[str]:
    """Return the keys that are true of the picture, with those that a finding brings along (pneumonia shows
    consolidation).
    """
    keys = {finding.key for finding in findings}
    for key in tuple(keys):
        keys.update(IMPLIED_FINDINGS.get(key, ()))
    return keys


def _snake(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")


def ct_rate_labels(findings: Sequence[Finding]) -> dict[str, int]:
    """Return CT-RATE's 18 labels, 0 or 1, in their order."""
    keys = present_keys(findings)
    if keys & {"ground_glass_opacity", "consolidation"}:
        keys.add("lung_opacity")
    return {name: int(_snake(name) in keys) for name in CT_RATE_18}


def vlm3d_labels(findings: Sequence[Finding]) -> dict[str, int]:
    """Return the 18 labels of the set vlm3d_18, 0 or 1, in their order."""
    keys = present_keys(findings)
    if keys & {"arterial_wall_calcification", "coronary_artery_wall_calcification"}:
        keys.add("calcification")
    if "pulmonary_fibrotic_sequela" in keys:
        keys.add("fibrosis")
    return {name: int(_snake(name) in keys) for name in VLM3D_18}
