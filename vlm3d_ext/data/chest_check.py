"""Whether a CT can be, and looks like, a scan of a chest.

A network trained on chests answers for a head, too, and as surely. What a scan shows never refuses it, because lungs
can be small (a child's), full of fluid or cut off, and the scan is one of a chest nevertheless: it is put into a note.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from vlm3d_ext.data.scan import Scan, UnusableScanError

__all__ = ["LEAST_CHEST_EXTENT_MM", "MINIMUM_SLICES", "ChestMeasures", "chest_notes", "measure_chest"]

MINIMUM_SLICES = 16
"""A chest of 300 mm in 16 slices has one every 19 mm; with fewer, what lies between them is guessed."""

LEAST_CHEST_EXTENT_MM = 150.0
"""Height below which a scan cannot hold an adult's lungs, which are 200 to 300 mm high."""

_LARGEST_CHEST_EXTENT_MM = 600.0
_THICK_SLICES_MM = 5.0
_ROUNDING_MM = 0.01
"""Headers hold single precision: slices of 5 mm can be 5.0000001 mm apart."""
_LEAST_LUNG_ML = 150.0
_LEAST_LUNG_SHARE = 0.05
_LUNG_MEDIAN_HU = (-950.0, -600.0)
_AIR_HU = -500.0
_BODY_HU = -300.0
_LEAST_PART_ML = 5.0
_GRID_MM = 3.0
"""Voxels of this size are enough for organs of litres; the work then does not grow with the number of slices."""


@dataclass(frozen=True)
class ChestMeasures:
    """What tells a chest from other parts of the body.

    Measured on real and synthetic scans (ml of lung, its share, its width in mm, its height in mm):

    | scan | lung ml | share | width | height |
    | --- | --- | --- | --- | --- |
    | chest with a lung cancer (NSCLC-Radiomics LUNG1-001) | 4691 | 0.239 | 296 | 255 |
    | right half of a chest with a large tumour (IBSI phantom) | 890 | 0.166 | 149 | 168 |
    | 44 synthetic chests of `data_prep.synthesize` | 2283 to 6632 | 0.113 to 0.303 | 222 to 279 | 223 to 314 |
    | abdomen and pelvis (TotalSegmentator's example; what counts is the mattress) | 309 | 0.013 | 318 | 336 |
    | upper abdomen (TotalSegmentator's DICOM example) | 0 | 0.000 | 0 | 0 |
    | synthetic head: skull, brain at 35 HU, sinuses, mastoids | 0 | 0.000 | 0 | 0 |

    Args:
        lung_ml: volume of air whose median lies in -950 to -600 HU, as in lung, and not about -1000 HU, as around the
            patient and in the bowel.
        lung_share: its share of lung and everything denser than -300 HU together, 0 to 1.
        lung_width_mm: its extent from left to right.
        lung_height_mm: the height of the slices that hold any of it.
    """

    lung_ml: float
    lung_share: float
    lung_width_mm: float
    lung_height_mm: float


def measure_chest(hu: np.ndarray, spacing_mm: Sequence[float]) -> ChestMeasures:
    """Measure the lung-like air of a scan on a grid of about 3 mm.

    Air is parted into connected pieces, each judged by its median. So lungs count that a tight crop has cut open, and
    the air around the patient does not, wherever the volume ends.

    Args:
        hu: (D, H, W), LPS canonical.
        spacing_mm: [z, y, x].
    """
    strides = [max(1, int(_GRID_MM / step)) for step in spacing_mm]
    coarse = hu[tuple(slice(None, None, stride) for stride in strides)]
    steps = [step * stride for step, stride in zip(spacing_mm, strides, strict=True)]
    voxel_ml = float(np.prod(steps)) / 1000
    # The opening removes the films of half-filled voxels on skin and bowel, whose values are those of lung.
    air = ndimage.binary_opening(coarse < _AIR_HU, ndimage.generate_binary_structure(2, 1)[None])
    parts, num_parts = ndimage.label(air)
    if num_parts == 0:
        return ChestMeasures(0.0, 0.0, 0.0, 0.0)
    sizes_ml = np.bincount(parts.ravel(), minlength=num_parts + 1) * voxel_ml
    like_lung = np.zeros(num_parts + 1, dtype=bool)
    for part, box in enumerate(ndimage.find_objects(parts), start=1):
        if sizes_ml[part] >= _LEAST_PART_ML:
            median = float(np.median(coarse[box][parts[box] == part]))
            like_lung[part] = _LUNG_MEDIAN_HU[0] <= median <= _LUNG_MEDIAN_HU[1]
    lung = like_lung[parts]
    lung_ml = int(np.count_nonzero(lung)) * voxel_ml
    body_ml = int(np.count_nonzero(coarse > _BODY_HU)) * voxel_ml
    columns = np.flatnonzero(lung.any(axis=(0, 1)))
    return ChestMeasures(
        lung_ml=lung_ml,
        lung_share=lung_ml / (lung_ml + body_ml) if lung_ml else 0.0,
        lung_width_mm=float(columns[-1] - columns[0] + 1) * steps[2] if lung_ml else 0.0,
        lung_height_mm=int(np.count_nonzero(lung.any(axis=(1, 2)))) * steps[0],
    )


def chest_notes(path: str | os.PathLike, scan: Scan) -> tuple[str, ...]:
    """Say in words what makes a scan a poor or doubtful input; empty for a good chest CT.

    Args:
        path: of the scan, for the message.
        scan: the scan in HU.

    Raises:
        UnusableScanError: if it has fewer than `MINIMUM_SLICES` slices.
    """
    num_slices, extent_mm, step_mm = scan.hu.shape[0], scan.geometry.extent_mm[0], scan.geometry.spacing_mm[0]
    if num_slices < MINIMUM_SLICES:
        raise UnusableScanError(
            f"{path}: has {num_slices} axial slices, expected at least {MINIMUM_SLICES}; pass the whole scan."
        )
    notes = []
    measured = measure_chest(scan.hu, scan.geometry.spacing_mm)
    if measured.lung_ml < _LEAST_LUNG_ML or measured.lung_share < _LEAST_LUNG_SHARE:
        notes.append(
            f"does not look like a chest CT: {measured.lung_ml:.0f} ml of aerated lung, {measured.lung_share:.1%} of "
            f"the body, expected at least {_LEAST_LUNG_ML:.0f} ml and {_LEAST_LUNG_SHARE:.0%}; results mean nothing if "
            "it is another part of the body"
        )
    if step_mm > _THICK_SLICES_MM + _ROUNDING_MM:
        notes.append(
            f"thick slices: one every {step_mm:.3g} mm, expected at most {_THICK_SLICES_MM:g} mm; small findings can "
            "be missed"
        )
    if extent_mm < LEAST_CHEST_EXTENT_MM:
        notes.append(
            f"short coverage: {extent_mm:.0f} mm from the lowest to the highest slice, expected at least "
            f"{LEAST_CHEST_EXTENT_MM:.0f} mm; nothing is known of the rest of the chest"
        )
    if extent_mm > _LARGEST_CHEST_EXTENT_MM:
        notes.append(
            f"reaches far beyond a chest: {extent_mm:.0f} mm from the lowest to the highest slice, expected at most "
            f"{_LARGEST_CHEST_EXTENT_MM:.0f} mm; cut it to the chest, which is otherwise seen coarsely"
        )
    return tuple(notes)
