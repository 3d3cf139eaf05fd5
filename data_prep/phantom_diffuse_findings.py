"""Findings that change a lung as a whole: emphysema, mosaic attenuation, septal lines, and the two diseases of the
bronchi.
"""

from __future__ import annotations

import numpy as np

from data_prep.finding_record import Finding
from data_prep.phantom_body import PatientBody
from data_prep.phantom_lung_findings import lobe_name, paint_septal_lines, side_of_lobes
from data_prep.phantom_scene import Scene, lobes_of
from data_prep.phantom_shapes import cells, ellipsoid_distance
from data_prep.phantom_trees import lung_points

__all__ = ["CHOOSERS", "PAINTERS", "bronchial_changes"]

_ALL_LOBES = (1, 2, 3, 4, 5)


def _names(lobes: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(lobe_name(lobe) for lobe in lobes)


def _choose_emphysema(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    grade = str(rng.choice(["mild", "moderate", "severe"], p=[0.35, 0.4, 0.25]))
    num = {"mild": 150, "moderate": 240, "severe": 340}[grade]
    share = {1: 0.36, 2: 0.13, 3: 0.36, 4: 0.05, 5: 0.10}  # centrilobular emphysema prefers the upper lobes
    centres = np.concatenate([lung_points(body, rng, lobe, int(num * part), 4.0) for lobe, part in share.items()])
    radii = np.clip(rng.lognormal(np.log(5.8), 0.32, len(centres)), 3.0, 12.0)
    return Finding(
        "emphysema",
        "bilateral",
        _names((1, 3) if grade == "mild" else _ALL_LOBES),
        grade=grade,
        pattern="centrilobular",
        geometry={"centres": centres, "radii": radii},
    )


def _paint_emphysema(scene: Scene, finding: Finding) -> None:
    canvas = scene.canvas
    lung = scene.lung()
    for centre, radius in zip(finding.geometry["centres"], finding.geometry["radii"], strict=True):
        box = canvas.box(centre, radius)
        if box is None:
            continue
        distance = ellipsoid_distance(canvas.x[box], canvas.y[box], canvas.z[box], centre, (radius,) * 3)
        canvas.blend(box, canvas.coverage(distance) * lung[box] * 0.95, -988.0)


def _choose_mosaic(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    geometry = {"seed": int(rng.integers(1, 2**31))}
    return Finding("mosaic_attenuation_pattern", "bilateral", _names(_ALL_LOBES), geometry=geometry)


def _paint_mosaic(scene: Scene, finding: Finding) -> None:
    canvas, seed = scene.canvas, finding.geometry["seed"]
    k, j, i = np.nonzero(scene.depth > 0.0)
    if len(k) == 0:
        return
    to_wall, cell = cells(canvas.x[k, j, i], canvas.y[k, j, i], canvas.z[k, j, i], seed, 40.0)
    # Trapped air makes some groups of lobules darker than their neighbours, with straight borders.
    dark = np.random.default_rng([seed, 7]).random(int(cell.max()) + 1)[cell] < 0.5
    change = np.where(dark, -75.0, 115.0) * np.clip(0.5 + to_wall / 4.0, 0.0, 1.0)
    canvas.hu[k, j, i] = np.maximum(canvas.hu[k, j, i] + change, -985.0)


def _choose_septal(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    geometry = {"seed": int(rng.integers(1, 2**31))}
    return Finding("interlobular_septal_thickening", "bilateral", _names(_ALL_LOBES), geometry=geometry)


def _paint_septal(scene: Scene, finding: Finding) -> None:
    paint_septal_lines(scene, finding.geometry["seed"], 1.0)


def _choose_peribronchial(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    lobes = [(1, 2, 3, 4, 5), (2, 5), (1, 2, 3, 5)][int(rng.integers(3))]
    thickness = float(rng.uniform(4.4, 6.0))
    return Finding("peribronchial_thickening", side_of_lobes(lobes), _names(lobes), thickness)


def _choose_bronchiectasis(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    lobes = [(2,), (5,), (2, 5), (4, 5), (1, 3), (3,), (1, 2)][int(rng.integers(7))]
    geometry = {"scale": float(rng.uniform(2.6, 3.4))}
    diameter = 2 * 2.3 * body.size * geometry["scale"]
    return Finding("bronchiectasis", side_of_lobes(lobes), _names(lobes), diameter, "", "cylindrical", geometry)


def bronchial_changes(findings: tuple[Finding, ...]) -> tuple[dict[int, float], dict[int, float]]:
    """Return (lobe -> factor of the lumen, lobe -> wall thickness in mm) that the findings ask of the airways."""
    lumen: dict[int, float] = {}
    wall: dict[int, float] = {}
    for finding in findings:
        for lobe in lobes_of(finding):
            if finding.key == "bronchiectasis":
                lumen[lobe] = finding.geometry["scale"]
                wall[lobe] = max(wall.get(lobe, 0.0), 1.8)
            elif finding.key == "peribronchial_thickening":
                wall[lobe] = max(wall.get(lobe, 0.0), finding.size_mm or 4.0)
    return lumen, wall


CHOOSERS = {
    "emphysema": _choose_emphysema,
    "mosaic_attenuation_pattern": _choose_mosaic,
    "interlobular_septal_thickening": _choose_septal,
    "peribronchial_thickening": _choose_peribronchial,
    "bronchiectasis": _choose_bronchiectasis,
}
PAINTERS = {
    "mosaic_attenuation_pattern": _paint_mosaic,
    "emphysema": _paint_emphysema,
    "interlobular_septal_thickening": _paint_septal,
}
