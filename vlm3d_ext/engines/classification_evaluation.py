"""How well a classifier finds what it should, label by label and on average, beside predictors that do not look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics.calibration import rescale_to_half
from ..metrics.calibration_error import per_label_brier, per_label_calibration_error
from ..metrics.case_resampling import percentile_interval, resampling_weights
from ..metrics.crg import crg_from_counts
from ..metrics.decisions import count_decisions, decide
from ..metrics.label_arrays import checked_labels, checked_probabilities, mean_over_defined
from ..metrics.ranking import weighted_auroc_and_average_precision

__all__ = ["FIGURES", "ClassificationReport", "baseline_figures", "evaluate_classification", "format_classification"]

FIGURES = (
    "auroc",
    "average_precision",
    "f1",
    "precision",
    "recall",
    "specificity",
    "accuracy",
    "expected_calibration_error",
    "brier",
)
_WITH_INTERVAL = ("auroc", "average_precision", "f1")  # of one label; the means have an interval for each figure
_CHALLENGE_FIGURES = ("auroc", "f1", "precision", "recall", "accuracy", "crg")
_NUM_RANDOM_DRAWS = 20


@dataclass(frozen=True)
class ClassificationReport:
    """Figures of a classifier on one split. A figure that is undefined is NaN.

    Args:
        label_names: in order.
        per_label: one row for each label: "label", "positives", "negatives", "unknown", "undefined" ("" or why some
            figures are: "no positives", "no negatives", "no known labels"), the `FIGURES`, "auroc_low", "auroc_high"
            and so on for AUROC, average precision and F1, and "threshold".
        macro: mean of each of the `FIGURES` over the labels where it is defined, and "crg", pooled over labels; each
            also with "_low" and "_high", which are NaN for the calibration error: chance differences add to it, so
            that resamples lie above the figure, and their percentiles do not enclose it.
        challenge: figures at the challenge's fixed threshold of 0.5: "as_given" of the probabilities as they are,
            "rescaled" after each label's threshold was moved to 0.5.
        baselines: "random", "all_negative", "all_positive", "prevalence" -> the same figures as `macro`, without
            intervals; see `baseline_figures`.
        num_cases: cases evaluated.
        num_resamples: bootstrap resamples behind the 95 % intervals.
    """

    label_names: tuple[str, ...]
    per_label: tuple[dict[str, Any], ...]
    macro: dict[str, float]
    challenge: dict[str, dict[str, float]]
    baselines: dict[str, dict[str, float]]
    num_cases: int
    num_resamples: int


def evaluate_classification(
    probabilities: np.ndarray,
    labels: np.ndarray,
    label_names: Sequence[str],
    thresholds: np.ndarray,
    training_prevalence: np.ndarray | None,
    num_resamples: int = 200,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> ClassificationReport:
    """Measure probabilities against labels, with bootstrap intervals and baselines.

    Args:
        probabilities: (N, L) in [0, 1], calibrated or not.
        labels: (N, L) of 1, 0 or NaN; NaN takes no part.
        label_names: (L,).
        thresholds: (L,) in (0, 1), chosen on validation data.
        training_prevalence: (L,), share of positives among the known training labels (NaN: none is known); None
            leaves the prevalence baseline out.
        num_resamples: bootstrap resamples; 0 leaves the intervals undefined.
        seed: of the resampling and of the random baseline.
        groups: (N,), for instance patient ids, to resample whole patients; None resamples cases.

    Raises:
        ValueError: if there is no case, or the arrays do not fit each other.
    """
    labels = checked_labels(labels)
    if not len(labels):
        raise ValueError("there is no case to evaluate; expected at least one row of labels.")
    probabilities = checked_probabilities(labels, probabilities)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    names = tuple(label_names)
    if thresholds.shape != (labels.shape[1],) or len(names) != labels.shape[1]:
        raise ValueError(
            f"{labels.shape[1]} labels need as many names and thresholds, got {len(names)} and {thresholds.shape}."
        )
    point = _figures(probabilities, labels, thresholds, np.ones((1, len(labels))))
    drawn = _figures(probabilities, labels, thresholds, resampling_weights(len(labels), num_resamples, seed, groups))
    intervals = {name: percentile_interval(drawn[name]) for name in _WITH_INTERVAL}
    rows = []
    for column, name in enumerate(names):
        of_label = labels[:, column]
        row: dict[str, Any] = {
            "label": name,
            "positives": int((of_label == 1).sum()),
            "negatives": int((of_label == 0).sum()),
            "unknown": int(np.isnan(of_label).sum()),
        }
        row["undefined"] = _why_undefined(row["positives"], row["negatives"])
        for figure in FIGURES:
            row[figure] = float(point[figure][0, column])
            if figure in intervals:
                row[f"{figure}_low"], row[f"{figure}_high"] = (float(end[column]) for end in intervals[figure])
        row["threshold"] = float(thresholds[column])
        rows.append(row)
    macro: dict[str, float] = {}
    drawn_means = _macro(drawn)
    del drawn_means["expected_calibration_error"]
    for figure, value in _macro(point).items():
        low, high = percentile_interval(drawn_means[figure]) if figure in drawn_means else (math.nan, math.nan)
        macro |= {figure: float(value[0]), f"{figure}_low": float(low), f"{figure}_high": float(high)}
    rescaled = rescale_to_half(probabilities, thresholds)
    at_half = {"as_given": _single_macro(probabilities, labels, 0.5), "rescaled": _single_macro(rescaled, labels, 0.5)}
    challenge = {name: {figure: all_[figure] for figure in _CHALLENGE_FIGURES} for name, all_ in at_half.items()}
    return ClassificationReport(
        names,
        tuple(rows),
        macro,
        challenge,
        baseline_figures(labels, training_prevalence, seed),
        len(labels),
        num_resamples,
    )


def baseline_figures(
    labels: np.ndarray, training_prevalence: np.ndarray | None = None, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return the mean figures and the CRG of predictors that do not look at the image.

    - random: uniform probabilities, decided at 0.5; the mean of 20 draws.
    - all_negative, all_positive: probability 0 or 1 for everything.
    - prevalence: each label's training prevalence as its probability in all cases, which is the best calibrated blind
      guess. It decides for the labels that are commoner in training than labels are on average, because that is the
      blind rule with the best pooled CRG (see `vlm3d_ext.metrics.crg_score`); a label without known training cases
      gets the average.

    Args:
        labels: (N, L) of 1, 0 or NaN.
        training_prevalence: (L,); None leaves out "prevalence".
        seed: of the random draws.

    Raises:
        ValueError: if the prevalence is not (L,) in [0, 1] or NaN.
    """
    labels = checked_labels(labels)
    generator = np.random.default_rng(seed)
    draws = [_single_macro(generator.random(labels.shape), labels, 0.5) for _ in range(_NUM_RANDOM_DRAWS)]
    figures = {
        "random": {name: float(mean_over_defined(np.array([draw[name] for draw in draws]))) for name in draws[0]},
        "all_negative": _single_macro(np.zeros(labels.shape), labels, 0.5),
        "all_positive": _single_macro(np.ones(labels.shape), labels, 0.5),
    }
    if training_prevalence is not None:
        prevalence = np.asarray(training_prevalence, dtype=np.float64)
        if prevalence.shape != labels.shape[1:] or ((prevalence < 0) | (prevalence > 1)).any():
            raise ValueError(f"training_prevalence must be ({labels.shape[1]},) in [0, 1], got {prevalence.tolist()}.")
        average = mean_over_defined(prevalence)
        guess = np.nan_to_num(np.where(np.isnan(prevalence), average, prevalence))
        figures["prevalence"] = _single_macro(np.tile(guess, (len(labels), 1)), labels, float(np.nan_to_num(average)))
    return figures


