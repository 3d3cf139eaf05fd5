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


def apply_window(hu: np.ndarray, window: str | tuple[float, float] = DEFAULT_WINDOW) -> np.ndarray:
    """Map HU to uint8: 0 at centre - width / 2 and below, 255 at centre + width / 2 and above, linear and rounded half
    to even between.

    Source: DICOM PS3.3 C.11.2.1.3.2, VOI LUT function LINEAR_EXACT. The value is computed in float32 for every input
    type, so an int16 volume and the same volume as float32 give the same bytes.

    Args:
        hu: any shape, int16 or floating, in HU.
        window: a name in `INTENSITY_WINDOWS`, or (centre, width) in HU.

    Returns:
        uint8 array of the shape of `hu`.

    Raises:
        ValueError: for an unknown window, or NaN in `hu`, which has no grey level.
    """
    centre, width = window_centre_width(window)
    if hu.dtype == np.int16:
        # 65,536 values are cheaper to window than the 70 million voxels of a chest.
        levels = _grey_levels(np.arange(-32768, 32768, dtype=np.float32), centre, width)
        return np.take(levels, hu.view(np.uint16) ^ np.uint16(0x8000))
    if np.isnan(hu).any():
        raise ValueError("cannot window a volume that holds NaN; expected HU; check how it was resampled.")
    return _grey_levels(hu.astype(np.float32), centre, width)


def _grey_levels(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """Window float32 `values` in place and return them as uint8."""
    values -= np.float32(centre - width / 2)
    values *= np.float32(255 / width)
    np.clip(values, 0, 255, out=values)
    return np.rint(values, out=values).astype(np.uint8)
