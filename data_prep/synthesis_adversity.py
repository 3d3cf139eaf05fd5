"""The quirks of the real CT-RATE, added on purpose to a synthetic one, so that preparation meets them before the user
does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.phantom import ThoraxPhantom
from data_prep.phantom_shapes import ellipsoid_distance
from data_prep.synthesis_tables import (
    LABEL_COLUMNS,
    METADATA_COLUMNS,
    REPORT_COLUMNS,
    VLM3D_LABEL_COLUMNS,
    csv_bytes,
    read_rows,
    table_paths,
)
from data_prep.synthetic_scan import nifti_bytes, volume_path
from vlm3d_ext.data.atomic_files import write_bytes, write_gzip, write_json

__all__ = ["add_adversity", "head_volume"]

_TABLES = {
    "labels": LABEL_COLUMNS,
    "vlm3d_labels": VLM3D_LABEL_COLUMNS,
    "metadata": METADATA_COLUMNS,
    "reports": REPORT_COLUMNS,
}
_QUIRK_PATIENTS = {
    "train_9001_a_1": "a row in every table, but no file",
    "train_9002_a_1": "a file, but no row in any table",
    "train_9003_a_1": "every voxel is zero",
    "train_9004_a_1": "a head CT, listed in no_chest_train.txt",
    "train_9005_a_1": "the gzip stream breaks off in the middle",
}
_INTERCEPT = -1024


def head_volume(size: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Return a (D, H, W) int16 head in HU: skull, brain and air, no chest."""
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(size, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    hu = np.full(size, -1000.0)
    hu[ellipsoid_distance(x, y, z, (0, 0, 0), (76, 96, 105)) < 0] = 45.0
    hu[ellipsoid_distance(x, y, z, (0, 0, 0), (71, 91, 100)) < 0] = 900.0
    hu[ellipsoid_distance(x, y, z, (0, 0, 0), (65, 85, 94)) < 0] = 34.0
    return hu.astype(np.int16)


def add_adversity(output: Path, release: str, seed: int) -> dict[str, str]:
    """Add the quirks to a whole data set of `data_prep.synthesize`; doing so to fresh tables gives the same bytes
    each time.

    Args:
        output: folder of the data set.
        release: "v1" or "v2".
        seed: seed of the noise in the added volumes.

    Returns:
        volume id -> what is wrong with it; also written to adversity.json.

    Raises:
        ValueError: if the data set has no training volume to start from.
    """
    paths = table_paths("train")
    rows = {name: read_rows((output / paths[name]).read_bytes()) for name in _TABLES}
    if not rows["metadata"]:
        raise ValueError(
            f"{output}: adversity needs at least one training volume, found none; ask for training patients."
        )
    quirks = dict(_QUIRK_PATIENTS)
    template = {name: rows[name][0] for name in _TABLES}
    size, spacing = _grid(template["metadata"])

    def put(volume_id: str, hu: np.ndarray, change: Callable[[bytes], bytes] | None = None) -> None:
        affine = np.diag([spacing[2], spacing[1], spacing[0], 1.0])
        v2 = release == "v2"
        stored = hu if v2 else np.maximum(hu.astype(np.int32) - _INTERCEPT, 0).astype(np.int16)
        path = output / volume_path(release, "train", volume_id)
        write_gzip(path, nifti_bytes(stored, affine if v2 else None), 3)
        if change is not None:
            write_bytes(path, change(path.read_bytes()))

    noise = np.random.default_rng([seed, 51]).normal(0, 12.0, size)
    noisy_head = (head_volume(size, spacing) + noise).astype(np.int16)
    chest = np.rint(ThoraxPhantom(seed + 9002).sample(size, spacing).hu).astype(np.int16)
    put("train_9002_a_1", chest)
    put("train_9003_a_1", np.zeros(size, dtype=np.int16) if release == "v2" else np.full(size, _INTERCEPT, np.int16))
    put("train_9004_a_1", noisy_head)
    put("train_9005_a_1", chest, lambda content: content[: len(content) // 2])
    for volume_id in _QUIRK_PATIENTS:
        if volume_id != "train_9002_a_1":
            for name in _TABLES:
                added: dict[str, Any] = {**template[name], "VolumeName": f"{volume_id}.nii.gz"}
                if name == "metadata":
                    added["RescaleIntercept"] = _INTERCEPT
                rows[name].append(added)
    no_chest = volume_path("v1", "train", "train_9004_a_1")  # the real lists name the v1 folders
    write_bytes(output / paths["no_chest"], f"{no_chest}\n".encode())

    # Quirks of rows that belong to good files.
    for name in ("labels", "vlm3d_labels", "metadata"):
        rows[name].insert(1, dict(rows[name][0]))
    quirks[_volume_id(rows["labels"][0])] = "its rows stand twice, identical, in labels and metadata"
    for name in ("labels", "reports"):
        for row in rows[name][2::3]:
            row["VolumeName"] = _volume_id(row)
    without_spacing = next((row for row in rows["metadata"][2:] if _volume_id(row) not in _QUIRK_PATIENTS), None)
    if without_spacing is not None:
        without_spacing["ZSpacing"] = ""
        quirks[_volume_id(without_spacing)] = "ZSpacing is missing in the metadata"
    for name, columns in _TABLES.items():
        write_bytes(output / paths[name], csv_bytes(columns, rows[name]))
    write_json(output / "adversity.json", quirks)
    return quirks


def _volume_id(row: dict[str, str]) -> str:
    return row["VolumeName"].removesuffix(".nii.gz")


def _grid(row: dict[str, str]) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    x, y = json.loads(row["XYSpacing"])
    size = (int(row["NumberofSlices"]), int(row["Rows"]), int(row["Columns"]))
    return size, (float(row["ZSpacing"]), float(y), float(x))
