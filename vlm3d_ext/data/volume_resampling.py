"""From one grid to another and back: images, label maps, masks, probabilities.

The window is applied after resampling: a mean of HU is a HU, a mean of clipped grey levels is not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import scipy.ndimage
import SimpleITK as sitk

from vlm3d_ext.data.area_averaging import are_parallel, average_onto_coarser_axes
from vlm3d_ext.data.atomic_files import write_gzip
from vlm3d_ext.data.connected_components import foreground_box
from vlm3d_ext.data.depth_policies import DEPTH_POLICIES, target_geometry
from vlm3d_ext.data.hounsfield_units import AIR_HU
from vlm3d_ext.data.intensity_windows import apply_window
from vlm3d_ext.data.parallel_sampling import ParallelSampling
from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = [
    "DEPTH_POLICIES",
    "resample_binary_mask",
    "resample_mask",
    "resample_to_grey_levels",
    "resample_volume",
    "restore_mask",
    "restore_probabilities",
    "target_geometry",
    "write_mask_nifti",
]

# ITK cuts fractions off integers, so a mask is interpolated between 0 and this. The threshold lies one step below the
# half: a voxel exactly between inside and outside counts as inside on both ends of a lesion, not on the end that
# rounding happens to favour.
_INSIDE = 20_000
_INSIDE_THRESHOLD = _INSIDE // 2 - 1

# A network's background lies below, and every threshold that is of use above.
_PROBABILITY_FLOOR = 0.02


def resample_volume(
    array: np.ndarray,
    geometry: VolumeGeometry,
    target: VolumeGeometry,
    order: str = "linear",
    fill: float = AIR_HU,
    antialias: bool = True,
) -> np.ndarray:
    """Sample an image on another grid.

    Args:
        array: (D, H, W), int16 or float32, on `geometry`.
        geometry: grid of `array`.
        target: grid wanted; parallel to `geometry` if `antialias`.
        order: "linear" or "nearest".
        fill: value outside `array`, in HU for a scan.
        antialias: with "linear", average over the new voxel along every axis that becomes coarser, as thicker slices
            would; see `vlm3d_ext.data.area_averaging`. Without it the value at the new voxel's centre is taken, and
            slices in between are not seen at all. On by default: when two real chest CTs are brought to 16 slices, the
            grey levels got from 3 mm and from 6 mm slices of one scan differ by 1.1 and 1.7 (of 255) instead of 4.0 and
            4.8, and a 4 mm nodule keeps at least a third of its contrast at any height instead of none; and it takes
            less time.

    Returns:
        Array of `target.shape`; float32 for "linear", the dtype of `array` for "nearest".

    Raises:
        ValueError: for an unknown order, an array that does not fit its grid, or grids that are not parallel with
            `antialias`.
    """
    if order not in ("linear", "nearest"):
        raise ValueError(f"order must be 'linear' or 'nearest', got {order!r}.")
    _check_fits(array, geometry)
    if order == "nearest":
        return _sampled(array, geometry, target, sitk.sitkNearestNeighbor, fill)
    if ParallelSampling.fits(geometry, target):
        sampling = ParallelSampling(geometry, target, antialias)
        sampled = np.full(target.shape, fill, dtype=np.float32)
        for out, plane in zip(sampled[sampling.covered], sampling.planes(array), strict=True):
            out[...] = plane
        return sampled
    if antialias:
        array, geometry = average_onto_coarser_axes(array, geometry, target, fill)
    return _sampled(array, geometry, target, sitk.sitkLinear, fill, sitk.sitkFloat32)


def resample_to_grey_levels(
    array: np.ndarray,
    geometry: VolumeGeometry,
    target: VolumeGeometry,
    windows: Sequence[str | tuple[float, float]],
    fill: float = AIR_HU,
    antialias: bool = True,
) -> np.ndarray:
    """Sample a scan on another grid and window it: the grey levels of `resample_volume` and `apply_window`, without the
    volume of floats between them.

    Args:
        array: (D, H, W), int16 or float32, in HU, on `geometry`.
        geometry: grid of `array`.
        target: grid wanted, parallel to `geometry` if `antialias`.
        windows: names, or (centre, width) in HU.
        fill: HU outside `array`.
        antialias: as in `resample_volume`.

    Returns:
        (len(windows), *target.shape) uint8.

    Raises:
        ValueError: as `resample_volume` and `apply_window` do.
    """
    _check_fits(array, geometry)
    levels = np.empty((len(windows), *target.shape), dtype=np.uint8)
    if not ParallelSampling.fits(geometry, target):
        hu = resample_volume(array, geometry, target, fill=fill, antialias=antialias)
        for channel, window in zip(levels, windows, strict=True):
            apply_window(hu, window, out=channel)
        return levels
    sampling = ParallelSampling(geometry, target, antialias)
    for channel, window in zip(levels, windows, strict=True):
        channel[...] = apply_window(np.array(fill, dtype=np.float32), window)
    depth, *in_plane = sampling.covered
    for k, plane in zip(range(depth.start, depth.stop), sampling.planes(array), strict=True):
        hu = plane.astype(np.float32, copy=False)
        for channel, window in zip(levels, windows, strict=True):
            apply_window(hu, window, out=channel[k, in_plane[0], in_plane[1]])
    return levels


def resample_mask(labels: np.ndarray, geometry: VolumeGeometry, target: VolumeGeometry) -> np.ndarray:
    """Sample a label map on another grid, by the nearest voxel: the only choice that invents no label.

    Args:
        labels: (D, H, W), bool or integers.
        geometry: grid of `labels`.
        target: grid wanted; any axes.

    Returns:
        Array of `target.shape` in the dtype of `labels` (uint8 for bool); 0 outside `geometry`.

    Raises:
        ValueError: for another dtype, or an array that does not fit its grid.
    """
    return _sampled(_integers(labels, geometry), geometry, target, sitk.sitkNearestNeighbor, 0)


def resample_binary_mask(
    mask: np.ndarray, geometry: VolumeGeometry, target: VolumeGeometry, keep_small: bool = True
) -> np.ndarray:
    """Sample a mask of 0 and 1 on another grid: keep what reaches one half.

    Along axes that become finer the mask is interpolated linearly; along those that become coarser it is averaged, as
    the image is, where the two grids are parallel. The surface then lies where it lay, to a fraction of a voxel; the
    nearest voxel would move it by up to half of one and leave steps.

    Args:
        mask: (D, H, W), bool or integers 0 / 1.
        geometry: grid of `mask`.
        target: grid wanted; any axes.
        keep_small: a connected part that reaches one half nowhere, such as a 2 mm nodule in 5 mm slices, keeps the
            voxels with at least half of its own maximum. It would vanish otherwise, and a scan with a nodule would
            teach that there is none.

    Returns:
        uint8 array of `target.shape`, 0 / 1; 0 outside `geometry`.

    Raises:
        ValueError: for another dtype, other values, or an array that does not fit its grid.
    """
    mask = _integers(mask, geometry)
    lowest, highest = int(mask.min()), int(mask.max())
    if lowest < 0 or highest > 1:
        raise ValueError(
            f"a binary mask holds 0 and 1, got values from {lowest} to {highest}; treat it as a label map."
        )
    if highest == 0:
        return np.zeros(target.shape, dtype=np.uint8)
    shares, shares_geometry = mask, geometry
    if are_parallel(geometry, target):
        shares, shares_geometry = average_onto_coarser_axes(mask, geometry, target, fill=0)
    graded = np.rint(shares * np.float32(_INSIDE)).astype(np.int16)
    graded = _sampled(graded, shares_geometry, target, sitk.sitkLinear, 0)
    kept = graded >= _INSIDE_THRESHOLD
    # On a grid that is nowhere coarser even a single voxel reaches one half somewhere, so the search for lost parts can
    # be spared.
    may_lose_parts = max(np.array(target.spacing_mm) / geometry.spacing_mm) > 1 or not are_parallel(geometry, target)
    if keep_small and may_lose_parts:
        _add_small_parts(kept, graded)
    return kept.view(np.uint8)


def _add_small_parts(kept: np.ndarray, graded: np.ndarray) -> None:
    """Add to `kept`, in place, the cores of those connected parts of `graded` > 0 of which nothing was kept."""
    box = foreground_box(graded)
    if box is None:
        return
    parts, num_parts = scipy.ndimage.label(graded[box] > 0, structure=np.ones((3, 3, 3)))
    has_kept = np.zeros(num_parts + 1, dtype=bool)
    has_kept[0] = True
    has_kept[parts[kept[box]]] = True
    if has_kept.all():
        return
    lost = ~has_kept[parts]
    largest = np.zeros(num_parts + 1, dtype=np.int16)
    np.maximum.at(largest, parts[lost], graded[box][lost])
    kept[box] |= lost & (2 * graded[box].astype(np.int32) >= largest[parts])


def restore_mask(
    mask: np.ndarray, prepared_geometry: VolumeGeometry, source_geometry: VolumeGeometry, labels: bool = False
) -> np.ndarray:
    """Bring a mask from a prepared grid back onto the scan's own stored grid, in the file's own axis order.

    Args:
        mask: (D, H, W) on the prepared grid.
        prepared_geometry: that grid.
        source_geometry: the scan's grid as stored (`Scan.source_geometry`), any orientation.
        labels: whether `mask` is a label map (`resample_mask`) rather than binary (`resample_binary_mask`).

    Returns:
        Array of `source_geometry.shape`, C-contiguous; voxels that the prepared grid did not cover are 0.

    Raises:
        ValueError: as the resampling functions do.
    """
    resample = resample_mask if labels else resample_binary_mask
    canonical = resample(mask, prepared_geometry, source_geometry.canonical())
    return np.ascontiguousarray(source_geometry.from_canonical(canonical))


def restore_probabilities(
    probabilities: np.ndarray,
    prepared_geometry: VolumeGeometry,
    source_geometry: VolumeGeometry,
    floor: float = _PROBABILITY_FLOOR,
) -> np.ndarray:
    """Bring probabilities from a prepared grid back onto the scan's own stored grid, in the file's own axis order.

    Along axes that become finer they are interpolated linearly; along those that become coarser they are averaged over
    the new voxel, as `restore_mask` does with masks, where the two grids are parallel. Only the surroundings of the
    voxels above `floor` are computed: lesions are small, and interpolating a whole 300 x 512 x 512 scan for each
    disease would take longer than the network.

    Args:
        probabilities: (D, H, W) in [0, 1] on the prepared grid, any float dtype.
        prepared_geometry: that grid.
        source_geometry: the scan's grid as stored (`Scan.source_geometry`), any orientation.
        floor: results above it are those of the whole computation; others may be 0 instead. Keep it below every
            threshold; 0 computes wherever there is anything.

    Returns:
        float32 array of `source_geometry.shape` in [0, 1], C-contiguous; 0 where the prepared grid does not reach.

    Raises:
        ValueError: for another dtype, values outside [0, 1] or NaN, or an array that does not fit its grid.
    """
    _check_fits(probabilities, prepared_geometry)
    if probabilities.dtype.kind != "f":
        raise ValueError(f"probabilities must be floats, got {probabilities.dtype}; a mask is for restore_mask.")
    lowest, highest = float(probabilities.min()), float(probabilities.max())
    if not (lowest >= 0 and highest <= 1):
        raise ValueError(
            f"probabilities must lie in [0, 1], got values from {lowest:g} to {highest:g}; apply the sigmoid first."
        )
    target = source_geometry.canonical()
    restored = np.zeros(source_geometry.shape, dtype=np.float32)
    occupied = foreground_box(probabilities > floor)
    if occupied is None:
        return restored
    antialias = are_parallel(prepared_geometry, target)
    ratios = [t / p if antialias else 1.0 for t, p in zip(target.spacing_mm, prepared_geometry.spacing_mm, strict=True)]
    # A new voxel sees old ones up to `reach` from its centre: two to interpolate between, or all that it covers.
    reaches = np.array([max(1.0, (ratio + 1) / 2) for ratio in ratios])
    lower, upper = np.array([box.start for box in occupied]), np.array([box.stop - 1 for box in occupied])
    inner, outer = (np.array([lower - margin, upper + margin]) for margin in (reaches, np.ceil(2 * reaches + 1)))
    to_target = np.linalg.inv(target.affine_lps) @ prepared_geometry.affine_lps
    corners = np.array(np.meshgrid(*inner.T[::-1], [1.0])).reshape(4, -1)
    reached = (to_target @ corners)[2::-1]
    part = _clipped_box(np.floor(reached.min(axis=1)), np.ceil(reached.max(axis=1)), target.shape)
    if any(along.start >= along.stop for along in part):
        return restored
    cut = _clipped_box(outer[0], outer[1], prepared_geometry.shape)
    values = resample_volume(
        np.ascontiguousarray(probabilities[cut], dtype=np.float32),
        _crop_geometry(prepared_geometry, cut),
        _crop_geometry(target, part),
        fill=0.0,
        antialias=antialias,
    )
    # Interpolation adds weights that sum to one only up to rounding.
    source_geometry.to_canonical(restored)[part] = np.clip(values, 0, 1)
    return restored


def write_mask_nifti(path: str | os.PathLike, mask: np.ndarray, source_geometry: VolumeGeometry) -> None:
    """Write a mask as .nii.gz whose affine is that of the scan it was drawn on. Same content, same bytes; the file is
    whole or absent.

    Args:
        path: name ending in .nii.gz.
        mask: (D, H, W) on `source_geometry`, bool, uint8 or uint16.
        source_geometry: the grid, with the axes as stored.

    Raises:
        ValueError: if the name, the dtype or the shape does not fit.
        OSError: if the file cannot be written.
    """
    if not os.fspath(path).endswith(".nii.gz"):
        raise ValueError(f"{path}: a mask's file name must end in .nii.gz; rename it.")
    if mask.dtype not in (np.bool_, np.uint8, np.uint16):
        raise ValueError(f"{path}: a mask must be bool, uint8 or uint16, got {mask.dtype}; convert it first.")
    _check_fits(mask, source_geometry)
    values = mask.astype(np.uint8) if mask.dtype == bool else mask
    image = nib.Nifti1Image(values.T, source_geometry.affine_ras)
    image.set_sform(source_geometry.affine_ras, code="scanner")
    image.set_qform(source_geometry.affine_ras, code="scanner")
    image.header.set_xyzt_units("mm")
    write_gzip(path, image.to_bytes())


def _clipped_box(first: np.ndarray, last: np.ndarray, shape: tuple[int, int, int]) -> tuple[slice, ...]:
    """Return the box of indices from `first` to `last`, both (3,) and included, as far as `shape` reaches."""
    return tuple(slice(max(int(a), 0), min(int(b) + 1, n)) for a, b, n in zip(first, last, shape, strict=True))


def _crop_geometry(geometry: VolumeGeometry, box: tuple[slice, ...]) -> VolumeGeometry:
    k, j, i = box
    affine = geometry.affine_lps.copy()
    affine[:3, 3] = geometry.positions_lps(np.array([[k.start, j.start, i.start]]))[0]
    return VolumeGeometry((k.stop - k.start, j.stop - j.start, i.stop - i.start), affine)


def _check_fits(array: np.ndarray, geometry: VolumeGeometry) -> None:
    if array.shape != geometry.shape:
        raise ValueError(f"the array has shape {array.shape}, but its grid has {geometry.shape}.")


def _integers(mask: np.ndarray, geometry: VolumeGeometry) -> np.ndarray:
    _check_fits(mask, geometry)
    if mask.dtype.kind not in "biu":
        raise ValueError(f"a mask must hold booleans or integers, got {mask.dtype}; threshold it first.")
    return mask.view(np.uint8) if mask.dtype == bool else mask


def _sampled(
    array: np.ndarray,
    geometry: VolumeGeometry,
    target: VolumeGeometry,
    interpolator: int,
    fill: float,
    pixel_type: int = sitk.sitkUnknown,
) -> np.ndarray:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.affine_lps[:3, 3].tolist())
    image.SetDirection(geometry.directions.ravel().tolist())
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(target.shape[::-1])
    resampler.SetOutputSpacing(target.spacing_mm[::-1])
    resampler.SetOutputOrigin(target.affine_lps[:3, 3].tolist())
    resampler.SetOutputDirection(target.directions.ravel().tolist())
    resampler.SetInterpolator(interpolator)
    resampler.SetDefaultPixelValue(fill)
    resampler.SetOutputPixelType(pixel_type)
    # Preparation runs one process per core; threads inside each would only compete.
    resampler.SetNumberOfThreads(1)
    return sitk.GetArrayFromImage(resampler.Execute(image))
