"""Extracted features on disk, one file per volume."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .atomic_files import write_json, write_npz

__all__ = ["FeatureStore", "FeatureStoreError"]

_INDEX = "features.json"


class FeatureStoreError(ValueError):
    """A folder of features does not fit what is asked of it; the message says what to do."""


class FeatureStore:
    """A folder with ``features.json`` (which encoder, which data) and ``<volume_id>.npz`` per volume.

    An NPZ holds ``global_features`` (C,) and ``region_features`` (R, C), float32, and ``labels`` (L,) with NaN for
    unknown. Files are whole or absent, so extraction can be stopped and continued.

    Args:
        folder: where the store is or will be.
        origin: what must be the same for all files: the encoder's checkpoint sha256, the manifest's fingerprint, and
            the like. None opens an existing store as it is.

    Raises:
        FeatureStoreError: if the folder holds features of another origin, or none where an existing store is opened.
    """

    def __init__(self, folder: str | os.PathLike, origin: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        index = self.folder / _INDEX
        existing = _read_index(index)
        if origin is None:
            if existing is None:
                raise FeatureStoreError(
                    f"{index}: no such file; extract features first with the encoder bundle's inference.json."
                )
            self.origin: dict[str, Any] = existing
            return
        self.origin = json.loads(json.dumps(dict(origin)))
        if existing is None:
            write_json(index, self.origin)
        elif existing != self.origin:
            differing = sorted(k for k in {*existing, *self.origin} if existing.get(k) != self.origin.get(k))
            raise FeatureStoreError(
                f"{index}: the features there were made with another {', '.join(differing)}; "
                f"choose another --output_dir or delete {self.folder}."
            )

    def path(self, volume_id: str) -> Path:
        """Return where a volume's features are."""
        return self.folder / f"{volume_id}.npz"

    def pending(self, cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the cases whose features are not there yet."""
        return [case for case in cases if not self.path(case["volume_id"]).is_file()]

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
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in ("global_features", "region_features", "labels")}
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise FeatureStoreError(f"{path}: no readable features ({error}); extract them again.") from None


def _read_index(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise FeatureStoreError(f"{path}: not JSON ({error}); delete {path.parent} and extract again.") from None
