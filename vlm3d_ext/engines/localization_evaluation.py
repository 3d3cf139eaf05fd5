"""How well lesions are drawn and found, disease by disease and on average, on the scans' own grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics.case_resampling import percentile_interval, resampling_weights
from ..metrics.froc import FrocCurve, froc, pool_candidates
from ..metrics.label_arrays import mean_over_defined
from ..metrics.lesion_components import SIZE_BINS, size_bin
from ..metrics.lesion_detection import pool_lesion_matches
from .localization_case import CaseEvaluation

__all__ = ["FROC_FALSE_POSITIVES", "LocalizationReport", "evaluate_localization", "format_localization"]

FROC_FALSE_POSITIVES = (0.5, 1.0, 2.0, 4.0)
"""False positives a scan at which the VLM3D challenge reads the sensitivity."""


@dataclass(frozen=True)
class LocalizationReport:
    """Figures of drawn lesions on one split. A figure that is undefined is NaN.

    Args:
        diseases: keys, in order.
        per_disease: one row for each: see `evaluate_localization`.
        mean: of each figure of the rows over the diseases where it is defined, and "dice_low" and "dice_high" of the
            mean Dice.
        curves: FROC of each disease; None where there is no scan to judge.
        num_scans: scans evaluated.
        num_resamples: bootstrap resamples behind the 95 % intervals.
    """

    diseases: tuple[str, ...]
    per_disease: tuple[dict[str, Any], ...]
    mean: dict[str, float]
    curves: dict[str, FrocCurve | None]
    num_scans: int
    num_resamples: int


def evaluate_localization(
    cases: Sequence[CaseEvaluation],
    diseases: Sequence[str],
    thresholds: Sequence[float],
    num_resamples: int = 200,
    seed: int = 0,
) -> LocalizationReport:
    """Gather the evaluations of single scans.

    A disease's row holds, beside "disease" and "threshold":

    - "positive_scans", "negative_scans", "partial_scans", "unknown_scans": how many there are of each, see
      `vlm3d_ext.engines.localization_case.read_truth`; "lesions": annotated in positive and partial scans.
    - "dice" (with "dice_low", "dice_high", a 95 % bootstrap interval over patients), "surface_dice" (2 mm): means over
      positive scans, a scan without prediction counting 0. "hausdorff_95_mm": median over the positive scans where it
      is defined, "hausdorff_95_undefined": the number of those where nothing was predicted.
    - "sensitivity": share of annotated lesions found; "precision": share of predicted lesions that are true, in
      positive and negative scans.
    - "lesions_small", "lesion_dice_small", "sensitivity_small", "precision_small", "ceiling_small" and the same for
      "medium" and "large" lesions: number, mean of each lesion's Dice (see `vlm3d_ext.metrics.lesion_dice`), shares,
      and the mean Dice of the lesions of the prepared true mask. Precision counts in the bin of the predicted size.
    - "false_positives_per_negative_scan", "negative_scans_with_false_positives" (a share).
    - "froc_0.5", "froc_1", "froc_2", "froc_4": sensitivity at so many false positives a scan, over positive and
      negative scans.
    - "ceiling_dice": mean Dice of the prepared true mask, brought back: what the resolution allows.
    - "baseline_dice": mean Dice of masks that do not look at the scan.

    Scans of unknown truth are counted and otherwise left out; of those with a partial annotation only the sensitivity
    is used.

    Args:
        cases: one for each scan and disease.
        diseases: keys, in order.
        thresholds: of each disease, for the report.
        num_resamples: bootstrap resamples; 0 leaves the intervals undefined.
        seed: of the resampling.

    Raises:
        ValueError: if there is no case, a scan lacks a disease or has one twice, or there are not as many thresholds as
            diseases.
    """
    if not cases:
        raise ValueError("there is no scan to evaluate; expected at least one.")
    if len(thresholds) != len(diseases):
        raise ValueError(f"{len(diseases)} diseases need as many thresholds, got {len(thresholds)}.")
    table = {(case.volume_id, case.disease): case for case in cases}
    patient_of = {case.volume_id: case.patient_id for case in cases}
    if len(table) != len(cases) or len(cases) != len(patient_of) * len(diseases):
        raise ValueError(
            f"each of {len(patient_of)} scans needs each of {len(diseases)} diseases once, got {len(cases)} results of "
            f"{len(table)} scans and diseases."
        )
    weights = resampling_weights(len(patient_of), num_resamples, seed, groups=list(patient_of.values()))
    rows, curves, resampled = [], {}, []
    for disease, threshold in zip(diseases, thresholds, strict=True):
        of_disease = [table[volume_id, disease] for volume_id in patient_of]
        drawn = _resampled_means(np.array([case.dice for case in of_disease]), weights)
        resampled.append(drawn)
        curves[disease] = _froc(of_disease)
        rows.append(_row(disease, threshold, of_disease, drawn, curves[disease]))
    names = [name for name in rows[0] if name not in ("disease", "threshold", "dice_low", "dice_high")]
    mean = {name: float(mean_over_defined(np.array([row[name] for row in rows], dtype=np.float64))) for name in names}
    low, high = percentile_interval(mean_over_defined(np.stack(resampled, axis=-1)))
    mean |= {"dice_low": float(low), "dice_high": float(high)}
    return LocalizationReport(tuple(diseases), tuple(rows), mean, curves, len(patient_of), num_resamples)


def _row(
    disease: str, threshold: float, cases: Sequence[CaseEvaluation], drawn: np.ndarray, curve: FrocCurve | None
) -> dict[str, Any]:
    of_status = {
        status: [case for case in cases if case.status == status]
        for status in ("positive", "negative", "partial", "unknown")
    }
    positive, negative = of_status["positive"], of_status["negative"]
    matches = pool_lesion_matches(case.matches for case in cases)
    distances = np.array([case.hausdorff_95_mm for case in positive])
    false_positives = np.array([case.matches.num_false_positives for case in negative])
    low, high = percentile_interval(drawn)
    row: dict[str, Any] = {"disease": disease, "threshold": float(threshold)}
    row |= {f"{status}_scans": len(those) for status, those in of_status.items()}
    row |= {
        "lesions": len(matches.found),
        "dice": _mean(case.dice for case in positive),
        "dice_low": float(low),
        "dice_high": float(high),
        "surface_dice": _mean(case.surface_dice for case in positive),
        "hausdorff_95_mm": math.nan if np.isnan(distances).all() else float(np.nanmedian(distances)),
        "hausdorff_95_undefined": int(np.isnan(distances).sum()),
        "sensitivity": matches.sensitivity,
        "precision": matches.precision,
    }
    sensitivity, precision = matches.sensitivity_by_size(), matches.precision_by_size()
    lesion_dice = _mean_by_size(positive, lambda case: case.lesion_dice)
    ceiling = _mean_by_size(positive, lambda case: case.ceiling_lesion_dice)
    for name in SIZE_BINS:
        row |= {
            f"lesions_{name}": sum(size_bin(voxels) == name for voxels in matches.lesion_voxels),
            f"lesion_dice_{name}": lesion_dice[name],
            f"sensitivity_{name}": sensitivity[name],
            f"precision_{name}": precision[name],
            f"ceiling_{name}": ceiling[name],
        }
    row["false_positives_per_negative_scan"] = _mean(false_positives)
    row["negative_scans_with_false_positives"] = _mean(false_positives > 0)
    reached = curve.sensitivity_at(FROC_FALSE_POSITIVES) if curve else (math.nan,) * len(FROC_FALSE_POSITIVES)
    row |= {f"froc_{limit:g}": value for limit, value in zip(FROC_FALSE_POSITIVES, reached, strict=True)}
    row["ceiling_dice"] = _mean(case.ceiling_dice for case in positive)
    row["baseline_dice"] = _mean(case.baseline_dice for case in positive)
    return row


def _froc(cases: Sequence[CaseEvaluation]) -> FrocCurve | None:
    judged = [case.candidates for case in cases if case.candidates is not None]
    if not judged:
        return None
    pooled = pool_candidates(judged)
    return froc(pooled.scores, pooled.is_true, pooled.lesion_best_score, len(judged))


def _mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are defined, NaN without any."""
    return float(mean_over_defined(np.array([float(value) for value in values])))


