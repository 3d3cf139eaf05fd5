"""The joint network beside the single-task networks that it began from, and beside what needs no scan."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.atomic_files import write_bytes, write_json

__all__ = ["ComparedFigure", "compare_tasks", "format_task_comparison", "write_task_comparison"]

logger = logging.getLogger(__name__)

_CLASSIFICATION = (("auroc", "AUROC"), ("average_precision", "average precision"), ("f1", "F1"), ("crg", "CRG"))
_WAYS = ("unguided", "guided")
_REPORTS = (("clinical_f1", "clinical F1"), ("crg", "CRG"), ("laterality", "laterality"))
_BLIND_REPORTS = ("nearest neighbour", "random report", "all normal")
_COMMANDS = {
    "classification": "bundles/classification/configs/evaluate.json",
    "localization": "bundles/localization/configs/evaluate.json",
    "report_generation": "bundles/report_generation/configs/evaluate.json",
}


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of a task; None where it is not defined or was not measured.

    Attributes:
        task: bundle that has this task alone.
        figure: what is measured; more is better.
        num_cases: on how many scans.
        single: of the single-task bundle.
        single_low: lower end of its 95 % interval; and
        single_high: the upper one.
        joint: of the joint network.
        joint_low: lower end of its 95 % interval; and
        joint_high: the upper one.
        baseline: the best of what does not read the scan, or reads it and copies a report.
        baseline_name: which that is.
    """

    task: str
    figure: str
    num_cases: int
    single: float | None
    single_low: float | None
    single_high: float | None
    joint: float | None
    joint_low: float | None
    joint_high: float | None
    baseline: float | None
    baseline_name: str

    @property
    def verdict(self) -> str:
        """Where the joint figure lies: "worse" or "better" than the whole single-task interval, "equal" inside it, ""
        where that cannot be said."""
        if self.joint is None or self.single_low is None or self.single_high is None:
            return ""
        if self.joint < self.single_low:
            return "worse"
        return "better" if self.joint > self.single_high else "equal"


def compare_tasks(
    joint_dir: str | os.PathLike, single_task_dirs: Mapping[str, str | os.PathLike]
) -> list[ComparedFigure]:
    """Read what the evaluations have written, and set it side by side.

    Args:
        joint_dir: of the joint network: ``classification_*.json``, ``localization.json``, ``reports.json``.
        single_task_dirs: "classification", "localization", "report_generation" -> folder of its evaluation. Where one
            was not evaluated, that is said, and its figures are None.

    Raises:
        FileNotFoundError: if the joint network was not evaluated.
        ValueError: if an evaluation was of another number of scans.
    """
    joint = Path(joint_dir)
    figures = []
    for way in _WAYS:
        name = f"classification_{way}.json"
        ours, theirs = _pair(joint, single_task_dirs, "classification", name, "num_cases")
        if ours is None:
            continue
        for key, title in _CLASSIFICATION:
            baselines = {baseline: values[key] for baseline, values in ours["baselines"].items()}
            macro = theirs["macro"] if theirs else {}
            figures.append(
                _compared("classification", f"{title}, {way}", ours["num_cases"], key, macro, ours["macro"], baselines)
            )
    ours, theirs = _pair(joint, single_task_dirs, "localization", "localization.json", "num_scans")
    if ours is not None:
        rows = {"mean": ours["mean"], **{row["disease"]: row for row in ours["per_disease"]}}
        single = {"mean": theirs["mean"], **{row["disease"]: row for row in theirs["per_disease"]}} if theirs else {}
        for disease, row in rows.items():
            blind = {"lesion frequency": row["baseline_dice"]}
            figures.append(
                _compared(
                    "localization", f"Dice, {disease}", ours["num_scans"], "dice", single.get(disease, {}), row, blind
                )
            )
    ours, theirs = _pair(joint, single_task_dirs, "report_generation", "reports.json", "num_cases")
    if ours is not None:
        systems = ours["systems"]
        for key, title in _REPORTS:
            blind = {name: systems[name][key] for name in _BLIND_REPORTS if name in systems}
            single = theirs["systems"]["generated"] if theirs else {}
            figures.append(
                _compared("report_generation", title, ours["num_cases"], key, single, systems["generated"], blind)
            )
    if not figures:
        raise FileNotFoundError(
            f"{joint}: no evaluation of the joint network; run the multitask bundle's evaluate.json."
        )
    return figures


def _pair(
    joint: Path, single_task_dirs: Mapping[str, str | os.PathLike], task: str, name: str, count: str
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the joint evaluation's file and the single-task one's; None for what is not there."""
    if not (joint / name).is_file():
        return None, None
    ours = json.loads((joint / name).read_text(encoding="utf-8"))
    other = Path(single_task_dirs[task]) / name
    if not other.is_file():
        logger.warning("%s: not there, so %s alone is not compared; evaluate it with %s.", other, task, _COMMANDS[task])
        return ours, None
    theirs = json.loads(other.read_text(encoding="utf-8"))
    if theirs[count] != ours[count]:
        raise ValueError(
            f"{other}: is of {theirs[count]} scans, the joint evaluation of {ours[count]}; evaluate both on one split "
            "of one data set."
        )
    return ours, theirs


def _compared(
    task: str,
    figure: str,
    num_cases: int,
    key: str,
    single: Mapping[str, Any],
    joint: Mapping[str, Any],
    baselines: Mapping[str, float | None],
) -> ComparedFigure:
    known = {name: value for name, value in baselines.items() if value is not None}
    best = max(known, key=lambda name: known[name], default="")
    single_value, joint_value = ([of.get(f"{key}{end}") for end in ("", "_low", "_high")] for of in (single, joint))
    return ComparedFigure(
        task,
        figure,
        num_cases,
        single=single_value[0],
        single_low=single_value[1],
        single_high=single_value[2],
        joint=joint_value[0],
        joint_low=joint_value[1],
        joint_high=joint_value[2],
        baseline=known.get(best),
        baseline_name=best,
    )


def format_task_comparison(figures: list[ComparedFigure]) -> str:
    """Return a table: a row per figure, with 95 % intervals."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    def interval(low: float | None, high: float | None) -> str:
        return "" if low is None and high is None else f"[{shown(low)}, {shown(high)}]"

    lines = [
        f"{'':44}{'single-task':>12}{'95 % interval':>17}{'joint':>8}{'95 % interval':>17}{'':>8}  best baseline",
    ]
    for row in figures:
        name = f"{row.task}: {row.figure.replace('_', ' ')}"
        lines.append(
            f"{name:44}{shown(row.single):>12}{interval(row.single_low, row.single_high):>17}{shown(row.joint):>8}"
            f"{interval(row.joint_low, row.joint_high):>17}{row.verdict:>8}  {shown(row.baseline)} {row.baseline_name}"
        )
    lines.append(
        '"better", "worse": outside the single-task interval; "equal": inside it. unguided: without anatomical mask'
    )
    return "\n".join(lines)


def write_task_comparison(
    joint_dir: str | os.PathLike, single_task_dirs: Mapping[str, str | os.PathLike]
) -> list[ComparedFigure]:
    """Write ``comparison.json`` and ``comparison.txt`` into the joint evaluation's folder, print, and return the
    figures; see `compare_tasks`."""
    figures = compare_tasks(joint_dir, single_task_dirs)
    table = format_task_comparison(figures)
    write_json(Path(joint_dir) / "comparison.json", [{**asdict(row), "verdict": row.verdict} for row in figures])
    write_bytes(Path(joint_dir) / "comparison.txt", (table + "\n").encode())
    logger.info("Single-task bundles and the joint network:\n%s", table)
    return figures
