"""Radiology reports that are true of a phantom, in the sections and the tone of CT-RATE's.

Every sentence comes from templates of our own, chosen by a seed. Sentences are separated by ". "; sizes are whole
millimetres, so no full stop stands inside a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.finding_record import Finding, present_keys
from data_prep.phantom_body import PatientBody
from data_prep.report_sentences import ABSENT, CLINICAL, IMPRESSION, NORMAL, ORDER, PRESENT, TECHNIQUE
from vlm3d_ext.data.anatomical_regions import region_by_name

__all__ = ["NOT_GIVEN", "PhantomReport", "write_report"]

NOT_GIVEN = "Not given."
"""What CT-RATE writes into an empty section."""

_CONTRAST_BLOOD_HU = 100.0
_FATTY_LIVER_HU = 38.0
_SHARE_OF_ABSENT_MENTIONED = 0.7


@dataclass(frozen=True)
class PhantomReport:
    """The four sections of a report, in CT-RATE's columns."""

    clinical_information: str
    technique: str
    findings: str
    impression: str


def write_report(findings: Sequence[Finding], body: PatientBody, seed: int | Sequence[int]) -> PhantomReport:
    """Write the report of one scan.

    Args:
        findings: what the picture shows.
        body: the patient, for what is normal and for contrast medium.
        seed: chooses the wording.
    """
    rng = np.random.default_rng(seed)

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    by_key = {finding.key: finding for finding in findings}
    present = present_keys(findings)
    # A reader who sees an opacity would not go on to exclude pneumonia in one breath.
    unmentioned = {"pneumonia"} if present & {"ground_glass_opacity", "consolidation"} else set()
    sentences: list[str] = []
    for key in ORDER:
        if key in by_key:
            template = pick(_templates(by_key[key]))
            sentences.append(template.format(**_words(by_key[key])))
        elif key in NORMAL:
            options = _normal(key, present, body)
            if options:
                sentences.append(pick(options))
        elif key not in present | unmentioned and rng.random() < _SHARE_OF_ABSENT_MENTIONED:
            sentences.append(pick(ABSENT[key]))
    conclusions = [pick(IMPRESSION[key]).format(**_words(by_key[key])) for key in ORDER if key in by_key]
    if not conclusions:
        conclusions = [pick(IMPRESSION[""])]
    contrast = body.blood_hu > _CONTRAST_BLOOD_HU
    return PhantomReport(
        clinical_information=NOT_GIVEN if rng.random() < 0.35 else pick(CLINICAL),
        technique=NOT_GIVEN if rng.random() < 0.05 else pick(TECHNIQUE["contrast" if contrast else "plain"]),
        findings=_join(sentences),
        impression=NOT_GIVEN if rng.random() < 0.08 else _join(conclusions),
    )


def _templates(finding: Finding) -> Sequence[str]:
    """Return the sentences that fit the kind of a finding; a nodule's also depend on how many there are."""
    kind = finding.pattern
    if finding.key == "lung_nodule":
        kind = f"{'one' if len(finding.geometry['centres']) == 1 else 'several'} {finding.pattern}"
    return PRESENT[finding.key].get(kind, PRESENT[finding.key][""])


def _normal(key: str, present: set[str], body: PatientBody) -> Sequence[str]:
    """Return the statements on an organ that hold for this patient."""
    if key == "liver":
        return NORMAL["fatty liver" if body.liver_hu < _FATTY_LIVER_HU else "liver"]
    if key == "contrast" and body.blood_hu > _CONTRAST_BLOOD_HU:
        return ()
    if key == "vessels" and present & {"mediastinal_widening", "arterial_wall_calcification"}:
        return ()
    if key == "airways" and present & {"bronchiectasis", "peribronchial_thickening"}:
        return NORMAL["trachea"]
    if key == "esophagus" and "hiatal_hernia" in present:
        return ()
    return NORMAL[key]


def _join(sentences: Sequence[str]) -> str:
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _words(finding: Finding) -> dict[str, str]:
    """Return what the templates may name: lobes, side, hemithorax, size, grade, pattern."""
    labels = [region_by_name(name).label for name in finding.regions]
    lobes = [label for label in labels if label.endswith("lobe")]
    if len(lobes) >= 4:
        place = "both lungs"
    elif sorted(lobes) == ["left lower lobe", "right lower lobe"]:
        place = "the lower lobes of both lungs"
    elif sorted(lobes) == ["left upper lobe", "right upper lobe"]:
        place = "the upper lobes of both lungs"
    elif lobes:
        place = _listed([f"the {label}" for label in lobes])
    else:
        place = "both lungs"
    size = str(round(finding.size_mm)) if finding.size_mm is not None else ""
    stations = finding.pattern.split(", ") if finding.key == "lymphadenopathy" else [finding.pattern or "soft tissue"]
    vessels = [f"{name} coronary artery" for name in finding.pattern.split(", ")]
    ribs = finding.geometry.get("ribs", [])
    return {
        "place": place,
        "side": "bilateral" if finding.side == "bilateral" else finding.side,
        "on_side": "on both sides" if finding.side == "bilateral" else f"on the {finding.side}",
        "of_lung": "both lungs" if finding.side == "bilateral" else f"the {finding.side} lung",
        "size": size,
        "grade": finding.grade,
        "pattern": finding.pattern,
        "stations": _listed(stations),
        "vessels": _listed(vessels),
        "vertebra": f"T{finding.geometry.get('vertebra', '')}",
        "ribs": _listed([f"{number}th" if number > 3 else "3rd" for number in ribs]) if ribs else "",
    }
