"""The cases of a manifest as a localizer needs them: what is known of each disease, and an even draw of diseases."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..text.disease_set import DiseaseSet, load_disease_set
from .case_manifest import SPLITS, CaseManifest, ManifestError
from .labelled_cases import LabelledCases

__all__ = ["UNKNOWN", "LesionCases", "has_lesion"]

UNKNOWN = 255
"""Value in a target of a voxel of which nobody says whether it belongs to a lesion."""

logger = logging.getLogger(__name__)


class LesionCases:
    """The cases of a manifest with ``disease_labels``: 1, 0 or NaN for each disease of a set, in its order.

    A disease with a mask of lesions is 1. With an empty mask (``lesion_masks_empty`` in the manifest) it is 0, since
    somebody looked and drew nothing; where the annotation is partial that says nothing. Without a mask it is what the
    labels say of it, mapped onto the set's label set; a data set without labels leaves it unknown. On construction,
    what is there of each disease is logged; `description` keeps it.

    Args:
        manifest: the prepared data set, or the path of its manifest.json.
        disease_set: name or path, see `load_disease_set`.

    Raises:
        ValueError: if a disease is no finding of the disease set's label set, so that its label could not be found, or
            the manifest's labels do not fit (see `LabelledCases`).
    """

    def __init__(
        self, manifest: CaseManifest | str | os.PathLike, disease_set: DiseaseSet | str = "chest_ct_5"
    ) -> None:
        self.manifest = manifest if isinstance(manifest, CaseManifest) else CaseManifest(manifest)
        self.disease_set = load_disease_set(disease_set)
        labels = LabelledCases(self.manifest, self.disease_set.label_set) if self.manifest.label_names else None
        strangers = [name for name in self.disease_set.names if labels is not None and name not in labels.names]
        if strangers:
            raise ValueError(
                f"disease set {self.disease_set.name}: {strangers[0]!r} is no finding of its label set "
                f"{self.disease_set.label_set}; write the name as it is there."
            )
        self._labels = labels
        self.description = self._describe()
        logger.info(self.description)

    def _with_disease_labels(self, case: dict[str, Any]) -> dict[str, Any]:
        names = self._labels.names if self._labels is not None else ()
        labelled = dict(zip(names, case["labels"], strict=True)) if names else {}
        values = []
        for disease in self.disease_set.diseases:
            label = float(labelled.get(disease.name, math.nan))
            if has_lesion(case, disease.key):
                label = 1.0
            elif disease.key in case["lesion_masks"] and disease.key not in case["lesion_masks_partial"]:
                label = 0.0
            elif disease.key in case["lesion_masks"] and label != 0:
                label = math.nan
            values.append(label)
        return {**case, "disease_labels": values}

    def cases(self, split: str | Sequence[str], max_cases: int | None = None) -> list[dict[str, Any]]:
        """Return the cases of one or several splits.

        Args:
            split: "training", "validation", "test", or several of them.
            max_cases: keep the first so many; None keeps all.

        Raises:
            ManifestError: if there is no such split, or it has no case.
        """
        source = self._labels if self._labels is not None else self.manifest
        return [self._with_disease_labels(case) for case in source.cases(split, max_cases)]

    def balanced(
        self,
        split: str,
        samples_per_disease: int | None = None,
        negative_share: float = 0.25,
        seed: int = 0,
        max_cases: int | None = None,
    ) -> list[dict[str, Any]]:
        """Return cases for one epoch in which the diseases come up equally often, each with its ``crop_disease``.

        Args:
            split: usually "training".
            samples_per_disease: how often a case is taken for each disease; cases with a mask of it take turns. None
                takes as many as the disease with the most masks has.
            negative_share: share of the result that are cases without a lesion mask, where there are cases that are
                known to lack a disease; in [0, 1).
            seed: of the order in which cases take turns.
            max_cases: use the first so many of the split; None uses all.

        Raises:
            ManifestError: if no case of the split has a mask with a lesion.
            ValueError: if a number is out of its range.
        """
        if not 0 <= negative_share < 1:
            raise ValueError(f"negative_share must be at least 0 and below 1, got {negative_share}.")
        if samples_per_disease is not None and samples_per_disease < 1:
            raise ValueError(f"samples_per_disease must be at least 1, got {samples_per_disease}; None takes all.")
        cases = self.cases(split, max_cases)
        positives = {key: [c for c in cases if has_lesion(c, key)] for key in self.disease_set.keys}
        positives = {key: group for key, group in positives.items() if group}
        if not positives:
            raise ManifestError(
                f"{self.manifest.path}: no {split} case has a mask with a lesion of {list(self.disease_set.keys)}; "
                "prepare the data with --lesion-masks."
            )
        random = np.random.default_rng(seed)
        count = samples_per_disease or max(len(group) for group in positives.values())
        drawn = []
        for key, group in positives.items():
            order = np.concatenate([random.permutation(len(group)) for _ in range(-(-count // len(group)))])[:count]
            drawn += [{**group[index], "crop_disease": key} for index in order]
        negatives = [
            c for c in cases if 0.0 in c["disease_labels"] and not any(has_lesion(c, key) for key in c["lesion_masks"])
        ]
        wanted = round(len(drawn) * negative_share / (1 - negative_share))
        if negatives and wanted:
            order = np.concatenate([random.permutation(len(negatives)) for _ in range(-(-wanted // len(negatives)))])
            drawn += [{**negatives[index], "crop_disease": None} for index in order[:wanted]]
        return drawn

    def _describe(self) -> str:
        lines = [f"Lesion masks of {self.manifest.path} ({self.disease_set.name}):"]
        for index, disease in enumerate(self.disease_set.diseases):
            parts = []
            for split in SPLITS:
                cases = self.cases(split) if self.manifest.content[split] else []
                drawn = [case for case in cases if has_lesion(case, disease.key)]
                masks = len(drawn)
                partial = sum(disease.key in case["lesion_masks_partial"] for case in drawn)
                absent = sum(case["disease_labels"][index] == 0 for case in cases)
                unknown = len(cases) - masks - absent
                partly = f" ({partial} partial)" if partial else ""
                parts.append(f"{split} {masks} with mask{partly}, {absent} without lesion, {unknown} unknown")
            lines.append(f"  {disease.name}: {'; '.join(parts)}")
        return "\n".join(lines)


def has_lesion(case: Mapping[str, Any], key: str) -> bool:
    """Return whether a case has a mask of a disease with at least one voxel."""
    return key in case["lesion_masks"] and key not in case.get("lesion_masks_empty", ())
