"""How far the surface of a predicted mask lies from the true one, in millimetres.

A mask's surface are its voxels that have a neighbour (of six) outside of the mask, or lie on the volume's edge;
distances are between voxel centres. This is MONAI's definition; see `surface_distances` for why it is called on a part
of the volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from monai.metrics import get_mask_edges, get_surface_distance

from ..data.connected_components import foreground_box
from .mask_overlap import check_masks

__all__ = ["SurfaceDistances", "hausdorff_distance_95", "normalised_surface_dice", "surface_distances"]


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances in mm from each voxel of one mask's surface to the nearest one of the other's.

    Where one mask is empty, the other's distances are infinite; an empty mask has no surface.

    Args:
        from_prediction: (N,), one for each voxel of the prediction's surface.
        from_truth: (M,), one for each voxel of the truth's.
    """

    from_prediction: np.ndarray
    from_truth: np.ndarray

    @property
    def hausdorff_95(self) -> float:
        """The larger of the two 95th percentiles, in mm; NaN where a mask is empty."""
        if not len(self.from_prediction) or not len(self.from_truth):
            return float("nan")
        return float(max(np.percentile(self.from_prediction, 95), np.percentile(self.from_truth, 95)))

    def surface_dice(self, tolerance_mm: float = 2.0) -> float:
        """The share of both surfaces that lies within `tolerance_mm` of the other, 0 to 1: 0 where one mask is empty,
        NaN where both are.

        Raises:
            ValueError: if the tolerance is negative or not finite.
        """
        if not 0 <= tolerance_mm < np.inf:
            raise ValueError(f"tolerance_mm must be a number of mm, 0 or more, got {tolerance_mm}.")
        distances = np.concatenate([self.from_prediction, self.from_truth])
        return float(np.mean(distances <= tolerance_mm)) if len(distances) else float("nan")


def hausdorff_distance_95(prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Return the 95th percentile Hausdorff distance in mm; NaN (undefined) where a mask is empty, or both.

    The larger of the two directed percentiles, as `monai.metrics.compute_hausdorff_distance(percentile=95)` takes it.

    Args:
        prediction: (D, H, W) bool.
        truth: (D, H, W) bool.
        spacing_mm: distance between voxel centres along `[z, y, x]`.

    Raises:
        TypeError: if a mask is not bool.
        ValueError: if a mask is not 3D, the shapes differ, or the spacing is not three positive numbers.
    """
    return surface_distances(prediction, truth, spacing_mm).hausdorff_95


def normalised_surface_dice(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float = 2.0
) -> float:
    """Return the share of both surfaces within a tolerance of the other, 0 to 1; 0 where one mask is empty, NaN where
    both are.

    Surfaces are counted in voxels, as `monai.metrics.compute_surface_dice` does by default, not in square mm.

    Source: Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
    radiotherapy", arXiv 1809.04430.

    Args:
        prediction: (D, H, W) bool.
        truth: (D, H, W) bool.
        spacing_mm: distance between voxel centres along `[z, y, x]`.
        tolerance_mm: how far is still right.

    Raises:
        TypeError: if a mask is not bool.
        ValueError: if a mask is not 3D, the shapes differ, the spacing is not three positive numbers, or the tolerance
            is negative.
    """
    return surface_distances(prediction, truth, spacing_mm).surface_dice(tolerance_mm)


def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Return the distances between two masks' surfaces, from which both metrics follow.

    Distances depend on the lesions alone, so MONAI is given their common bounding box, not the volume: of a scan of
    512 × 512 × 300 voxels a nodule needs some thousands. MONAI adds the margin that makes the box's edge a surface.

    Args:
        prediction: (D, H, W) bool.
        truth: (D, H, W) bool.
        spacing_mm: distance between voxel centres along `[z, y, x]`.

    Raises:
        TypeError: if a mask is not bool.
        ValueError: if a mask is not 3D, the shapes differ, or the spacing is not three positive numbers.
    """
    check_masks(prediction, truth)
    spacing = [float(value) for value in spacing_mm]
    if len(spacing) != 3 or not all(0 < value < np.inf for value in spacing):
        raise ValueError(f"spacing_mm must be three positive numbers [z, y, x] in mm, got {spacing}.")
    boxes = [box for box in (foreground_box(prediction), foreground_box(truth)) if box is not None]
    if not boxes:
        return SurfaceDistances(np.empty(0), np.empty(0))
    common = tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True)
    )
    edges = [np.asarray(part, dtype=bool) for part in get_mask_edges(prediction[common], truth[common])]
    if len(boxes) == 1:
        # As MONAI has it, without its warning: an empty mask is an ordinary case here.
        return SurfaceDistances(*(np.full(np.count_nonzero(part), np.inf) for part in edges))
    from_prediction, from_truth = (
        np.asarray(get_surface_distance(one, other, spacing=spacing), dtype=np.float64)
        for one, other in (edges, edges[::-1])
    )
    return SurfaceDistances(from_prediction, from_truth)
