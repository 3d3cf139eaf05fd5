"""Predicted lesions on disk: masks on the scan's own grid, and what is measured of them, one JSON file per volume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .atomic_files import write_bytes, write_json
from .lesion_boxes import boxes_of_mask, volume_box_mm
from .result_store import ResultStore, ResultStoreError
from .volume_geometry import VolumeGeometry
from .volume_resampling import write_mask_nifti

__all__ = ["LocalizationStore"]

_VALUES = ("threshold", "num_voxels", "volume_ml", "lesions")
_LESION_VALUES = ("bbox_mm", "centroid_mm", "probability", "num_voxels", "volume_ml")


class LocalizationStore(ResultStore):
    """A `ResultStore` with ``localization.json`` (which checkpoint, which data) and, for each volume,
    ``<volume_id>.json``, ``masks/<disease>/<volume_id>.nii.gz`` and, if it was drawn, ``montages/<volume_id>.png``.

    A volume's JSON holds ``volume_id``, ``volume_box_mm`` (of the whole scan) and ``diseases``: for each key
    ``threshold`` (0 to 1, from validation data), ``num_voxels``, ``volume_ml``, and ``lesions``, most probable first,
    each with ``bbox_mm`` (`[xmin, ymin, zmin, dx, dy, dz]`, LPS, from voxel edge to voxel edge), ``centroid_mm`` (`[x,
    y, z]`, LPS), ``probability`` (the largest in it), ``num_voxels`` and ``volume_ml``. It is written last, so that
    where it is, the masks are.
    """

    kind = "lesion masks"
    index_name = "localization.json"
    suffix = ".json"
    made_by = "the localization bundle's inference.json"

    def mask_path(self, disease: str, volume_id: str) -> Path:
        """Return where the mask of a volume's disease is."""
        return self.folder / "masks" / disease / f"{volume_id}.nii.gz"

    def montage_path(self, volume_id: str) -> Path:
        """Return where the picture of a volume is, if it was drawn."""
        return self.folder / "montages" / f"{volume_id}.png"

    def write(
        self,
        volume_id: str,
        probabilities: Mapping[str, np.ndarray],
        thresholds: Mapping[str, float],
        source_geometry: VolumeGeometry,
        montage: bytes | None = None,
    ) -> None:
        """Cut each disease's probabilities at its threshold; store masks, lesions and, if given, a picture.

        Args:
            volume_id: whose they are.
            probabilities: disease key -> (D, H, W) in [0, 1] on `source_geometry`
                (`vlm3d_ext.data.volume_resampling.restore_probabilities`).
            thresholds: disease key -> value in (0, 1]; a voxel is of the lesion from it on.
            source_geometry: the scan's grid as stored.
            montage: a PNG.

        Raises:
            ResultStoreError: if a disease has no threshold, or one outside (0, 1]; nothing is written.
            ValueError: if an array does not fit the grid.
            OSError: if a file cannot be written.
        """
        path = self.path(volume_id)
        for disease in probabilities:
            threshold = thresholds.get(disease)
            if threshold is None or not 0 < threshold <= 1:
                raise ResultStoreError(
                    f"{path}: the threshold of {disease} is {threshold}, expected a number above 0 and up to 1; "
                    "choose thresholds on validation data first."
                )
        # An old JSON beside new masks would describe other lesions.
        path.unlink(missing_ok=True)
        voxel_ml = float(np.abs(np.linalg.det(source_geometry.affine_lps[:3, :3]))) / 1000
        diseases = {}
        for disease, values in probabilities.items():
            mask = values >= thresholds[disease]
            write_mask_nifti(self.mask_path(disease, volume_id), mask, source_geometry)
            num_voxels = int(np.count_nonzero(mask))
            diseases[disease] = {
                "threshold": float(thresholds[disease]),
                "num_voxels": num_voxels,
                "volume_ml": num_voxels * voxel_ml,
                "lesions": boxes_of_mask(mask, source_geometry, values),
            }
        if montage is not None:
            write_bytes(self.montage_path(volume_id), montage)
        content = {"volume_id": volume_id, "volume_box_mm": volume_box_mm(source_geometry), "diseases": diseases}
        write_json(path, content)

    def read(self, volume_id: str) -> dict[str, dict[str, Any]]:
        """Return what is known of each disease of a volume.

        Raises:
            ResultStoreError: if it is absent or not readable.
        """
        return self._read(volume_id)[1]

    def read_volume_box(self, volume_id: str) -> list[float]:
        """Return the box of the whole scan, `[xmin, ymin, zmin, dx, dy, dz]` in LPS mm.

        Raises:
            ResultStoreError: as `read`.
        """
        return self._read(volume_id)[0]

    def _read(self, volume_id: str) -> tuple[list[float], dict[str, dict[str, Any]]]:
        path = self.path(volume_id)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            volume_box = [float(value) for value in content["volume_box_mm"]]
            read = {key: {name: of[name] for name in _VALUES} for key, of in content["diseases"].items()}
            for disease in read.values():
                disease["lesions"] = [{name: box[name] for name in _LESION_VALUES} for box in disease["lesions"]]
            return volume_box, read
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultStoreError(f"{path}: no readable lesions ({error}); delete it and run again.") from None

    def volume_ids(self) -> list[str]:
        """Return the volumes that have their masks, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.json") if path.name != self.index_name)
