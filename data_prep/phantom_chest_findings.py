"""Findings of heart, vessels, mediastinum and skeleton, and material put in by physicians. Lengths in mm, densities
in HU.
"""

from __future__ import annotations

import numpy as np

from data_prep.finding_record import Finding
from data_prep.phantom_body import PatientBody, heart_distance
from data_prep.phantom_bones import rib_position
from data_prep.phantom_scene import Scene
from data_prep.phantom_shapes import ramp

__all__ = ["CHOOSERS", "MEDIASTINAL_PAINTERS", "PAINTERS"]

_METAL_HU = 2900.0
_NODE_STATIONS = {
    "right paratracheal": (-19, -2, 72),
    "left paratracheal": (19, 0, 76),
    "prevascular": (2, -38, 48),
    "aortopulmonary": (32, -4, 38),
    "subcarinal": (0, 16, 2),
    "right hilar": (-46, 0, 0),
    "left hilar": (52, 6, 0),
}


def _surface_of_heart(body: PatientBody, direction: tuple[float, float, float], lift_mm: float) -> np.ndarray:
    """Return the point (3,) of the heart's surface, raised by `lift_mm`, in a direction seen from its centre."""
    centre, radii = body.heart_centre_and_radii()
    unit = np.asarray(direction, dtype=float) / np.linalg.norm(direction)
    near, far = 0.0, 2.0 * float(radii.max())
    for _ in range(30):
        middle = (near + far) / 2
        point = (centre + middle * unit).reshape(3, 1)
        near, far = (middle, far) if heart_distance(body, *point)[0] < lift_mm else (near, middle)
    return centre + near * unit


