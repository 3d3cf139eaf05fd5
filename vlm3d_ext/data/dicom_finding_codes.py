"""Standard codes for the findings that are drawn.

Source: the standard's own code dictionary (DICOM PS3.16, as pydicom carries it), and SNOMED CT 95436008 |Lung
consolidation (disorder)|, which that dictionary lacks. Ground-glass opacity has a DICOM code and is taken from there.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydicom.sr.coding import Code

__all__ = ["ABNORMAL_STRUCTURE", "PRIVATE_SCHEME", "FindingCode", "finding_code"]

ABNORMAL_STRUCTURE = Code("49755003", "SCT", "Morphologically Abnormal Structure")
"""The category of all of them (CID 7150)."""

PRIVATE_SCHEME = "99VLM3D"
"""Designator of our own codes; the standard keeps those that begin with 99 free for private use."""

_LUNG = Code("39607008", "SCT", "Lung")


@dataclass(frozen=True)
class FindingCode:
    """What a segment is and where it lies.

    Args:
        property_type: the finding.
        region: the organ or space in which it lies; None where that is not known.
    """

    property_type: Code
    region: Code | None = None

    @property
    def is_private(self) -> bool:
        """Whether the code is one of ours, which other programs do not know."""
        return self.property_type.scheme_designator == PRIVATE_SCHEME


_CODES = {
    "pericardial_effusion": FindingCode(
        Code("373945007", "SCT", "Pericardial effusion"), Code("25489000", "SCT", "Pericardial cavity")
    ),
    "pleural_effusion": FindingCode(Code("60046008", "SCT", "Pleural effusion"), Code("3120008", "SCT", "Pleura")),
    "consolidation": FindingCode(Code("95436008", "SCT", "Lung consolidation"), _LUNG),
    "ground_glass_opacity": FindingCode(Code("112120", "DCM", "Ground glass opacity"), _LUNG),
    "lung_nodule": FindingCode(Code("27925004", "SCT", "Nodule"), _LUNG),
}


def finding_code(key: str, name: str) -> FindingCode:
    """Return the code of a finding; one that is not in the table gets its key as a private code.

    Args:
        key: disease key, such as ``"pleural_effusion"``.
        name: the finding's name, the meaning of a private code; longer than the 64 characters that a meaning may have,
            it is cut.
    """
    return _CODES.get(key) or FindingCode(Code(key, PRIVATE_SCHEME, name[:64]))
