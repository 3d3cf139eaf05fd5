"""The files that an evaluation of drawn lesions leaves."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.atomic_files import write_bytes, write_json
from .localization_case import CaseEvaluation
from .localization_evaluation import LocalizationReport
from .localization_figures import draw_dice_by_size, draw_froc

__all__ = ["write_localization_report"]


def write_localization_report(
    report: LocalizationReport, cases: Sequence[CaseEvaluation], output_dir: str | os.PathLike
) -> list[Path]:
    """Write an evaluation as JSON, CSV and pictures; all are made before the first is written.

    - ``localization.json``: means and one entry for each disease; an undefined figure is null.
    - ``localization.csv``: one row for each disease; an undefined figure is an empty cell.
    - ``cases.csv``: one row for each scan and disease.
    - ``froc.png``, ``dice_by_size.png``.

    Args:
        report: of `evaluate_localization`.
        cases: those it gathers.
        output_dir: where the files go; made if absent.

    Returns:
        The paths, in the order above.

    Raises:
        OSError: if a file cannot be written.
    """
    content = {
        "num_scans": report.num_scans,
        "num_resamples": report.num_resamples,
        "diseases": list(report.diseases),
        "mean": _plain(report.mean),
        "per_disease": [_plain(row) for row in report.per_disease],
    }
    files = {
        "localization.csv": _as_csv([_plain(row) for row in report.per_disease]),
        "cases.csv": _as_csv([_plain(_case_row(case)) for case in cases]),
        "froc.png": draw_froc(report),
        "dice_by_size.png": draw_dice_by_size(report, cases),
    }
    folder = Path(output_dir)
    write_json(folder / "localization.json", content)
    for name, written in files.items():
        write_bytes(folder / name, written)
    return [folder / "localization.json", *(folder / name for name in files)]


def _case_row(case: CaseEvaluation) -> dict[str, Any]:
    judged = case.candidates is not None
    annotated = case.status in ("positive", "partial")
    return {
        "volume_id": case.volume_id,
        "patient_id": case.patient_id,
        "disease": case.disease,
        "status": case.status,
        "dice": case.dice,
        "surface_dice": case.surface_dice,
        "hausdorff_95_mm": case.hausdorff_95_mm,
        "true_lesions": len(case.matches.found) if annotated or judged else math.nan,
        "found_lesions": sum(case.matches.found) if annotated or judged else math.nan,
        "predicted_lesions": len(case.matches.true_prediction) if judged else math.nan,
        "false_positives": case.matches.num_false_positives if judged else math.nan,
        "true_voxels": case.num_true_voxels if annotated or judged else math.nan,
        "predicted_voxels": case.num_predicted_voxels,
        "ceiling_dice": case.ceiling_dice,
        "baseline_dice": case.baseline_dice,
    }


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures with six digits, None where undefined; a threshold keeps all, since it is there to be used."""
    return {name: value if name == "threshold" else _rounded(value) for name, value in figures.items()}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else round(value, 6)


def _as_csv(rows: Sequence[Mapping[str, object]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()
