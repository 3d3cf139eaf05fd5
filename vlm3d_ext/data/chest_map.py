"""Where in the chest a voxel is: its nearest lobe, its side, its height and depth between the lungs' ends.

Fluid and consolidated lung are no lobe in most anatomical masks, so a voxel outside the five lobes counts to the lobe
nearest to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from .anatomical_regions import LUNG_REGION_INDICES, region_by_name

__all__ = ["LEFT_LOBES", "RIGHT_LOBES", "Box", "ChestMap", "in_plane_diameter_mm"]

Box = tuple[slice, slice, slice]

LEFT_LOBES = (1, 2)
RIGHT_LOBES = (3, 4, 5)
_MIDLINE_REGIONS = tuple(region_by_name(name).index for name in ("thoracic_spine", "trachea", "sternum"))
_COARSE_STEP_MM = 4.0
"""Distances to the lobes are taken on a grid about this fine: a chest then has half a million voxels, not fifty."""
_HEIGHT_SHARE = 0.5
_DEPTH_SHARE = 2 / 3
"""A third of the height is named if it holds half of a lesion, a half of the depth if it holds two thirds of it."""


class ChestMap:
    """Lobes, sides and positions of one volume, LPS canonical: i runs to the patient's left, j to the back, k up.

    Without regions, or where a lung has no voxel, the side follows from the mid-line: the mean position of spine,
    trachea and sternum where the regions have them, the middle of the volume else. Without lobes height and depth are
    those in the volume.

    Args:
        shape: (D, H, W).
        spacing_mm: [z, y, x].
        regions: (D, H, W), 0 to 20 (`vlm3d_ext.data.anatomical_regions`), or None.
    """

    def __init__(self, shape: Sequence[int], spacing_mm: Sequence[float], regions: np.ndarray | None = None) -> None:
        self.shape = tuple(int(size) for size in shape)
        self._regions = regions
        self._strides = [max(1, round(_COARSE_STEP_MM / step)) for step in spacing_mm]
        self._nearest_lobe: np.ndarray | None = None
        self._both_lungs = False
        self.midline_vox = (self.shape[2] - 1) / 2
        self._ends = [(0.0, size - 1.0) for size in self.shape]
        if regions is not None:
            coarse = regions[tuple(slice(None, None, stride) for stride in self._strides)]
            self._read(coarse, spacing_mm)

    def _read(self, coarse: np.ndarray, spacing_mm: Sequence[float]) -> None:
        middle = np.isin(coarse, _MIDLINE_REGIONS).sum(axis=(0, 1))
        if middle.any():
            self.midline_vox = float(np.average(np.arange(len(middle)), weights=middle) * self._strides[2])
        lobes = np.where(np.isin(coarse, LUNG_REGION_INDICES), coarse, 0).astype(np.uint8)
        if not lobes.any():
            return
        steps = [step * stride for step, stride in zip(spacing_mm, self._strides, strict=True)]
        where = ndimage.distance_transform_edt(lobes == 0, steps, return_distances=False, return_indices=True)
        self._nearest_lobe = lobes[tuple(where)]
        self._both_lungs = bool(np.isin(lobes, LEFT_LOBES).any() and np.isin(lobes, RIGHT_LOBES).any())
        for axis, stride in enumerate(self._strides):
            filled = np.flatnonzero(lobes.any(axis=tuple(other for other in range(3) if other != axis))) * stride
            self._ends[axis] = (float(filled[0]), float(filled[-1]))

    @property
    def has_lobes(self) -> bool:
        """Whether the regions hold any lobe."""
        return self._nearest_lobe is not None

    def lobes(self, box: Box) -> np.ndarray:
        """Return for each voxel of a box its lobe, or the one nearest to it; (d, h, w) uint8, all 0 without lobes."""
        if self._nearest_lobe is None or self._regions is None:
            return np.zeros([side.stop - side.start for side in box], dtype=np.uint8)
        indices = [
            np.minimum((np.arange(side.start, side.stop) + stride // 2) // stride, size - 1)
            for side, stride, size in zip(box, self._strides, self._nearest_lobe.shape, strict=True)
        ]
        own = self._regions[box]
        return np.where(np.isin(own, LUNG_REGION_INDICES), own, self._nearest_lobe[np.ix_(*indices)]).astype(np.uint8)

    def is_left(self, box: Box) -> np.ndarray:
        """Return for each voxel of a box whether it is on the patient's left; (d, h, w) bool."""
        if self._both_lungs:
            return np.isin(self.lobes(box), LEFT_LOBES)
        left = np.arange(box[2].start, box[2].stop) > self.midline_vox
        return np.broadcast_to(left, [side.stop - side.start for side in box])

    def position(self, mask: np.ndarray, box: Box) -> tuple[str, ...]:
        """Return of ("upper" | "middle" | "lower", "anterior" | "posterior") what holds for most of a lesion.

        Args:
            mask: (d, h, w) bool, the lesion inside `box`, with at least one voxel.
            box: where in the volume it is.
        """
        height = _shares(mask.sum(axis=(1, 2)), box[0].start, self._ends[0], parts=3)
        depth = _shares(mask.sum(axis=(0, 2)), box[1].start, self._ends[1], parts=2)
        named = []
        if height.max() >= _HEIGHT_SHARE:
            named.append(("lower", "middle", "upper")[int(height.argmax())])
        if depth.max() >= _DEPTH_SHARE:
            named.append(("anterior", "posterior")[int(depth.argmax())])
        return tuple(named)


def _shares(profile: np.ndarray, start: int, ends: tuple[float, float], parts: int) -> np.ndarray:
    """Return the share of a profile in each of `parts` equal parts between two ends; what lies beyond counts to the
    outer ones."""
    first, last = ends
    place = (start + np.arange(len(profile)) - first + 0.5) / (last - first + 1.0)
    part = np.clip((place * parts).astype(int), 0, parts - 1)
    return np.bincount(part, weights=profile, minlength=parts) / profile.sum()


def in_plane_diameter_mm(mask: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Return the largest diameter of a lesion in any axial slice, in mm: what a reader measures with the calliper.

    It reaches over the voxels' own extent: a row of n voxels is n steps long, and a ball comes out up to a step too
    wide.

    Args:
        mask: (d, h, w) bool.
        spacing_mm: [z, y, x].
    """
    steps = np.asarray(spacing_mm[1:], dtype=float)
    largest = 0.0
    for plane in mask:
        rows = np.flatnonzero(plane.any(axis=1))
        if not len(rows):
            continue
        # The two voxels farthest from each other are each the first or the last of their row.
        first = plane[rows].argmax(axis=1)
        last = plane.shape[1] - 1 - plane[rows][:, ::-1].argmax(axis=1)
        points = np.concatenate([np.stack([rows, first], 1), np.stack([rows, last], 1)]) * steps
        offsets = points[:, None] - points[None]
        lengths = np.linalg.norm(offsets, axis=-1)
        directions = np.divide(offsets, lengths[..., None], out=np.zeros_like(offsets), where=lengths[..., None] > 0)
        extents = np.linalg.norm(directions * steps, axis=-1)
        largest = max(largest, float((lengths + extents).max()), float(steps.max()))
    return largest
