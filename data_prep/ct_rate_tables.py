"""CT-RATE's tables: labels, reports, metadata and the lists of volumes that show no chest.

Their names mix two words for one split: *valid*_predicted_labels.csv, but *validation*_reports.csv and
*validation*_metadata.csv. What labels and reports say belongs to a scan and is shared by its reconstructions;
metadata belong to a volume.

Source: the CT-RATE data set card (Hamamci et al., arXiv 2403.17834).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_prep.raw_case import LayoutError
from vlm3d_ext.data.csv_table import CsvTable, CsvTableError, ScanTable, read_csv_table, volume_name
from vlm3d_ext.data.label_table import label_set_of_columns, labels_of_row
from vlm3d_ext.text.label_mapping import map_labels, mapping_in_words
from vlm3d_ext.text.label_set import LabelSet

__all__ = ["VolumeMetadata", "read_label_table", "read_metadata_table", "read_no_chest_list", "read_report_table"]

_VOLUME_COLUMN = "VolumeName"
_REPORT_COLUMNS = {"findings": "Findings_EN", "impression": "Impressions_EN"}
_OTHER_REPORT_COLUMNS = ("ClinicalInformation_EN", "Technique_EN", "VolumeToAnnotate")
_NO_TEXT = {"not given.", "not given"}  # the sentinel for an empty section
_METADATA_COLUMNS = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
_METADATA_SPLIT = {"train": "train", "valid": "validation"}
_XY_SPACING = re.compile(r"\[\s*([^,\s]+)\s*,\s*([^,\s]+)\s*\]")


def read_label_table(
    root: Path, split: str, label_set: LabelSet, scan_of: Callable[[str], str], remarks: list[str]
) -> ScanTable | None:
    """Read the labels of a split as tuples of 1, 0 or None in the order of `label_set`.

    ``multi_abnormality_labels_<label set>/<split>_labels.csv`` is taken where it exists, else
    ``multi_abnormality_labels/<split>_predicted_labels.csv``. If that holds another set than is wanted (as a rule
    CT-RATE's own 18), the labels are mapped; what the mapping cannot know becomes None.

    Args:
        root: the data set's root.
        split: ``"train"`` or ``"valid"``.
        label_set: the wanted labels.
        scan_of: volume id -> scan id.
        remarks: a mapping, extra columns and an absent table are written here.

    Returns:
        The table, or None if the release holds none.

    Raises:
        LayoutError: if columns are missing or there twice.
    """
    candidates = (
        root / f"multi_abnormality_labels_{label_set.name}" / f"{split}_labels.csv",
        root / "multi_abnormality_labels" / f"{split}_predicted_labels.csv",
    )
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        remarks.append(
            f"no label table {candidates[1].relative_to(root).as_posix()}: the labels of this split are unknown"
        )
        return None
    label = path.relative_to(root).as_posix()
    table = _read_table(path, [_VOLUME_COLUMN] if path == candidates[1] else [_VOLUME_COLUMN, *label_set.names], label)
    file_set = _label_set_of(table, label_set) if path == candidates[1] else label_set
    if file_set is not label_set:
        remarks.append(f"{label}: {mapping_in_words(file_set, label_set)}")
    extra = table.extra_columns([_VOLUME_COLUMN, *file_set.names])
    if extra:
        remarks.append(f"{label}: extra column(s) {extra} are not used")

    # Few combinations of labels make up most rows.
    @cache
    def mapped(values: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(map_labels(dict(zip(file_set.names, values, strict=True)), file_set, label_set).values())

    def parse(number: int, row: dict[str, str]) -> tuple[int | None, ...]:
        values = labels_of_row(row, file_set.names, f"{label} row {number}")
        return values if file_set is label_set else mapped(values)

    return ScanTable(table, _VOLUME_COLUMN, parse, scan_of)


def _label_set_of(table: CsvTable, label_set: LabelSet) -> LabelSet:
    try:
        return label_set_of_columns(table.columns, label_set, table.label)
    except CsvTableError as error:
        raise LayoutError(str(error)) from None


def _read_table(path: Path, required: Sequence[str], label: str) -> CsvTable:
    try:
        return read_csv_table(path, required, label)
    except CsvTableError as error:
        raise LayoutError(str(error)) from None


def read_report_table(root: Path, split: str, scan_of: Callable[[str], str], remarks: list[str]) -> ScanTable | None:
    """Read the reports of a split as ``{"findings": str, "impression": str}``; "Not given." becomes an empty string.

    Returns:
        The table, or None if the release holds none.

    Raises:
        LayoutError: if columns are missing or there twice.
    """
    path = root / "radiology_text_reports" / f"{_METADATA_SPLIT[split]}_reports.csv"
    label = path.relative_to(root).as_posix()
    if not path.is_file():
        remarks.append(f"no report table {label}: the cases of this split have no report")
        return None
    table = _read_table(path, [_VOLUME_COLUMN, *_REPORT_COLUMNS.values()], label)
    extra = table.extra_columns([_VOLUME_COLUMN, *_REPORT_COLUMNS.values(), *_OTHER_REPORT_COLUMNS])
    if extra:
        remarks.append(f"{label}: extra column(s) {extra} are not used")

    def parse(number: int, row: dict[str, str]) -> dict[str, str]:
        texts = {section: row[column] for section, column in _REPORT_COLUMNS.items()}
        return {section: "" if text.lower() in _NO_TEXT else text for section, text in texts.items()}

    return ScanTable(table, _VOLUME_COLUMN, parse, scan_of)


@dataclass(frozen=True)
class VolumeMetadata:
    """What a v1 volume's blank header does not say.

    Args:
        slope: HU per stored unit.
        intercept: HU of stored value 0.
        spacing_mm: [z, y, x].
    """

    slope: float
    intercept: float
    spacing_mm: tuple[float, float, float]


def read_metadata_table(root: Path, split: str) -> ScanTable:
    """Read slope, intercept and spacing of a split as `VolumeMetadata`.

    ``XYSpacing`` is a string "[x, y]". A row without a value (``ZSpacing`` is missing for some volumes of the
    release) refuses its volume.

    Raises:
        LayoutError: if the table or one of its columns is missing.
    """
    path = root / "metadata" / f"{_METADATA_SPLIT[split]}_metadata.csv"
    label = path.relative_to(root).as_posix()
    if not path.is_file():
        raise LayoutError(
            f"{label}: not found, but release v1 has blank headers and knows HU and spacing only from it; "
            "download it, or use release v2 (train_fixed, valid_fixed)."
        )
    table = _read_table(path, [_VOLUME_COLUMN, *_METADATA_COLUMNS], label)

    def number_of(text: str, number: int, column: str, positive: bool) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (positive and value <= 0):
            expected = "a positive number" if positive else "a number"
            raise ValueError(
                f"{label} row {number}: {column} is {text!r}, expected {expected}; correct the cell from the original "
                "DICOM, or use release v2, whose header knows it."
            )
        return value

    def parse(number: int, row: dict[str, str]) -> VolumeMetadata:
        match = _XY_SPACING.fullmatch(row["XYSpacing"])
        if not match:
            raise ValueError(
                f"{label} row {number}: XYSpacing is {row['XYSpacing']!r}, expected '[x, y]' in mm; correct it."
            )
        return VolumeMetadata(
            slope=number_of(row["RescaleSlope"], number, "RescaleSlope", positive=True),
            intercept=number_of(row["RescaleIntercept"], number, "RescaleIntercept", positive=False),
            spacing_mm=(
                number_of(row["ZSpacing"], number, "ZSpacing", positive=True),
                number_of(match[2], number, "XYSpacing", positive=True),
                number_of(match[1], number, "XYSpacing", positive=True),
            ),
        )

    return ScanTable(table, _VOLUME_COLUMN, parse)


def read_no_chest_list(root: Path, split: str) -> dict[str, str]:
    """Return volume id -> name of the list, for the volumes that the release lists as showing no chest (head CTs)."""
    path = root / "metadata" / f"no_chest_{split}.txt"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return {volume_name(line): path.relative_to(root).as_posix() for line in lines if line.strip()}
