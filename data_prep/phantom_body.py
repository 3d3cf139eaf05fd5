"""One patient's proportions, and the shape of the chest as formulas in millimetres.

A nominal adult is described once; every patient stretches it. Body frame: x Left, y Posterior, z Superior, mm, origin
near the middle of the chest, the carina near z = +28.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.phantom_shapes import ellipsoid_distance, ramp

__all__ = ["ChestFields", "PatientBody", "chest_fields", "draw_patient_body", "heart_distance"]

# The heart's long axis points left, down and to the front.
_HEART_AXIS_DEG = 38.0
_NUM_THORACIC_VERTEBRAE = 12
VERTEBRA_PITCH_MM = 22.5
FIRST_VERTEBRA_Z_MM = 125.0


@dataclass(frozen=True)
class PatientBody:
    """What differs from patient to patient; lengths in mm, densities in HU.

    Args:
        sex: "F" or "M".
        age_years: 20 to 90.
        stretch: factors of the nominal adult's positions along x, y, z.
        fat_mm: thickness of the fat under the skin.
        tilt_deg: rotation of the body on the table about x, y, z.
        offset_mm: displacement of the body from the middle of the scan.
        scoliosis_mm: sideways amplitude of the spine's curve.
        blood_hu: density of blood; above 100 where contrast medium was given.
        lung_hu: density of healthy lung.
        bone_hu: density of cancellous bone.
        liver_hu: density of the liver.
        heart_scale: size of the heart; 1 is normal.
        dome_mm: height of the right dome of the diaphragm.
        mediastinum_scale: width of the upper mediastinum; 1 is normal.
        seed: seed of the fine structure (vessels, airways).
    """

    sex: str
    age_years: int
    stretch: tuple[float, float, float]
    fat_mm: float
    tilt_deg: tuple[float, float, float]
    offset_mm: tuple[float, float, float]
    scoliosis_mm: float
    blood_hu: float
    lung_hu: float
    bone_hu: float
    liver_hu: float
    seed: int
    heart_scale: float = 1.0
    dome_mm: float = -72.0
    mediastinum_scale: float = 1.0

    @property
    def half_width_mm(self) -> float:
        """Half the inner width of the rib cage."""
        return 128.0 * self.stretch[0]

    @property
    def half_depth_mm(self) -> float:
        """Half the inner depth of the rib cage."""
        return 88.0 * self.stretch[1]

    @property
    def size(self) -> float:
        """Mean stretch, by which radii of organs grow."""
        return float(np.mean(self.stretch))

    def at(self, *points: tuple[float, float, float]) -> np.ndarray:
        """Return nominal points as an (N, 3) array of this patient's positions, mm."""
        return np.asarray(points, dtype=float) * np.asarray(self.stretch)

    def spine_centre(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y of the vertebral bodies' centre at the heights `z`, mm: kyphosis and a little scoliosis."""
        height = z / self.stretch[2]
        x = self.scoliosis_mm * np.sin(height * (np.pi / 150.0))
        y = (58.0 + 9.0 * np.cos(height * (np.pi / 260.0))) * self.stretch[1]
        return x, y

    def vertebra_z_mm(self, number: float) -> float:
        """Return the height of the centre of thoracic vertebra `number` (T1 is 1), mm."""
        return (FIRST_VERTEBRA_Z_MM - (number - 1) * VERTEBRA_PITCH_MM) * self.stretch[2]

    def rotation(self) -> np.ndarray:
        """Return the (3, 3) rotation from the body frame to LPS."""
        ax, ay, az = np.deg2rad(self.tilt_deg)
        about_x = np.array([[1, 0, 0], [0, np.cos(ax), -np.sin(ax)], [0, np.sin(ax), np.cos(ax)]])
        about_y = np.array([[np.cos(ay), 0, np.sin(ay)], [0, 1, 0], [-np.sin(ay), 0, np.cos(ay)]])
        about_z = np.array([[np.cos(az), -np.sin(az), 0], [np.sin(az), np.cos(az), 0], [0, 0, 1]])
        return about_z @ about_y @ about_x

    def heart_centre_and_radii(self) -> tuple[np.ndarray, np.ndarray]:
        """Return centre (3,) and radii (3,) of the heart ellipsoid in mm, before its rotation in the frontal plane."""
        growth = self.heart_scale
        # A large heart grows to the left and downwards more than to the right.
        centre = self.at((20.0 + 14.0 * (growth - 1), -22.0, -42.0 - 8.0 * (growth - 1)))[0]
        return centre, np.array([61.0, 41.0, 43.0]) * self.size * growth


def draw_patient_body(seed: int) -> PatientBody:
    """Draw a patient; the same seed gives the same patient."""
    rng = np.random.default_rng([seed, 1])
    sex = "F" if rng.random() < 0.42 else "M"
    general = rng.normal(0.94 if sex == "F" else 1.01, 0.035)
    stretch = tuple(float(np.clip(general * rng.normal(1.0, 0.035), 0.84, 1.12)) for _ in range(3))
    return PatientBody(
        sex=sex,
        age_years=int(np.clip(rng.normal(52, 17), 20, 90)),
        stretch=(stretch[0], stretch[1], stretch[2]),
        fat_mm=float(rng.uniform(7, 24) + (3 if sex == "F" else 0)),
        tilt_deg=(float(rng.normal(0, 2.0)), float(rng.normal(0, 1.5)), float(rng.normal(0, 2.5))),
        offset_mm=(float(rng.normal(0, 5)), float(rng.normal(0, 5)), float(rng.normal(0, 4))),
        scoliosis_mm=float(rng.normal(0, 4)),
        blood_hu=float(rng.uniform(120, 190)) if rng.random() < 0.2 else float(rng.uniform(36, 48)),
        lung_hu=float(rng.normal(-850, 18)),
        bone_hu=float(rng.uniform(130, 230)),
        liver_hu=float(rng.uniform(25, 65)),
        seed=seed,
        dome_mm=float(rng.normal(-72, 7)),
    )


@dataclass
class ChestFields:
    """Signed distances in mm, arrays of one shape; positive inside the chest wall, above the diaphragm, outside the
    mediastinum.

    Args:
        body: depth below the skin.
        wall: depth inside the rib cage.
        diaphragm: height above the diaphragm.
        mediastinum: distance from the mediastinum.
        fissure: distance from the nearest fissure.
        lobe: region index 1 to 5 of the lobe that a position would belong to.
    """

    body: np.ndarray
    wall: np.ndarray
    diaphragm: np.ndarray
    mediastinum: np.ndarray
    fissure: np.ndarray
    lobe: np.ndarray

    @property
    def lung(self) -> np.ndarray:
        """Depth inside the lung, mm; negative outside."""
        return np.minimum(np.minimum(self.wall, self.diaphragm), self.mediastinum)


def heart_distance(body: PatientBody, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the signed distance to the heart's surface in mm, negative inside."""
    centre, radii = body.heart_centre_and_radii()
    angle = np.deg2rad(_HEART_AXIS_DEG)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    dx, dz = x - float(centre[0]), z - float(centre[2])
    return ellipsoid_distance(cos * dx - sin * dz, y - float(centre[1]), sin * dx + cos * dz, (0, 0, 0), radii)


def _superellipse(x: np.ndarray, y: np.ndarray, half_width: float, half_depth: float) -> np.ndarray:
    """Return (|x/a|^2.5 + |y/b|^2.5)^(1/2.5), which is 1 on the outline of a rounded chest."""
    u, v = np.abs(x / half_width), np.abs(y / half_depth)
    return np.power(u * u * np.sqrt(u) + v * v * np.sqrt(v) + 1e-9, 0.4)


def _rib_cage_depth(body: PatientBody, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    height = z / body.stretch[2]
    u = np.clip((height + 20.0) / 152.0, 0.0, 1.0)
    narrowing = np.sqrt(np.maximum(1.0 - u * u * np.sqrt(u), 4e-4))
    outline = _superellipse(x, y, body.half_width_mm, body.half_depth_mm)
    rho = np.sqrt(x * x + y * y)
    radial = rho * (narrowing / outline - 1.0)
    # Where the dome of the chest closes, a radial distance is longer than the true one.
    slope = 1.25 * u * np.sqrt(u) / narrowing * 0.7
    return radial / np.sqrt(1.0 + slope * slope)


def chest_fields(body: PatientBody, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> ChestFields:
    """Evaluate the shape of the chest at positions in the body frame (arrays of one shape, mm)."""
    fx, fy, fz = body.stretch
    wall = _rib_cage_depth(body, x, y, z)

    thick_x, thick_y = 22.0 + body.fat_mm, 22.0 + 0.8 * body.fat_mm
    neck = 1.0 - 0.22 * ramp(z / fz, 118.0, 175.0)
    outline = _superellipse(x, y - 4.0, body.half_width_mm + thick_x, body.half_depth_mm + thick_y)
    skin = np.sqrt(x * x + (y - 4.0) ** 2) * (neck / outline - 1.0)
    if body.sex == "F":
        for side in (-1.0, 1.0):
            centre = (side * 66.0 * fx, -(body.half_depth_mm + thick_y - 14.0), -12.0 * fz)
            skin = np.maximum(skin, -ellipsoid_distance(x, y, z, centre, (52.0 * fx, 36.0 * fy, 54.0 * fz)))

    right = x < 0
    height = np.where(right, body.dome_mm, body.dome_mm - 9.0) * fz
    sideways = (np.abs(x) - 60.0 * fx) / (72.0 * fx)
    dome = height - 60.0 * fz * (sideways**2 + ((y + 14.0 * fy) / (86.0 * fy)) ** 2)
    diaphragm = (z - dome) * 0.8

    upper = ramp(z / fz, 0.0, 25.0)
    half_width = (24.0 + upper * (6.0 * body.mediastinum_scale + 34.0 * (body.mediastinum_scale - 1.0))) * fx
    u, v = x / half_width, (y - 4.0) / (52.0 * fy)
    core = (np.sqrt(u * u + v * v) - 1.0) * half_width
    spine_x, spine_y = body.spine_centre(z)
    spine = np.sqrt((x - spine_x) ** 2 + (np.minimum(y - spine_y, 0.0)) ** 2) - 24.0 * body.size
    anterior_septum = np.maximum(np.abs(x) - 4.0, y)
    mediastinum = np.minimum(np.minimum(core, spine), anterior_septum)
    mediastinum = np.minimum(mediastinum, heart_distance(body, x, y, z) - 4.0)

    # Oblique fissures fall from the upper back to the lower front; the right lung has a horizontal one as well.
    oblique = (z / fz - (-22.0 + 1.15 * y / fy - 0.0016 * (y / fy) ** 2)) * 0.65
    minor = z - 2.0 * fz + 0.05 * (y + 30.0)
    lobe = np.where(right, np.where(oblique < 0, 5, np.where(minor > 0, 3, 4)), np.where(oblique < 0, 2, 1)).astype(
        np.uint8
    )
    fissure = np.abs(oblique)
    fissure = np.where(right & (oblique > 0), np.minimum(fissure, np.abs(minor)), fissure)
    return ChestFields(skin, wall, diaphragm, mediastinum, fissure, lobe)
