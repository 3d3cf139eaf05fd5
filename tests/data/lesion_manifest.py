"""Manifests that say what is known of lesions, without any volume behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm3d_ext.data.atomic_files import write_json
from vlm3d_ext.data.case_manifest import SPLITS
from vlm3d_ext.text.label_set import load_label_set


def lesion_case(
    volume_id: str,
    masks: Sequence[str] = (),
    labels: Mapping[str, int | None] | None = None,
    empty: Sequence[str] = (),
    partial: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a case; `labels` are CT-RATE's by name, those not named are 0. None is a case without labels."""
    names = load_label_set("ct_rate_18").names
    return {
        "volume_id": volume_id,
        "patient_id": volume_id,
        "image": f"volumes/{volume_id}.npz",
        "geometry": f"volumes/{volume_id}.json",
        "has_anatomical_mask": False,
        "labels": [] if labels is None else [labels.get(name, 0) for name in names],
        "lesion_masks": {key: f"lesion_masks/{key}/{volume_id}.nii.gz" for key in masks},
        "lesion_masks_empty": list(empty),
        "lesion_masks_partial": list(partial),
    }


def write_lesion_manifest(folder: Path, labelled: bool = True, **splits: Sequence[dict[str, Any]]) -> Path:
    """Write a manifest of cases by split; returns its path."""
    names = list(load_label_set("ct_rate_18").names) if labelled else []
    content = {"label_set": "ct_rate_18", "label_names": names, "fingerprint": "tiny"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.json"
    write_json(path, content | {split: list(splits.get(split, ())) for split in SPLITS})
    return path
