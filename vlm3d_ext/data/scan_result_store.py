"""What was made of each scan: one JSON file that names its page, masks, report and DICOM objects, written last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic_files import TEMPORARY_SUFFIX, write_json
from .prepared_case import read_sidecar
from .result_store import ResultStore, ResultStoreError

__all__ = ["ScanResultStore"]

_FOLDERS_BESIDE = ("pages", "dicom_seg", "dicom_sr")


class ScanResultStore(ResultStore):
    """A `ResultStore` with ``multitask.json`` (which checkpoint and settings) and ``<volume_id>.json`` per scan.

    A scan's file holds ``volume_id``, ``source`` (its path as the manifest has it), ``source_format`` ("nifti", "dicom"
    or "npz"), ``input_digest`` (of the scan's files), ``content_sha256`` (of the voxels prepared from them), ``files``
    (what was written, relative to the folder above), ``dicom_options`` and ``notes``. It is written last, so where it
    is, all of them are. A scan whose files have changed since is done again, also where its voxels have not: its place
    in the patient may be another.

    Args:
        folder: where the store is or will be.
        origin: as for `ResultStore`.
        dicom_options: what decides which DICOM objects there are and what is in them; a DICOM series that was done with
            others is done again.

    Raises:
        ResultStoreError: as `ResultStore`.
    """

    kind = "results"
    index_name = "multitask.json"
    suffix = ".json"
    made_by = "the multitask bundle's inference.json"

    def __init__(
        self,
        folder: str | os.PathLike,
        origin: Mapping[str, Any] | None = None,
        dicom_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(folder, origin)
        self.dicom_options = dict(dicom_options or {})

    def write(self, volume_id: str, record: Mapping[str, Any]) -> None:
        """Store what there is of one scan."""
        write_json(self.path(volume_id), {"volume_id": volume_id, **record, "dicom_options": self.dicom_options})

    def forget(self, volume_id: str) -> None:
        """Remove what a scan's record says, before its files are written anew: half old, half new, it would lie."""
        self.path(volume_id).unlink(missing_ok=True)

    def read(self, volume_id: str) -> dict[str, Any]:
        """Return what there is of one scan.

        Raises:
            ResultStoreError: if it is absent or not readable.
        """
        path = self.path(volume_id)
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ResultStoreError(f"{path}: no readable result ({error}); delete it and run again.") from None

    def remove_leftovers(self, *stores: ResultStore) -> None:
        """Remove what a killed run left half-written: here, in other stores, and among pages and DICOM objects.

        Nobody else may be writing there.
        """
        beside = (self.folder.parent / name for name in _FOLDERS_BESIDE)
        for folder in (self.folder, *beside, *(store.folder for store in stores)):
            for path in folder.rglob(f".*{TEMPORARY_SUFFIX}"):
                path.unlink(missing_ok=True)

    def pending(self, cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the cases that have no result, or one of other files or, if they are DICOM, of other options."""
        return [case for case in cases if not self._is_done(case)]

    def _is_done(self, case: Mapping[str, Any]) -> bool:
        if not self.path(case["volume_id"]).is_file():
            return False
        sidecar, record = read_sidecar(case["geometry"]), self.read(case["volume_id"])
        same_options = sidecar["source_format"] != "dicom" or record.get("dicom_options") == self.dicom_options
        return same_options and record.get("input_digest") == sidecar["input_digest"]

    def volume_ids(self) -> list[str]:
        """Return the scans that have their results, sorted."""
        return sorted(path.stem for path in Path(self.folder).glob("*.json") if path.name != self.index_name)
