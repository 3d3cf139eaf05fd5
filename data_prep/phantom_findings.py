"""Choosing a scan's findings, and what they change in the patient's proportions. The painters are listed by the stage
they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from data_prep import phantom_chest_findings, phantom_diffuse_findings, phantom_lung_findings, phantom_pleural_findings
from data_prep.finding_record import FINDING_PREVALENCE, Finding
from data_prep.phantom_body import PatientBody
from data_prep.phantom_scene import Scene

__all__ = ["choose_findings", "paint_stage", "shape_body"]

_CHOOSERS = {
    **phantom_lung_findings.CHOOSERS,
    **phantom_diffuse_findings.CHOOSERS,
    **phantom_pleural_findings.CHOOSERS,
    **phantom_chest_findings.CHOOSERS,
}
_STAGES = {
    "pleura": phantom_pleural_findings.PAINTERS,
    "diffuse": phantom_diffuse_findings.PAINTERS,
    "focal": phantom_lung_findings.PAINTERS,
    "mediastinum": phantom_chest_findings.MEDIASTINAL_PAINTERS,
    "skeleton": phantom_chest_findings.PAINTERS,
}


def shape_body(body: PatientBody, findings: Iterable[Finding]) -> PatientBody:
    """Return the patient with the proportions that the findings ask for: a larger heart, hyperinflated lungs, a wider
    mediastinum.
    """
    for finding in findings:
        if finding.key == "cardiomegaly":
            body = replace(body, heart_scale=finding.geometry["scale"])
        elif finding.key == "mediastinal_widening":
            body = replace(body, mediastinum_scale=finding.geometry["scale"])
        elif finding.key == "emphysema":
            amount = {"mild": 0.5, "moderate": 0.8, "severe": 1.2}[finding.grade]
            body = replace(body, lung_hu=body.lung_hu - 40.0 * amount, dome_mm=body.dome_mm - 14.0 * amount)
    return body


def choose_findings(
    body: PatientBody, keys: Sequence[str], seed: int | Sequence[int], least_radius_mm: float = 3.0
) -> tuple[Finding, ...]:
    """Place the findings `keys` in a patient.

    Args:
        body: the patient in health.
        keys: names out of `FINDING_PREVALENCE`; the order does not matter.
        seed: seed of this scan's findings.
        least_radius_mm: no drawn lesion gets smaller than this, so that the coarsest grid of the scan still holds a
            voxel of it.

    Raises:
        ValueError: for an unknown name.
    """
    unknown = sorted(set(keys) - set(_CHOOSERS))
    if unknown:
        raise ValueError(f"unknown findings {unknown}; known are {sorted(_CHOOSERS)}.")
    # Those that shape the body come first: the others are placed in the body so shaped.
    first = [key for key in ("cardiomegaly", "emphysema", "mediastinal_widening") if key in keys]
    order = first + [key for key in FINDING_PREVALENCE if key in keys and key not in first]
    seeds = [seed] if isinstance(seed, int) else list(seed)
    chosen: list[Finding] = []
    for key in order:
        rng = np.random.default_rng([*seeds, list(FINDING_PREVALENCE).index(key)])
        finding = _CHOOSERS[key](shape_body(body, chosen), rng, least_radius_mm)
        if key == "pneumothorax" and any(f.key in ("pleural_effusion", "pleural_thickening") for f in chosen):
            # Free air goes to a side without another pleural finding where there is one.
            taken = {f.side for f in chosen if f.key in ("pleural_effusion", "pleural_thickening")}
            free = [side for side in ("left", "right") if side not in taken and "bilateral" not in taken]
            finding = replace(finding, side=free[0]) if free else finding
        chosen.append(finding)
    return tuple(chosen)


def paint_stage(scene: Scene, stage: str) -> None:
    """Paint the scan's findings that belong to a stage: "pleura", "diffuse", "focal", "mediastinum" or "skeleton"."""
    for key, painter in _STAGES[stage].items():
        finding = scene.finding(key)
        if finding is not None:
            painter(scene, finding)
