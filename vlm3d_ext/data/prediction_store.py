"""Predicted findings on disk, one file per volume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .atomic_files import write_json
from .result_store import ResultStore, ResultStoreError

__all__ = ["PredictionStore"]

_VALUES = ("probability", "threshold", "prediction", "trained")


class PredictionStore(ResultStore):
    """A `ResultStore` with ``classification.json`` (which checkpoint, which data) and ``<volume_id>.json`` per volume.

    A volume's file holds ``volume_id`` and ``findings``: for each name ``probability`` (calibrated, 0 to 1),
    ``threshold`` (from validation data), ``prediction`` (0 or 1) and ``trained`` (false for a finding that is scored by
    its prompt alone).
    """

    kind = "predictions"
    index_name = "classification.json"
    suffix = ".json"
    made_by = "the classification bundle's inference.json"

    def write(
        self,
        volume_id: str,
        names: Sequence[str],
        probabilities: Sequence[float],
        thresholds: Sequence[float],
        predictions: Sequence[int],
        trained: Sequence[bool],
    ) -> None:
        """Store one volume's predictions.

        Raises:
            ResultStoreError: if a finding is there twice.
            ValueError: if there are not as many values as names.
        """
        repeated = [name for name in names if list(names).count(name) > 1]
        if repeated:
            raise ResultStoreError(f"{self.path(volume_id)}: the finding {repeated[0]!r} is there twice; rename one.")
        rows = zip(names, probabilities, thresholds, predictions, trained, strict=True)
        findings = {
            name: {
                "probability": float(probability),
                "threshold": float(threshold),
                "prediction": int(prediction),
                "trained": bool(is_trained),
            }
            for name, probability, threshold, prediction, is_trained in rows
        }
        write_json(self.path(volume_id), {"volume_id": volume_id, "findings": findings})

    def read(self, volume_id: str) -> dict[str, dict[str, Any]]:
        """Return one volume's findings.

        Raises:
            ResultStoreError: if they are absent or not readable.
        """
        path = self.path(volume_id)
        try:
            findings = dict(json.loads(path.read_text(encoding="utf-8"))["findings"])
            return {name: {value: finding[value] for value in _VALUES} for name, finding in findings.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultStoreError(f"{path}: no readable predictions ({error}); delete it and run again.") from None

    def volume_ids(self) -> list[str]:
        """Return the volumes that have their predictions, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.json") if path.name != self.index_name)
