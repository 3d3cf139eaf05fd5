"""Score classification results as the VLM3D challenge does: at a fixed threshold of 0.5, with CRG.

    python -m vlm3d_ext.engines.challenge_classification_score --predictions p.json --labels valid_predicted_labels.csv

Precision, recall, F1, accuracy and AUROC are means over labels. They equal the challenge's wherever every label has
positives and negatives; a label without positives is left out here, where the challenge's precision, recall and F1
count 0. Volumes that occur in one of the two files only are counted, listed and left out; the challenge has none, so
repair them before a submission. Ends with 0, or with 2 if nothing could be scored.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.atomic_files import write_json
from ..data.challenge_classification import read_challenge_predictions
from ..data.label_table import read_label_csv
from ..text.label_set import load_label_set
from .classification_evaluation import ClassificationReport, evaluate_classification, format_classification

__all__ = ["main", "score_challenge_predictions"]

_SHOWN = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 0 or 2."""
    options = _parser().parse_args(arguments)
    try:
        scores, text = score_challenge_predictions(
            options.predictions, options.labels, options.label_set, options.training_labels, options.resamples
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
        prog="python -m vlm3d_ext.engines.challenge_classification_score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--predictions", required=True, type=Path, help="JSON file as submitted to the challenge")
    parser.add_argument("--labels", required=True, type=Path, help="CSV file of labels, one row for each volume")
    parser.add_argument("--label-set", default="ct_rate_18", help="label set to score (default: ct_rate_18)")
    parser.add_argument("--training-labels", type=Path, help="CSV file of training labels, for the prevalence baseline")
    parser.add_argument("--resamples", type=int, default=200, help="bootstrap resamples for intervals (default: 200)")
    parser.add_argument("--output", type=Path, help="write the scores as JSON, too")
    return parser


def score_challenge_predictions(
    predictions_path: Path,
    labels_path: Path,
    label_set: str = "ct_rate_18",
    training_labels_path: Path | None = None,
    num_resamples: int = 200,
) -> tuple[dict[str, Any], str]:
    """Score a challenge file against a label CSV.

    Args:
        predictions_path: JSON file as submitted to the challenge.
        labels_path: CSV file of labels.
        label_set: name or path of the label set to score.
        training_labels_path: CSV file of training labels, for the prevalence baseline; None leaves it out.
        num_resamples: bootstrap resamples.

    Returns:
        The scores for a JSON file (null where undefined): "num_volumes", "macro" with CRG and intervals,
        "baselines", "per_pathology", the volumes that are in one file only, "remarks"; and the same as text.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file cannot be used, or no volume is in both.
    """
    names = load_label_set(label_set).names
    predictions = read_challenge_predictions(predictions_path, names)
    table = read_label_csv(labels_path, label_set)
    scored = [row for row, volume_id in enumerate(predictions.volume_ids) if volume_id in table.labels]
    if not scored:
        raise ValueError(
            f"{predictions_path}: none of its {len(predictions.volume_ids)} volumes (such as "
            f"{predictions.volume_ids[0]}) has a row in {labels_path} (such as {next(iter(table.labels))}); give the "
            f"labels of the split that was predicted."
        )
    labels = np.array([table.labels[predictions.volume_ids[row]] for row in scored])
    prevalence = None
    if training_labels_path is not None:
        prevalence = _prevalence(np.array(list(read_label_csv(training_labels_path, label_set).labels.values())))
    report = evaluate_classification(
        predictions.probabilities[scored], labels, names, np.full(len(names), 0.5), prevalence, num_resamples
    )
    unlabelled = [volume_id for volume_id in predictions.volume_ids if volume_id not in table.labels]
    unpredicted = sorted(set(table.labels) - set(predictions.volume_ids))
    remarks = [*predictions.warnings, *table.remarks]
    remarks += _listed("volume(s) predicted, but without a row of labels", unlabelled)
    remarks += _listed("volume(s) with labels, but not predicted", unpredicted)
    if prevalence is None:
        remarks.append("no prevalence baseline without --training-labels")
    scores = {
        **_as_scores(report),
        "predicted_without_labels": unlabelled,
        "labelled_without_prediction": unpredicted,
        "remarks": remarks,
    }
    text = "\n".join([format_classification(report), "", *(f"note: {remark}" for remark in remarks)])
    return scores, text


def _prevalence(labels: np.ndarray) -> np.ndarray:
    known = (~np.isnan(labels)).sum(axis=0)
    return np.where(known > 0, np.nansum(labels, axis=0) / np.maximum(known, 1), np.nan)


def _listed(what: str, volume_ids: Sequence[str]) -> list[str]:
    if not volume_ids:
        return []
    more = ", ..." if len(volume_ids) > _SHOWN else ""
    return [f"{len(volume_ids)} {what}: {', '.join(volume_ids[:_SHOWN])}{more}"]


def _as_scores(report: ClassificationReport) -> dict[str, Any]:
    figures = ("precision", "recall", "f1", "accuracy", "auroc")

    def plain(values: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
        return {name: None if math.isnan(values[name]) else values[name] for name in wanted}

    with_intervals = [f"{figure}{end}" for figure in (*figures, "crg") for end in ("", "_low", "_high")]
    rows = [{"name": row["label"], "undefined": row["undefined"], **plain(row, figures)} for row in report.per_label]
    return {
        "num_volumes": report.num_cases,
        "macro": plain(report.macro, with_intervals),
        "baselines": {name: plain(values, (*figures, "crg")) for name, values in report.baselines.items()},
        "per_pathology": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