def _choose_cardiomegaly(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    grade = str(rng.choice(["mild", "moderate", "severe"]))
    scale = {"mild": 1.2, "moderate": 1.28, "severe": 1.36}[grade] + float(rng.uniform(0, 0.05))
    return Finding("cardiomegaly", "", ("heart",), None, grade, "", {"scale": scale})


def _choose_pericardial_effusion(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    thickness = max(float(rng.uniform(9.0, 24.0)), 2 * least_radius_mm)
    grade = "small" if thickness < 12 else "moderate" if thickness < 19 else "large"
    return Finding("pericardial_effusion", "", ("heart",), thickness, grade)


def _paint_pericardial_effusion(scene: Scene, finding: Finding) -> None:
    canvas, body, thickness = scene.canvas, scene.body, finding.size_mm or 10.0
    centre, radii = body.heart_centre_and_radii()
    box = canvas.box(centre, float(radii.max()) + thickness + 4.0)
    if box is None:
        return
    x, y, z = canvas.x[box], canvas.y[box], canvas.z[box]
    distance = heart_distance(body, x, y, z)
    # Fluid gathers behind and below, and leaves the roots of the great vessels free.
    local = thickness * (0.5 + 0.5 * ramp(y, float(centre[1]) - 30.0, float(centre[1]) + 35.0))
    local = local * ramp(z, float(centre[2]) + 48.0, float(centre[2]) + 15.0)
    allowed = (scene.fields.diaphragm[box] > 0) | (distance < 6.0)
    organs = ~np.isin(canvas.anatomy[box], (0, 10, 11, 12, 13, 14))
    shell = np.maximum(distance - local, 0.6 - distance)
    coverage = canvas.coverage(shell) * allowed * ~organs
    canvas.blend(box, coverage, 12.0)
    canvas.anatomy[box][coverage >= 0.5] = 0
    canvas.mark_lesion("pericardial_effusion", box, coverage >= 0.5)


def _spots(scene: Scene, finding: Finding) -> None:
    for centre, radii in zip(finding.geometry["centres"], finding.geometry["radii"], strict=True):
        scene.canvas.add_ellipsoid(centre, radii, finding.geometry["hu"])


def _choose_arterial_calcification(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    grade = str(rng.choice(["mild", "moderate", "severe"]))
    num = {"mild": 14, "moderate": 24, "severe": 40}[grade]
    centres, radii = [], []
    for _ in range(num):
        t, angle = rng.random(), rng.uniform(0, 2 * np.pi)
        if rng.random() < 0.55:  # the arch, seen from its upper and outer wall
            along = body.at((-12 + 32 * t, -22 + 46 * t, 52.0 + 6 * np.sin(np.pi * t)))[0]
            offset = np.array([0.8 * np.cos(angle), -0.5 * np.cos(angle), abs(np.sin(angle))]) * 12.5 * body.size
        else:
            along = body.at((21 - 8 * t, 39 + 6 * np.sin(3 * t), 20 - 150 * t))[0]
            offset = np.array([np.cos(angle), np.sin(angle), 0.0]) * 11.0 * body.size
        centres.append(along + offset)
        radii.append(rng.uniform(2.6, 4.6) * np.array([1.0, 1.0, rng.uniform(1.0, 1.8)]))
    geometry = {"centres": np.array(centres), "radii": np.array(radii), "hu": 850.0}
    return Finding("arterial_wall_calcification", "", ("aorta",), None, grade, "", geometry)


def _choose_coronary_calcification(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    grade = str(rng.choice(["mild", "moderate", "severe"]))
    share = {"mild": 0.45, "moderate": 0.65, "severe": 0.9}[grade]
    vessels = {
        "left anterior descending": [(0.35, -0.7, 0.75), (0.5, -0.85, 0.45), (0.65, -0.85, 0.1), (0.8, -0.75, -0.25)],
        "circumflex": [(0.45, -0.45, 0.8), (0.9, 0.05, 0.55), (1.0, 0.4, 0.1)],
        "right": [(-0.35, -0.8, 0.55), (-0.75, -0.65, 0.15), (-0.7, -0.55, -0.35)],
    }
    names = list(vessels) if grade == "severe" else list(vessels)[: 1 if grade == "mild" else 2]
    centres, radii = [], []
    for name in names:
        directions = np.array(vessels[name])
        for t in np.linspace(0, len(directions) - 1, 4 * len(directions)):
            n = min(int(t), len(directions) - 2)
            direction = directions[n] + (t - n) * (directions[n + 1] - directions[n])
            if rng.random() < share:
                centres.append(direction)
                radii.append(rng.uniform(2.6, 4.2, 3))
    if not centres:
        centres, radii = [np.array(vessels[names[0]][0])], [np.full(3, 3.0)]
    geometry = {"directions": np.array(centres), "radii": np.array(radii), "hu": 800.0}
    return Finding("coronary_artery_wall_calcification", "", ("heart",), None, grade, ", ".join(names), geometry)


def _paint_coronary_calcification(scene: Scene, finding: Finding) -> None:
    # The vessels lie on the surface of the heart, whatever its size in this scan is.
    for direction, radii in zip(finding.geometry["directions"], finding.geometry["radii"], strict=True):
        centre = _surface_of_heart(scene.body, tuple(direction), 0.5)
        scene.canvas.add_ellipsoid(centre, radii, finding.geometry["hu"])


def _choose_hernia(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    radius = float(rng.uniform(20.0, 32.0))
    grade = "small" if radius < 24 else "moderate" if radius < 28 else "large"
    geometry = {"centres": body.at((10.0, 30.0, -72.0)), "radii": np.array([[1.05, 0.9, 1.05]]) * radius}
    return Finding("hiatal_hernia", "", ("esophagus",), 2 * radius, grade, "", geometry)


def _paint_hernia(scene: Scene, finding: Finding) -> None:
    canvas = scene.canvas
    centre, radii = finding.geometry["centres"][0], finding.geometry["radii"][0]
    free = np.isin(canvas.anatomy, (0, 2, 6, 10, 11, 12, 13, 14, 15, 51)).astype(np.float32)
    canvas.add_ellipsoid(centre, radii, 48.0, 6, within=free)
    canvas.add_ellipsoid(centre, radii - 4.0, 14.0, 6, within=free)
    gas = canvas.coverage(canvas.y - (centre[1] - 0.1 * radii[1])) * free
    canvas.add_ellipsoid(centre, radii - 4.0, -960.0, 6, within=gas)


def _choose_nodes(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    num = int(rng.integers(3, 7))
    stations = [str(s) for s in rng.choice(list(_NODE_STATIONS), size=num, replace=False)]
    radii = rng.uniform(6.0, 11.5, (num, 1)) * rng.uniform(0.95, 1.45, (num, 3))
    radii[:, 0] = radii.min(axis=1)
    centres = np.concatenate([body.at(_NODE_STATIONS[s]) for s in stations]) + rng.normal(0, 2.0, (num, 3))
    short_axes = 2 * radii.min(axis=1)
    order = np.argsort(short_axes)[::-1]
    geometry = {"centres": centres[order], "radii": radii[order], "stations": [stations[n] for n in order], "hu": 48.0}
    pattern = ", ".join(stations[n] for n in order)
    return Finding("lymphadenopathy", "", ("great_vessels",), float(short_axes.max()), "", pattern, geometry)


def _choose_widening(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    scale = float(rng.uniform(1.45, 1.85))
    geometry = {"scale": scale}
    return Finding("mediastinal_widening", "", ("great_vessels",), None, "", "anterior soft tissue", geometry)


def _paint_widening(scene: Scene, finding: Finding) -> None:
    canvas, body, scale = scene.canvas, scene.body, finding.geometry["scale"]
    extent = np.array([27.0 * scale, 26.0, 42.0]) * body.size
    free = np.isin(canvas.anatomy, (0, 10, 12, 13)) & (scene.fields.wall > 2.0)
    canvas.add_ellipsoid(body.at((0.0, -34.0, 58.0))[0], extent, 44.0, 0, within=free.astype(np.float32))


def _choose_material(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    pattern = str(rng.choice(["pacemaker", "port catheter", "sternal wires"]))
    side = {"pacemaker": "left", "port catheter": "right", "sternal wires": ""}[pattern]
    return Finding("medical_material", side, ("sternum",) if not side else ("superior_vena_cava",), None, "", pattern)


def _paint_material(scene: Scene, finding: Finding) -> None:
    canvas, body = scene.canvas, scene.body
    chest = -(body.half_depth_mm + 16.0)
    fx, _, fz = body.stretch
    if finding.pattern == "pacemaker":
        canvas.add_ellipsoid((78 * fx, chest + 16.0, 84 * fz), (21, 6, 20), _METAL_HU)
        lead = body.at((66, -84, 96), (44, -60, 108), (20, -28, 88), (-24, -18, 62), (-26, -16, 0), (-14, -26, -34))
        tip = scene.body.heart_centre_and_radii()[0] + np.array([24.0, -14.0, -22.0])
        canvas.add_tube(np.concatenate([lead, [tip]]), 2.2, _METAL_HU)
    elif finding.pattern == "port catheter":
        canvas.add_ellipsoid((-70 * fx, chest + 16.0, 84 * fz), (13, 8, 13), _METAL_HU)
        line = body.at((-66, -86, 92), (-52, -60, 118), (-38, -22, 112), (-28, -18, 70), (-27, -17, 5))
        canvas.add_tube(line, 2.2, 1900.0)
    else:
        front = -(body.half_depth_mm + 5.5)
        for z in np.linspace(-44, 52, 6):
            turn = np.linspace(0, 2 * np.pi, 9)
            loop = np.stack([19 * np.cos(turn), front + 9 * np.sin(turn), np.full(9, z * fz)], axis=1)
            canvas.add_tube(loop, 1.8, _METAL_HU)
        turn = np.linspace(0, 2 * np.pi, 13)
        ring = body.at((2, -20, -20))[0] + np.stack([12 * np.cos(turn), 12 * np.sin(turn), 3 * np.sin(turn)], axis=1)
        canvas.add_tube(ring, 2.4, _METAL_HU)


def _choose_fracture(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    if rng.random() < 0.4:
        vertebra = {"vertebra": int(rng.integers(6, 12))}
        return Finding("fracture", "", ("thoracic_spine",), None, "", "vertebral", vertebra)
    side = str(rng.choice(["left", "right"]))
    first = int(rng.integers(3, 7))
    geometry = {"ribs": list(range(first, first + int(rng.integers(2, 5)))), "way": float(rng.uniform(0.4, 0.62))}
    return Finding("fracture", side, (f"ribs_{side}",), None, "", "rib", geometry)


def _paint_fracture(scene: Scene, finding: Finding) -> None:
    if finding.pattern != "rib":
        return  # the spine's painter draws the collapsed vertebra
    canvas, body = scene.canvas, scene.body
    for number in finding.geometry["ribs"]:
        way = finding.geometry["way"] + 0.012 * (number % 2)
        gap = rib_position(body, number, finding.side, way)
        before = rib_position(body, number, finding.side, way - 0.035)
        after = rib_position(body, number, finding.side, way + 0.035)
        outward = np.array([gap[0] / body.half_width_mm**2, gap[1] / body.half_depth_mm**2, 0.0])
        outward /= np.linalg.norm(outward)
        # The line of fracture, and two stumps out of step that callus surrounds.
        canvas.add_ellipsoid(gap, (6, 6, 8), 45.0)
        canvas.add_ellipsoid(before + 3.0 * outward, (6.5, 6.5, 7.5), 520.0)
        canvas.add_ellipsoid(after - 3.0 * outward, (6.5, 6.5, 7.5), 520.0)


CHOOSERS = {
    "cardiomegaly": _choose_cardiomegaly,
    "pericardial_effusion": _choose_pericardial_effusion,
    "arterial_wall_calcification": _choose_arterial_calcification,
    "coronary_artery_wall_calcification": _choose_coronary_calcification,
    "hiatal_hernia": _choose_hernia,
    "lymphadenopathy": _choose_nodes,
    "mediastinal_widening": _choose_widening,
    "medical_material": _choose_material,
    "fracture": _choose_fracture,
}
MEDIASTINAL_PAINTERS = {
    "mediastinal_widening": _paint_widening,
    "pericardial_effusion": _paint_pericardial_effusion,
    "lymphadenopathy": _spots,
    "hiatal_hernia": _paint_hernia,
    "arterial_wall_calcification": _spots,
    "coronary_artery_wall_calcification": _paint_coronary_calcification,
}
PAINTERS = {"fracture": _paint_fracture, "medical_material": _paint_material}
