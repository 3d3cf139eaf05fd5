"""Findings of the pleura: effusion, pneumothorax, thickening. Each takes room from the lung. Lengths in mm, densities
in HU.
"""

from __future__ import annotations

import numpy as np

from data_prep.finding_record import Finding
from data_prep.phantom_body import PatientBody
from data_prep.phantom_scene import Scene
from data_prep.phantom_shapes import ramp, wobble

__all__ = ["CHOOSERS", "PAINTERS"]

_EFFUSION_DEPTH_MM = {"small": (13.0, 20.0), "moderate": (26.0, 38.0), "large": (46.0, 62.0)}


def _on_side(x: np.ndarray, side: str) -> np.ndarray:
    if side == "left":
        return x > 0
    if side == "right":
        return x < 0
    return np.ones(x.shape, dtype=bool)


def _choose_effusion(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    grade = str(rng.choice(["small", "moderate", "large"], p=[0.35, 0.4, 0.25]))
    side = str(rng.choice(["left", "right", "bilateral"], p=[0.3, 0.35, 0.35]))
    depth = max(float(rng.uniform(*_EFFUSION_DEPTH_MM[grade])), 2 * least_radius_mm)
    return Finding("pleural_effusion", side, ("pleura",), depth, grade)


def _paint_effusion(scene: Scene, finding: Finding) -> None:
    canvas, fields, depth = scene.canvas, scene.fields, finding.size_mm or 15.0
    fz = scene.body.stretch[2]
    # Free fluid lies at the back of a supine patient and is deepest above the diaphragm.
    height = 0.35 + 0.65 * ramp(canvas.z / fz, 70.0 + 0.5 * depth, -70.0)
    back = ramp(canvas.y, -15.0 - 0.5 * depth, 55.0)
    level = depth * height * back
    cavity = np.minimum(np.minimum(fields.wall, fields.diaphragm), fields.mediastinum)
    over_wall = level - fields.wall
    over_diaphragm = 0.75 * level - fields.diaphragm
    fluid = np.maximum(over_wall, over_diaphragm)
    side = _on_side(canvas.x, finding.side)
    fluid = np.where(side & (level > 0.8), fluid, -50.0)
    coverage = canvas.coverage(-np.minimum(fluid, cavity))
    canvas.blend(canvas.everywhere(), coverage, 12.0)
    canvas.anatomy[coverage >= 0.5] = 0
    canvas.mark_lesion("pleural_effusion", canvas.everywhere(), coverage >= 0.5)
    scene.depth = np.minimum(scene.depth, -fluid)


def _choose_pneumothorax(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    side = str(rng.choice(["left", "right"]))
    depth = max(float(rng.uniform(12.0, 38.0)), 2 * least_radius_mm)
    grade = "small" if depth < 20 else "moderate" if depth < 30 else "large"
    return Finding("pneumothorax", side, ("pleura",), depth, grade)


def _paint_pneumothorax(scene: Scene, finding: Finding) -> None:
    canvas, fields, depth = scene.canvas, scene.fields, finding.size_mm or 20.0
    # Free air rises to the front of a supine patient, and to the apex.
    front = np.maximum(ramp(canvas.y, 35.0, -60.0), 0.7 * ramp(canvas.z / scene.body.stretch[2], 40.0, 100.0))
    gap = np.where(_on_side(canvas.x, finding.side), depth * front - fields.wall, -50.0)
    cavity = np.minimum(scene.depth, fields.wall)
    coverage = canvas.coverage(-np.minimum(gap, cavity))
    canvas.blend(canvas.everywhere(), coverage, -1000.0)
    canvas.anatomy[coverage >= 0.5] = 0
    # The lung's own surface shows as a fine line.
    line = canvas.coverage(np.abs(gap + 1.0) - 0.8) * canvas.coverage(-cavity)
    canvas.blend(canvas.everywhere(), line * 0.5, -100.0)
    scene.depth = np.minimum(scene.depth, -gap)


def _choose_thickening(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    side = str(rng.choice(["left", "right", "bilateral"], p=[0.35, 0.4, 0.25]))
    pattern = "calcified" if rng.random() < 0.35 else "smooth"
    geometry = {"seed": int(rng.integers(1, 2**31))}
    return Finding("pleural_thickening", side, ("pleura",), float(rng.uniform(7.0, 11.0)), "", pattern, geometry)


def _paint_thickening(scene: Scene, finding: Finding) -> None:
    canvas, fields, thickness = scene.canvas, scene.fields, finding.size_mm or 8.0
    rough = wobble(canvas.x, canvas.y, canvas.z, finding.geometry["seed"], 70.0)
    lateral = ramp(np.abs(canvas.x), 45.0, 85.0) * ramp(canvas.z / scene.body.stretch[2], 85.0, 55.0)
    local = thickness * lateral * np.clip(0.75 + 0.35 * rough, 0.0, 1.0)
    rind = np.where(_on_side(canvas.x, finding.side) & (local > 1.0), local - fields.wall, -50.0)
    inside = np.minimum(rind, np.minimum(fields.wall, fields.diaphragm))
    coverage = canvas.coverage(-inside)
    canvas.blend(canvas.everywhere(), coverage, 58.0)
    canvas.anatomy[coverage >= 0.5] = 0
    if finding.pattern == "calcified":
        plaque = np.minimum(inside, np.minimum(2.8 - np.abs(fields.wall - 2.8), 12.0 * (rough - 0.25)))
        canvas.blend(canvas.everywhere(), canvas.coverage(-plaque), 420.0)
    scene.depth = np.minimum(scene.depth, -rind)


CHOOSERS = {
    "pleural_effusion": _choose_effusion,
    "pneumothorax": _choose_pneumothorax,
    "pleural_thickening": _choose_thickening,
}
PAINTERS = {
    "pleural_thickening": _paint_thickening,
    "pleural_effusion": _paint_effusion,
    "pneumothorax": _paint_pneumothorax,
}
