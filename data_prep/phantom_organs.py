"""The healthy soft organs of the phantom: chest wall, lungs, airways, mediastinum, upper abdomen. Densities in HU.

Labels are TotalSegmentator v2 `total` class ids. Its classes hold the pulmonary veins but no pulmonary arteries, so
the arteries are drawn without a label.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_prep.phantom_body import heart_distance
from data_prep.phantom_scene import LUNG_CLASS_OFFSET, Scene
from data_prep.phantom_shapes import ramp, wobble
from data_prep.phantom_trees import bronchial_tree, vascular_tree

__all__ = [
    "paint_abdomen",
    "paint_airways",
    "paint_chest_wall",
    "paint_lungs",
    "paint_mediastinum",
    "paint_pulmonary_vessels",
]

SOFT_TISSUE_HU, MUSCLE_HU, FAT_HU, AIR_HU = 40.0, 55.0, -105.0, -1000.0
_AORTA = ((-14, -22, -14), (-20, -28, 16), (-16, -26, 40), (-4, -10, 55), (10, 10, 57), (20, 28, 48), (22, 39, 28))


def paint_chest_wall(scene: Scene) -> None:
    """Paint skin, fat, muscle and the fat inside the rib cage, which later organs fill, and the table under the
    patient.
    """
    canvas, body, fields = scene.canvas, scene.body, scene.fields
    x, y, z = canvas.x, canvas.y, canvas.z
    everywhere = canvas.everywhere()
    streaks = wobble(x, y, z, body.seed + 11, 26.0)
    skin = canvas.coverage(-fields.body)
    canvas.blend(everywhere, skin, 10.0)
    canvas.blend(everywhere, canvas.coverage(2.5 - fields.body), FAT_HU)
    muscle_depth = body.fat_mm * (1.0 + 0.25 * streaks)
    # Under the breast the fat is as thick as the breast is.
    outside_cage = -fields.wall
    muscle = np.minimum(fields.body - muscle_depth, 30.0 * body.size - outside_cage)
    canvas.blend(everywhere, canvas.coverage(-muscle), np.where(streaks > 0.9, -40.0, MUSCLE_HU).astype(np.float32))
    if body.sex == "F":
        for side in (-1.0, 1.0):
            centre = (side * 64.0 * body.stretch[0], -(body.half_depth_mm + 38.0), -14.0 * body.stretch[2])
            box = canvas.box(centre, (36, 24, 36))
            if box is not None:
                gland = ramp(streaks[box], 0.1, 0.7) * (fields.body[box] > 5) * (outside_cage[box] > 26)
                canvas.blend(box, gland * 0.8, 30.0)
    for side in (-1.0, 1.0):
        axilla = body.at((side * 122.0, 8.0, 86.0))[0]
        canvas.add_ellipsoid(axilla, (22, 34, 40), FAT_HU, edge_mm=6.0, within=(outside_cage > 12) * skin)
    canvas.blend(everywhere, canvas.coverage(1.5 - fields.wall), -95.0)
    table_y = body.half_depth_mm + 22.0 + 0.8 * body.fat_mm + 12.0 + 0.0006 * x * x * -1.0
    table = np.abs(y - table_y) - 5.0
    canvas.blend(everywhere, canvas.coverage(np.maximum(table, np.abs(x) - 190.0)) * (fields.body < -2), -250.0)


def paint_abdomen(scene: Scene) -> None:
    """Paint diaphragm, liver (5), stomach (6) and spleen (1) under the domes of the diaphragm."""
    canvas, body, fields = scene.canvas, scene.body, scene.fields
    x, y, z = canvas.x, canvas.y, canvas.z
    fx, fy, fz = body.stretch
    below = np.minimum(-fields.diaphragm, fields.wall)
    if not np.any(below > -5.0):
        return
    everywhere = canvas.everywhere()
    # The diaphragm is a thin muscle over the abdominal fat.
    canvas.blend(everywhere, canvas.coverage(-below), MUSCLE_HU)
    canvas.blend(everywhere, canvas.coverage(3.0 - below), FAT_HU)
    edge = 40.0 * fx - 0.25 * (z + 110.0 * fz) - 0.9 * np.maximum(y + 10.0, 0.0)
    liver = np.minimum(np.minimum(below - 2.0, edge - x), z + 260.0)
    liver = np.minimum(liver, np.sqrt(x * x + (y - 62 * fy) ** 2) - 36.0)
    canvas.blend(everywhere, canvas.coverage(-liver), body.liver_hu, label=5)
    inside = canvas.coverage(2.0 - below)
    canvas.add_ellipsoid(body.at((86, 42, -122))[0], (30 * fx, 38 * fy, 46 * fz), 50.0, 1, within=inside)
    found = canvas.add_ellipsoid(body.at((58, -14, -118))[0], (40 * fx, 42 * fy, 40 * fz), 45.0, 6, within=inside)
    if found is not None:
        gas = canvas.coverage(y - (-30.0 * fy)) * inside
        canvas.add_ellipsoid(body.at((58, -14, -118))[0], (35 * fx, 37 * fy, 35 * fz), AIR_HU + 20, 6, within=gas)


def paint_lungs(scene: Scene) -> None:
    """Paint aerated lung with its gravity gradient and fissures; the labels are the five lobes (10 to 14)."""
    canvas, body, fields = scene.canvas, scene.body, scene.fields
    texture = wobble(canvas.x, canvas.y, canvas.z, body.seed + 12, 45.0)
    density = body.lung_hu + 45.0 * ramp(canvas.y, -70.0, 85.0) + 7.0 * texture
    # A fissure is about a millimetre thick; it adds to a voxel by its share of it.
    density = density + 300.0 * min(1.0, 1.1 / canvas.edge_mm) * np.clip(
        1.0 - fields.fissure / max(1.2, 0.5 * canvas.edge_mm), 0.0, 1.0
    )
    coverage = scene.lung()
    canvas.blend(canvas.everywhere(), coverage, density.astype(np.float32))
    inside = coverage >= 0.5
    canvas.anatomy[inside] = fields.lobe[inside] + LUNG_CLASS_OFFSET


def paint_pulmonary_vessels(scene: Scene) -> None:
    """Paint the vessels inside the lungs; they keep the lobe's label, as TotalSegmentator's lobes include them."""
    within = scene.lung()
    for branch in vascular_tree(scene.body):
        scene.canvas.add_tube(branch.points, branch.radius, scene.body.blood_hu, within=within)


def paint_airways(
    scene: Scene, lumen_scale: Mapping[int, float] | None = None, wall_mm: Mapping[int, float] | None = None
) -> None:
    """Paint trachea (16) and bronchi: walls first, then the air inside, so that they open into each other.

    Args:
        lumen_scale: lobe -> factor of the radii of its bronchi (wide in bronchiectasis).
        wall_mm: lobe -> thickness of the walls of its bronchi, mm (thick in peribronchial thickening).
    """
    lumen_scale, wall_mm = lumen_scale or {}, wall_mm or {}
    normal_wall = {0: 1.6, 1: 1.4, 2: 1.2, 3: 0.8}
    widths = []
    for branch in bronchial_tree(scene.body):
        # Lobar bronchi widen less than the smaller ones behind them.
        scale = lumen_scale.get(branch.lobe, 1.0) if branch.generation == 3 else 1.0
        if branch.generation == 2:
            scale = 1.0 + 0.35 * (lumen_scale.get(branch.lobe, 1.0) - 1.0)
        lumen = np.linspace(*branch.radius, len(branch.points)) * scale
        wall = max(wall_mm.get(branch.lobe, 0.0), normal_wall[branch.generation])
        widths.append((branch, lumen))
        label = 16 if branch.generation == 0 else None
        scene.canvas.add_tube(branch.points, lumen + wall, SOFT_TISSUE_HU, label)
    for branch, lumen in widths:
        # The trachea's mask follows it into the main bronchi, as TotalSegmentator's does.
        label = 16 if branch.generation <= 1 else None
        scene.canvas.add_tube(branch.points, lumen, AIR_HU + 15.0, label)


def paint_mediastinum(scene: Scene) -> None:
    """Paint heart (51, 61), aorta (52), pulmonary veins (53), great vessels (54 to 60, 62), oesophagus (15), thyroid
    (17).
    """
    canvas, body = scene.canvas, scene.body
    size, blood = body.size, body.blood_hu
    _paint_heart(scene)

    def tube(
        label: int | None, radius: float | tuple[float, ...], *points: tuple[float, float, float], hu: float = blood
    ):
        canvas.add_tube(body.at(*points), np.asarray(radius) * size, hu, label)

    tube(None, (14.0, 13.0, 12.0), (14, -40, -14), (12, -34, 10), (10, -18, 24))
    tube(None, (10.5, 9.0, 6.0), (10, -18, 24), (-18, 0, 16), (-42, 4, 8))
    tube(None, (11.0, 8.0, 6.0), (10, -18, 24), (30, 0, 24), (44, 6, 12))
    for ends in ((-42, 10, -14), (-40, 2, -2), (46, 12, -16), (46, 0, -2)):
        tube(53, (6.0, 5.0), (6 if ends[0] > 0 else -6, 8, -14), ends)
    tube(62, 8.5, (-26, -14, -16), (-27, -18, 20), (-25, -18, 62))
    tube(60, 7.0, (-25, -18, 62), (-34, -20, 105), (-42, -16, 150))
    tube(59, 6.5, (-25, -20, 62), (8, -32, 78), (34, -22, 104), (42, -16, 150))
    tube(52, (15.0, 15.5, 14.5, 13.5, 12.5, 12.0, 11.5), *_AORTA)
    descending = [(21 - 8 * t, 39 + 6 * np.sin(3 * t), 28 - 190 * t) for t in np.linspace(0, 1, 7)]
    tube(52, 11.5, *descending)
    tube(54, 6.0, (-6, -14, 58), (-14, -10, 90))
    tube(57, 4.0, (-14, -10, 90), (-20, -6, 160))
    tube(55, 4.5, (-14, -10, 90), (-40, 0, 122), (-80, -6, 132))
    tube(58, 4.0, (6, -2, 60), (16, -4, 100), (20, -6, 160))
    tube(56, 5.0, (14, 14, 58), (24, 12, 100), (44, 4, 124), (84, -6, 132))
    gullet = [(2, 14, 170), (3, 17, 110), (4, 24, 60), (3, 27, 20), (4, 24, -30), (10, 22, -75), (26, 10, -104)]
    tube(15, 7.5, *gullet, hu=SOFT_TISSUE_HU)
    tube(None, 1.8, *gullet[1:5], hu=-450.0)
    for side in (-1.0, 1.0):
        canvas.add_ellipsoid(body.at((side * 17.0, -8.0, 152.0))[0], np.array([9, 10, 22]) * size, 105.0, 17)


def _paint_heart(scene: Scene) -> None:
    canvas, body = scene.canvas, scene.body
    centre, radii = body.heart_centre_and_radii()
    box = canvas.box(centre, float(radii.max()) + 12.0)
    if box is None:
        return
    distance = heart_distance(body, canvas.x[box], canvas.y[box], canvas.z[box])
    # Pericardium: a thin line around the fat that surrounds the muscle.
    canvas.blend(box, canvas.coverage(np.abs(distance - 3.0) - 0.9) * 0.6, 20.0)
    canvas.blend(box, canvas.coverage(distance - 2.0), -90.0)
    canvas.blend(box, canvas.coverage(distance), SOFT_TISSUE_HU + 6.0, label=51)
    grooves = wobble(canvas.x[box], canvas.y[box], canvas.z[box], body.seed + 13, 60.0)
    canvas.blend(box, canvas.coverage(np.abs(grooves) * 20.0 + (distance + 6.0) * 0.8) * (distance < 0), -80.0)
    growth = body.heart_scale
    chambers = (((34, -16, -48), (22, 18, 24)), ((12, -44, -46), (24, 14, 22)), ((-22, -18, -34), (20, 20, 24)))
    for place, extent in (*chambers, ((6, 8, -20), (26, 14, 17))):
        offset = (body.at(place)[0] - centre) * growth
        canvas.add_ellipsoid(centre + offset, np.array(extent) * body.size * growth, body.blood_hu - 4.0, 51)
    appendage = centre + (body.at((44.0, -14.0, -8.0))[0] - centre) * growth
    canvas.add_ellipsoid(appendage, np.array([9.0, 12.0, 8.0]) * body.size, body.blood_hu, 61)
