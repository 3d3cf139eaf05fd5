"""Score localisation results in the VLM3D challenge's form: boxes against masks or against boxes.

    python -m vlm3d_ext.engines.challenge_localization_score --predictions p.json --masks lesion_masks
    python -m vlm3d_ext.engines.challenge_localization_score --predictions p.json --truth truth.json --scans test.csv

For each disease: boxes are paired one to one for the largest sum of IoU (Hungarian method, IoU >= 0.10), which gives
mean IoU and distance of the centres; FROC gives the sensitivity at 0.5, 1, 2 and 4 false positives a scan. Beside it
stand two baselines that look at nothing: no boxes, and the whole volume as one box. The figures as the challenge's own
evaluation counts them are given too; see vlm3d_ext.metrics.challenge_box_figures for how they differ.

Which scans count: those of --scans; there, what has no mask or box has no lesion. Without --scans, a disease is scored
on the volumes that have a mask of it (an empty one says that there is no lesion), or that are in --truth. A volume
that was not predicted counts as one without boxes. Ends with 0, or with 2 if nothing could be scored.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.atomic_files import write_json
from ..data.challenge_localization import ChallengeBoxes, read_challenge_localization
from ..metrics.box_scores import FALSE_POSITIVES, BoxesOfScan, BoxScores, score_boxes
from ..metrics.challenge_box_figures import challenge_box_figures
from ..text.disease_set import DiseaseSet, load_disease_set
from .challenge_localization_truth import TrueBoxes, read_scan_list, true_boxes_of_file, true_boxes_of_masks

__all__ = ["main", "score_challenge_localization"]

_SHOWN = 10
_NO_BOXES = np.zeros((0, 6))
_WHOLE_VOLUME = "whole volume as one box"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 0 or 2."""
    options = _parser().parse_args(arguments)
    try:
        scores, text = score_challenge_localization(
            options.predictions, options.masks, options.truth, options.scans, options.disease_set, options.min_iou
        )
        print(text)
        if options.output:
            write_json(options.output, scores)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlm3d_ext.engines.challenge_localization_score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--predictions", required=True, type=Path, help="JSON file as submitted to the challenge")
    truth = parser.add_mutually_exclusive_group(required=True)
    truth.add_argument("--masks", type=Path, help="folder of <disease>/<volume_id>.nii.gz on the scans' own grids")
    truth.add_argument("--truth", type=Path, help="JSON file of true boxes in the challenge's form")
    parser.add_argument(
        "--scans", type=Path, help="list or CSV file of the volumes to score, lesion-free ones included"
    )
    parser.add_argument("--disease-set", default="chest_ct_5", help="diseases to score (default: chest_ct_5)")
    parser.add_argument("--min-iou", type=float, default=0.10, help="least IoU of a pair (default: 0.10)")
    parser.add_argument("--output", type=Path, help="write the scores as JSON, too")
    return parser


