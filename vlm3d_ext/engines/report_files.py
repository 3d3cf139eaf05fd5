"""The files that an evaluation of reports leaves."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.atomic_files import write_bytes, write_json
from .png_figures import as_png, new_figure
from .report_evaluation import ReportEvaluation, format_reports

__all__ = ["write_report_evaluation"]

_NUM_EXAMPLES = 6


def write_report_evaluation(
    evaluation: ReportEvaluation,
    output_dir: str | os.PathLike,
    texts: Mapping[str, Sequence[str]],
    references: Sequence[str],
) -> None:
    """Write an evaluation; all is made before the first file is written.

    - ``reports.json``: figures and findings of all systems; what is undefined is null.
    - ``reports.txt``: the table of `format_reports`.
    - ``reports.csv``: a row for each system.
    - ``reports_per_case.csv``, ``reports_per_label.csv``: of all systems, a row for each case or finding.
    - ``reports.png``: clinical F1 of each system with its interval, and of each finding.
    - ``reports_examples.txt``: references beside what was generated: the worst, some in the middle and the best by
      clinical F1, of the cases that have one.

    Args:
        evaluation: of `evaluate_reports`.
        output_dir: where the files go.
        texts: system -> texts.
        references: reference reports.
    """
    folder = Path(output_dir)
    figures = {system.name: _plain(system.figures) for system in evaluation.systems}
    content = {
        "num_cases": evaluation.num_cases,
        "num_resamples": evaluation.num_resamples,
        "without_reference": list(evaluation.left_out),
        "systems": figures,
        "per_label": {system.name: [_plain(row) for row in system.per_label] for system in evaluation.systems},
        "absent_metrics": evaluation.systems[0].absent,
    }
    per_case = [{"system": s.name, **_plain(row)} for s in evaluation.systems for row in s.per_case]
    per_label = [{"system": s.name, **_plain(row)} for s in evaluation.systems for row in s.per_label]
    files = {
        "reports.csv": _as_csv([{"system": name, **row} for name, row in figures.items()]),
        "reports_per_case.csv": _as_csv(per_case),
        "reports_per_label.csv": _as_csv(per_label),
        "reports.png": _draw(evaluation),
        "reports_examples.txt": _examples(evaluation, texts, references).encode(),
        "reports.txt": (format_reports(figures) + "\n").encode(),
    }
    write_json(folder / "reports.json", content)
    for name, written in files.items():
        write_bytes(folder / name, written)


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    def rounded(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return None if math.isnan(value) else round(value, 6)

    return {name: rounded(value) for name, value in figures.items()}


def _as_csv(rows: Sequence[Mapping[str, object]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _examples(evaluation: ReportEvaluation, texts: Mapping[str, Sequence[str]], references: Sequence[str]) -> str:
    system = evaluation.systems[0]
    scored = [case for case, row in enumerate(system.per_case) if not math.isnan(row["clinical_f1"])]
    order = sorted(scored, key=lambda case: system.per_case[case]["clinical_f1"])
    chosen = sorted({round(n * (len(order) - 1) / (_NUM_EXAMPLES - 1)) for n in range(_NUM_EXAMPLES)} if order else ())
    parts = []
    for place in chosen:
        case = order[place]
        row = system.per_case[case]
        parts.append(
            f"=== {row['volume_id']}: clinical F1 {row['clinical_f1']:.2f}, {row['found_findings']} of "
            f"{row['true_findings']} findings found, {row['named_findings']} named\n"
            f"--- reference\n{references[case]}\n--- {system.name}\n{texts[system.name][case]}\n"
        )
    return "\n".join(parts)


def _draw(evaluation: ReportEvaluation) -> bytes:
    systems = evaluation.systems
    labels = systems[0].per_label
    figure = new_figure(11, 0.4 * len(labels) + 1.4)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    values = [system.figures["clinical_f1"] for system in systems]
    reach = [
        [max(0.0, system.figures["clinical_f1"] - system.figures["clinical_f1_low"]) for system in systems],
        [max(0.0, system.figures["clinical_f1_high"] - system.figures["clinical_f1"]) for system in systems],
    ]
    places = list(range(len(systems)))
    left.barh(places, values, xerr=reach, height=0.6, color=[f"C{place}" for place in places], ecolor="black")
    left.set_yticks(places, [system.name for system in systems])
    left.set_title("clinical F1, mean over findings")
    height = 0.8 / len(systems)
    for place, system in enumerate(systems):
        rows = [row["f1"] for row in system.per_label]
        offsets = [index + (place - (len(systems) - 1) / 2) * height for index in range(len(rows))]
        right.barh(offsets, rows, height=height, color=f"C{place}")
    right.set_yticks(range(len(labels)), [f"{row['label']} ({row['positives']})" for row in labels], fontsize=8)
    right.set_title("clinical F1 of each finding (number of positives)")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
    return as_png(figure)
