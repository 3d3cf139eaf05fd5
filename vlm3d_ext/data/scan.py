"""What a reader of scans returns, and the one error it raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = ["Rescale", "Scan", "UnusableScanError"]


class UnusableScanError(ValueError):
    """A scan or mask file that must not be used; the message is one line: file, value found, what was expected, what to
    do."""


class Rescale(NamedTuple):
    """The linear map from stored values to HU: `hu = slope * stored + intercept`."""

    slope: float
    intercept: float


@dataclass(frozen=True, eq=False)
class Scan:
    """One CT volume in Hounsfield units. Holds no identifiers of the patient.

    Args:
        hu: (D, H, W), int16 where every value is a whole number in its range, else float32; LPS canonical,
            C-contiguous; values outside the scanner's field of view are -1024. Read-only where it is the file's own
            memory.
        geometry: grid of `hu`. Axes are permuted and flipped to LPS; an oblique scan's rotation stays in the affine.
        source_geometry: the grid as stored in the file, where a mask has to go back to.
        source_format: "nifti" or "dicom".
        notes: what was noticed and put right while reading, in words.
    """

    hu: np.ndarray
    geometry: VolumeGeometry
    source_geometry: VolumeGeometry
    source_format: str
    notes: tuple[str, ...] = ()
