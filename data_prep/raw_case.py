"""What is known of one raw scan before its voxels are read: the hand-over from a layout to the preparation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

__all__ = ["LayoutError", "RawCase", "RawDataset"]


class LayoutError(ValueError):
    """The raw data as a whole cannot be prepared: one line says which file, which value, what was expected, what to
    do."""


@dataclass(frozen=True)
class RawCase:
    """One raw scan (one reconstruction), with what its tables say of it.

    Args:
        volume_id: name of the prepared case, unique in the data set, without an extension.
        scan_id: the acquisition that labels and the report belong to.
        patient_id: the unit of splitting.
        split: ``"training"``, ``"validation"`` or ``"test"``.
        path: NIfTI file, folder holding one DICOM series, or NPZ of an already prepared case.
        source: `path` relative to the data set's root, with ``/``.
        labels: 1, 0 or None (unknown) in the order of the label set; empty where there is no label set.
        report: ``{"findings": str, "impression": str}``, or None where the data set has no report for the scan.
        stored_values: (slope, intercept) that turn stored values into HU, where the file does not know them (CT-RATE
            v1).
        spacing_mm: [z, y, x] where the file does not know it (CT-RATE v1).
        series_number: DICOM SeriesNumber of the series to take from a folder of several; None leaves the choice to the
            reader.
        content_sha256: digest of the scan's own files, where names and sizes are not to be trusted to tell one scan
            from another; None where they are.
        exclusion: why the case is left out on purpose, or None.
        refusal: why the case cannot be prepared, or None.
        notes: remarks for the log.
    """

    volume_id: str
    scan_id: str
    patient_id: str
    split: str
    path: Path
    source: str
    labels: tuple[int | None, ...] = ()
    report: Mapping[str, str] | None = None
    stored_values: tuple[float, float] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    series_number: int | None = None
    content_sha256: str | None = None
    exclusion: str | None = None
    refusal: str | None = None
    notes: tuple[str, ...] = ()

    def refused(self, reason: str) -> RawCase:
        """Return the case with `reason` as its refusal; the first reason given stays."""
        return self if self.refusal else replace(self, refusal=reason)

    def excluded(self, reason: str) -> RawCase:
        """Return the case with `reason` as its exclusion; the first reason given stays."""
        return self if self.exclusion else replace(self, exclusion=reason)

    def noted(self, *notes: str) -> RawCase:
        """Return the case with further remarks."""
        return replace(self, notes=self.notes + notes)


@dataclass(frozen=True)
class RawDataset:
    """All raw scans of a folder, sorted by volume id.

    Args:
        root: folder that `RawCase.source` is relative to.
        layout: ``"ct_rate"`` or ``"scan_folder"``.
        release: ``"v1"``, ``"v2"``, or None outside CT-RATE.
        cases: every scan that a file stands for, also the excluded and refused ones.
        rows_without_file: volume ids that a table names and no file holds.
        files_without_row: volume ids that a file holds and no label table names.
        remarks: remarks on the data set as a whole (extra columns, absent tables), for the log and the terminal.
        ignored_files: number of files in the folder that are no scans.
    """

    root: Path
    layout: str
    release: str | None
    cases: tuple[RawCase, ...]
    rows_without_file: tuple[str, ...] = ()
    files_without_row: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    ignored_files: int = field(default=0)
