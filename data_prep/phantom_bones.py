"""The skeleton of the phantom: spine, ribs, sternum and costal cartilages, shoulder girdle, with TotalSegmentator's
class ids.
"""

from __future__ import annotations

import numpy as np

from data_prep.phantom_body import FIRST_VERTEBRA_Z_MM, VERTEBRA_PITCH_MM, PatientBody
from data_prep.phantom_scene import Scene
from data_prep.phantom_shapes import Canvas

__all__ = ["paint_bones", "rib_position"]

_CORTICAL_HU = 620.0
_RIB_LEVEL_MM = 5.5
"""Distance of the middle of a rib outside the inner surface of the rib cage."""
_RIB_DROP_MM = 92.0
# Share of the way from back to front at which the bone of each rib ends.
_BONE_END = np.array([0, 0.86, 0.86, 0.85, 0.84, 0.83, 0.82, 0.81, 0.80, 0.78, 0.74, 0.52, 0.33])
_FIRST_RIB_CLASS = {"left": 92, "right": 104}


def _way_to_front(body: PatientBody, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return 0 at the back of the rib cage, 1 at its front, as an angle share, independent of the height."""
    return np.arctan2(np.abs(x) / body.half_width_mm, y / body.half_depth_mm) / np.pi


def rib_position(body: PatientBody, number: int, side: str, way: float) -> np.ndarray:
    """Return the position (3,) in mm of a point on a rib, `way` from 0 (spine) to 1 (sternum)."""
    sign = 1.0 if side == "left" else -1.0
    z = body.vertebra_z_mm(number) - _RIB_DROP_MM * body.stretch[2] * way
    u = float(np.clip((z / body.stretch[2] + 20.0) / 152.0, 0.0, 0.99))
    narrowing = np.sqrt(1.0 - u**2.5)
    angle = way * np.pi
    sine, cosine = abs(np.sin(angle)), abs(np.cos(angle))
    rho = narrowing / (sine**2.5 + cosine**2.5) ** 0.4
    x = sign * (rho * np.sin(angle) * body.half_width_mm + _RIB_LEVEL_MM * np.sin(angle))
    y = rho * np.cos(angle) * body.half_depth_mm + _RIB_LEVEL_MM * np.cos(angle)
    return np.array([x, y, z])


def paint_bones(scene: Scene) -> None:
    """Paint all bones; they cover what lies under them."""
    _paint_ribs(scene)
    _paint_sternum(scene)
    _paint_shoulder_girdle(scene)
    _paint_spine(scene)


def _paint_ribs(scene: Scene) -> None:
    canvas, body = scene.canvas, scene.body
    outside = -scene.fields.wall
    k, j, i = np.nonzero((outside > -3.0) & (outside < 15.0))
    if len(k) == 0:
        return
    x, y, z = canvas.x[k, j, i], canvas.y[k, j, i], canvas.z[k, j, i]
    way = _way_to_front(body, x, y, z)
    level = (z + _RIB_DROP_MM * body.stretch[2] * way) / body.stretch[2]
    number = 1.0 + (FIRST_VERTEBRA_Z_MM - level) / VERTEBRA_PITCH_MM
    nearest = np.clip(np.round(number), 1, 12).astype(int)
    off_level = (number - nearest) * VERTEBRA_PITCH_MM * body.stretch[2] * 0.85
    off_surface = outside[k, j, i] - _RIB_LEVEL_MM
    inner = np.sqrt((off_level / 5.3) ** 2 + (off_surface / 4.0) ** 2)
    distance = (inner - 1.0) * 4.5
    coverage = canvas.coverage(distance) * (np.abs(x) > 14.0)
    front = way > _BONE_END[nearest]
    cartilage = front & (nearest <= 10) & (np.abs(x) > 16.0)
    bone = ~front
    hu = np.where(inner < 0.62, body.bone_hu + 60.0, _CORTICAL_HU)
    for part, values in ((bone, hu), (cartilage, np.full_like(hu, 105.0))):
        share = coverage * part
        current = canvas.hu[k, j, i]
        canvas.hu[k, j, i] = current + share * (values - current)
    solid = coverage >= 0.5
    labels = np.where(x > 0, _FIRST_RIB_CLASS["left"], _FIRST_RIB_CLASS["right"]) + nearest - 1
    labels = np.where(cartilage, 117, labels)
    chosen = solid & (bone | cartilage)
    canvas.anatomy[k[chosen], j[chosen], i[chosen]] = labels[chosen]


def _paint_slab(canvas: Canvas, centre: np.ndarray, half: tuple[float, float, float], hu: float, label: int) -> None:
    """Paint a rounded block with a dense rim."""
    box = canvas.box(centre, half)
    if box is None:
        return
    u = np.abs(canvas.x[box] - centre[0]) - half[0]
    v = np.abs(canvas.y[box] - centre[1]) - half[1]
    w = np.abs(canvas.z[box] - centre[2]) - half[2]
    distance = np.maximum(np.maximum(u, v), w)
    canvas.blend(box, canvas.coverage(distance), np.where(distance > -2.0, 380.0, hu).astype(np.float32), label)


def _paint_sternum(scene: Scene) -> None:
    body = scene.body
    front = -(body.half_depth_mm + _RIB_LEVEL_MM)
    fz = body.stretch[2]
    for centre_z, half_z, half_x, back in ((46.0, 20.0, 24.0, 8.0), (-14.0, 40.0, 16.0, 0.0), (-64.0, 12.0, 6.0, 0.0)):
        centre = np.array([0.0, front + back, centre_z * fz])
        _paint_slab(scene.canvas, centre, (half_x * body.size, 5.5, half_z * fz), scene.body.bone_hu - 20.0, 116)


def _paint_shoulder_girdle(scene: Scene) -> None:
    canvas, body = scene.canvas, scene.body
    x, y, z = canvas.x, canvas.y, canvas.z
    fx, _, fz = body.stretch
    outside = -scene.fields.wall
    for side, scapula, clavicle, humerus in ((1.0, 71, 73, 69), (-1.0, 72, 74, 70)):
        box = canvas.box((side * 95.0 * fx, 75.0 * body.stretch[1], 70.0 * fz), (60.0, 60.0, 75.0 * fz))
        if box is not None:
            # The blade of the scapula lies on the rib cage, a triangle that narrows downwards.
            way = _way_to_front(body, x[box], y[box], z[box])
            reach = 0.06 + 0.12 * (z[box] / fz + 5.0) / 120.0
            plate = np.abs(outside[box] - 21.0 - 10.0 * (way - 0.2)) - 2.6
            triangle = np.maximum(np.abs(way - 0.22) - reach, np.abs(z[box] / fz - 62.0) / 58.0 - 1.0) * 90.0
            on_side = side * x[box] > 0
            shape = np.maximum(plate, triangle)
            canvas.blend(box, canvas.coverage(shape) * on_side, 420.0, scapula)
        spine_of_scapula = body.at((side * 78, 96, 96), (side * 120, 60, 118), (side * 138, 22, 126))
        canvas.add_tube(spine_of_scapula, 5.0, 400.0, scapula)
        canvas.add_tube(
            body.at((side * 22, -72, 84), (side * 60, -70, 104), (side * 105, -40, 122), (side * 132, -8, 128)),
            6.0,
            470.0,
            clavicle,
        )
        head = body.at((side * 146.0, 6.0, 128.0))[0]
        canvas.add_ellipsoid(head, np.full(3, 19.0 * body.size), 520.0, humerus)
        canvas.add_ellipsoid(head, np.full(3, 15.0 * body.size), body.bone_hu + 30.0, humerus)
        canvas.add_tube(body.at((side * 150, 4, 130), (side * 168, -12, 185)), 11.0, 600.0, humerus)


def _paint_spine(scene: Scene) -> None:
    canvas, body = scene.canvas, scene.body
    fz = body.stretch[2]
    size = body.size
    middle = canvas.z
    spine_x, spine_y = body.spine_centre(middle)
    near = (np.abs(canvas.x - spine_x) < 46.0) & (np.abs(canvas.y - spine_y - 18.0) < 58.0)
    k, j, i = np.nonzero(near)
    if len(k) == 0:
        return
    dx = canvas.x[k, j, i] - spine_x[k, j, i]
    dy = canvas.y[k, j, i] - spine_y[k, j, i]
    z = middle[k, j, i]
    number = 1.0 + (FIRST_VERTEBRA_Z_MM - z / fz) / VERTEBRA_PITCH_MM
    nearest = np.round(number).astype(int)
    # Vertebrae grow downwards; half a pitch minus half a disc is half a body.
    grow = (0.82 + 0.02 * np.clip(number, 0, 13)) * size
    off_level = (number - nearest) * VERTEBRA_PITCH_MM * fz
    compressed = scene.finding("fracture")
    disc_half = np.full(len(k), 2.6)
    if compressed is not None and compressed.pattern == "vertebral":
        broken = nearest == compressed.geometry["vertebra"]
        # The front of a wedge fracture has lost more height than its back.
        disc_half = np.where(broken, 3.0 + 6.0 * np.clip((14.0 - dy) / 28.0, 0, 1), disc_half)
    rim = (np.sqrt((dx / (16.5 * grow)) ** 2 + (dy / (14.0 * grow)) ** 2) - 1.0) * 14.0
    half_pitch = VERTEBRA_PITCH_MM * fz / 2
    plate = np.abs(off_level) - (half_pitch - disc_half)
    vertebra = np.maximum(rim, plate)
    labels = np.where(nearest >= 1, np.where(nearest <= 12, 44 - nearest, 31), 44)
    hu = canvas.hu[k, j, i]
    anatomy = canvas.anatomy[k, j, i]

    def put(distance: np.ndarray, value: float | np.ndarray, label: np.ndarray | int | None) -> None:
        nonlocal hu
        share = canvas.coverage(distance)
        hu = hu + share * (value - hu)
        if label is not None:
            inside = share >= 0.5
            anatomy[inside] = label[inside] if isinstance(label, np.ndarray) else label

    put(rim - 8.0, 55.0, None)
    put(np.maximum(np.abs(dx) - 30.0, np.abs(dy - 34.0) - 20.0), 52.0, None)
    put(rim, 85.0, None)
    marrow = np.where(vertebra > -2.2, 430.0, body.bone_hu)
    if compressed is not None and compressed.pattern == "vertebral":
        marrow = np.where(nearest == compressed.geometry["vertebra"], np.maximum(marrow, body.bone_hu + 170.0), marrow)
    put(vertebra, marrow, labels)
    canal_y = dy - 24.0 * grow
    canal = np.sqrt((dx / 10.0) ** 2 + (canal_y / 8.0) ** 2)
    ring = np.abs(canal - 1.25) * 8.5 - 2.4
    high = np.abs(off_level) - 7.0
    put(np.maximum(ring, high - 2.0), 420.0, labels)
    wing = np.maximum(np.abs(dy - 26.0 - 0.25 * np.abs(dx)) - 4.5, np.maximum(np.abs(dx) - 32.0, 9.0 - np.abs(dx)))
    put(np.maximum(wing, high), 360.0, labels)
    process = np.maximum(np.abs(dx) - 3.2, np.abs(dy - 46.0 - 0.3 * off_level) - 14.0)
    put(np.maximum(process, high - 1.0), 380.0, labels)
    put((canal - 1.0) * 8.0, 15.0, None)
    put((canal - 0.62) * 8.0, 38.0, 79)
    canvas.hu[k, j, i] = hu
    canvas.anatomy[k, j, i] = anatomy
