"""Pictures of a localization's evaluation: FROC curves, and Dice against the size of lesions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..metrics.lesion_components import SIZE_BINS
from .localization_case import CaseEvaluation
from .localization_evaluation import FROC_FALSE_POSITIVES, LocalizationReport
from .localization_montage import DISEASE_COLOURS
from .png_figures import as_png, new_figure

__all__ = ["draw_dice_by_size", "draw_froc"]

_PANEL_INCHES = 2.6


def draw_froc(report: LocalizationReport) -> bytes:
    """Return a PNG with the FROC curve of each disease that has lesions; dotted lines where the challenge reads it.

    Args:
        report: with the curves.
    """
    figure = new_figure(5.6, 4.2)
    axes = figure.subplots()
    for limit in FROC_FALSE_POSITIVES:
        axes.axvline(limit, color="0.8", linewidth=0.8, linestyle=":")
    for number, disease in enumerate(report.diseases):
        curve = report.curves[disease]
        if curve is None or not curve.num_lesions:
            axes.plot([], [], color=_colour(number), label=f"{disease}: undefined, no lesions")
            continue
        # From the right end of its curve on, more false positives cannot be had, and nothing more is found.
        false_positives = [0.0, *curve.false_positives_per_scan, max(4.5, *curve.false_positives_per_scan, 0.0)]
        reached = curve.sensitivity[-1] if len(curve.sensitivity) else 0.0
        axes.step(
            false_positives,
            [0.0, *curve.sensitivity, reached],
            where="post",
            color=_colour(number),
            linewidth=1.5,
            label=f"{disease} ({curve.num_lesions} lesions, {curve.num_scans} scans)",
        )
    axes.set(xlim=(0, 4.5), ylim=(-0.02, 1.02), xlabel="false positives per scan", ylabel="sensitivity of lesions")
    axes.set_title("FROC", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return as_png(figure)


def draw_dice_by_size(report: LocalizationReport, cases: Sequence[CaseEvaluation]) -> bytes:
    """Return a PNG with the Dice of each true lesion against its size, one panel for each disease.

    Open grey circles are the ceiling, what the prepared true mask scores; dotted lines separate the bins of size.

    Args:
        report: of the same cases.
        cases: evaluated.
    """
    number_of = len(report.diseases)
    num_columns = min(3, number_of)
    num_rows = -(-number_of // num_columns)
    figure = new_figure(_PANEL_INCHES * num_columns + 0.4, _PANEL_INCHES * num_rows + 0.5)
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
    for number, axes in enumerate(panels):
        if number >= number_of:
            axes.set_visible(False)
            continue
        disease = report.diseases[number]
        positive = [case for case in cases if case.disease == disease and case.status == "positive"]
        voxels = np.array([size for case in positive for size in case.matches.lesion_voxels])
        dice = np.array([value for case in positive for value in case.lesion_dice])
        axes.set_title(f"{disease}, {len(voxels)} lesions", fontsize=8)
        axes.set(xscale="log", ylim=(-0.04, 1.04))
        axes.tick_params(labelsize=7)
        for least, _ in list(SIZE_BINS.values())[1:]:
            axes.axvline(least, color="0.7", linewidth=0.8, linestyle=":")
        if not len(voxels):
            axes.text(0.5, 0.5, "no lesions", transform=axes.transAxes, ha="center", fontsize=8, color="0.35")
            axes.set_facecolor("0.95")
            continue
        measured = [case for case in positive if case.ceiling_lesion_dice]
        sizes = [size for case in measured for size in case.matches.lesion_voxels]
        ceilings = [value for case in measured for value in case.ceiling_lesion_dice]
        axes.scatter(sizes, ceilings, s=14, facecolors="none", edgecolors="0.6", linewidths=0.7)
        axes.scatter(voxels, dice, s=14, color=_colour(number), edgecolors="0.25", linewidths=0.3)
    figure.supxlabel("voxels of the lesion, on the scan's own grid", fontsize=9)
    figure.supylabel("Dice of the lesion", fontsize=9)
    return as_png(figure)


def _colour(number: int) -> str:
    return DISEASE_COLOURS[number % len(DISEASE_COLOURS)]
