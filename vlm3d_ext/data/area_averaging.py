"""Sampling onto a coarser grid by averaging what each new voxel covers, instead of picking what lies at its centre.

A 300-slice chest sampled linearly at 64 heights never looks at most of its slices: their nodules vanish and the others'
noise stays. Averaging over the new voxel's extent is what a scanner does when it reconstructs thicker slices. With
equal spacings the average is linear interpolation itself, so the two meet without a jump.
"""

from __future__ import annotations

import numpy as np

from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = [
    "COARSER",
    "are_parallel",
    "average_onto_coarser_axes",
    "average_terms",
    "overlap_weights",
    "weighted_sum",
]

COARSER = 1 + 1e-6
"""Ratio of spacings above which an axis is averaged. Spacings computed along different ways differ by rounding; an axis
that is no coarser is left to interpolation."""

_DIRECTION_TOLERANCE = 1e-4
# As in interpolation, which asks whether the new voxel's centre lies inside.
_LEAST_COVERED = 0.5 - 1e-9


def are_parallel(geometry: VolumeGeometry, other: VolumeGeometry) -> bool:
    """Whether the axes of both grids point the same ways, in the same order."""
    return bool(np.allclose(geometry.directions, other.directions, atol=_DIRECTION_TOLERANCE))


def overlap_weights(num_source: int, num_target: int, first_edge: float, ratio: float) -> np.ndarray:
    """Return the share of each target voxel that each source voxel covers along one axis.

    Args:
        num_source: voxels of the source; voxel n reaches from n to n + 1.
        num_target: voxels of the target; voxel m reaches from `first_edge + m * ratio` to `first_edge + (m + 1) *
            ratio`.
        first_edge: lower edge of the target, in source voxels.
        ratio: target spacing / source spacing.

    Returns:
        (num_target, num_source) float64 in [0, 1]; a row adds up to 1 where the source covers the target voxel fully.
    """
    lower = first_edge + ratio * np.arange(num_target)[:, None]
    source = np.arange(num_source)[None, :]
    overlap = np.minimum(lower + ratio, source + 1) - np.maximum(lower, source)
    return np.clip(overlap, 0, None) / ratio


def average_onto_coarser_axes(
    array: np.ndarray, geometry: VolumeGeometry, target: VolumeGeometry, fill: float
) -> tuple[np.ndarray, VolumeGeometry]:
    """Average along those axes where `target` is coarser than `geometry`; leave the others as they are.

    Args:
        array: (D, H, W) on `geometry`.
        geometry: the grid of `array`.
        target: a grid with the same axes.
        fill: value of voxels of which `array` covers less than half. Others get the mean of what it covers: a mixture
            of tissue and outside air would look like lung.

    Returns:
        The array, float32 if any axis was averaged, and its grid: the target's along averaged axes, the source's along
        the others.

    Raises:
        ValueError: if the two grids' axes are not parallel.
    """
    if not are_parallel(geometry, target):
        raise ValueError(
            "antialiasing averages along the scan's own axes, but the target's axes point elsewhere; "
            "reorient the scan first, or pass antialias=False."
        )
    inverse = np.linalg.inv(geometry.affine_lps)
    first_centre = (inverse @ np.append(target.affine_lps[:3, 3], 1.0))[:3]
    affine = geometry.affine_lps.copy()
    for axis in range(3):
        column = 2 - axis
        ratio = target.spacing_mm[axis] / geometry.spacing_mm[axis]
        if ratio <= COARSER:
            continue
        first_edge = first_centre[column] + 0.5 - ratio / 2
        weights = overlap_weights(array.shape[axis], target.shape[axis], first_edge, ratio)
        array = _weighted_sums(array, weights, axis, fill)
        affine[:3, 3] += geometry.affine_lps[:3, column] * first_centre[column]
        affine[:3, column] = target.affine_lps[:3, column]
    shape = (array.shape[0], array.shape[1], array.shape[2])
    return array, VolumeGeometry(shape, affine)


def _weighted_sums(array: np.ndarray, weights: np.ndarray, axis: int, fill: float) -> np.ndarray:
    planes = np.moveaxis(array, axis, 0)
    if axis == 2:
        planes = np.ascontiguousarray(planes)
    covered, terms = average_terms(weights)
    sums = np.empty((len(weights), *planes.shape[1:]), dtype=np.float32)
    sums[: covered.start] = fill
    sums[covered.stop :] = fill
    for out, (indices, shares) in zip(sums[covered], terms, strict=True):
        weighted_sum(planes, indices, shares, out)
    return np.ascontiguousarray(np.moveaxis(sums, 0, axis))


def average_terms(weights: np.ndarray) -> tuple[slice, list[tuple[np.ndarray, np.ndarray]]]:
    """Return which target voxels the source covers by half or more, and of what each of those is the average.

    Args:
        weights: of `overlap_weights`.

    Returns:
        covered: the target voxels, which lie side by side; for an empty range nothing is covered.
        terms: for each of them the indices of source voxels, ascending, and their float32 shares, which add up to 1.
    """
    sums = weights.sum(axis=1)
    covered = np.flatnonzero(sums >= _LEAST_COVERED)
    terms = [(np.flatnonzero(weights[m]), weights[m]) for m in covered]
    box = slice(int(covered[0]), int(covered[-1]) + 1) if len(covered) else slice(0, 0)
    return box, [(n, (row[n] / row.sum()).astype(np.float32)) for n, row in terms]


def weighted_sum(planes: np.ndarray, indices: np.ndarray, shares: np.ndarray, out: np.ndarray) -> None:
    """Put the sum of `shares` * `planes[indices]` into `out`, all in float32.

    Term by term rather than by matrix product: a product's order of additions differs from processor to processor, and
    prepared files must not.
    """
    np.multiply(planes[indices[0]], shares[0], out=out, dtype=np.float32, casting="same_kind")
    term = np.empty_like(out)
    for n, share in zip(indices[1:], shares[1:], strict=True):
        np.multiply(planes[n], share, out=term, dtype=np.float32, casting="same_kind")
        out += term
