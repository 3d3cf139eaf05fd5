"""Extracted features on disk, one file per volume."""

from __future__ import annotations

import zipfile

import numpy as np

from .atomic_files import write_npz
from .npz_arrays import NpzArrays
from .result_store import ResultStore, ResultStoreError

__all__ = ["FeatureStore", "FeatureStoreError"]


class FeatureStoreError(ResultStoreError):
    """A folder of features does not fit what is asked of it; the message says what to do."""


class FeatureStore(ResultStore):
    """A `ResultStore` with ``features.json`` (which encoder, which data) and ``<volume_id>.npz`` per volume.

    An NPZ holds ``global_features`` (C,) and ``region_features`` (R, C), float32, and ``labels`` (L,) with NaN for
    unknown.
    """

    kind = "features"
    index_name = "features.json"
    suffix = ".npz"
    made_by = "the encoder bundle's inference.json"
    error = FeatureStoreError

    def write(
        self, volume_id: str, global_features: np.ndarray, region_features: np.ndarray, labels: np.ndarray
    ) -> None:
        """Store one volume's features."""
        arrays = {"global_features": global_features, "region_features": region_features, "labels": labels}
        write_npz(
            self.path(volume_id),
            {name: np.asarray(array, dtype=np.float32) for name, array in arrays.items()},
            compressed=False,
        )

    def read(self, volume_id: str) -> dict[str, np.ndarray]:
        """Return one volume's features.

        Raises:
            FeatureStoreError: if they are absent or not readable.
        """
        path = self.path(volume_id)
        try:
            arrays = NpzArrays(path.read_bytes())
            return {name: arrays.read(name) for name in ("global_features", "region_features", "labels")}
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise FeatureStoreError(f"{path}: no readable features ({error}); extract them again.") from None
