"""Small prepared cases with lesions on both grids, as a manifest would list them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.test_volume_geometry import oriented_geometry
from vlm3d_ext.data.prepared_case import write_prepared_case
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import resample_binary_mask, target_geometry, write_mask_nifti
from vlm3d_ext.text.disease_set import Disease, DiseaseSet

DISEASES = DiseaseSet(
    "tiny",
    (
        Disease("lung_nodule", "Lung nodule", "Lung nodule", "A round opacity."),
        Disease("pleural_effusion", "Pleural effusion", "Pleural effusion", "Fluid around the lung."),
    ),
    "vlm3d_18",
)
SOURCE = oriented_geometry("RAS", (40, 36, 20), (1.5, 1.5, 3.0))  # as many NIfTI files are stored
PREPARED_SIZE = (16, 24, 24)


def ball(centre: Sequence[float], radius_mm: float, geometry: VolumeGeometry = SOURCE) -> np.ndarray:
    """Return a ball, (D, H, W) bool; `centre` is an index (k, j, i) of the grid."""
    squares = sum(
        ((index - at) * spacing) ** 2
        for index, at, spacing in zip(np.indices(geometry.shape), centre, geometry.spacing_mm, strict=True)
    )
    return np.asarray(squares <= radius_mm**2)


def make_case(
    folder: Path,
    volume_id: str,
    masks: Mapping[str, np.ndarray],
    labels: Sequence[float] = (math.nan, math.nan),
    partial: Sequence[str] = (),
    num_windows: int = 1,
    source: VolumeGeometry = SOURCE,
) -> dict[str, Any]:
    """Write a case with its masks (disease -> (D, H, W) bool on `source`) and return its entry, paths absolute."""
    (prepared,) = target_geometry(source.canonical(), PREPARED_SIZE)
    imgs = np.random.default_rng(0).integers(0, 255, PREPARED_SIZE, dtype=np.uint8)
    sidecar = {
        "prepared_geometry": prepared.to_dict(),
        "source_geometry": source.to_dict(),
        "depth_window": {"index": 0, "count": num_windows},
    }
    image, geometry = write_prepared_case(folder, volume_id, imgs, None, prepared.spacing_mm, sidecar)
    on_prepared, on_source = {}, {}
    for disease, mask in masks.items():
        on_source[disease] = folder / "lesion_masks_original_grid" / disease / f"{volume_id}.nii.gz"
        write_mask_nifti(on_source[disease], mask, source)
        on_prepared[disease] = folder / "lesion_masks" / disease / f"{volume_id}.nii.gz"
        canonical = np.ascontiguousarray(source.to_canonical(mask))
        write_mask_nifti(on_prepared[disease], resample_binary_mask(canonical, source.canonical(), prepared), prepared)
    return {
        "volume_id": volume_id,
        "patient_id": volume_id.rsplit("_", 2)[0],
        "image": str(image),
        "geometry": str(geometry),
        "lesion_masks": {disease: str(path) for disease, path in on_prepared.items()},
        "lesion_masks_original_grid": {disease: str(path) for disease, path in on_source.items()},
        "lesion_masks_partial": list(partial),
        "disease_labels": list(labels),
    }


def on_prepared_grid(masks: Sequence[np.ndarray], source: VolumeGeometry = SOURCE) -> np.ndarray:
    """Return masks on the prepared grid as probabilities (diseases, D, H, W): what a perfect network would give."""
    (prepared,) = target_geometry(source.canonical(), PREPARED_SIZE)
    canonical = [np.ascontiguousarray(source.to_canonical(mask)) for mask in masks]
    drawn = [resample_binary_mask(mask, source.canonical(), prepared) for mask in canonical]
    return np.stack(drawn).astype(np.float32)