def _mean_by_size(
    cases: Sequence[CaseEvaluation], lesion_values: Callable[[CaseEvaluation], Sequence[float]]
) -> dict[str, float]:
    of_bin: dict[str, list[float]] = {name: [] for name in SIZE_BINS}
    for case in cases:
        # Where the prepared mask was not there to be measured, there are no values.
        if values := lesion_values(case):
            for voxels, value in zip(case.matches.lesion_voxels, values, strict=True):
                of_bin[size_bin(voxels)].append(value)
    return {name: _mean(values) for name, values in of_bin.items()}


def _resampled_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (R,) weighted means of the values (N,) that are defined; NaN where a resample has none."""
    defined = ~np.isnan(values)
    total = weights[:, defined].sum(axis=1)
    sums = weights[:, defined] @ values[defined]
    return np.divide(sums, total, out=np.full(len(weights), np.nan), where=total > 0)


def format_localization(report: LocalizationReport) -> str:
    """Return the report as text, at most 120 columns wide: drawing, finding, and sizes, one line for each disease."""
    width = max(len("mean"), *(len(disease) for disease in report.diseases)) + 1
    rows: list[Mapping[str, Any]] = [*report.per_disease, {"disease": "mean", **report.mean}]
    lines = [
        f"{report.num_scans} scans, on their own grids; a disease's scans: with lesions / without / partial / unknown",
        f"{'drawing':{width}}{'scans':>17}{'Dice':>7}{'95 % interval':>17}{'ceiling':>9}{'blind':>7}"
        f"{'NSD 2 mm':>10}{'HD95 mm':>9}{'undef.':>8}",
    ]
    for row in rows:
        is_mean = row["disease"] == "mean"
        states = "/".join(str(row[f"{state}_scans"]) for state in ("positive", "negative", "partial", "unknown"))
        interval = "" if math.isnan(row["dice_low"]) else f"[{row['dice_low']:.3f}, {row['dice_high']:.3f}]"
        lines.append(
            f"{row['disease']:{width}}{'' if is_mean else states:>17}{_number(row['dice']):>7}{interval:>17}"
            f"{_number(row['ceiling_dice']):>9}{_number(row['baseline_dice']):>7}{_number(row['surface_dice']):>10}"
            f"{_number(row['hausdorff_95_mm'], 1):>9}{'' if is_mean else row['hausdorff_95_undefined']:>8}"
        )
    limits = "".join(f"{f'@{limit:g}':>7}" for limit in FROC_FALSE_POSITIVES)
    lines.append("")
    lines.append(
        f"{'finding':{width}}{'lesions':>9}{'sensitivity':>13}{'precision':>11}{'FP/negative':>13}{'with any':>10}"
        f"   FROC{limits}"
    )
    for row in rows:
        reached = "".join(f"{_number(row[f'froc_{limit:g}']):>7}" for limit in FROC_FALSE_POSITIVES)
        lines.append(
            f"{row['disease']:{width}}{'' if row['disease'] == 'mean' else row['lesions']:>9}"
            f"{_number(row['sensitivity']):>13}{_number(row['precision']):>11}"
            f"{_number(row['false_positives_per_negative_scan'], 2):>13}"
            f"{_number(row['negative_scans_with_false_positives']):>10}       {reached}"
        )
    lines.append("")
    bounds = {"small": "small < 10 voxels", "medium": "medium 10-1000", "large": "large > 1000"}
    lines.append(f"{'':{width}}" + "".join(f"{bounds[name]:^32}" for name in SIZE_BINS))
    lines.append(f"{'by size':{width}}" + f"{'lesions':>9}{'Dice':>7}{'found':>7}{'ceiling':>9}" * len(SIZE_BINS))
    for row in rows:
        cells = [
            f"{'' if row['disease'] == 'mean' else row[f'lesions_{name}']:>9}{_number(row[f'lesion_dice_{name}']):>7}"
            f"{_number(row[f'sensitivity_{name}']):>7}{_number(row[f'ceiling_{name}']):>9}"
            for name in SIZE_BINS
        ]
        lines.append(f"{row['disease']:{width}}{''.join(cells)}")
    return "\n".join(line.rstrip() for line in lines)


def _number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
