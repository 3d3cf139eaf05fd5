"""Generated reports on disk: one JSON and one text file per volume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .atomic_files import write_bytes, write_json
from .result_store import ResultStore, ResultStoreError

__all__ = ["ReportStore"]

_KEYS = (
    "report_id",
    "volume_id",
    "report_text",
    "findings_list",
    "diseases_mentioned",
    "report_length",
    "sections",
    "metadata",
)


class ReportStore(ResultStore):
    """A `ResultStore` with ``report_generation.json`` (which checkpoint, data and settings) and, for each volume,
    ``<volume_id>.json`` and ``<volume_id>.txt``.

    The JSON holds ``report_id``; ``volume_id``; ``report_text``; ``findings_list``, what the text says of findings
    (``key``, ``status``, ``sides``, ``regions``, ``sizes_mm``, ``sentence``); ``diseases_mentioned``, names of the
    findings that it says are present; ``report_length`` in words; ``sections`` (``findings``, ``impression``,
    ``recommendations``, each "" where it is not there); and ``metadata``. It is written last.
    """

    kind = "reports"
    index_name = "report_generation.json"
    suffix = ".json"
    made_by = "the report_generation bundle's inference.json"

    def text_path(self, volume_id: str) -> Path:
        """Return where the plain text is."""
        return self.folder / f"{volume_id}.txt"

    def write(self, volume_id: str, report: Mapping[str, Any]) -> None:
        """Store one volume's report.

        Raises:
            ValueError: if it lacks one of the entries, or has others.
        """
        if set(report) != set(_KEYS):
            raise ValueError(f"{self.path(volume_id)}: a report has the entries {_KEYS}, got {sorted(report)}.")
        self.path(volume_id).unlink(missing_ok=True)
        write_bytes(self.text_path(volume_id), (str(report["report_text"]) + "\n").encode())
        write_json(self.path(volume_id), {key: report[key] for key in _KEYS})

    def read(self, volume_id: str) -> dict[str, Any]:
        """Return one volume's report.

        Raises:
            ResultStoreError: if it is absent or not readable.
        """
        path = self.path(volume_id)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {key: content[key] for key in _KEYS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultStoreError(f"{path}: no readable report ({error}); delete it and run again.") from None

    def volume_ids(self) -> list[str]:
        """Return the volumes that have their reports, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.json") if path.name != self.index_name)
