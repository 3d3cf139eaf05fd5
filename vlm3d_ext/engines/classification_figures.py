"""Pictures of a classification: ROC and precision-recall curves for each label, and a reliability diagram."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np

from ..metrics.calibration_error import per_label_calibration_error, reliability_curve
from ..metrics.label_arrays import checked_labels, checked_probabilities, mean_over_defined
from .classification_evaluation import ClassificationReport
from .png_figures import as_png, new_figure

__all__ = ["draw_precision_recall_curves", "draw_reliability", "draw_roc_curves"]

_PANEL_SIZE = 2.1  # inches
_TITLE_WIDTH = 26  # characters that fit over a panel


def draw_roc_curves(report: ClassificationReport, probabilities: np.ndarray, labels: np.ndarray) -> bytes:
    """Return a PNG with the ROC curve of each label; a label without one says why.

    Args:
        report: of the same arrays.
        probabilities: (N, L).
        labels: (N, L) of 1, 0 or NaN.
    """
    from sklearn.metrics import roc_curve

    def draw(axes: Any, row: dict[str, Any], truth: np.ndarray, scores: np.ndarray) -> bool:
        if row["undefined"]:
            return False
        false_positive_rate, sensitivity, _ = roc_curve(truth, scores, drop_intermediate=True)
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
        axes.plot(false_positive_rate, sensitivity, linewidth=1.4)
        _note(axes, f"AUROC {row['auroc']:.3f}\n[{row['auroc_low']:.3f}, {row['auroc_high']:.3f}]")
        return True

    return _draw_panels(report, probabilities, labels, "1 - specificity", "sensitivity", draw)


def draw_precision_recall_curves(report: ClassificationReport, probabilities: np.ndarray, labels: np.ndarray) -> bytes:
    """Return a PNG with the precision-recall curve of each label; the dotted line is its prevalence.

    Args:
        report: of the same arrays.
        probabilities: (N, L).
        labels: (N, L) of 1, 0 or NaN.
    """
    from sklearn.metrics import precision_recall_curve

    def draw(axes: Any, row: dict[str, Any], truth: np.ndarray, scores: np.ndarray) -> bool:
        if row["undefined"]:
            return False
        precision, recall, _ = precision_recall_curve(truth, scores)
        prevalence = truth.mean()
        axes.axhline(prevalence, color="0.6", linewidth=0.8, linestyle=":")
        axes.plot(recall, precision, linewidth=1.4, drawstyle="steps-post")
        text = f"AP {row['average_precision']:.3f}\nprevalence {prevalence:.3f}"
        _note(axes, text, top=row["average_precision"] < 0.6)  # where the curve leaves room
        return True

    return _draw_panels(report, probabilities, labels, "recall", "precision", draw)


def draw_reliability(
    probabilities: np.ndarray, labels: np.ndarray, uncalibrated_probabilities: np.ndarray | None = None
) -> bytes:
    """Return a PNG that sets mean probabilities against shares of positives, all labels together, and counts below.

    Args:
        probabilities: (N, L), calibrated.
        labels: (N, L) of 1, 0 or NaN.
        uncalibrated_probabilities: (N, L), drawn beside them where given.
    """
    figure = new_figure(4.6, 5.4)
    axes, counts_axes = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
    curves = [("calibrated", probabilities)] if uncalibrated_probabilities is not None else [("", probabilities)]
    if uncalibrated_probabilities is not None:
        curves.insert(0, ("before calibration", uncalibrated_probabilities))
    for title, values in curves:
        mean, share, count = reliability_curve(labels, values)
        error = float(mean_over_defined(per_label_calibration_error(labels, values)))
        text = f"{title}, macro ECE" if title else "macro ECE"
        axes.plot(mean, share, marker="o", markersize=4, linewidth=1.2, label=f"{text} {error:.3f}")
        counts_axes.plot(mean, count, marker="o", markersize=3, linewidth=1.0)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share of positives", title="Reliability, all labels")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    counts_axes.set(xlabel="mean probability of a bin", ylabel="entries")
    counts_axes.set_ylim(bottom=0)
    return as_png(figure)


def _draw_panels(
    report: ClassificationReport,
    probabilities: np.ndarray,
    labels: np.ndarray,
    x_label: str,
    y_label: str,
    draw: Callable[[Any, dict[str, Any], np.ndarray, np.ndarray], bool],
) -> bytes:
    labels = checked_labels(labels)
    probabilities = checked_probabilities(labels, probabilities)
    num_columns = min(6, max(1, math.ceil(math.sqrt(1.8 * len(report.per_label)))))
    num_rows = math.ceil(len(report.per_label) / num_columns)
    figure = new_figure(_PANEL_SIZE * num_columns + 0.4, (_PANEL_SIZE + 0.25) * num_rows + 0.4)
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
    for column, axes in enumerate(panels):
        if column >= len(report.per_label):
            axes.set_visible(False)
            continue
        row = report.per_label[column]
        known = ~np.isnan(labels[:, column])
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.tick_params(labelsize=7)
        axes.set_title(textwrap.fill(row["label"], _TITLE_WIDTH), fontsize=8)
        if not draw(axes, row, labels[known, column], probabilities[known, column]):
            reason = f"undefined:\n{row['undefined']}"
            axes.text(0.5, 0.5, reason, ha="center", va="center", fontsize=8, color="0.35")
            axes.set_facecolor("0.95")
    figure.supxlabel(x_label, fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    return as_png(figure)


def _note(axes: Any, text: str, top: bool = False) -> None:
    place = (0.97, 0.97, "top") if top else (0.97, 0.04, "bottom")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.0}
    axes.text(place[0], place[1], text, va=place[2], ha="right", fontsize=7, bbox=box, transform=axes.transAxes)
