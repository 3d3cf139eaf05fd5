"""What a phantom's findings say in the words of `vlm3d_ext.text.lesion_locations`, without a look at its masks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from data_prep.finding_record import DRAWN_LESIONS, IMPLIED_FINDINGS, Finding
from data_prep.lesion_masks import DISEASE_SET
from vlm3d_ext.data.anatomical_regions import ANATOMICAL_REGIONS
from vlm3d_ext.text.lesion_locations import GRADE_VOLUMES_ML, LesionLocation, grade_of_volume

__all__ = ["lesion_location_of_finding", "lesion_locations_of_findings"]

_NUM_NODULES_LISTED = 4
_LUNG_SHARE = 0.5
"""Of the ball of oedema around each hilum, about half is lung."""
_LOBE_SHARE = 0.6
"""Of a patch's ellipsoid, about so much lies inside the lobe that holds its centre; it is not painted beyond."""
_HALO_SHARE = 1.0
"""Ground glass around a pneumonia's core, as a multiple of the core."""
_OPACITIES = ("consolidation", "ground_glass_opacity")


def lesion_location_of_finding(finding: Finding) -> LesionLocation | None:
    """Return the location of a drawn finding; None for one without a mask of its own.

    Several nodules become one entry, the largest with the number of the others; see `lesion_locations_of_findings` for
    one each. A pneumonia or an oedema is none of the drawn diseases, what it shows is: see there, too.
    """
    if finding.key not in DRAWN_LESIONS:
        return None
    if finding.key == "lung_nodule":
        nodules = _nodules(finding)
        return replace(nodules[0], num_lesions=len(nodules))
    return _location(finding.key, finding)


def lesion_locations_of_findings(findings: Iterable[Finding]) -> list[LesionLocation]:
    """Return what the masks of a phantom would say, in the order of the disease set: nodules one by one, the largest
    first, every other disease once, with what a pneumonia or an oedema shows of it.
    """
    listed = list(findings)
    locations: list[LesionLocation] = []
    for key in DISEASE_SET.keys:
        shown = [finding for finding in listed if key in (finding.key, *IMPLIED_FINDINGS.get(finding.key, ()))]
        if key == "lung_nodule":
            nodules = sorted((n for finding in shown for n in _nodules(finding)), key=lambda n: -(n.size_mm or 0.0))
            kept = nodules[:_NUM_NODULES_LISTED]
            if len(nodules) > len(kept):
                kept[-1] = replace(kept[-1], num_lesions=1 + len(nodules) - len(kept))
            locations += kept
        elif shown:
            locations.append(_united([_location(key, finding) for finding in shown]))
    return locations


def _location(key: str, finding: Finding) -> LesionLocation:
    volume_ml = _volume_ml(key, finding)
    grade = finding.grade
    if not grade and volume_ml is not None:
        grade = grade_of_volume(volume_ml, GRADE_VOLUMES_ML[key])
    return LesionLocation(
        disease=key,
        name=DISEASE_SET.names[DISEASE_SET.index(key)],
        side=finding.side,
        regions=finding.regions,
        position=_position(key, finding),
        size_mm=None,
        grade=grade,
        volume_ml=volume_ml,
        num_lesions=len(finding.geometry.get("centres", ())) or 1,
    )


def _position(key: str, finding: Finding) -> tuple[str, ...]:
    """Return where most of an effusion is: free fluid of a supine patient lies at the back, and reaches up as it grows.

    What lies in lobes has none: they say it already.
    """
    if key != "pleural_effusion":
        return ()
    return ("lower", "posterior") if finding.grade == "small" else ("posterior",)


def _nodules(finding: Finding) -> list[LesionLocation]:
    """Return one location per nodule, the largest first; a record without geometry only knows the largest."""
    radii = finding.geometry.get("radii", [(finding.size_mm or 0.0) / 2])
    lobes = finding.geometry.get("lobes")
    regions = [ANATOMICAL_REGIONS[lobe - 1].name for lobe in lobes] if lobes else [finding.regions[0]]
    name = DISEASE_SET.names[DISEASE_SET.index("lung_nodule")]
    return [
        LesionLocation(
            disease="lung_nodule",
            name=name,
            side="left" if region.startswith("left") else "right",
            regions=(region,),
            position=(),
            size_mm=2 * float(radius),
            grade="",
            volume_ml=4 / 3 * math.pi * float(radius) ** 3 / 1000,
            num_lesions=1,
        )
        for radius, region in zip(radii, regions, strict=True)
    ]


def _volume_ml(key: str, finding: Finding) -> float | None:
    """Return the volume of what is drawn of a disease, from the ellipsoids of the record; None for fluid."""
    if key not in _OPACITIES:
        return None
    if finding.key == "pulmonary_edema":
        reach = finding.geometry.get("reach")
        return None if reach is None else _LUNG_SHARE * 2 * 4 / 3 * math.pi * 0.8 * 1.15 * reach**3 / 1000
    if "radii" in finding.geometry:
        volume_mm3 = 4 / 3 * math.pi * float(np.prod(finding.geometry["radii"], axis=1).sum())
    else:
        volume_mm3 = math.pi / 6 * (finding.size_mm or 0.0) ** 3
    halo = finding.key == "pneumonia" and key == "ground_glass_opacity"
    return (_HALO_SHARE if halo else 1.0) * _LOBE_SHARE * volume_mm3 / 1000


def _united(locations: list[LesionLocation]) -> LesionLocation:
    """Return one location for what several findings show of a disease."""
    if len(locations) == 1:
        return locations[0]
    # The places of the largest come first, as by overlap.
    ordered = sorted(locations, key=lambda location: -(location.volume_ml or 0.0))
    sides = {location.side for location in ordered}
    volume_ml = sum(location.volume_ml or 0.0 for location in ordered)
    return replace(
        ordered[0],
        side=sides.pop() if len(sides) == 1 else "bilateral",
        regions=tuple(dict.fromkeys(region for location in ordered for region in location.regions)),
        grade=grade_of_volume(volume_ml, GRADE_VOLUMES_ML[ordered[0].disease]),
        volume_ml=volume_ml,
        num_lesions=sum(location.num_lesions for location in ordered),
    )
