"""The two files that describe a prepared data set: manifest.json for training, preparation_log.json for people.

Both are built from the raw data's tables and the cases' sidecars alone, sorted, so that they do not depend on the
order of work, on interruptions, the clock or the machine. Their format is in docs/design.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from data_prep.case_preparation import CaseOutcome
from data_prep.preparation_settings import digest_of
from data_prep.raw_case import RawCase, RawDataset

__all__ = ["build_log", "build_manifest", "count_classes", "label_remarks", "positive_weights"]

SPLITS = ("training", "validation", "test")


def build_manifest(
    *,
    name: str,
    label_set: str,
    label_names: Sequence[str],
    settings: Mapping[str, Any],
    source_root: str,
    cases: Sequence[RawCase],
    sidecars: Mapping[str, Sequence[Mapping[str, Any]]],
    not_annotated: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Any]:
    """Return the content of manifest.json.

    Args:
        name: name of the data set.
        label_set: name of the label set.
        label_names: in the order of each case's labels.
        settings: plain JSON content.
        source_root: the raw data's root relative to the manifest's folder.
        cases: raw cases, in any order, with their final split; those without a sidecar are left out.
        sidecars: raw volume id -> the sidecars of its prepared volumes (several under the depth policy ``"windows"``).
        not_annotated: raw volume id -> diseases whose mask is left out, because it cannot be right.
    """
    by_split: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    contents = []
    for case in sorted(cases, key=lambda case: case.volume_id):
        for sidecar in sidecars.get(case.volume_id, ()):
            entry = _case_entry(case, sidecar, (not_annotated or {}).get(case.volume_id, ()))
            by_split[case.split].append(entry)
            contents.append([case.split, dict(entry), sidecar["content_sha256"]])
            # It follows from the content's digest, so it is no part of the fingerprint.
            entry["lesion_masks_empty"] = _empty_masks(sidecar, entry["lesion_masks"])
    counts = {split: count_classes(by_split[split], label_names) for split in SPLITS}
    described = {"label_set": label_set, "label_names": list(label_names), "settings": dict(settings)}
    return {
        "name": name,
        **described,
        "source_root": source_root,
        # Where the raw data lie is no property of the prepared data, so it is not part of the fingerprint.
        "fingerprint": digest_of({**described, "cases": contents}),
        "class_counts": counts,
        "positive_weights": positive_weights(counts["training"]),
        **by_split,
    }


def _case_entry(case: RawCase, sidecar: Mapping[str, Any], not_annotated: Collection[str]) -> dict[str, Any]:
    volume_id = sidecar["volume_id"]

    def annotated(key: str) -> dict[str, str]:
        return {disease: path for disease, path in sidecar[key].items() if disease not in not_annotated}

    return {
        "volume_id": volume_id,
        "scan_id": case.scan_id,
        "patient_id": case.patient_id,
        "image": sidecar.get("image", f"volumes/{volume_id}.npz"),
        "geometry": f"volumes/{volume_id}.json",
        "has_anatomical_mask": sidecar["has_anatomical_mask"],
        "labels": list(case.labels),
        "lesion_masks": annotated("lesion_masks"),
        "lesion_masks_original_grid": annotated("lesion_masks_original_grid"),
        "lesion_masks_partial": [key for key in sidecar["lesion_masks_partial"] if key not in not_annotated],
        "lesion_masks_source": annotated("lesion_masks_source"),
        "report": dict(case.report) if case.report is not None else None,
        "source": case.source,
    }


def _empty_masks(sidecar: Mapping[str, Any], diseases: Collection[str]) -> list[str]:
    """Return the diseases whose mask has no voxel in the prepared volume, which nothing else in the manifest shows."""
    # Volumes prepared by an earlier version know the voxels of the whole scan only.
    voxels = sidecar.get("lesion_voxels", sidecar.get("lesion_voxels_in_scan", {}))
    return [disease for disease in diseases if voxels.get(disease) == 0]


def count_classes(entries: Sequence[Mapping[str, Any]], label_names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return label -> number of prepared volumes where it is positive, negative and unknown."""
    counts = {}
    for index, label in enumerate(label_names):
        values = [entry["labels"][index] for entry in entries]
        counts[label] = {
            "positive": sum(value == 1 for value in values),
            "negative": sum(value == 0 for value in values),
            "unknown": sum(value is None for value in values),
        }
    return counts


def positive_weights(counts: Mapping[str, Mapping[str, int]]) -> dict[str, float | None]:
    """Return label -> negatives / positives, the weight of a positive in binary cross-entropy; None where there is no
    positive."""
    return {
        label: count["negative"] / count["positive"] if count["positive"] else None for label, count in counts.items()
    }


def label_remarks(class_counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """Name the labels that cannot be trained, and those that cannot be scored in validation.

    Splits without any known label, such as those of a folder of scans, are passed over: nothing is expected of them.

    Args:
        class_counts: split -> `count_classes` of its cases.
    """
    remarks = []
    training, validation = class_counts["training"], class_counts["validation"]
    unknown = [label for label, count in training.items() if not count["positive"] + count["negative"]]
    if unknown and len(unknown) < len(training):
        remarks.append(f"labels unknown in every training case, which cannot be trained: {', '.join(unknown)}")
    if any(count["positive"] + count["negative"] for count in validation.values()):
        absent = [label for label, count in validation.items() if not count["positive"]]
        if absent:
            remarks.append(
                f"labels without a positive in validation, whose metrics will be undefined: {', '.join(absent)}"
            )
    return remarks


def build_log(
    *, settings: Mapping[str, Any], dataset: RawDataset, outcomes: Sequence[CaseOutcome], remarks: Sequence[str]
) -> dict[str, Any]:
    """Return the content of preparation_log.json: settings, summary, remarks, one entry per raw scan."""
    statuses = [outcome.status for outcome in outcomes]
    return {
        "settings": dict(settings),
        "summary": {
            **{status: statuses.count(status) for status in ("prepared", "excluded", "refused")},
            "rows_without_file": len(dataset.rows_without_file),
            "files_without_row": len(dataset.files_without_row),
            "ignored_files": dataset.ignored_files,
        },
        "remarks": list(remarks),
        "rows_without_file": list(dataset.rows_without_file),
        "files_without_row": list(dataset.files_without_row),
        "cases": [
            {
                "volume_id": outcome.volume_id,
                "status": outcome.status,
                "reason": outcome.reason,
                "notes": list(outcome.notes),
            }
            for outcome in sorted(outcomes, key=lambda outcome: (outcome.volume_id, outcome.reason))
        ],
    }
