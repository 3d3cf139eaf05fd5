"""Class ids and names of TotalSegmentator's ``total`` task, in the v1 release (104 classes) and the v2 release (117
classes).

The ids changed between the releases (the aorta is 7 in v1 and 52 in v2), so a multi-label file means nothing without
its release. Which of the 20 regions a class belongs to is said by `vlm3d_ext.data.anatomical_regions` alone.

Source: the class map of TotalSegmentator (Wasserthal et al., Radiology: AI 2023), as its v1 and v2 releases list it.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from vlm3d_ext.data.anatomical_regions import region_of_totalsegmentator_class

__all__ = ["TOTALSEGMENTATOR_VERSIONS", "region_lookup_table", "totalsegmentator_class_names"]

TOTALSEGMENTATOR_VERSIONS = (1, 2)

_LUNG_LOBES = (
    "lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right"
).split()
_SHOULDER = "humerus_left humerus_right scapula_left scapula_right clavicula_left clavicula_right".split()
_HIP = "femur_left femur_right hip_left hip_right".split()
_MUSCLES = (
    "gluteus_maximus_left gluteus_maximus_right gluteus_medius_left gluteus_medius_right gluteus_minimus_left "
    "gluteus_minimus_right autochthon_left autochthon_right iliopsoas_left iliopsoas_right"
).split()
_ILIAC_VESSELS = "iliac_artery_left iliac_artery_right iliac_vena_left iliac_vena_right".split()


def _vertebrae() -> list[str]:
    """The presacral vertebrae from below: L5 to L1, T12 to T1, C7 to C1."""
    return [f"vertebrae_{part}{n}" for part, count in (("L", 5), ("T", 12), ("C", 7)) for n in range(count, 0, -1)]


def _ribs() -> list[str]:
    return [f"rib_{side}_{n}" for side in ("left", "right") for n in range(1, 13)]


def _version_1() -> list[str]:
    return [
        *"spleen kidney_right kidney_left gallbladder liver stomach aorta inferior_vena_cava".split(),
        *"portal_vein_and_splenic_vein pancreas adrenal_gland_right adrenal_gland_left".split(),
        *_LUNG_LOBES,
        *_vertebrae(),
        *"esophagus trachea heart_myocardium heart_atrium_left heart_ventricle_left heart_atrium_right".split(),
        *"heart_ventricle_right pulmonary_artery brain".split(),
        *_ILIAC_VESSELS,
        *"small_bowel duodenum colon".split(),
        *_ribs(),
        *_SHOULDER,
        *_HIP,
        *"sacrum face".split(),
        *_MUSCLES,
        "urinary_bladder",
    ]


def _version_2() -> list[str]:
    return [
        *"spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right".split(),
        "adrenal_gland_left",
        *_LUNG_LOBES,
        *"esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate".split(),
        *"kidney_cyst_left kidney_cyst_right sacrum vertebrae_S1".split(),
        *_vertebrae(),
        *"heart aorta pulmonary_vein brachiocephalic_trunk subclavian_artery_right subclavian_artery_left".split(),
        *"common_carotid_artery_right common_carotid_artery_left brachiocephalic_vein_left".split(),
        *"brachiocephalic_vein_right atrial_appendage_left superior_vena_cava inferior_vena_cava".split(),
        "portal_vein_and_splenic_vein",
        *_ILIAC_VESSELS,
        *_SHOULDER,
        *_HIP,
        "spinal_cord",
        *_MUSCLES,
        *"brain skull".split(),
        *_ribs(),
        *"sternum costal_cartilages".split(),
    ]


@cache
def totalsegmentator_class_names(version: int) -> dict[int, str]:
    """Return class id -> class name of the ``total`` task.

    Args:
        version: 1 (ids 1 to 104) or 2 (ids 1 to 117).

    Raises:
        ValueError: if `version` is neither.
    """
    if version not in TOTALSEGMENTATOR_VERSIONS:
        raise ValueError(f"TotalSegmentator version must be 1 or 2, got {version!r}.")
    return dict(enumerate(_version_1() if version == 1 else _version_2(), start=1))


@cache
def region_lookup_table(version: int) -> np.ndarray:
    """Return a uint8 array: class id of TotalSegmentator `version` -> region index (1 to 20), 0 outside the 20 regions.

    Shape (105,) for version 1 and (118,) for version 2; entry 0 is background.

    Raises:
        ValueError: if `version` is neither 1 nor 2.
    """
    names = totalsegmentator_class_names(version)
    table = np.zeros(len(names) + 1, dtype=np.uint8)
    for class_id, name in names.items():
        table[class_id] = region_of_totalsegmentator_class(name)
    table.flags.writeable = False
    return table
