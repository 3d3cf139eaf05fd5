"""The drawing surface of the thorax phantom: voxel positions in millimetres, and soft-edged shapes painted onto them.

Positions are in the phantom's body frame, in mm: x to the patient's Left, y to Posterior, z to Superior, arrays in
the order (D, H, W). Every shape is a formula in mm, so the same shape can be painted on any grid. Edges are as soft
as a voxel is wide, which stands in for the partial volume effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial import cKDTree

__all__ = ["Canvas", "cells", "ellipsoid_distance", "ramp", "wobble"]

Box = tuple[slice, slice, slice]
Vector = Sequence[float] | np.ndarray


@dataclass
class Canvas:
    """A block of voxels being painted.

    Args:
        x, y, z: (D, H, W) float32 positions in the body frame, mm.
        index_from_body: (4, 4) affine, body position (x, y, z, 1) -> voxel index (i, j, k, 1).
        edge_mm: width of a soft edge, mm.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    index_from_body: np.ndarray
    edge_mm: float
    hu: np.ndarray = field(init=False)
    anatomy: np.ndarray = field(init=False)
    lesion_masks: dict[str, np.ndarray] = field(default_factory=dict)
    part_voxels: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hu = np.full(self.x.shape, -1000.0, dtype=np.float32)
        self.anatomy = np.zeros(self.x.shape, dtype=np.uint8)

    def box(self, centre: Vector, half_extent_mm: float | Vector) -> Box | None:
        """Return the index box that encloses `centre` plus or minus `half_extent_mm` (and a soft edge), or None
        outside the grid.
        """
        half = np.broadcast_to(np.asarray(half_extent_mm, dtype=float), (3,)) + self.edge_mm
        rotation = self.index_from_body[:3, :3]
        middle = rotation @ np.asarray(centre, dtype=float) + self.index_from_body[:3, 3]
        reach = np.abs(rotation) @ half
        first = np.ceil(middle - reach).astype(int)
        last = np.floor(middle + reach).astype(int) + 1
        size = np.array(self.x.shape[::-1])
        first, last = np.maximum(first, 0), np.minimum(last, size)
        if np.any(first >= last):
            return None
        i, j, k = (slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
        return k, j, i

    def blend(self, box: Box, occupancy: np.ndarray, hu: float | np.ndarray, label: int | None = None) -> None:
        """Mix `hu` into the box by `occupancy` (0 to 1, the box's shape); voxels at least half covered take `label`."""
        view = self.hu[box]
        view += occupancy * (hu - view)
        if label is not None:
            self.anatomy[box][occupancy >= 0.5] = label

    def everywhere(self) -> Box:
        """Return the box that is the whole block."""
        return slice(None), slice(None), slice(None)

    def coverage(self, distance_mm: np.ndarray, edge_mm: float | None = None) -> np.ndarray:
        """Turn a signed distance in mm (negative inside) into a coverage between 0 and 1."""
        return np.clip(0.5 - distance_mm / (edge_mm or self.edge_mm), 0.0, 1.0)

    def add_ellipsoid(
        self,
        centre: Vector,
        radii: Vector,
        hu: float,
        label: int | None = None,
        edge_mm: float | None = None,
        within: np.ndarray | None = None,
    ) -> tuple[Box, np.ndarray] | None:
        """Paint an axis-aligned ellipsoid (mm); return its box and coverage, or None outside the grid.

        Args:
            within: (D, H, W) coverage that the ellipsoid is cut by, such as the lung's.
        """
        box = self.box(centre, radii)
        if box is None:
            return None
        distance = ellipsoid_distance(self.x[box], self.y[box], self.z[box], centre, radii)
        occupancy = self.coverage(distance, edge_mm)
        if within is not None:
            occupancy = occupancy * within[box]
        self.blend(box, occupancy, hu, label)
        return box, occupancy

    def tube_coverage(self, start: np.ndarray, end: np.ndarray, radius_start: float, radius_end: float):
        """Return (box, coverage) of a cone-like capsule from `start` to `end` (mm), or None outside the grid.

        A tube thinner than a soft edge covers a voxel only partly, in proportion to its width.
        """
        widest = max(radius_start, radius_end)
        box = self.box((start + end) / 2, np.abs(end - start) / 2 + widest)
        if box is None:
            return None
        axis = (end - start).astype(np.float32)
        dx, dy, dz = self.x[box] - float(start[0]), self.y[box] - float(start[1]), self.z[box] - float(start[2])
        along = np.clip((dx * axis[0] + dy * axis[1] + dz * axis[2]) / max(float(axis @ axis), 1e-6), 0.0, 1.0)
        dx -= along * axis[0]
        dy -= along * axis[1]
        dz -= along * axis[2]
        distance = np.sqrt(dx * dx + dy * dy + dz * dz) - (radius_start + along * (radius_end - radius_start))
        return box, self.coverage(distance) * min(1.0, 2.0 * widest / self.edge_mm)

    def add_tube(
        self,
        points: np.ndarray,
        radii: float | Vector,
        hu: float,
        label: int | None = None,
        within: np.ndarray | None = None,
    ) -> None:
        """Paint a tube along the polyline `points` (N, 3) with radii in mm (one, or one per point)."""
        points = np.asarray(points, dtype=float)
        widths = np.broadcast_to(np.asarray(radii, dtype=float), (len(points),))
        for n in range(len(points) - 1):
            found = self.tube_coverage(points[n], points[n + 1], float(widths[n]), float(widths[n + 1]))
            if found is not None:
                box, occupancy = found
                self.blend(box, occupancy if within is None else occupancy * within[box], hu, label)

    def count_part(self, key: str, part: int, inside: np.ndarray) -> None:
        """Note how many voxels part number `part` of the finding `key` has; a part without a voxel is not in the
        picture.
        """
        self.part_voxels[key, part] = self.part_voxels.get((key, part), 0) + int(np.count_nonzero(inside))

    def mark_lesion(self, key: str, box: Box, inside: np.ndarray) -> None:
        """Add the voxels `inside` (boolean, the box's shape) to the mask of the disease `key`."""
        mask = self.lesion_masks.setdefault(key, np.zeros(self.x.shape, dtype=bool))
        mask[box] |= inside


def ellipsoid_distance(x: np.ndarray, y: np.ndarray, z: np.ndarray, centre: Vector, radii: Vector):
    """Return the first-order signed distance in mm to an aligned ellipsoid, negative inside; exact for a sphere."""
    cx, cy, cz = (float(c) for c in centre)
    rx, ry, rz = (float(r) for r in radii)
    px, py, pz = (x - cx) / rx, (y - cy) / ry, (z - cz) / rz
    scaled = np.sqrt(px * px + py * py + pz * pz)
    slope = np.sqrt((px / rx) ** 2 + (py / ry) ** 2 + (pz / rz) ** 2)
    # In the very middle both terms vanish; there the distance is the smallest radius.
    return np.where(slope > 1e-6, scaled * (scaled - 1.0) / np.maximum(slope, 1e-6), -min(rx, ry, rz))


def ramp(value: np.ndarray, start: float, end: float) -> np.ndarray:
    """Return 0 before `start`, 1 after `end`, and a smooth cubic step between; `start` may be the larger one."""
    t = np.clip((value - start) / (end - start), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def wobble(x: np.ndarray, y: np.ndarray, z: np.ndarray, seed: int, wavelength_mm: float) -> np.ndarray:
    """Return a smooth random field of about unit amplitude, a formula in mm, so that it is the same on every grid."""
    rng = np.random.default_rng(seed)
    total = np.zeros(np.broadcast(x, y, z).shape, dtype=np.float32)
    for _ in range(4):
        direction = rng.normal(size=3)
        direction *= 2 * np.pi / wavelength_mm / np.linalg.norm(direction) * rng.uniform(0.7, 1.4)
        a, b, c = (float(v) for v in direction)
        total += np.sin(a * x + b * y + c * z + float(rng.uniform(0, 2 * np.pi)))
    return total / 2.0


def cells(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, seed: int, cell_mm: float, extent_mm: float = 190.0
) -> tuple[np.ndarray, np.ndarray]:
    """Divide space into irregular polyhedral cells, as the secondary lobules of the lung are.

    Args:
        x, y, z: (N,) positions in mm.
        seed: seed of the cell centres.
        cell_mm: mean cell diameter, mm.
        extent_mm: half-width of the cube that the cells fill.

    Returns:
        (N,) distance in mm to the nearest wall between cells, (N,) index of the cell.
    """
    rng = np.random.default_rng(seed)
    lattice = np.arange(-extent_mm, extent_mm + cell_mm, cell_mm)
    centres = np.stack(np.meshgrid(lattice, lattice, lattice, indexing="ij"), axis=-1).reshape(-1, 3)
    centres += rng.uniform(-0.5, 0.5, centres.shape) * cell_mm
    distances, nearest = cKDTree(centres).query(np.stack([x, y, z], axis=-1), k=5)
    # Walls are bisecting planes; the nearest need not be the one towards the second nearest centre.
    between = np.linalg.norm(centres[nearest[:, 1:]] - centres[nearest[:, :1]], axis=2)
    to_wall = np.min((distances[:, 1:] ** 2 - distances[:, :1] ** 2) / (2 * between), axis=1)
    return to_wall.astype(np.float32), nearest[:, 0]
