"""Small chests as a user would hand them in, NIfTI and DICOM, for tests of the intake."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.preparation_settings import PreparationSettings
from tests.data.test_dicom_series import write_slice
from tests.data_prep.tiny_release import chest_hu
from vlm3d_ext.data.volume_geometry import VolumeGeometry

GEOMETRY = VolumeGeometry.from_spacing((40, 24, 28), (5.0, 10.0, 10.0), (-135.0, -115.0, 100.0))
SETTINGS = PreparationSettings(spatial_size=(8, 16, 18), windows=("wide",))
SIZE = ["--spatial-size", "8", "16", "18", "--window", "wide"]
PREPARATION = {**SETTINGS.to_dict(), "label_set": "ct_rate_18", "layout": "ct_rate"}


def chest(seed: int) -> np.ndarray:
    """(40, 24, 28) HU with lungs of several litres; no two seeds give the same."""
    return chest_hu(seed, GEOMETRY)


def write_dicom(folder: Path, hu: np.ndarray, prefix: str = "IM", **changes) -> Path:
    """Write a volume on `GEOMETRY` as a DICOM series; `changes` are DICOM keywords."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y, z = (float(value) for value in GEOMETRY.affine_lps[:3, 3])
    for number, plane in enumerate(hu):
        height = z + number * GEOMETRY.spacing_mm[0]
        elements = {"ImagePositionPatient": [x, y, height], "PixelSpacing": [10.0, 10.0], **changes}
        pixels = (plane.astype(np.int32) + 1024).clip(0).astype(np.uint16)
        write_slice(folder / f"{prefix}{number:04d}", number, pixels=pixels, **elements)
    return folder
