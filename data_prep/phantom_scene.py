"""What the painters of organs and findings share while one block of a phantom is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data_prep.finding_record import Finding
from data_prep.phantom_body import ChestFields, PatientBody
from data_prep.phantom_shapes import Canvas
from vlm3d_ext.data.anatomical_regions import region_by_name

__all__ = ["LUNG_CLASS_OFFSET", "Scene", "lobes_of"]

LUNG_CLASS_OFFSET = 9
"""TotalSegmentator's class of a lobe is its region index plus this."""


@dataclass
class Scene:
    """One block of voxels with the chest's shape at each of them.

    Args:
        canvas: the voxels.
        body: the patient.
        fields: distances at each voxel.
        findings: all findings of the scan.
        depth: (D, H, W) depth inside the aerated lung, mm; the pleural findings make it smaller.
    """

    canvas: Canvas
    body: PatientBody
    fields: ChestFields
    findings: tuple[Finding, ...] = ()
    depth: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.depth = self.fields.lung

    def lung(self) -> np.ndarray:
        """Return the (D, H, W) coverage by lung, 0 to 1."""
        return self.canvas.coverage(-self.depth)

    def finding(self, key: str) -> Finding | None:
        """Return the finding called `key`, or None."""
        return next((f for f in self.findings if f.key == key), None)


def lobes_of(finding: Finding) -> tuple[int, ...]:
    """Return the indices (1 to 5) of the lobes that a finding names."""
    return tuple(index for index in (region_by_name(name).index for name in finding.regions) if index <= 5)