def score_challenge_localization(
    predictions_path: Path,
    masks_folder: Path | None = None,
    truth_path: Path | None = None,
    scans_path: Path | None = None,
    disease_set: str | DiseaseSet = "chest_ct_5",
    min_iou: float = 0.10,
) -> tuple[dict[str, Any], str]:
    """Score a challenge file against masks or boxes, one of which is given.

    Args:
        predictions_path: JSON file as submitted to the challenge.
        masks_folder: folder of ``<disease>/<volume_id>.nii.gz``.
        truth_path: JSON file of true boxes.
        scans_path: list of the volumes to score; None scores what the truth knows.
        disease_set: name, path or object.
        min_iou: least IoU of a pair.

    Returns:
        The scores for a JSON file (null where undefined): "num_volumes", "per_disease", "macro", "baselines",
        "challenge", the volumes in one file only, "remarks"; and the same as text.

    Raises:
        FileNotFoundError: if a file or folder does not exist.
        ValueError: if one cannot be used, or no volume is in both.
    """
    if (masks_folder is None) == (truth_path is None):
        raise ValueError("the truth is either a folder of masks or a file of boxes; give one of the two.")
    diseases = load_disease_set(disease_set)
    predictions = read_challenge_localization(predictions_path, diseases)
    truth = (
        true_boxes_of_masks(masks_folder, diseases)
        if masks_folder is not None
        else true_boxes_of_file(truth_path, diseases)  # type: ignore[arg-type]
    )
    known = truth.volume_ids()
    remarks = [*predictions.warnings, *truth.remarks]
    if scans_path is not None:
        scans = read_scan_list(scans_path)
        remarks += _listed("volume(s) with a truth, but not in the list of scans: left out", set(known) - set(scans))
        truth = truth.restricted_to(scans)
    scored = truth.volume_ids()
    unpredicted = sorted(set(scored) - set(predictions.volumes))
    unknown = sorted(set(predictions.volumes) - set(scored))
    if len(unpredicted) == len(scored):
        raise ValueError(
            f"{predictions_path}: none of its {len(predictions.volumes)} volumes (such as "
            f"{next(iter(predictions.volumes))}) is among the {len(scored)} to score (such as {scored[0]}); give the "
            f"truth of the volumes that were predicted."
        )
    remarks += _listed("volume(s) to score, but not predicted: counted as without boxes", unpredicted)
    remarks += _listed("volume(s) predicted, but without a truth: left out", unknown)
    rows = {key: score_boxes(_scans_of(predictions, truth, key), min_iou) for key in diseases.keys}
    if not any(row.num_lesions for row in rows.values()):
        remarks.append("there is no lesion at all: only the number of boxes says something")
    whole = _whole_volumes(truth)
    if whole is None:
        remarks.append(f"no baseline '{_WHOLE_VOLUME}' with --truth: the file does not tell how large a volume is")
    baselines = {
        "no boxes": {key: score_boxes(_scans_of(None, truth, key), min_iou) for key in diseases.keys},
        _WHOLE_VOLUME: None
        if whole is None
        else {key: score_boxes(_with_whole_volume(truth, whole, key), min_iou) for key in diseases.keys},
    }
    challenge = challenge_box_figures(
        [
            {
                key: _boxes_of_scan(predictions, volume_id, key, truth.boxes[key][volume_id])
                for key in diseases.keys
                if volume_id in truth.boxes[key]
            }
            for volume_id in scored
        ],
        diseases.keys,
        min_iou,
        FALSE_POSITIVES,
    )
    scores = {
        "num_volumes": len(scored),
        "min_iou": min_iou,
        "per_disease": {key: _as_scores(row) for key, row in rows.items()},
        "macro": _macro(rows),
        "baselines": {
            name: None
            if of is None
            else {"per_disease": {k: _as_scores(v) for k, v in of.items()}, "macro": _macro(of)}
            for name, of in baselines.items()
        },
        "challenge": {
            "iou": {
                "per_pathology": {key: _plain(value) for key, value in challenge.iou.items()},
                "macro": _plain(challenge.macro_iou),
            },
            "distance": {
                "per_pathology": {key: _plain(value) for key, value in challenge.distance_mm.items()},
                "macro": _plain(challenge.macro_distance_mm),
            },
            "froc": _by_false_positives(challenge.sensitivity),
        },
        "scored_without_prediction": unpredicted,
        "predicted_without_truth": unknown,
        "remarks": remarks,
    }
    return scores, _format(scores, diseases)


def _scans_of(predictions: ChallengeBoxes | None, truth: TrueBoxes, key: str) -> list[BoxesOfScan]:
    return [_boxes_of_scan(predictions, volume_id, key, boxes) for volume_id, boxes in truth.boxes[key].items()]


def _boxes_of_scan(predictions: ChallengeBoxes | None, volume_id: str, key: str, boxes: np.ndarray) -> BoxesOfScan:
    if predictions is None or volume_id not in predictions.volumes:
        return BoxesOfScan(_NO_BOXES, np.zeros(0), boxes)
    predicted = predictions.volumes[volume_id][key]
    return BoxesOfScan(predicted.bbox_mm, predicted.probabilities, boxes)


def _whole_volumes(truth: TrueBoxes) -> dict[str, np.ndarray] | None:
    """Return the box of each volume, or None if the size of a volume with lesions is not known."""
    boxes = {}
    for volume_id in truth.volume_ids():
        extent = truth.extents_mm.get(volume_id)
        if extent is None:
            if any(len(of_disease.get(volume_id, ())) for of_disease in truth.boxes.values()):
                return None
            extent = np.ones(3)  # without lesions a box is a false positive whatever its size
        boxes[volume_id] = np.concatenate([np.zeros(3), extent])[None]
    return boxes


