"""From stored values to Hounsfield units, and the check that this was done exactly once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlm3d_ext.data.scan import Rescale, UnusableScanError

__all__ = [
    "AIR_HU",
    "AIR_RANGE_HU",
    "LEAST_TISSUE_HU",
    "PADDING_HU",
    "check_hounsfield_units",
    "check_rescale",
    "low_percentile_hu",
    "replace_padding",
    "to_hounsfield_units",
]

AIR_HU = -1024
"""What voxels outside the scanner's field of view are set to: the floor of the usual 12-bit CT range."""

AIR_RANGE_HU = (-1100.0, -800.0)
"""Where the low percentile of a CT in HU lies: room air is -1000 by definition, aerated lung about -850."""

LEAST_TISSUE_HU = -300
"""Below it lies nothing but air and lung. More than a twentieth of any chest volume is denser."""

PADDING_HU = -2000
"""At and below it there is no matter, only the makers' padding outside the field of view (-2000, -2048, -3024,
-8192)."""

_LARGEST_RESCALE = 1e6
_PERCENTILES = (5.0, 95.0)
_MAXIMUM_SAMPLED_VOXELS = 2_000_000
_INT16 = np.iinfo(np.int16)


def to_hounsfield_units(stored: np.ndarray, rescale: Rescale) -> np.ndarray:
    """Return `slope * stored + intercept` as int16 if every value is a whole number within int16, otherwise as float32.

    Works slice by slice, so that no wider copy of the whole volume exists. Already int16 values with slope 1 and
    intercept 0 are returned as they are.

    Args:
        stored: (D, H, W), any integer or real dtype, any byte order; finite.
        rescale: slope and intercept.
    """
    slope, intercept = rescale
    if stored.dtype == np.int16 and stored.dtype.isnative and (slope, intercept) == (1, 0):
        return stored
    whole = np.empty(stored.shape, dtype=np.int16)
    for out, values in zip(whole, stored, strict=True):
        hu = _rescaled(values, slope, intercept)
        if hu.min() < _INT16.min or hu.max() > _INT16.max:
            break
        out[...] = hu
        if hu.dtype.kind == "f" and not np.array_equal(out, hu):
            break
    else:
        return whole
    real = np.empty(stored.shape, dtype=np.float32)
    for out_real, values in zip(real, stored, strict=True):
        out_real[...] = _rescaled(values, slope, intercept)
    return real


def _rescaled(values: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    if (slope, intercept) == (1, 0):
        return values
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 4 and slope == int(slope) and intercept == int(intercept):
        return values.astype(np.int64) * int(slope) + int(intercept)
    return values.astype(np.float64) * slope + intercept


def check_rescale(path: Path, name: str, rescale: Rescale) -> None:
    """Refuse a slope or intercept that no CT has.

    Raises:
        UnusableScanError: if the slope is 0, or one of the two is not finite or beyond a million.
    """
    slope, intercept = rescale
    if slope == 0 or not np.isfinite([slope, intercept]).all() or max(abs(slope), abs(intercept)) > _LARGEST_RESCALE:
        raise UnusableScanError(
            f"{path}: {name} are {slope:g} and {intercept:g}, expected finite numbers and a slope other than 0; "
            "correct them at their source."
        )


def low_percentile_hu(hu: np.ndarray) -> float:
    """Return the 5th percentile of the voxels above padding, in HU; NaN if all are padding.

    Outside air and lung fill far more than a twentieth of any chest volume, even one cropped to the body or the lungs.
    The 5th percentile therefore lies in air, while a lower one would follow the tail of the noise: air with 60 HU of
    noise has its 5th percentile at -1099, but its 1st at -1140. Computed on a regular sample of at most two million
    voxels.
    """
    return _percentiles(hu)[0]


def check_hounsfield_units(path: Path, hu: np.ndarray) -> None:
    """Refuse a volume whose dark end is not air, or that holds nothing denser than air.

    The second half is for slope and intercept applied twice: air then lies at -2024, below the padding limit, and drops
    out, and soft tissue at -984 takes its place. But then nothing is left where tissue belongs.

    Raises:
        UnusableScanError: if the 5th percentile lies outside `AIR_RANGE_HU` or the 95th below `LEAST_TISSUE_HU`; the
            message says whether slope and intercept look forgotten or applied twice.
    """
    low, high = _percentiles(hu)
    lowest, highest = AIR_RANGE_HU
    if np.isnan(low):
        raise UnusableScanError(
            f"{path}: every voxel is at or below {PADDING_HU} HU, expected a scan; leave the file out, or correct its "
            "intercept."
        )
    expected = f"expected air at {lowest:.0f} to {highest:.0f} HU"
    if low > highest:
        raise UnusableScanError(
            f"{path}: the 5th percentile is {low:.0f} HU, {expected}: it looks as if slope and intercept were not "
            "applied; pass rescale=(slope, intercept) from the metadata, or check_hu=False if the volume holds no air "
            "at all."
        )
    if low < lowest or high < LEAST_TISSUE_HU:
        raise UnusableScanError(
            f"{path}: the 5th and 95th percentiles are {low:.0f} and {high:.0f} HU, {expected} and tissue above "
            f"{LEAST_TISSUE_HU} HU: it looks as if slope and intercept were applied twice; the file is in HU already, "
            "so pass no rescale, or export it again; check_hu=False switches the check off."
        )


def _percentiles(hu: np.ndarray) -> tuple[float, float]:
    """Return the 5th and the 95th percentile of a regular sample of the voxels above padding."""
    stride = max(1, int(np.ceil((hu.size / _MAXIMUM_SAMPLED_VOXELS) ** (1 / 3))))
    sample = hu[::stride, ::stride, ::stride]
    sample = sample[sample > PADDING_HU]
    if not sample.size:
        return float("nan"), float("nan")
    low, high = np.percentile(sample, _PERCENTILES)
    return float(low), float(high)


def replace_padding(hu: np.ndarray) -> tuple[np.ndarray, int]:
    """Return `hu` with padding (<= `PADDING_HU`) set to `AIR_HU`, in place where the array allows it, and the number of
    voxels changed."""
    if hu.min() > PADDING_HU:
        return hu, 0
    padding = hu <= PADDING_HU
    if not hu.flags.writeable:
        hu = hu.copy()
    hu[padding] = AIR_HU
    return hu, int(np.count_nonzero(padding))
