"""Reading CSV tables that say something of volumes: columns checked once, rows looked up by volume or by scan.

A table whose columns do not fit stops the run, because every row would be wrong. A row that does not fit refuses its
own volume only.
"""

from __future__ import annotations

import csv
import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CsvTable", "CsvTableError", "RowLookup", "ScanTable", "read_csv_table", "volume_name"]

_LONGEST_FIELD = 16 * 1024 * 1024  # a report is kilobytes; Python's own limit of 128 KiB is no reason to lose one


class CsvTableError(ValueError):
    """A table as a whole cannot be used; one line says which file, what was expected, what to do."""


def volume_name(text: str) -> str:
    """Return a volume's name as tables and lists write it (path, spaces, ``.nii.gz`` or none) as the bare volume id."""
    name = text.strip().replace("\\", "/").rsplit("/", 1)[-1]
    for extension in (".nii.gz", ".nii", ".npz"):
        if name.lower().endswith(extension):
            return name[: -len(extension)]
    return name


@dataclass(frozen=True)
class CsvTable:
    """A CSV table in memory.

    Args:
        label: how messages call the file (relative to the data set's root).
        columns: column names, stripped.
        rows: (row number, {column: text}) with the header as row 1; text is stripped.
        malformed: (row number, text of the first field, message) of rows whose number of fields is not that of the
            header.
    """

    label: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]
    malformed: tuple[tuple[int, str, str], ...]

    def extra_columns(self, known: Iterable[str]) -> list[str]:
        """Return the columns that are not among `known`, in file order."""
        return [column for column in self.columns if column not in set(known)]


def read_csv_table(path: Path, required: Sequence[str], label: str | None = None) -> CsvTable:
    """Read a CSV file whose first row names the columns.

    Args:
        path: UTF-8 file, with or without a byte order mark.
        required: columns that must be there.
        label: how messages call the file; its name by default.

    Raises:
        CsvTableError: if the file is empty or no UTF-8 text, or columns are missing or there twice.
    """
    label = label or path.name
    previous_limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records = [record for record in csv.reader(file) if record]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise CsvTableError(
            f"{label}: cannot be read as a UTF-8 CSV table ({error}); save it again as UTF-8 CSV."
        ) from None
    finally:
        csv.field_size_limit(previous_limit)
    if not records:
        raise CsvTableError(
            f"{label}: is empty, expected a header row with {list(required)}; download or export it again."
        )
    columns = tuple(name.strip() for name in records[0])
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise CsvTableError(f"{label}: column(s) {twice} appear twice, expected each once; remove one of each.")
    missing = [name for name in required if name not in columns]
    if missing:
        raise CsvTableError(f"{label}: {_missing_columns(missing, columns)}")
    rows, malformed = [], []
    for number, record in enumerate(records[1:], start=2):
        if len(record) == len(columns):
            rows.append((number, dict(zip(columns, (text.strip() for text in record), strict=True))))
        else:
            fields = f"{len(record)} fields, expected {len(columns)} as in the header"
            message = f"{label} row {number}: {fields}; correct the row."
            malformed.append((number, record[0], message))
    return CsvTable(label, columns, tuple(rows), tuple(malformed))


def _missing_columns(missing: Sequence[str], present: Sequence[str]) -> str:
    parts = []
    for name in missing:
        nearest = difflib.get_close_matches(name.lower(), [column.lower() for column in present], n=1, cutoff=0.6)
        found = next((column for column in present if nearest and column.lower() == nearest[0]), None)
        parts.append(f"{name!r}" + (f" (nearest present: {found!r})" if found else ""))
    return (
        f"missing column(s) {', '.join(parts)} among {len(present)} columns; "
        "rename the columns, or choose the label set or release that they belong to."
    )


@dataclass(frozen=True)
class RowLookup:
    """What a table says of one volume.

    Args:
        found: whether any row stands for the volume.
        value: the parsed row, or None.
        refusal: why the volume cannot be used, or None.
        notes: remarks for the log.
    """

    found: bool
    value: Any = None
    refusal: str | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Entry:
    row: int
    value: Any = None
    problem: str | None = None
    identical_rows: tuple[int, ...] = ()


class ScanTable:
    """Parsed rows of a table, by volume and by scan.

    Identical rows of one volume collapse with a note, conflicting ones refuse that volume. With `scan_of`, the row of
    a sibling reconstruction (or a row that names the scan itself) stands in where a volume has none, and
    reconstructions whose rows disagree refuse the whole scan, because what the rows say belongs to the scan.

    Args:
        table: the table.
        key_column: column with the volume's name.
        parse: turns (row number, row) into a value that compares by ``==``; its ValueError is the volume's refusal.
        scan_of: volume id -> scan id, or None where rows are not shared.
    """

    def __init__(
        self,
        table: CsvTable,
        key_column: str,
        parse: Callable[[int, dict[str, str]], Any],
        scan_of: Callable[[str], str] | None = None,
    ) -> None:
        self.table = table
        self._scan_of = scan_of
        self._entries: dict[str, _Entry] = {}
        for number, row in table.rows:
            try:
                entry = _Entry(number, value=parse(number, row))
            except ValueError as error:
                entry = _Entry(number, problem=str(error))
            self._add(volume_name(row[key_column]), entry)
        position = table.columns.index(key_column)
        for number, first_field, message in table.malformed:
            # Only a name in the first field survives a wrong number of fields; elsewhere the row is nobody's.
            if position == 0:
                self._add(volume_name(first_field), _Entry(number, problem=message))
        self._by_scan: dict[str, list[str]] = defaultdict(list)
        if scan_of:
            for name in self._entries:
                self._by_scan[scan_of(name)].append(name)

    def _add(self, name: str, entry: _Entry) -> None:
        known = self._entries.get(name)
        if known is None:
            self._entries[name] = entry
        elif known.problem is None and entry.problem is None and known.value == entry.value:
            known.identical_rows += (entry.row,)
        elif known.problem is None:
            known.problem = entry.problem or (
                f"{self.table.label}: rows {known.row} and {entry.row} both describe {name} and disagree; keep "
                f"the right one."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all rows, without repeats, sorted."""
        return tuple(sorted(name for name in self._entries if name))

    def find(self, volume_id: str) -> RowLookup:
        """Return what the table says of `volume_id`."""
        siblings = sorted(self._by_scan.get(self._scan_of(volume_id), ())) if self._scan_of else []
        name = volume_id if volume_id in self._entries else next(iter(siblings), None)
        if name is None:
            return RowLookup(found=False)
        entry = self._entries[name]
        if entry.problem:
            return RowLookup(found=True, refusal=entry.problem)
        for sibling in siblings:
            other = self._entries[sibling]
            if other.problem is None and other.value != entry.value:
                first, second = sorted((entry.row, other.row))
                return RowLookup(
                    found=True,
                    refusal=f"{self.table.label}: rows {first} and {second} belong to reconstructions of one "
                    f"scan and disagree; "
                    "they must say the same.",
                )
        notes = []
        if entry.identical_rows:
            repeats = ", ".join(str(row) for row in entry.identical_rows)
            notes.append(f"{self.table.label}: row {entry.row} is repeated in row(s) {repeats}; counted once")
        if name != volume_id:
            notes.append(f"{self.table.label}: no row of its own; row {entry.row} of the same scan is used")
        return RowLookup(found=True, value=entry.value, notes=tuple(notes))
