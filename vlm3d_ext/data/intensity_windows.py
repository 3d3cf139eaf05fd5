"""Intensity windows: from Hounsfield units to the 256 grey levels that are stored."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["DEFAULT_WINDOW", "INTENSITY_WINDOWS", "apply_window", "window_centre_width"]

INTENSITY_WINDOWS: dict[str, tuple[float, float]] = {
    "soft_tissue": (40.0, 400.0),
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
    "bone": (400.0, 1800.0),
    "wide": (0.0, 2000.0),
}
"""Name -> (centre, width) in HU. `soft_tissue` is the default; the description this package follows calls 40 / 400 its
lung window, but aerated lung (about -850 HU) is plain black in it. `wide` spans ±1000 HU, which keeps air, lung and
bone apart in one channel."""

DEFAULT_WINDOW = "soft_tissue"


def window_centre_width(window: str | tuple[float, float]) -> tuple[float, float]:
    """Return (centre, width) in HU of a window given by name or by its two numbers.

    Raises:
        ValueError: for an unknown name, or a pair that is not finite with a positive width.
    """
    if isinstance(window, str):
        if window not in INTENSITY_WINDOWS:
            raise ValueError(f"no intensity window is called {window!r}; the names are {sorted(INTENSITY_WINDOWS)}.")
        return INTENSITY_WINDOWS[window]
    numbers = tuple(float(value) for value in window)
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
        raise ValueError(f"an intensity window is a name or (centre, width > 0) in HU, got {window!r}.")
    return numbers[0], numbers[1]


def apply_window(
    hu: np.ndarray, window: str | tuple[float, float] = DEFAULT_WINDOW, out: np.ndarray | None = None
) -> np.ndarray:
    """Map HU to uint8: 0 at centre - width / 2 and below, 255 at centre + width / 2 and above, linear and rounded half
    to even between.

    Source: DICOM PS3.3 C.11.2.1.3.2, VOI LUT function LINEAR_EXACT. The value is computed in float32 for every input
    type, so an int16 volume and the same volume as float32 give the same bytes.

    Args:
        hu: any shape, int16 or floating, in HU; not changed.
        window: a name in `INTENSITY_WINDOWS`, or (centre, width) in HU.
        out: uint8 array of the shape of `hu`, contiguous or not, to put the result into.

    Returns:
        uint8 array of the shape of `hu`; `out` if it was given.

    Raises:
        ValueError: for an unknown window, an `out` of another shape or type, or NaN in `hu`, which has no grey level.
    """
    centre, width = window_centre_width(window)
    if out is None:
        out = np.empty(hu.shape, dtype=np.uint8)
    elif out.shape != hu.shape or out.dtype != np.uint8:
        raise ValueError(f"out must be uint8 of shape {hu.shape}, got {out.dtype} of shape {out.shape}.")
    if hu.dtype == np.int16:
        # 65,536 values are cheaper to window than the 70 million voxels of a chest.
        levels = np.empty(65536, dtype=np.uint8)
        _put_grey_levels(np.arange(-32768, 32768, dtype=np.float32), centre, width, levels)
        out[...] = np.take(levels, hu.view(np.uint16) ^ np.uint16(0x8000))
        return out
    if hu.size and np.isnan(hu.min()):
        raise ValueError("cannot window a volume that holds NaN; expected HU; check how it was resampled.")
    _put_grey_levels(hu.astype(np.float32, copy=False), centre, width, out)
    return out


def _put_grey_levels(values: np.ndarray, centre: float, width: float, out: np.ndarray) -> None:
    """Window float32 `values` into `out`."""
    levels = np.empty(values.shape, dtype=np.float32)
    np.subtract(values, np.float32(centre - width / 2), out=levels)
    levels *= np.float32(255 / width)
    np.clip(levels, 0, 255, out=levels)
    np.rint(levels, out=levels)
    np.copyto(out, levels, casting="unsafe")