def _figures(
    probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray | float, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Return each of the `FIGURES`, (R, L), and "crg", (R,)."""
    auroc, average_precision = weighted_auroc_and_average_precision(labels, probabilities, weights)
    counts = count_decisions(labels, decide(probabilities, thresholds), weights)
    return {
        "auroc": auroc,
        "average_precision": average_precision,
        "f1": counts.f1,
        "precision": counts.precision,
        "recall": counts.recall,
        "specificity": counts.specificity,
        "accuracy": counts.accuracy,
        "expected_calibration_error": per_label_calibration_error(labels, probabilities, case_weights=weights),
        "brier": per_label_brier(labels, probabilities, weights),
        "crg": crg_from_counts(counts),
    }


def _macro(figures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values if name == "crg" else mean_over_defined(values) for name, values in figures.items()}


def _single_macro(probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray | float) -> dict[str, float]:
    figures = _figures(probabilities, labels, thresholds, np.ones((1, len(labels))))
    return {name: float(value[0]) for name, value in _macro(figures).items()}


def _why_undefined(positives: int, negatives: int) -> str:
    if not positives and not negatives:
        return "no known labels"
    return "no positives" if not positives else "no negatives" if not negatives else ""


def format_classification(report: ClassificationReport) -> str:
    """Return the report as text: means beside baselines, the challenge's figures if they differ, one line a label."""
    columns = ["classifier", *(name.replace("_", " ") for name in report.baselines)]
    width = max(len("expected calibration error"), *(len(name) for name in report.label_names)) + 2
    lines = [f"{report.num_cases} cases; macro means over the labels where a figure is defined, CRG pooled"]
    lines.append(" " * width + "".join(f"{name:>13}" for name in columns) + "   95 % interval")
    for figure in (*FIGURES, "crg"):
        values = [report.macro[figure], *(baseline[figure] for baseline in report.baselines.values())]
        interval = _interval(report.macro[f"{figure}_low"], report.macro[f"{figure}_high"])
        lines.append(f"{_title(figure):{width}}" + "".join(f"{_number(value):>13}" for value in values) + interval)
    lines.append("")
    if any(row["threshold"] != 0.5 for row in report.per_label):
        titles = "".join(f"{_title(figure):>11}" for figure in _CHALLENGE_FIGURES)
        lines.append(f"{'at the fixed threshold 0.5':{width}}{titles}")
        for name, figures in report.challenge.items():
            cells = "".join(f"{_number(figures[figure]):>11}" for figure in _CHALLENGE_FIGURES)
            lines.append(f"{name.replace('_', ' '):{width}}{cells}")
        lines.append("")
    lines.append(f"{'label':{width}}{'pos':>6}{'neg':>6}{'AUROC':>9}{'':17}{'AP':>9}{'F1':>9}{'threshold':>11}")
    for row in report.per_label:
        start = f"{row['label']:{width}}{row['positives']:>6}{row['negatives']:>6}"
        if row["undefined"]:
            lines.append(f"{start}  undefined: {row['undefined']}")
            continue
        interval = f"{_interval(row['auroc_low'], row['auroc_high']):17}"
        rest = f"{_number(row['average_precision']):>9}{_number(row['f1']):>9}{row['threshold']:>11.3f}"
        lines.append(f"{start}{_number(row['auroc']):>9}{interval}{rest}")
    return "\n".join(lines)


def _title(figure: str) -> str:
    short = {"auroc": "AUROC", "f1": "F1", "crg": "CRG", "brier": "Brier score"}
    return short.get(figure, figure.replace("_", " "))


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"   [{low:.3f}, {high:.3f}]"
