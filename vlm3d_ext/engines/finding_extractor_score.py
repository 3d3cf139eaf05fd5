"""Score the rule-based finding extractor on reports whose labels are known.

    python -m vlm3d_ext.engines.finding_extractor_score --reports labelled_reports.csv --label-set ct_rate_18

The table has one row for each report: an id (AccessionNo, VolumeName, volume_id or scan_id), the text (report_text, or
another column by --text-column) and a column of 0 and 1 for each finding; empty cells are unknown and left out. Printed
are, for each finding, positives, precision, recall and F1 of the positive class; the macro-F1, which is the mean over
the findings that have positives; two baselines that read nothing, all positive and all negative; and the errors, each
with the sentence that caused it. --rows odd scores rows 1, 3, 5, ..., to develop on one half and report the other.

Ends with 0, or with 2 if the table cannot be used.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.atomic_files import write_bytes
from ..data.csv_table import CsvTableError, read_csv_table
from ..data.label_table import LABEL_ID_COLUMNS, labels_of_row
from ..text.finding_extractor import FindingExtractor

__all__ = ["ExtractionError", "ExtractorScores", "main", "positive_f1", "score_finding_extractor"]

_ROWS = {"all": slice(None), "odd": slice(0, None, 2), "even": slice(1, None, 2)}
_NO_MENTION = "no mention"


@dataclass(frozen=True)
class ExtractionError:
    """One label that the extractor got wrong.

    Args:
        case: id of the report.
        label: name of the finding.
        kind: "false positive" or "false negative".
        sentence: the sentence that caused it, with how it was read if it was a false negative; or "no mention".
    """

    case: str
    label: str
    kind: str
    sentence: str


@dataclass(frozen=True)
class ExtractorScores:
    """Figures of the extractor, each array (L,) in the order of `names`; NaN where undefined.

    Args:
        names: findings.
        num_reports: reports scored.
        positives: true positives and false negatives.
        precision: share of the reported that is true.
        recall: share of the true that is reported.
        f1: harmonic mean of the two; undefined without positives.
        all_positive_f1: F1 of reporting every finding of every scan.
        errors: in the order of the reports.
    """

    names: tuple[str, ...]
    num_reports: int
    positives: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    all_positive_f1: np.ndarray
    errors: tuple[ExtractionError, ...]

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the findings that have positives."""
        return float(np.nanmean(self.f1))

    def as_text(self) -> str:
        """Return the table, the baselines and the number of errors."""
        width = max(map(len, self.names)) + 2
        lines = [
            f"{self.num_reports} reports; F1 of the positive class",
            f"{'':<{width}}{'positives':>9}{'precision':>11}{'recall':>8}{'F1':>7}{'all positive':>14}",
        ]
        for index, name in enumerate(self.names):
            figures = (self.precision, self.recall, self.f1, self.all_positive_f1)
            cells = [f"{values[index]:.3f}" if not np.isnan(values[index]) else "-" for values in figures]
            columns = "".join(f"{cell:>{size}}" for cell, size in zip(cells, (11, 8, 7, 14), strict=True))
            lines.append(f"{name:<{width}}{int(self.positives[index]):>9}{columns}")
        baseline = float(np.nanmean(self.all_positive_f1))
        lines += [
            f"macro-F1 over {int((self.positives > 0).sum())} findings: {self.macro_f1:.3f} "
            f"(all positive {baseline:.3f}, all negative 0.000)",
            f"{len(self.errors)} errors among {self.num_reports * len(self.names)} labels",
        ]
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 0 or 2."""
    options = _parser().parse_args(arguments)
    try:
        extractor = FindingExtractor(options.label_set, uncertain_is_present=not options.uncertain_is_absent)
        scores = score_finding_extractor(options.reports, extractor, options.rows, options.text_column)
        print(scores.as_text())
        for error in scores.errors:
            print(f"{error.case}: {error.label}: {error.kind}: {error.sentence}")
        if options.errors:
            _write_errors(options.errors, scores.errors)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlm3d_ext.engines.finding_extractor_score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reports", required=True, type=Path, help="CSV file of reports and their labels")
    parser.add_argument("--label-set", default="ct_rate_18", help="findings to score (default: ct_rate_18)")
    parser.add_argument("--text-column", default="report_text", help="column of the reports (default: report_text)")
    parser.add_argument("--rows", choices=list(_ROWS), default="all", help="rows to score (default: all)")
    parser.add_argument(
        "--uncertain-is-absent", action="store_true", help="count what is only suspected as absent, not as present"
    )
    parser.add_argument("--errors", type=Path, help="write the errors as CSV, too")
    return parser


def score_finding_extractor(
    path: Path, extractor: FindingExtractor, rows: str = "all", text_column: str = "report_text"
) -> ExtractorScores:
    """Compare the extractor's labels with those of a table.

    Args:
        path: CSV file with an id, a report and one column for each of the extractor's findings.
        extractor: what to score.
        rows: "all", "odd" (the first row, the third, ...) or "even".
        text_column: column of the reports.

    Raises:
        CsvTableError: if the file is missing or no CSV table, columns are missing, a row has too few or too many
            fields, a label is not 0, 1 or empty, or no row is left.
    """
    if not path.is_file():
        raise CsvTableError(f"{path}: no such file, expected a CSV table of reports and labels; check the path.")
    table = read_csv_table(path, [text_column], str(path))
    id_column = next((name for name in LABEL_ID_COLUMNS if name in table.columns), None)
    if id_column is None:
        raise CsvTableError(
            f"{path}: no column with ids, expected one of {list(LABEL_ID_COLUMNS)} among the columns "
            f"{list(table.columns)}; rename it."
        )
    try:
        extractor.label_set.check_columns(table.columns)
    except ValueError as error:
        raise CsvTableError(f"{path}: {error}") from None
    if table.malformed:
        raise CsvTableError(table.malformed[0][2])
    chosen = table.rows[_ROWS[rows]]
    if not chosen:
        raise CsvTableError(f"{path}: has {len(table.rows)} rows and none to score (rows: {rows}); export it again.")
    cases = [row[id_column] for _, row in chosen]
    reports = [row[text_column] for _, row in chosen]
    labels = np.array(
        [labels_of_row(row, extractor.names, f"{path} row {number}") for number, row in chosen], dtype=float
    )
    predicted = np.stack([extractor.labels(report) for report in reports])
    true_positives = (predicted * (labels == 1)).sum(axis=0)
    positives = (labels == 1).sum(axis=0)
    reported = (predicted * ~np.isnan(labels)).sum(axis=0)
    everything = (~np.isnan(labels)).sum(axis=0)
    return ExtractorScores(
        names=extractor.names,
        num_reports=len(reports),
        positives=positives,
        precision=_ratio(true_positives, reported),
        recall=_ratio(true_positives, positives),
        f1=positive_f1(true_positives, reported, positives),
        all_positive_f1=positive_f1(positives, everything, positives),
        errors=tuple(_errors(extractor, cases, reports, labels, predicted)),
    )


def positive_f1(true_positives: np.ndarray, reported: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return F1 = 2 TP / (reported + positives), (L,); NaN where there are no positives."""
    return np.where(positives > 0, _ratio(2 * true_positives, reported + positives), np.nan)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)


