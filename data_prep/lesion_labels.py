"""What the labels say of the drawn diseases, and where a mask says something else.

A positive label with a mask that has no voxel contradicts itself, so that disease counts as not annotated. A mask
with voxels for a negative label is kept: it says more than a word drawn from a report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.lesion_masks import DISEASE_SET
from data_prep.raw_case import RawCase
from vlm3d_ext.text.disease_set import DiseaseSet
from vlm3d_ext.text.label_mapping import map_labels
from vlm3d_ext.text.label_set import LabelSet, load_label_set

__all__ = ["EMPTY", "NEGATIVE", "contradiction_remarks", "contradictions", "disease_labels"]

EMPTY = "its label is positive, but its mask is empty: counts as not annotated"
NEGATIVE = "its label is negative, but its mask is not empty: the mask is kept"

_SHOWN_VOLUMES = 20


def disease_labels(
    cases: Sequence[RawCase], label_set: LabelSet, disease_set: DiseaseSet = DISEASE_SET
) -> dict[str, dict[str, int | None]]:
    """Return volume id -> disease key -> 1, 0 or None (unknown), by the rules of `vlm3d_ext.text.label_mapping`.

    CT-RATE's negative "Lung opacity", say, is a negative ground-glass opacity; its positive one says nothing of it.

    Args:
        cases: raw cases with labels of `label_set`; a case without labels knows none.
        label_set: what the labels mean.
        disease_set: the diseases.
    """
    target = load_label_set(disease_set.label_set)
    unknown = (None,) * label_set.num_findings
    rows = np.array([case.labels or unknown for case in cases], dtype=np.float32).reshape(-1, label_set.num_findings)
    columns = [target.names.index(name) for name in disease_set.names]
    mapped = map_labels(rows, label_set, target)[:, columns]
    return {
        case.volume_id: {
            key: None if np.isnan(value) else int(value) for key, value in zip(disease_set.keys, row, strict=True)
        }
        for case, row in zip(cases, mapped, strict=True)
    }


def contradictions(labels: Mapping[str, int | None], lesion_voxels: Mapping[str, int]) -> dict[str, str]:
    """Return disease key -> `EMPTY` or `NEGATIVE`, where mask and label disagree.

    Args:
        labels: disease key -> 1, 0 or None.
        lesion_voxels: disease key -> voxels of its mask in the whole scan; only diseases that have a mask.
    """
    found = {}
    for disease, voxels in lesion_voxels.items():
        if labels.get(disease) == 1 and not voxels:
            found[disease] = EMPTY
        elif labels.get(disease) == 0 and voxels:
            found[disease] = NEGATIVE
    return found


def contradiction_remarks(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Say for each disease which volumes' masks disagree with their labels; the log has a note at each of them.

    Args:
        found: volume id -> `contradictions`.
    """
    volumes: dict[tuple[str, str], list[str]] = {}
    for volume_id, of_volume in sorted(found.items()):
        for disease, what in of_volume.items():
            volumes.setdefault((disease, what), []).append(volume_id)
    remarks = []
    for (disease, what), ids in sorted(volumes.items()):
        shown = ", ".join(ids[:_SHOWN_VOLUMES]) + (", ..." if len(ids) > _SHOWN_VOLUMES else "")
        remarks.append(f"{disease}: {len(ids)} volume(s) where {what} ({shown})")
    return remarks
