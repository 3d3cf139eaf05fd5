"""What one scan's prediction of one disease is worth, on the scan's own grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.connected_components import foreground_box, label_lesions, without_faint_lesions
from ..data.prepared_case import PreparedCaseError, read_sidecar
from ..data.scan_reader import UnusableScanError, read_mask
from ..data.volume_geometry import VolumeGeometry
from ..data.volume_resampling import restore_mask, restore_probabilities
from ..metrics.froc import FrocCandidates, candidates_of
from ..metrics.lesion_detection import LesionMatches, match_lesions
from ..metrics.lesion_dice import dice_by_lesion
from ..metrics.mask_overlap import dice_score
from ..metrics.surface_distances import surface_distances

__all__ = ["CaseEvaluation", "DiseaseTruth", "ScanGrids", "evaluate_case", "read_grids", "read_truth"]

NSD_TOLERANCE_MM = 2.0
NO_MATCHES = LesionMatches((), (), (), ())
_SAME_GRID_MM = 0.05
_FAINTEST_CANDIDATE = 0.1
_FLOOR = 0.02
_ROUNDING = 1e-4


@dataclass(frozen=True)
class ScanGrids:
    """Where a case's voxels lie.

    Args:
        prepared: the grid of the network's output.
        source: the scan's own grid, as stored.
    """

    prepared: VolumeGeometry
    source: VolumeGeometry

    def restore(self, probabilities: np.ndarray, threshold: float, presence_threshold: float = 0.0) -> np.ndarray:
        """Return probabilities (D, H, W) on the scan's stored grid, exact where they matter for a threshold.

        Lesions that nowhere reach the presence threshold are taken below the threshold first, on the prepared grid:
        interpolation lowers the peaks of small ones. What is interpolated are odds relative to those of the threshold,
        as shares of one, so that a contour between a voxel of 1 and one of 0 lies half way, whatever the threshold; at
        a threshold of 0.9, probabilities themselves would shave nearly half a voxel off every surface.

        A batch of scans of several sizes is filled up at the ends of the axes; what lies beyond the prepared grid is
        cut off.

        Raises:
            ValueError: if the array is smaller than the prepared grid.
        """
        inside = probabilities[tuple(slice(0, size) for size in self.prepared.shape)]
        inside = without_faint_lesions(inside, threshold, presence_threshold)
        scale = (1 - threshold) / threshold if 0 < threshold < 1 else 1.0
        # What lies below the floor may be taken as 0, so the floor must lie below one half, where the threshold is now.
        relative = restore_probabilities(_scale_odds(inside, scale), self.prepared, self.source, floor=_FLOOR)
        restored = _scale_odds(relative, 1 / scale)
        # Rounding must not decide on which side of the threshold a voxel half way between two lies: it is inside, as in
        # masks that are brought back (`restore_mask`).
        below = np.minimum(restored, np.nextafter(np.float32(threshold), np.float32(0)))
        return np.where(relative >= 0.5 - _ROUNDING, np.maximum(restored, np.float32(threshold)), below)


def _scale_odds(probabilities: np.ndarray, scale: float) -> np.ndarray:
    """Return the probabilities whose odds are `scale` times as large."""
    scaled = probabilities * np.asarray(scale, dtype=probabilities.dtype)
    return scaled / (scaled + (1 - probabilities))


@dataclass(frozen=True, eq=False)
class DiseaseTruth:
    """What is known of one disease in one scan.

    Args:
        status: "positive" (a whole annotation with lesions), "negative" (known to be absent), "partial" (some lesions
            are annotated, others may not be), "unknown".
        mask: (D, H, W) bool on the scan's stored grid; None where no voxel is annotated.
        prepared_mask: (D, H, W) uint8, what preparation made of the mask; None where there is none.
    """

    status: str
    mask: np.ndarray | None = None
    prepared_mask: np.ndarray | None = None


@dataclass(frozen=True)
class CaseEvaluation:
    """One disease in one scan. What is not defined, or may not be judged, is NaN or empty; see `evaluate_case`.

    Args:
        volume_id: the scan's.
        patient_id: whose scan it is.
        disease: key.
        status: as in `DiseaseTruth`.
        dice: of the masks, 0 to 1.
        surface_dice: normalised surface Dice at 2 mm, 0 to 1.
        hausdorff_95_mm: NaN also where nothing was predicted.
        num_true_voxels: of the annotated lesions.
        num_predicted_voxels: of the prediction.
        matches: which lesions were found and which predicted ones are true; those predicted beside a partial
            annotation are left out.
        lesion_dice: of each true lesion; see `vlm3d_ext.metrics.lesion_dice.dice_by_lesion`.
        candidates: for the FROC; None where it may not be judged.
        ceiling_dice: of the prepared true mask, brought back: what a perfect network would reach at this resolution.
        ceiling_lesion_dice: the same of each true lesion.
        baseline_dice: of masks that do not look at the scan, where they were given.
    """

    volume_id: str
    patient_id: str
    disease: str
    status: str
    dice: float = math.nan
    surface_dice: float = math.nan
    hausdorff_95_mm: float = math.nan
    num_true_voxels: int = 0
    num_predicted_voxels: int = 0
    matches: LesionMatches = NO_MATCHES
    lesion_dice: tuple[float, ...] = ()
    candidates: FrocCandidates | None = None
    ceiling_dice: float = math.nan
    ceiling_lesion_dice: tuple[float, ...] = ()
    baseline_dice: float = math.nan


def read_grids(geometry_path: str) -> ScanGrids:
    """Read the grids of a case from its sidecar.

    Raises:
        PreparedCaseError: if the sidecar is not readable, or the case is one of several windows of its scan: its
            prediction says nothing of the rest of the scan, which would be counted as missed.
    """
    content = read_sidecar(geometry_path)
    num_windows = content.get("depth_window", {}).get("count", 1)
    if num_windows != 1:
        raise PreparedCaseError(
            f"{geometry_path}: is one of {num_windows} windows of its scan, expected the whole scan in one case; "
            'prepare it with the depth policy "resample" to draw lesions on the scan\'s own grid.'
        )
    try:
        return ScanGrids(
            VolumeGeometry.from_dict(content["prepared_geometry"]), VolumeGeometry.from_dict(content["source_geometry"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PreparedCaseError(
            f"{geometry_path}: lacks a prepared or source grid ({error}); prepare the scan again."
        ) from None


def read_truth(case: Mapping[str, Any], disease: str, label: float, grids: ScanGrids) -> DiseaseTruth:
    """Read what is known of a disease in a case of the manifest.

    Without a mask, label 0 means that there is no lesion, and anything else that nothing is known. An empty mask says
    that there is none, unless the label says that there is one, or the annotation is partial.

    Args:
        case: with "lesion_masks", and "lesion_masks_original_grid", "lesion_masks_partial" where the manifest has them.
        disease: key.
        label: 1, 0 or NaN.
        grids: of the case.

    Raises:
        UnusableScanError: if a mask is not readable, or lies on another grid than it should.
    """
    if disease not in case.get("lesion_masks", {}):
        return DiseaseTruth("negative" if label == 0 else "unknown")
    path = case.get("lesion_masks_original_grid", {}).get(disease)
    if path is None:
        raise UnusableScanError(
            f"{case['geometry']}: the case has a mask of {disease} on the prepared grid only, expected one on the "
            "scan's own grid (lesion_masks_original_grid); prepare it again with this version."
        )
    canonical = _mask_on(path, grids.source.canonical())
    partial = disease in case.get("lesion_masks_partial", ())
    if not canonical.any():
        return DiseaseTruth("negative" if label == 0 or (label != 1 and not partial) else "unknown")
    mask = np.ascontiguousarray(grids.source.from_canonical(canonical))
    prepared = _mask_on(case["lesion_masks"][disease], grids.prepared).astype(np.uint8)
    return DiseaseTruth("partial" if partial else "positive", mask, prepared)


def _mask_on(path: str, geometry: VolumeGeometry) -> np.ndarray:
    labels, found = read_mask(path)
    if not found.is_close(geometry, _SAME_GRID_MM):
        raise UnusableScanError(
            f"{path}: lies on a grid of {found.shape} at {np.round(found.affine_lps[:3, 3], 2).tolist()} mm, expected "
            f"{geometry.shape} at {np.round(geometry.affine_lps[:3, 3], 2).tolist()} mm; prepare the case again."
        )
    return labels > 0


def evaluate_case(
    volume_id: str,
    patient_id: str,
    disease: str,
    truth: DiseaseTruth,
    probabilities: np.ndarray,
    threshold: float,
    grids: ScanGrids,
    baseline: np.ndarray | None = None,
) -> CaseEvaluation:
    """Measure one disease's probabilities in one scan.

    - positive: everything.
    - negative: predicted lesions are false positives; there is nothing to overlap.
    - partial: only whether the annotated lesions were found, since a prediction elsewhere may be right.
    - unknown: nothing.

    The candidates for the FROC are the predicted lesions, each with its largest probability, and fainter ones:
    connected parts from probability 0.1 on that reach `threshold` nowhere. Without them the curve would end where the
    threshold happens to lie; with 0.1 as the threshold of all, faint bridges would join lesions that the prediction
    keeps apart.

    Args:
        volume_id: the scan's.
        patient_id: whose scan it is.
        disease: key.
        truth: of `read_truth`.
        probabilities: (D, H, W) on the scan's stored grid.
        threshold: a voxel is of the lesion from it on.
        grids: of the case.
        baseline: (D, H, W) bool on the stored grid, masks to compare with.
    """
    prediction = probabilities >= threshold
    evaluated: dict[str, Any] = {"num_predicted_voxels": int(np.count_nonzero(prediction))}
    if truth.status == "negative":
        nothing = np.zeros_like(prediction)
        evaluated["matches"] = match_lesions(prediction, nothing)
        evaluated["candidates"] = _froc_candidates(probabilities, nothing, threshold)
    elif truth.mask is not None:
        matches = match_lesions(prediction, truth.mask)
        evaluated["matches"] = matches
        evaluated["num_true_voxels"] = int(np.count_nonzero(truth.mask))
        if truth.status == "partial":
            evaluated["matches"] = replace(matches, true_prediction=(), prediction_voxels=(), contacts=())
        if truth.status == "positive":
            spacing_mm = grids.source.spacing_mm
            distances = surface_distances(prediction, truth.mask, spacing_mm)
            evaluated |= {
                "dice": dice_score(prediction, truth.mask),
                "surface_dice": distances.surface_dice(NSD_TOLERANCE_MM),
                "hausdorff_95_mm": distances.hausdorff_95,
                "lesion_dice": dice_by_lesion(prediction, truth.mask, spacing_mm),
                "candidates": _froc_candidates(probabilities, truth.mask, threshold),
            }
            if truth.prepared_mask is not None:
                ceiling = restore_mask(truth.prepared_mask, grids.prepared, grids.source).astype(bool)
                evaluated["ceiling_dice"] = dice_score(ceiling, truth.mask)
                evaluated["ceiling_lesion_dice"] = dice_by_lesion(ceiling, truth.mask, spacing_mm)
            if baseline is not None:
                evaluated["baseline_dice"] = dice_score(baseline, truth.mask)
    return CaseEvaluation(volume_id, patient_id, disease, truth.status, **evaluated)


def _froc_candidates(probabilities: np.ndarray, truth: np.ndarray, threshold: float) -> FrocCandidates:
    least = min(threshold, _FAINTEST_CANDIDATE)
    shown = probabilities >= least
    box = foreground_box(shown)
    if box is None:
        return candidates_of(probabilities, truth, threshold)
    parts, num_parts = label_lesions(shown[box])
    inside = probabilities[box]
    is_strong = np.zeros(num_parts + 1, dtype=bool)
    is_strong[parts[inside >= threshold]] = True
    kept = np.zeros_like(probabilities)
    kept[box] = np.where(shown[box] & ((inside >= threshold) | ~is_strong[parts]), inside, 0)
    return candidates_of(kept, truth, least)