def _errors(
    extractor: FindingExtractor, cases: Sequence[str], reports: Sequence[str], labels: np.ndarray, predicted: np.ndarray
) -> list[ExtractionError]:
    errors = []
    for index, report in enumerate(reports):
        wrong = np.flatnonzero(np.abs(predicted[index] - labels[index]) == 1)  # an unknown label is never wrong
        mentions = extractor.mentions(report) if len(wrong) else []
        for column in wrong:
            key, name = extractor.keys[column], extractor.names[column]
            of_finding = [mention for mention in mentions if mention.key == key]
            if predicted[index, column]:
                counted = ("present", "uncertain") if extractor.uncertain_is_present else ("present",)
                cause = next(mention.sentence for mention in of_finding if mention.status in counted)
                errors.append(ExtractionError(cases[index], name, "false positive", cause))
            else:
                read = [f"{mention.status}: {mention.sentence}" for mention in of_finding]
                errors.append(ExtractionError(cases[index], name, "false negative", " | ".join(read) or _NO_MENTION))
    return errors


def _write_errors(path: Path, errors: Sequence[ExtractionError]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["case", "label", "error", "sentence"])
    writer.writerows([error.case, error.label, error.kind, error.sentence] for error in errors)
    write_bytes(path, buffer.getvalue().encode())


if __name__ == "__main__":
    sys.exit(main())
