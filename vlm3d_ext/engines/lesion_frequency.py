"""The trivial baseline of drawing: how often each voxel of the prepared grid is lesion, whatever the scan shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.scan_reader import read_mask
from ..text.disease_set import DiseaseSet, load_disease_set

__all__ = ["LesionFrequency", "lesion_frequency"]

# A little below round shares, such as the half of two masks: interpolation must not decide whether those are drawn.
_THRESHOLDS = np.linspace(0.05, 0.95, 19) - 0.001


class LesionFrequency(NamedTuple):
    """Of L diseases.

    Attributes:
        frequency: (L, D, H, W) float32 in [0, 1], share of the scans with the disease in which a voxel is lesion; None
            where prepared grids differ in size, so that there is no voxel-wise average, or no case has a lesion.
        thresholds: (L,), from which share on it is drawn; None as well.
    """

    frequency: np.ndarray | None
    thresholds: np.ndarray | None


def lesion_frequency(
    cases: Sequence[Mapping[str, Any]], disease_set: DiseaseSet | str = "chest_ct_5", max_masks: int = 200
) -> LesionFrequency:
    """Average the training masks of each disease, and find the cut that fits those masks best (mean Dice).

    Args:
        cases: training cases with ``lesion_masks``, paths on the prepared grid. Empty masks are left out, and so are
            those of partial annotations, which do not say where there is no lesion.
        disease_set: the order of the diseases.
        max_masks: masks of a disease that are enough, taken evenly over the cases; they are held in memory.

    Returns:
        The frequencies; a disease without masks has zero everywhere and threshold 1.

    Raises:
        UnusableScanError: if a mask cannot be read.
    """
    diseases = load_disease_set(disease_set)
    masks = {}
    for key in diseases.keys:
        paths = [case["lesion_masks"][key] for case in cases if _shows_lesions(case, key)]
        chosen = np.unique(np.linspace(0, len(paths) - 1, min(max_masks, len(paths))).astype(int))
        found = [read_mask(paths[index])[0] > 0 for index in chosen]
        masks[key] = [mask for mask in found if mask.any()]
    shapes = {mask.shape for group in masks.values() for mask in group}
    if len(shapes) != 1:
        return LesionFrequency(None, None)
    shape = shapes.pop()
    frequency = np.zeros((diseases.num_diseases, *shape), dtype=np.float32)
    thresholds = np.ones(diseases.num_diseases)
    for index, key in enumerate(diseases.keys):
        if masks[key]:
            stack = np.stack(masks[key])
            frequency[index] = stack.mean(0)
            thresholds[index] = max(_THRESHOLDS, key=lambda cut: _mean_dice(stack, frequency[index] >= cut))
    return LesionFrequency(frequency, thresholds)


def _shows_lesions(case: Mapping[str, Any], key: str) -> bool:
    left_out = (*case.get("lesion_masks_empty", ()), *case.get("lesion_masks_partial", ()))
    return key in case["lesion_masks"] and key not in left_out


def _mean_dice(masks: np.ndarray, drawn: np.ndarray) -> float:
    overlap = (masks & drawn).sum((1, 2, 3))
    return float((2 * overlap / (masks.sum((1, 2, 3)) + drawn.sum())).mean())
