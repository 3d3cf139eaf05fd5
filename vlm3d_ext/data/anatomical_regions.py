"""The 20 anatomical regions of a chest CT, and how TotalSegmentator's classes map onto them.

One table, `ANATOMICAL_REGIONS`, is the only place where regions are defined. Region 0 is background. Region 19 (pleura)
has no TotalSegmentator class: it is a shell around the lungs, derived where the mask is prepared.

Source: class ids and names of TotalSegmentator v2, task ``total`` (Wasserthal et al., Radiology: AI 2023), and the
names that its v1 release used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = [
    "ANATOMICAL_REGIONS",
    "LUNG_REGION_INDICES",
    "NUM_REGIONS",
    "PLEURA_REGION_INDEX",
    "AnatomicalRegion",
    "region_by_name",
    "region_of_totalsegmentator_class",
    "totalsegmentator_lookup_table",
]


@dataclass(frozen=True)
class AnatomicalRegion:
    """One region of the 20.

    Args:
        index: value in the anatomical mask, 1 to 20.
        name: snake-case name used in code, configs and files.
        label: the words a report would use.
        totalsegmentator: class id in TotalSegmentator v2 ``total`` -> class name.
        totalsegmentator_v1_names: further class names, as the v1 release wrote them.
    """

    index: int
    name: str
    label: str
    totalsegmentator: dict[int, str]
    totalsegmentator_v1_names: tuple[str, ...] = ()


def _ribs(side: str, first_id: int) -> dict[int, str]:
    return {first_id + n - 1: f"rib_{side}_{n}" for n in range(1, 13)}


_THORACIC_VERTEBRAE = {44 - n: f"vertebrae_T{n}" for n in range(12, 0, -1)}  # T12 is 32, T1 is 43

ANATOMICAL_REGIONS: tuple[AnatomicalRegion, ...] = (
    AnatomicalRegion(1, "left_upper_lobe", "left upper lobe", {10: "lung_upper_lobe_left"}),
    AnatomicalRegion(2, "left_lower_lobe", "left lower lobe", {11: "lung_lower_lobe_left"}),
    AnatomicalRegion(3, "right_upper_lobe", "right upper lobe", {12: "lung_upper_lobe_right"}),
    AnatomicalRegion(4, "right_middle_lobe", "right middle lobe", {13: "lung_middle_lobe_right"}),
    AnatomicalRegion(5, "right_lower_lobe", "right lower lobe", {14: "lung_lower_lobe_right"}),
    AnatomicalRegion(6, "trachea", "trachea", {16: "trachea"}),
    AnatomicalRegion(
        7,
        "heart",
        "heart",
        {51: "heart", 61: "atrial_appendage_left"},
        (
            "heart_myocardium",
            "heart_atrium_left",
            "heart_ventricle_left",
            "heart_atrium_right",
            "heart_ventricle_right",
        ),
    ),
    AnatomicalRegion(8, "aorta", "aorta", {52: "aorta"}),
    AnatomicalRegion(9, "pulmonary_vessels", "pulmonary vessels", {53: "pulmonary_vein"}, ("pulmonary_artery",)),
    AnatomicalRegion(10, "superior_vena_cava", "superior vena cava", {62: "superior_vena_cava"}),
    AnatomicalRegion(
        11,
        "great_vessels",
        "great vessels of the upper mediastinum",
        {
            54: "brachiocephalic_trunk",
            55: "subclavian_artery_right",
            56: "subclavian_artery_left",
            57: "common_carotid_artery_right",
            58: "common_carotid_artery_left",
            59: "brachiocephalic_vein_left",
            60: "brachiocephalic_vein_right",
        },
    ),
    AnatomicalRegion(12, "esophagus", "esophagus", {15: "esophagus"}),
    AnatomicalRegion(13, "thyroid", "thyroid gland", {17: "thyroid_gland"}),
    AnatomicalRegion(14, "thoracic_spine", "thoracic spine", {**_THORACIC_VERTEBRAE, 79: "spinal_cord"}),
    AnatomicalRegion(15, "ribs_left", "left ribs", _ribs("left", 92)),
    AnatomicalRegion(16, "ribs_right", "right ribs", _ribs("right", 104)),
    AnatomicalRegion(17, "sternum", "sternum and costal cartilages", {116: "sternum", 117: "costal_cartilages"}),
    AnatomicalRegion(
        18,
        "shoulder_girdle",
        "shoulder girdle",
        {
            69: "humerus_left",
            70: "humerus_right",
            71: "scapula_left",
            72: "scapula_right",
            73: "clavicula_left",
            74: "clavicula_right",
        },
    ),
    AnatomicalRegion(19, "pleura", "pleura", {}),
    AnatomicalRegion(
        20,
        "upper_abdomen",
        "upper abdomen",
        {
            1: "spleen",
            2: "kidney_right",
            3: "kidney_left",
            4: "gallbladder",
            5: "liver",
            6: "stomach",
            7: "pancreas",
            8: "adrenal_gland_right",
            9: "adrenal_gland_left",
        },
    ),
)
NUM_REGIONS = len(ANATOMICAL_REGIONS)
LUNG_REGION_INDICES = (1, 2, 3, 4, 5)
PLEURA_REGION_INDEX = 19

_HIGHEST_TOTALSEGMENTATOR_CLASS = 117


def region_by_name(name: str) -> AnatomicalRegion:
    """Return the region called `name`.

    Raises:
        ValueError: if there is no such region.
    """
    for region in ANATOMICAL_REGIONS:
        if region.name == name:
            return region
    raise ValueError(f"no anatomical region is called {name!r}; the names are {[r.name for r in ANATOMICAL_REGIONS]}.")


@cache
def _region_of_class_name() -> dict[str, int]:
    names: dict[str, int] = {}
    for region in ANATOMICAL_REGIONS:
        for name in (*region.totalsegmentator.values(), *region.totalsegmentator_v1_names):
            names[name] = region.index
    return names


def region_of_totalsegmentator_class(name: str) -> int:
    """Return the region index (1 to 20) of a TotalSegmentator class name, v1 or v2; 0 for a class outside them."""
    return _region_of_class_name().get(name, 0)


@cache
def totalsegmentator_lookup_table() -> np.ndarray:
    """Return a (118,) uint8 array: class id of TotalSegmentator v2 ``total`` -> region index, 0 for other classes."""
    table = np.zeros(_HIGHEST_TOTALSEGMENTATOR_CLASS + 1, dtype=np.uint8)
    for region in ANATOMICAL_REGIONS:
        for class_id in region.totalsegmentator:
            table[class_id] = region.index
    return table
