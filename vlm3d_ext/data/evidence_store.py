"""What the upstream bundles say about each scan, on disk: one NPZ and one JSON file per volume."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .atomic_files import write_json, write_npz
from .npz_arrays import NpzArrays
from .result_store import ResultStore, ResultStoreError

__all__ = ["EvidenceStore"]

_ARRAYS = ("global_features", "region_features", "local_features")


class EvidenceStore(ResultStore):
    """A `ResultStore` with ``evidence.json`` (which checkpoints, which data) and, for each volume, ``<volume_id>.npz``
    (``global_features`` (V,) and ``region_features`` (R, V), float32; ``local_features`` (D, H, W, V), pooled in-plane,
    float16) and ``<volume_id>.json``: ``findings``, for each name ``probability``, ``threshold`` and ``prediction``,
    and ``lesions``, a list of `vlm3d_ext.text.lesion_locations.LesionLocation` as JSON. The JSON is written last, so
    that where it is, the features are.
    """

    kind = "evidence"
    index_name = "evidence.json"
    suffix = ".json"
    made_by = "the report_generation bundle's train.json or inference.json"

    def features_path(self, volume_id: str) -> Path:
        """Return where a volume's features are."""
        return self.folder / f"{volume_id}.npz"

    def write(
        self,
        volume_id: str,
        features: Mapping[str, np.ndarray],
        findings: Mapping[str, Mapping[str, Any]],
        lesions: Sequence[Mapping[str, Any]],
    ) -> None:
        """Store one volume's evidence; see the class for what the arguments hold."""
        self.path(volume_id).unlink(missing_ok=True)
        types = {"local_features": np.float16}
        arrays = {name: np.asarray(features[name], dtype=types.get(name, np.float32)) for name in _ARRAYS}
        write_npz(self.features_path(volume_id), arrays, compressed=False)
        content = {"volume_id": volume_id, "findings": dict(findings), "lesions": list(lesions)}
        write_json(self.path(volume_id), content)

    def read_features(self, volume_id: str) -> dict[str, np.ndarray]:
        """Return one volume's features.

        Raises:
            ResultStoreError: if they are absent or not readable.
        """
        path = self.features_path(volume_id)
        try:
            arrays = NpzArrays(path.read_bytes())
            return {name: arrays.read(name) for name in _ARRAYS}
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ResultStoreError(f"{path}: no readable evidence ({error}); delete it and run again.") from None

    def read(self, volume_id: str) -> dict[str, Any]:
        """Return one volume's ``findings`` and ``lesions``.

        Raises:
            ResultStoreError: if they are absent or not readable.
        """
        path = self.path(volume_id)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {"findings": dict(content["findings"]), "lesions": list(content["lesions"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultStoreError(f"{path}: no readable evidence ({error}); delete it and run again.") from None
