"""What was made of each scan: one JSON file that names its page, masks, report and DICOM objects, written last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic_files import write_json
from .prepared_case import read_sidecar
from .result_store import ResultStore, ResultStoreError

__all__ = ["ScanResultStore"]


class ScanResultStore(ResultStore):
    """A `ResultStore` with ``multitask.json`` (which checkpoint and settings) and ``<volume_id>.json`` per scan.

    A scan's file holds ``volume_id``, ``source`` (its path as the manifest has it), ``source_format`` ("nifti", "dicom"
    or "npz"), ``content_sha256`` (of what was prepared from it), ``files`` (what was written, relative to this folder)
    and ``notes``. It is written last, so where it is, all of them are; a scan that has changed since is done again.
    """

    kind = "results"
    index_name = "multitask.json"
    suffix = ".json"
    made_by = "the multitask bundle's inference.json"

    def write(self, volume_id: str, record: Mapping[str, Any]) -> None:
        """Store what there is of one scan."""
        write_json(self.path(volume_id), {"volume_id": volume_id, **record})

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

    def pending(self, cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the cases that have no result, or one of another content."""
        return [case for case in cases if not self._is_done(case)]

    def _is_done(self, case: Mapping[str, Any]) -> bool:
        if not self.path(case["volume_id"]).is_file():
            return False
        content = read_sidecar(case["geometry"])["content_sha256"]
        return self.read(case["volume_id"]).get("content_sha256") == content

    def volume_ids(self) -> list[str]:
        """Return the scans that have their results, sorted."""
        return sorted(path.stem for path in Path(self.folder).glob("*.json") if path.name != self.index_name)
