"""Focal findings of the lung: how they are placed in a patient, and how they are painted.

Nodule and mass, ground glass and consolidation (alone, as pneumonia, as oedema), atelectasis, fibrotic sequela.
Densities in HU, lengths in mm.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_prep.finding_record import Finding
from data_prep.phantom_body import PatientBody
from data_prep.phantom_scene import Scene, lobes_of
from data_prep.phantom_shapes import Box, cells, ellipsoid_distance, ramp, wobble
from data_prep.phantom_trees import lung_points
from vlm3d_ext.data.anatomical_regions import ANATOMICAL_REGIONS

__all__ = ["CHOOSERS", "PAINTERS", "keep_parts"]

_LEFT_LOBES, _RIGHT_LOBES = (1, 2), (3, 4, 5)
_LARGEST_NODULE_MM = 30.0


def lobe_name(lobe: int) -> str:
    """Return the region name of a lobe index 1 to 5."""
    return ANATOMICAL_REGIONS[lobe - 1].name


def side_of_lobes(lobes: tuple[int, ...]) -> str:
    """Return "left", "right" or "bilateral"."""
    left, right = any(lobe in _LEFT_LOBES for lobe in lobes), any(lobe in _RIGHT_LOBES for lobe in lobes)
    return "bilateral" if left and right else "left" if left else "right"


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1, 2**31))


def _choose_nodules(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    num = int(rng.choice([1, 2, 3, 4], p=[0.4, 0.25, 0.2, 0.15]))
    diameters = np.sort(np.clip(rng.lognormal(np.log(14.5), 0.38, num), 6.0, 29.0))[::-1]
    radii = np.maximum(diameters / 2, least_radius_mm)
    lobes = rng.choice([1, 2, 3, 4, 5], size=num, p=[0.22, 0.22, 0.24, 0.1, 0.22])
    centres = [lung_points(body, rng, int(lobe), 1, radius + 2)[0] for lobe, radius in zip(lobes, radii, strict=True)]
    found = tuple(dict.fromkeys(int(lobe) for lobe in lobes))
    return Finding(
        "lung_nodule",
        side_of_lobes(found),
        tuple(lobe_name(lobe) for lobe in found),
        size_mm=float(min(2 * radii[0], max(_LARGEST_NODULE_MM, 2 * least_radius_mm))),
        pattern="calcified" if rng.random() < 0.12 else "solid",
        geometry={"centres": np.array(centres), "radii": radii, "lobes": [int(lobe) for lobe in lobes]},
    )


def _paint_nodules(scene: Scene, finding: Finding) -> None:
    canvas = scene.canvas
    density = 320.0 if finding.pattern == "calcified" else 45.0
    for n, (centre, radius) in enumerate(zip(finding.geometry["centres"], finding.geometry["radii"], strict=True)):
        box = canvas.box(centre, radius)
        if box is None:
            continue
        distance = ellipsoid_distance(canvas.x[box], canvas.y[box], canvas.z[box], centre, (radius,) * 3)
        canvas.count_part("lung_nodule", n, (distance <= 0) & (scene.depth[box] > 0))
        canvas.blend(box, canvas.coverage(distance) * canvas.coverage(-scene.depth[box]), density)
        canvas.mark_lesion("lung_nodule", box, (distance <= 0) & (scene.depth[box] > 0))


def _choose_mass(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    lobe = int(rng.choice([1, 2, 3, 5]))
    radius = max(float(rng.uniform(18.0, 29.0)), 1.2 * least_radius_mm)
    centre = lung_points(body, rng, lobe, 1, 0.8 * radius)
    geometry = {"centres": centre, "radii": np.array([radius]), "lobes": [lobe], "seed": _seed(rng)}
    return Finding("mass", side_of_lobes((lobe,)), (lobe_name(lobe),), size_mm=2 * radius, geometry=geometry)


def _paint_mass(scene: Scene, finding: Finding) -> None:
    canvas, geometry = scene.canvas, finding.geometry
    centre, radius = geometry["centres"][0], geometry["radii"][0]
    box = canvas.box(centre, radius + 14.0)
    if box is None:
        return
    x, y, z = canvas.x[box], canvas.y[box], canvas.z[box]
    distance = ellipsoid_distance(x, y, z, centre, (radius,) * 3) + 2.5 * wobble(x, y, z, geometry["seed"], 18.0)
    lung = canvas.coverage(-scene.depth[box])
    # Spicules: streaks that run out from the surface.
    rays = wobble((x - centre[0]) / radius, (y - centre[1]) / radius, (z - centre[2]) / radius, geometry["seed"], 0.9)
    canvas.blend(box, ramp(rays, 0.7, 1.2) * ramp(distance, 12.0, 0.0) * lung * 0.6, 0.0)
    canvas.blend(box, canvas.coverage(distance) * lung, 42.0)
    canvas.count_part("mass", 0, (distance < -2.0) & (lung >= 0.5))
    # The middle of a large tumour is often necrotic.
    canvas.blend(box, canvas.coverage(distance + 0.6 * radius, 6.0), 18.0)


def _choose_patches(
    key: str, body: PatientBody, rng: np.random.Generator, num: int, radii: tuple[float, float], least_radius_mm: float
) -> Finding:
    if num == 1:
        lobes = [int(rng.choice([1, 2, 3, 4, 5], p=[0.18, 0.27, 0.18, 0.1, 0.27]))]
    else:
        pool = [(1, 2, 3, 4, 5), (2, 5), _LEFT_LOBES, _RIGHT_LOBES][int(rng.choice(4, p=[0.5, 0.2, 0.15, 0.15]))]
        lobes = [int(lobe) for lobe in rng.choice(pool, size=num)]
    centres, sizes = [], []
    for lobe in lobes:
        # Mostly near the pleura and at the back, as in infections.
        candidates = lung_points(body, rng, lobe, 12, 9.0)
        centres.append(candidates[int(np.argmax(candidates[:, 1] + rng.normal(0, 18.0, len(candidates))))])
        size = rng.uniform(*radii) * rng.uniform(0.85, 1.2, 3)
        sizes.append(np.maximum(size, 1.2 * least_radius_mm))
    found = tuple(dict.fromkeys(lobes))
    return Finding(
        key,
        side_of_lobes(found),
        tuple(lobe_name(lobe) for lobe in found),
        size_mm=float(2 * np.max(sizes)),
        pattern="focal" if num == 1 else "patchy",
        geometry={"centres": np.array(centres), "radii": np.array(sizes), "lobes": lobes, "seed": _seed(rng)},
    )


def _choose_ground_glass(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    num = int(rng.integers(2, 7))
    return _choose_patches("ground_glass_opacity", body, rng, num, (15.0, 30.0), least_radius_mm)


def _choose_consolidation(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    return _choose_patches("consolidation", body, rng, int(rng.integers(1, 3)), (20.0, 34.0), least_radius_mm)


def _choose_pneumonia(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    return _choose_patches("pneumonia", body, rng, 1, (24.0, 36.0), least_radius_mm)


def _opacify(scene: Scene, box: Box, coverage: np.ndarray, rise_hu: float) -> None:
    """Raise lung density; tissue that is already dense rises little, so vessels stay visible in ground glass."""
    view = scene.canvas.hu[box]
    view += coverage * rise_hu * np.clip(1.0 - (view + 900.0) / 950.0, 0.0, 1.1)


def _patches(scene: Scene, finding: Finding):
    """Yield (part, box, distance, coverage by the lobe's lung) for each patch; distance is negative inside."""
    canvas, geometry = scene.canvas, finding.geometry
    for n, (centre, radii) in enumerate(zip(geometry["centres"], geometry["radii"], strict=True)):
        box = canvas.box(centre, np.asarray(radii) * 1.35 + 16.0)
        if box is None:
            continue
        x, y, z = canvas.x[box], canvas.y[box], canvas.z[box]
        distance = ellipsoid_distance(x, y, z, centre, radii) + 0.16 * float(np.mean(radii)) * wobble(
            x, y, z, geometry["seed"] + n, 28.0
        )
        lobe = scene.fields.lobe[box] == geometry["lobes"][n]
        yield n, box, distance, canvas.coverage(-scene.depth[box]) * lobe


def _paint_ground_glass(scene: Scene, finding: Finding) -> None:
    for n, box, distance, lung in _patches(scene, finding):
        coverage = scene.canvas.coverage(distance, 9.0) * lung
        scene.canvas.count_part(finding.key, n, coverage >= 0.5)
        _opacify(scene, box, coverage, 290.0)
        scene.canvas.mark_lesion("ground_glass_opacity", box, coverage >= 0.5)


def _paint_consolidation(scene: Scene, finding: Finding) -> None:
    canvas = scene.canvas
    for n, box, distance, lung in _patches(scene, finding):
        coverage = canvas.coverage(distance, 5.0) * lung
        canvas.count_part(finding.key, n, coverage >= 0.5)
        if finding.key == "pneumonia":
            halo = ramp(distance, 17.0, 4.0) * lung
            _opacify(scene, box, halo, 280.0)
            canvas.mark_lesion("ground_glass_opacity", box, (halo >= 0.5) & (coverage < 0.5))
        canvas.blend(box, coverage, 28.0)
        # Air bronchogram: bronchi stay open in airless lung.
        centre, radii = finding.geometry["centres"][n], finding.geometry["radii"][n]
        hilum = scene.body.at((42.0 if centre[0] > 0 else -42.0, 8.0, -4.0))[0]
        away = (centre - hilum) / np.linalg.norm(centre - hilum)
        for spread in (-0.4, 0.1, 0.5):
            across = np.cross(away, [0.0, 0.6, 0.8]) * spread * np.mean(radii)
            start, end = centre - 0.75 * away * np.mean(radii), centre + 0.45 * away * np.mean(radii) + across
            canvas.add_tube(np.stack([start, end]), (2.0, 1.2), -900.0, within=scene.lung())
        canvas.mark_lesion("consolidation", box, coverage >= 0.5)


def _choose_edema(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    reach = float(rng.uniform(48.0, 66.0)) + least_radius_mm
    names = tuple(lobe_name(lobe) for lobe in (1, 2, 3, 5))
    geometry = {"reach": reach, "seed": _seed(rng)}
    return Finding("pulmonary_edema", "bilateral", names, pattern="perihilar", geometry=geometry)


def _paint_edema(scene: Scene, finding: Finding) -> None:
    canvas, reach = scene.canvas, finding.geometry["reach"]
    everywhere = canvas.everywhere()
    nearest = np.full(canvas.x.shape, np.inf, dtype=np.float32)
    for side in (-1.0, 1.0):
        hilum = scene.body.at((side * 48.0, 14.0, -8.0))[0]
        nearest = np.minimum(
            nearest, ellipsoid_distance(canvas.x, canvas.y, canvas.z, hilum, (reach * 0.8, reach, reach * 1.15))
        )
    nearest += 5.0 * wobble(canvas.x, canvas.y, canvas.z, finding.geometry["seed"], 30.0)
    coverage = canvas.coverage(nearest, 16.0) * scene.lung()
    _opacify(scene, everywhere, coverage, 270.0)
    canvas.mark_lesion("ground_glass_opacity", everywhere, coverage >= 0.5)
    paint_septal_lines(scene, finding.geometry["seed"], 1.0)


def paint_septal_lines(scene: Scene, seed: int, strength: float) -> None:
    """Paint the walls between secondary lobules as dense lines, strongest in the outer and lower lung."""
    canvas = scene.canvas
    k, j, i = np.nonzero(scene.depth > 0.0)
    if len(k) == 0:
        return
    x, y, z, depth = canvas.x[k, j, i], canvas.y[k, j, i], canvas.z[k, j, i], scene.depth[k, j, i]
    to_wall, _ = cells(x, y, z, seed, 21.0)
    zone = ramp(depth, 48.0, 18.0) * (0.55 + 0.45 * ramp(z, 90.0, 10.0))
    # A septum 2 mm thick, coarser than a real one, so that a scan resampled to few slices still shows it; a voxel wider
    # than that shows its share.
    line = np.clip(0.5 - (to_wall - 1.0) / canvas.edge_mm, 0.0, 1.0) * min(1.0, 3.4 / canvas.edge_mm)
    current = canvas.hu[k, j, i]
    canvas.hu[k, j, i] = current + 0.68 * line * zone * strength * np.maximum(-60.0 - current, 0.0)


def _choose_atelectasis(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    pattern = "linear" if rng.random() < 0.5 else "segmental"
    lobes = tuple(int(v) for v in rng.choice([1, 2, 4, 5], size=1 if pattern == "segmental" else 2, replace=False))
    centres, normals = [], []
    for lobe in lobes:
        for _ in range(2 if pattern == "linear" else 1):
            # Low in the lung, where ventilation is poorest.
            candidates = lung_points(body, rng, lobe, 12, 8.0)
            centres.append(candidates[int(np.argmin(candidates[:, 2]))])
            if pattern == "segmental":
                # The wedge runs from the hilum to the pleura, and upright.
                hilum = body.at((42.0 if lobe in _LEFT_LOBES else -38.0, 8.0, -10.0))[0]
                normal = np.cross(centres[-1] - hilum, [0.0, 0.0, 1.0]) + rng.normal(0, 4.0, 3)
            else:
                normal = np.array([rng.normal(0, 0.7), rng.normal(0, 0.7), 0.6])
            normals.append(normal / np.linalg.norm(normal))
    thickness = float(rng.uniform(5.0, 8.0)) if pattern == "linear" else float(rng.uniform(16.0, 24.0))
    geometry = {
        "centres": np.array(centres),
        "normals": np.array(normals),
        "lobes": list(np.repeat(lobes, 2 if pattern == "linear" else 1)),
        "reach": float(rng.uniform(26.0, 38.0)),
    }
    names = tuple(lobe_name(lobe) for lobe in lobes)
    return Finding("atelectasis", side_of_lobes(lobes), names, thickness, pattern=pattern, geometry=geometry)


def _paint_atelectasis(scene: Scene, finding: Finding) -> None:
    canvas, geometry = scene.canvas, finding.geometry
    lobes = np.isin(scene.fields.lobe, lobes_of(finding))
    half = (finding.size_mm or 6.0) / 2
    for n, (centre, normal) in enumerate(zip(geometry["centres"], geometry["normals"], strict=True)):
        reach = geometry["reach"]
        box = canvas.box(centre, reach + half)
        if box is None:
            continue
        dx, dy, dz = canvas.x[box] - centre[0], canvas.y[box] - centre[1], canvas.z[box] - centre[2]
        height = dx * normal[0] + dy * normal[1] + dz * normal[2]
        across = np.sqrt(np.maximum(dx * dx + dy * dy + dz * dz - height * height, 0.0))
        # A collapsed segment is a wedge, broad at the pleura; a linear atelectasis is a plate.
        local = half * (1.35 - 0.03 * np.clip(scene.depth[box], 0, 30)) if finding.pattern == "segmental" else half
        distance = np.maximum(np.abs(height) - local, across - reach)
        coverage = canvas.coverage(distance) * canvas.coverage(-scene.depth[box]) * lobes[box]
        canvas.blend(box, coverage, 35.0)
        canvas.count_part("atelectasis", n, coverage >= 0.4)


def _choose_sequela(body: PatientBody, rng: np.random.Generator, least_radius_mm: float) -> Finding:
    if rng.random() < 0.55:
        side = str(rng.choice(["left", "right", "bilateral"], p=[0.25, 0.35, 0.4]))
        lobes: tuple[int, ...] = {"left": (1,), "right": (3,), "bilateral": (1, 3)}[side]
        pattern, size = "apical", float(rng.uniform(9.0, 16.0))
    else:
        side, lobes, pattern, size = "bilateral", (2, 5), "reticular", float(rng.uniform(20.0, 32.0))
    starts = np.concatenate([lung_points(body, rng, lobe, 5, 3.0) for lobe in lobes for _ in range(1)])
    geometry = {"seed": _seed(rng), "starts": starts, "jitter": rng.normal(0, 9.0, (len(starts), 3))}
    names = tuple(lobe_name(lobe) for lobe in lobes)
    return Finding("pulmonary_fibrotic_sequela", side, names, size, pattern=pattern, geometry=geometry)


def _paint_sequela(scene: Scene, finding: Finding) -> None:
    canvas, geometry = scene.canvas, finding.geometry
    lobes = np.isin(scene.fields.lobe, lobes_of(finding))
    lung = scene.lung() * lobes
    fz = scene.body.stretch[2]
    thickness = finding.size_mm or 10.0
    if finding.pattern == "apical":
        rough = wobble(canvas.x, canvas.y, canvas.z, geometry["seed"], 34.0)
        cap = ramp(canvas.z, 62.0 * fz, 98.0 * fz) * thickness * (1.0 + 0.4 * rough) - 1.0
        canvas.blend(canvas.everywhere(), canvas.coverage(scene.depth - cap) * lung, 35.0)
        spots = canvas.coverage((scene.depth - cap * 0.7) + 9.0 * (1.7 - rough)) * lung
        canvas.blend(canvas.everywhere(), spots, 380.0)
        for start, jitter in zip(geometry["starts"], geometry["jitter"], strict=True):
            sign = 1.0 if start[0] > 0 else -1.0
            apex = scene.body.at((sign * 46.0, 4.0, 104.0))[0] + jitter
            hilum = scene.body.at((sign * 44.0, 6.0, 30.0))[0] + 0.6 * jitter[::-1]
            middle = 0.5 * (apex + hilum) + 0.8 * jitter[[1, 2, 0]]
            canvas.add_tube(np.stack([apex, middle, hilum]), (4.2, 2.8, 2.0), 25.0, within=lung)
        return
    k, j, i = np.nonzero((scene.depth > 0.0) & (scene.depth < thickness + 6.0) & lobes)
    if len(k) == 0:
        return
    x, y, z = canvas.x[k, j, i], canvas.y[k, j, i], canvas.z[k, j, i]
    to_wall, _ = cells(x, y, z, geometry["seed"], 9.5)
    zone = ramp(scene.depth[k, j, i], thickness + 5.0, thickness - 6.0) * ramp(z, 5.0 * fz, -55.0 * fz)
    wall = np.clip(0.5 - (to_wall - 1.2) / max(canvas.edge_mm * 0.8, 1.0), 0.15, 1.0)
    current = canvas.hu[k, j, i]
    target = -930.0 + wall * 900.0
    canvas.hu[k, j, i] = current + zone * (target - current)


def keep_parts(finding: Finding, parts: list[int]) -> Finding | None:
    """Return a focal finding with only some of its parts (nodules, patches, plates), its place and size told anew;
    None if none are left.
    """
    if not parts:
        return None
    geometry = dict(finding.geometry)
    for name in ("centres", "radii", "normals", "lobes"):
        if name in geometry:
            geometry[name] = [geometry[name][n] for n in parts]
    found = tuple(dict.fromkeys(int(lobe) for lobe in geometry["lobes"]))
    size = finding.size_mm if "radii" not in geometry else float(2 * np.max(geometry["radii"]))
    names = tuple(lobe_name(lobe) for lobe in found)
    return replace(finding, side=side_of_lobes(found), regions=names, size_mm=size, geometry=geometry)


CHOOSERS = {
    "lung_nodule": _choose_nodules,
    "mass": _choose_mass,
    "ground_glass_opacity": _choose_ground_glass,
    "consolidation": _choose_consolidation,
    "pneumonia": _choose_pneumonia,
    "pulmonary_edema": _choose_edema,
    "atelectasis": _choose_atelectasis,
    "pulmonary_fibrotic_sequela": _choose_sequela,
}
PAINTERS = {
    # Ground glass first: what is denser covers it.
    "pulmonary_edema": _paint_edema,
    "ground_glass_opacity": _paint_ground_glass,
    "pulmonary_fibrotic_sequela": _paint_sequela,
    "atelectasis": _paint_atelectasis,
    "consolidation": _paint_consolidation,
    "pneumonia": _paint_consolidation,
    "mass": _paint_mass,
    "lung_nodule": _paint_nodules,
}
