"""Labels from a CSV table, in the findings of the label set that is wanted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..text.label_mapping import describe_mapping, map_labels, mapping_in_words
from ..text.label_set import LabelSet, available_label_sets, load_label_set
from .csv_table import CsvTableError, ScanTable, read_csv_table

__all__ = ["LABEL_ID_COLUMNS", "LabelTable", "label_set_of_columns", "labels_of_row", "read_label_csv"]

# CT-RATE's volumes, our own names for a volume and a scan, and CT-RATE's reports for its text classifier; where a
# table has several, the first of these is taken.
LABEL_ID_COLUMNS = ("VolumeName", "volume_id", "scan_id", "AccessionNo")
_LABEL_OF_TEXT = {"": None, "0": 0, "0.0": 0, "1": 1, "1.0": 1}


@dataclass(frozen=True)
class LabelTable:
    """Labels of a CSV file.

    Args:
        path: the file.
        label_set_of_file: the set whose columns the file has.
        labels: volume or scan id, without an extension -> 1.0, 0.0 or NaN (unknown) for each finding of the set that
            was wanted, in its order.
        mapping: in words, how the wanted findings follow from the file's.
        remarks: what else a user should know: repeated rows, columns that are not used.
    """

    path: Path
    label_set_of_file: LabelSet
    labels: Mapping[str, tuple[float, ...]]
    mapping: str
    remarks: tuple[str, ...]


def read_label_csv(path: str | os.PathLike, label_set: LabelSet | str) -> LabelTable:
    """Read a CSV table with one row for each volume or scan and one column for each finding.

    Ids are in the first of the columns `LABEL_ID_COLUMNS` that the table has, with or without ``.nii.gz``. The finding
    columns are those of `label_set`, or else of a shipped set from which it can be mapped; what the mapping cannot
    know is unknown. Cells are 0, 1 or empty (unknown).

    Args:
        path: UTF-8 CSV file.
        label_set: the wanted findings, or the name or path of their set.

    Raises:
        FileNotFoundError: if there is no such file.
        CsvTableError: if the columns fit no set (each missing one is named with the nearest present), no column holds
            ids, a cell is no label, a row has too many or too few fields, or rows of one id disagree.
    """
    path = Path(path)
    wanted = label_set if isinstance(label_set, LabelSet) else load_label_set(label_set)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a CSV table of labels; check the path.")
    table = read_csv_table(path, (), str(path))
    id_column = next((name for name in LABEL_ID_COLUMNS if name in table.columns), None)
    if id_column is None:
        raise CsvTableError(
            f"{path}: no column with the scans' ids, expected one of {list(LABEL_ID_COLUMNS)} among the columns "
            f"{list(table.columns)}; rename it."
        )
    file_set = label_set_of_columns(table.columns, wanted, str(path))
    if table.malformed:
        raise CsvTableError(table.malformed[0][2])
    if not table.rows:
        raise CsvTableError(f"{path}: has a header and no rows, expected one for each scan; export it again.")
    for number, row in table.rows:
        if not row[id_column]:
            raise CsvTableError(f"{path} row {number}: {id_column!r} is empty, expected an id; fill it in.")
    rows = ScanTable(table, id_column, lambda number, row: labels_of_row(row, file_set.names, f"{path} row {number}"))
    found = {name: rows.find(name) for name in rows.names}
    for row_of_id in found.values():
        if row_of_id.refusal:
            raise CsvTableError(row_of_id.refusal)
    values = np.array([row_of_id.value for row_of_id in found.values()], dtype=np.float32)
    if file_set is not wanted:
        values = map_labels(values, file_set, wanted)
    remarks = []
    repeats = [note for row_of_id in found.values() for note in row_of_id.notes]
    if repeats:
        more = f" (and {len(repeats) - 1} more ids with identical rows)" if len(repeats) > 1 else ""
        remarks.append(repeats[0] + more)
    extra = table.extra_columns([id_column, *file_set.names])
    if extra:
        remarks.append(f"{path}: column(s) {extra} are not used")
    labels = {name: tuple(row_values) for name, row_values in zip(found, values.tolist(), strict=True)}
    return LabelTable(path, file_set, labels, mapping_in_words(file_set, wanted), tuple(remarks))


def label_set_of_columns(columns: Sequence[str], wanted: LabelSet, label: str) -> LabelSet:
    """Return the label set whose columns a table has: the wanted one, else the shipped one that says most about it.

    Args:
        columns: the table's header.
        wanted: the findings that are wanted in the end.
        label: how messages call the table.

    Raises:
        CsvTableError: if the columns fit none; the message names what is missing for the set that fits best.
    """
    shipped = [load_label_set(name) for name in available_label_sets() if name != wanted.name]
    supported = {other.name: describe_mapping(other, wanted)["supported"] for other in shipped}
    others = sorted((other for other in shipped if supported[other.name]), key=lambda other: -supported[other.name])
    candidates = [wanted, *others]
    nearest = min(candidates, key=lambda candidate: len(set(candidate.names) - set(columns)))
    try:
        nearest.check_columns(columns)
    except ValueError as error:
        purpose = "" if nearest is wanted else f"for labels of {wanted.name!r}, "
        raise CsvTableError(f"{label}: {purpose}{error}") from None
    return nearest


def labels_of_row(row: Mapping[str, str], names: Sequence[str], place: str) -> tuple[int | None, ...]:
    """Return 1, 0 or None (unknown) for the named cells of a row.

    Raises:
        ValueError: if a cell is neither 0, 1 nor empty; `place` says where.
    """
    for name in names:
        if row[name] not in _LABEL_OF_TEXT:
            raise ValueError(f"{place}: {name!r} is {row[name]!r}, expected 0, 1 or empty (unknown); correct the cell.")
    return tuple(_LABEL_OF_TEXT[row[name]] for name in names)
