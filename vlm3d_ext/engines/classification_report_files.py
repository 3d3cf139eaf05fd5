"""The files that an evaluation of a classifier leaves."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.atomic_files import write_bytes, write_json
from .classification_evaluation import FIGURES, ClassificationReport
from .classification_figures import draw_precision_recall_curves, draw_reliability, draw_roc_curves

__all__ = ["write_classification_report"]


def write_classification_report(
    report: ClassificationReport,
    output_dir: str | os.PathLike,
    volume_ids: Sequence[str],
    probabilities: np.ndarray,
    labels: np.ndarray,
    suffix: str = "",
    uncalibrated_probabilities: np.ndarray | None = None,
) -> list[Path]:
    """Write an evaluation as JSON, CSV and pictures; all are made before the first is written.

    - ``classification.json``: everything; an undefined figure is null.
    - ``classification.csv``: one row for each label; an undefined figure is an empty cell, "undefined" says why.
    - ``classification_baselines.csv``: macro figures, one row for the classifier and one for each baseline.
    - ``predictions.csv``: probabilities, one row for each volume.
    - ``roc.png``, ``precision_recall.png``, ``reliability.png``.

    Args:
        report: of `evaluate_classification`.
        output_dir: where the files go; made if absent.
        volume_ids: (N,).
        probabilities: (N, L), those that were evaluated.
        labels: (N, L) of 1, 0 or NaN.
        suffix: goes into each name, ``guided`` gives ``classification_guided.json``.
        uncalibrated_probabilities: (N, L), for the reliability diagram.

    Returns:
        The paths, in the order above.

    Raises:
        ValueError: if the suffix has characters that do not belong in a file name, or the lengths differ.
        OSError: if a file cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]*", suffix):
        raise ValueError(f"suffix must be letters, digits, '-' and '_', got {suffix!r}.")
    probabilities = np.asarray(probabilities)
    if len(volume_ids) != len(probabilities) or probabilities.shape != np.shape(labels):
        raise ValueError(
            f"volume ids, probabilities and labels must describe the same cases, got {len(volume_ids)}, "
            f"{probabilities.shape} and {np.shape(labels)}."
        )
    tail = f"_{suffix}" if suffix else ""
    content = {
        "num_cases": report.num_cases,
        "num_resamples": report.num_resamples,
        "label_names": list(report.label_names),
        "macro": _plain(report.macro),
        "challenge": {name: _plain(figures) for name, figures in report.challenge.items()},
        "baselines": {name: _plain(figures) for name, figures in report.baselines.items()},
        "per_label": [_plain(row) for row in report.per_label],
    }
    means = {"classifier": report.macro, **report.baselines}
    mean_rows = [
        {"predictor": name, **{figure: figures[figure] for figure in (*FIGURES, "crg")}}
        for name, figures in means.items()
    ]
    prediction_rows = [
        {"volume_id": volume_id, **dict(zip(report.label_names, row.tolist(), strict=True))}
        for volume_id, row in zip(volume_ids, probabilities, strict=True)
    ]
    files = {
        f"classification{tail}.csv": _as_csv(_plain(row) for row in report.per_label),
        f"classification_baselines{tail}.csv": _as_csv(_plain(row) for row in mean_rows),
        f"predictions{tail}.csv": _as_csv(prediction_rows),
        f"roc{tail}.png": draw_roc_curves(report, probabilities, labels),
        f"precision_recall{tail}.png": draw_precision_recall_curves(report, probabilities, labels),
        f"reliability{tail}.png": draw_reliability(probabilities, labels, uncalibrated_probabilities),
    }
    folder = Path(output_dir)
    write_json(folder / f"classification{tail}.json", content)
    for name, written in files.items():
        write_bytes(folder / name, written)
    return [folder / f"classification{tail}.json", *(folder / name for name in files)]


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures with six digits, None where undefined; a threshold keeps all, since it is there to be used."""
    return {name: value if name == "threshold" else _rounded(value) for name, value in figures.items()}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else round(value, 6)


def _as_csv(rows: Iterable[Mapping[str, object]]) -> bytes:
    rows = list(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()