def _with_whole_volume(truth: TrueBoxes, whole: Mapping[str, np.ndarray], key: str) -> list[BoxesOfScan]:
    return [BoxesOfScan(whole[volume_id], np.ones(1), boxes) for volume_id, boxes in truth.boxes[key].items()]


def _macro(rows: Mapping[str, BoxScores]) -> dict[str, Any]:
    """Means over the diseases for which a figure is defined."""

    def mean(values: Sequence[float]) -> float | None:
        defined = [value for value in values if not math.isnan(value)]
        return float(np.mean(defined)) if defined else None

    sensitivity = [mean([row.sensitivity[number] for row in rows.values()]) for number in range(len(FALSE_POSITIVES))]
    return {
        "mean_iou": mean([row.mean_iou for row in rows.values()]),
        "centroid_distance_mm": mean([row.centroid_distance_mm for row in rows.values()]),
        "sensitivity": {f"{limit:g}": value for limit, value in zip(FALSE_POSITIVES, sensitivity, strict=True)},
    }


def _as_scores(row: BoxScores) -> dict[str, Any]:
    return {
        "num_scans": row.num_scans,
        "num_lesions": row.num_lesions,
        "num_boxes": row.num_boxes,
        "num_matched": row.num_matched,
        "mean_iou": _plain(row.mean_iou),
        "centroid_distance_mm": _plain(row.centroid_distance_mm),
        "sensitivity": _by_false_positives(row.sensitivity),
    }


def _by_false_positives(sensitivity: Sequence[float]) -> dict[str, float | None]:
    return {f"{limit:g}": _plain(value) for limit, value in zip(FALSE_POSITIVES, sensitivity, strict=True)}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _format(scores: Mapping[str, Any], diseases: DiseaseSet) -> str:
    limits = [f"{limit:g}" for limit in FALSE_POSITIVES]
    head = f"{'':<26}{'scans':>6}{'lesions':>9}{'boxes':>7}{'matched':>9}{'IoU':>7}{'dist. mm':>10}"
    lines = [
        f"{scores['num_volumes']} volumes, IoU of a pair >= {scores['min_iou']:g}, sensitivity @ false positives/scan",
        head + "".join(f"{'@' + limit:>7}" for limit in limits),
    ]
    whole = scores["baselines"][_WHOLE_VOLUME]

    def line(name: str, row: Mapping[str, Any]) -> str:
        counts = "".join(
            f"{row.get(count, ''):>{width}}"
            for count, width in (("num_scans", 6), ("num_lesions", 9), ("num_boxes", 7), ("num_matched", 9))
        )
        figures = f"{_shown(row['mean_iou'], 3):>7}{_shown(row['centroid_distance_mm'], 1):>10}"
        return f"{name:<26}{counts}{figures}" + "".join(f"{_shown(row['sensitivity'][at], 3):>7}" for at in limits)

    for key in diseases.keys:
        lines.append(line(key, scores["per_disease"][key]))
        if whole is not None:
            lines.append(line(f"  {_WHOLE_VOLUME}", whole["per_disease"][key]))
    lines.append(line("mean over diseases", scores["macro"]))
    if whole is not None:
        lines.append(line(f"  {_WHOLE_VOLUME}", whole["macro"]))
    challenge = scores["challenge"]
    found = ", ".join(f"{_shown(challenge['froc'][at], 3)} @{at}" for at in limits)
    lines += [
        "no boxes at all: sensitivity 0, IoU and distance undefined",
        "",
        f"as the challenge counts: IoU {_shown(challenge['iou']['macro'], 3)}, distance "
        f"{_shown(challenge['distance']['macro'], 1)} mm, sensitivity {found}",
        *(f"note: {remark}" for remark in scores["remarks"]),
    ]
    return "\n".join(lines)


def _shown(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _listed(what: str, volume_ids: Sequence[str] | set[str]) -> list[str]:
    if not volume_ids:
        return []
    more = ", ..." if len(volume_ids) > _SHOWN else ""
    return [f"{len(volume_ids)} {what}: {', '.join(sorted(volume_ids)[:_SHOWN])}{more}"]


if __name__ == "__main__":
    sys.exit(main())
