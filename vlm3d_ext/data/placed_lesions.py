"""The lesions of a mask with their place in the chest: volumes by side, lobes by overlap, position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from .chest_map import LEFT_LOBES, RIGHT_LOBES, Box, ChestMap
from .connected_components import label_lesions

__all__ = ["PlacedLesions"]

_SMALLEST_LOBE_SHARE = 0.1
_SMALLEST_SIDE_SHARE = 0.05
_STRADDLING_SHARE = 0.25
"""A lesion with less of itself on one side is all on the other: a mask's edge may cross the mid-line."""


class PlacedLesions:
    """The connected components of a mask, numbered from 1 as by `label_lesions`; number 0 stands for all together.

    Args:
        mask: (D, H, W), non-zero is lesion, with at least one voxel.
        box: around its lesions, see `vlm3d_ext.data.connected_components.foreground_box`.
        chest: of the volume.
        spacing_mm: [z, y, x].
    """

    def __init__(self, mask: np.ndarray, box: Box, chest: ChestMap, spacing_mm: Sequence[float]) -> None:
        self.chest = chest
        self.box = box
        self.spacing_mm = tuple(float(step) for step in spacing_mm)
        self.labels, self.count = label_lesions(mask[box])
        self._voxel_ml = float(np.prod(self.spacing_mm)) / 1000
        inside = self.labels > 0
        values = self.labels[inside]
        num_lobes = 1 + len(LEFT_LOBES) + len(RIGHT_LOBES)
        pairs = np.bincount(values * num_lobes + chest.lobes(box)[inside], minlength=(self.count + 1) * num_lobes)
        self._lobe_voxels = pairs.reshape(self.count + 1, num_lobes)
        self._left = np.bincount(values[chest.is_left(box)[inside]], minlength=self.count + 1)
        self._voxels = np.bincount(values, minlength=self.count + 1)
        self._slices = ndimage.find_objects(self.labels)
        for totals in (self._lobe_voxels, self._left, self._voxels):
            totals[0] = totals.sum(axis=0)

    def by_volume(self) -> list[int]:
        """Return the numbers of the lesions, the largest first."""
        return [int(number) + 1 for number in np.argsort(-self._voxels[1:], kind="stable")]

    def volume_ml(self, number: int = 0) -> float:
        """Return the volume of a lesion in ml."""
        return float(self._voxels[number] * self._voxel_ml)

    def mask(self, number: int = 0) -> tuple[np.ndarray, Box]:
        """Return a lesion, (d, h, w) bool, and the box of the volume that it fills."""
        if number == 0:
            return self.labels > 0, self.box
        inner = self._slices[number - 1]
        d, h, w = (
            slice(outer.start + part.start, outer.start + part.stop)
            for outer, part in zip(self.box, inner, strict=True)
        )
        return self.labels[inner] == number, (d, h, w)

    def side_volumes_ml(self, number: int = 0) -> dict[str, float]:
        """Return "left" and "right" -> volume in ml; a lesion that barely crosses the mid-line is all on one side."""
        numbers = np.arange(1, self.count + 1) if number == 0 else np.array([number])
        voxels, left = self._voxels[numbers], self._left[numbers].astype(float)
        left = np.where(left < _STRADDLING_SHARE * voxels, 0, left)
        left = np.where(voxels - left < _STRADDLING_SHARE * voxels, voxels, left)
        left_ml = float(left.sum() * self._voxel_ml)
        return {"left": left_ml, "right": float(voxels.sum() * self._voxel_ml) - left_ml}

    def side(self, number: int = 0, least_ml: float = 0.0) -> str:
        """Return "left" or "right", or "bilateral" if either has at least 5 % of the volume and `least_ml`.

        A single lesion is never bilateral unless it straddles the mid-line.
        """
        by_side = self.side_volumes_ml(number)
        smaller = min(by_side.values())
        if smaller > 0 and smaller >= max(least_ml, _SMALLEST_SIDE_SHARE * sum(by_side.values())):
            return "bilateral"
        return "left" if by_side["left"] >= by_side["right"] else "right"

    def lobes(self, number: int = 0, side: str = "bilateral") -> tuple[int, ...]:
        """Return the lobes (1 to 5) on a side that hold at least 10 % of a lesion, the largest part first.

        Each named side has one at least, if any lobe there is touched; none without an anatomical mask.
        """
        if not self.chest.has_lobes:
            return ()
        voxels = self._lobe_voxels[number]
        sides = {"left": (LEFT_LOBES,), "right": (RIGHT_LOBES,)}.get(side, (LEFT_LOBES, RIGHT_LOBES))
        found: list[int] = []
        for lobes in sides:
            largest = max(lobes, key=lambda lobe: int(voxels[lobe]))
            enough = _SMALLEST_LOBE_SHARE * voxels.sum()
            found += [lobe for lobe in lobes if voxels[lobe] and (lobe == largest or voxels[lobe] >= enough)]
        return tuple(sorted(found, key=lambda lobe: (-int(voxels[lobe]), lobe)))
