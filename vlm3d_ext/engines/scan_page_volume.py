"""A scan made small enough to travel inside an HTML page: grey values as JPEG sheets, masks as runs.

Eight bits do not hold a CT: one lung window would clip what a bone window shows. The scan is therefore cut at -200 HU
into two bands, and each HU is the sum of what the two say: `hu = low + high - BAND_LIMIT_HU`, where `low` is the HU
clipped to the lower band and `high` to the upper one. A voxel is flat in the band that it does not belong to, and JPEG
stores flat areas for almost nothing, so two bands cost little more than one.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.connected_components import foreground_box
from ..data.depth_policies import target_geometry
from ..data.volume_geometry import VolumeGeometry
from ..data.volume_resampling import resample_binary_mask, resample_volume

__all__ = [
    "BAND_LIMIT_HU",
    "HU_OF_LEVEL",
    "SHOWN_RANGE_HU",
    "EncodedVolume",
    "decode_bands",
    "encode_mask",
    "encode_volume",
    "nearest_slices",
    "page_grid",
    "shown_mask",
    "shown_volume",
]

SHOWN_RANGE_HU = (-1024.0, 1500.0)
"""What the page can show; lower and higher values are clipped."""

BAND_LIMIT_HU = -200.0
"""Where the two bands meet: above aerated lung, below fat, so that few voxels lie near it."""

# Soft tissue is looked at in the narrowest windows, so it gets the finest levels: 3 HU each up to 310 HU, 14 HU above,
# where a window is more than 1,000 HU wide. Lung has 3.2 HU for each level.
_LEVELS = np.arange(256, dtype=np.float64)
HU_OF_LEVEL = (
    np.interp(_LEVELS, [0, 255], [SHOWN_RANGE_HU[0], BAND_LIMIT_HU]),
    np.interp(_LEVELS, [0, 170, 255], [BAND_LIMIT_HU, 310.0, SHOWN_RANGE_HU[1]]),
)
"""HU of the 256 grey levels, of the lower and of the upper band."""

# Tried in this order until the sheets are small enough.
_QUALITIES = (95, 92, 88, 84, 78, 70, 60, 45, 30)
# JPEG works on blocks of 8 x 8 pixels; a slice that begins with a block shares none with its neighbour.
_BLOCK = 8
# Browsers on small devices refuse larger pictures.
_LARGEST_SIDE = 4096
_ROUNDING = 1e-6


@dataclass(frozen=True)
class EncodedVolume:
    """The grey values of a scan as JPEG files.

    Args:
        sheets: of the lower and of the upper band, JPEG files with `slices_per_sheet` slices one above the other.
        slices_per_sheet: slices in each sheet but the last, which may have fewer.
        rows_per_slice: pixel rows from one slice to the next, a multiple of 8; the last ones may be padding.
        means: grey level of each sheet on average, as encoded: what a browser that hands out other pixels than it
            draws is recognised by.
        quality: of the JPEG files.
        mean_error_hu: mean absolute difference between what went in, clipped to `SHOWN_RANGE_HU`, and what comes out.
    """

    sheets: tuple[tuple[bytes, ...], tuple[bytes, ...]]
    slices_per_sheet: int
    rows_per_slice: int
    means: tuple[tuple[float, ...], tuple[float, ...]]
    quality: int
    mean_error_hu: float

    @property
    def num_bytes(self) -> int:
        """Size of all sheets together."""
        return sum(len(sheet) for band in self.sheets for sheet in band)


def page_grid(geometry: VolumeGeometry, max_in_plane: int, max_slices: int) -> VolumeGeometry:
    """Return the grid that a page shows: that of the scan where it is small enough, else a coarser one.

    Args:
        geometry: canonical grid of the scan.
        max_in_plane: most pixels along the larger side of an axial slice.
        max_slices: most axial slices.

    Raises:
        ValueError: if one of the two is less than 1.
    """
    if min(max_in_plane, max_slices) < 1:
        raise ValueError(f"a page needs at least 1 pixel and 1 slice, got {max_in_plane} and {max_slices}.")
    depth, (_, extent_y, extent_x) = geometry.shape[0], geometry.extent_mm
    in_plane_mm = max(max(extent_y, extent_x) / max_in_plane, min(geometry.spacing_mm[1:]))
    height, width = (math.ceil(extent / in_plane_mm - _ROUNDING) for extent in (extent_y, extent_x))
    (grid,) = target_geometry(geometry, (min(depth, max_slices), height, width))
    return geometry if grid.is_close(geometry) else grid


def shown_volume(hu: np.ndarray, geometry: VolumeGeometry, grid: VolumeGeometry) -> np.ndarray:
    """Return a scan on the page's grid, averaged where that is coarser: (D, H, W) float32, in HU within
    `SHOWN_RANGE_HU`."""
    values = hu if grid is geometry else resample_volume(hu, geometry, grid)
    return np.clip(values.astype(np.float32, copy=False), *SHOWN_RANGE_HU)


def shown_mask(mask: np.ndarray, geometry: VolumeGeometry, grid: VolumeGeometry) -> np.ndarray:
    """Return a mask on the page's grid, (D, H, W) bool, as `resample_binary_mask` does; even the smallest lesion stays.

    Only the surroundings of the mask are averaged: lesions are small, and there is a mask for each disease.
    """
    occupied = foreground_box(mask)
    if occupied is None:
        return np.zeros(grid.shape, dtype=bool)
    if grid is geometry:
        return mask
    # A voxel of the page sees voxels of the scan up to this far away.
    margins = [math.ceil(t / s) + 1 for t, s in zip(grid.spacing_mm, geometry.spacing_mm, strict=True)]
    starts = [max(box.start - margin, 0) for box, margin in zip(occupied, margins, strict=True)]
    stops = [min(box.stop + margin, n) for box, margin, n in zip(occupied, margins, geometry.shape, strict=True)]
    k, j, i = (stop - start for start, stop in zip(starts, stops, strict=True))
    affine = geometry.affine_lps.copy()
    affine[:3, 3] = geometry.positions_lps(np.array([starts]))[0]
    cut = mask[starts[0] : stops[0], starts[1] : stops[1], starts[2] : stops[2]]
    return resample_binary_mask(np.ascontiguousarray(cut), VolumeGeometry((k, j, i), affine), grid).astype(bool)


def encode_volume(values_hu: np.ndarray, max_bytes: int) -> EncodedVolume:
    """Encode a volume as JPEG sheets, with the best quality that fits.

    Args:
        values_hu: (D, H, W) in HU; clipped to `SHOWN_RANGE_HU`.
        max_bytes: size of all sheets together. Not kept if even the lowest quality needs more, which takes a volume of
            noise.
    """
    depth, height, _ = values_hu.shape
    rows = math.ceil(height / _BLOCK) * _BLOCK
    slices = max(1, min(depth, _LARGEST_SIDE // rows))
    # Repeated edges compress better than a step to black.
    padded = np.pad(values_hu, ((0, 0), (0, rows - height), (0, 0)), mode="edge")
    levels = [_levels(padded, of_level) for of_level in HU_OF_LEVEL]
    starts = range(0, depth, slices)
    for quality in _QUALITIES:
        bands = [tuple(_jpeg(band[start : start + slices], quality) for start in starts) for band in levels]
        sheets = (bands[0], bands[1])
        if sum(len(sheet) for band in sheets for sheet in band) <= max_bytes:
            break
    low, high = (tuple(float(band[start : start + slices].mean()) for start in starts) for band in levels)
    decoded = decode_bands(sheets, rows)[:, :height]
    error = float(np.abs(decoded - np.clip(values_hu, *SHOWN_RANGE_HU)).mean())
    return EncodedVolume(sheets, slices, rows, (low, high), quality, error)


def decode_bands(sheets: Sequence[Sequence[bytes]], rows_per_slice: int) -> np.ndarray:
    """Return the HU that a browser gets from the sheets, (D, rows_per_slice, W) float32; the padding rows are there."""
    from PIL import Image

    low, high = (
        np.concatenate([of_level.astype(np.float32)[np.asarray(Image.open(io.BytesIO(sheet)))] for sheet in band])
        for band, of_level in zip(sheets, HU_OF_LEVEL, strict=True)
    )
    values = low + high - np.float32(BAND_LIMIT_HU)
    return values.reshape(-1, rows_per_slice, values.shape[1])


def encode_mask(mask: np.ndarray) -> str:
    """Return a mask as base64 of the lengths of its runs, losslessly.

    The voxels are taken in the array's order; runs of outside and inside alternate, beginning with outside (of length 0
    if the first voxel is inside). A length is written in groups of seven bits, the lowest first; the highest bit of a
    byte says that more follow.
    """
    flat = np.asarray(mask, dtype=bool).ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0], changes, [flat.size]])
    lengths = np.diff(starts).tolist()
    if flat[0]:
        lengths.insert(0, 0)
    written = bytearray()
    for length in lengths:
        while length > 0x7F:
            written.append(length & 0x7F | 0x80)
            length >>= 7
        written.append(length)
    return base64.b64encode(bytes(written)).decode("ascii")


def nearest_slices(position_mm: Sequence[float], geometry: VolumeGeometry, grid: VolumeGeometry) -> tuple[int, ...]:
    """Return the indices (k, j, i) of the page's voxel at a position.

    Args:
        position_mm: (x, y, z) in LPS mm.
        geometry: the scan's canonical grid, in which the position must lie, counting voxels from edge to edge.
        grid: the page's.

    Raises:
        ValueError: if it is no position inside the scan.
    """
    position = np.array(position_mm, dtype=np.float64)
    if position.shape != (3,) or not np.isfinite(position).all():
        raise ValueError(f"a position is (x, y, z) in mm, got {list(position_mm)}.")
    in_scan = _index(position, geometry)
    if (in_scan < -0.5 - _ROUNDING).any() or (in_scan > np.array(geometry.shape) - 0.5 + _ROUNDING).any():
        raise ValueError(
            f"the position {position.round(1).tolist()} mm lies outside the scan: as index (k, j, i) it is "
            f"{in_scan.round(1).tolist()} in {geometry.shape}; give LPS millimetres of this scan."
        )
    nearest = np.floor(_index(position, grid) + 0.5).astype(int)
    return tuple(int(index) for index in np.clip(nearest, 0, np.array(grid.shape) - 1))


def _index(position: np.ndarray, geometry: VolumeGeometry) -> np.ndarray:
    return (np.linalg.inv(geometry.affine_lps) @ np.append(position, 1.0))[2::-1]


def _levels(values_hu: np.ndarray, of_level: np.ndarray) -> np.ndarray:
    return np.rint(np.interp(values_hu, of_level, _LEVELS)).astype(np.uint8)


def _jpeg(slices: np.ndarray, quality: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(slices.reshape(-1, slices.shape[2])).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()
