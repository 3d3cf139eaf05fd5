"""The cases of a manifest with their labels in the findings of one label set, and what is known of those labels."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..text.label_mapping import describe_mapping, map_labels, mapping_in_words
from ..text.label_set import LabelSet, load_label_set
from .anatomical_regions import region_by_name
from .case_manifest import SPLITS, CaseManifest, ManifestError
from .csv_table import volume_name
from .label_table import LabelTable, read_label_csv

__all__ = ["LabelledCases"]

logger = logging.getLogger(__name__)

_NUM_NAMED = 10  # of a list of ids; the rest is counted


class LabelledCases:
    """The cases of a manifest, labelled for training and scoring on a label set.

    Labels are 1.0, 0.0 or NaN (unknown) in the order of the set. On construction, one block of text is logged that
    says where the labels come from, how many are known, and which findings cannot be trained or scored;
    `description` keeps it.

    Args:
        manifest: the prepared data set, or the path of its manifest.json.
        label_set: the wanted set, or its name or path, several joined by ``+``; None takes the manifest's own.
        labels_csv: a CSV table whose labels replace the manifest's (see `vlm3d_ext.data.label_table.read_label_csv`).
            A case takes the row of its volume, else of the volume it was cut from, else of its scan; a case without a
            row has no known label.

    Raises:
        ValueError: if no finding of the set is supported by the labels that there are, the CSV's columns or cells do
            not fit (`CsvTableError`), none of its rows belongs to a case, or the manifest's labels are of a set that
            cannot be loaded (`ManifestError`).
        FileNotFoundError: if there is no such CSV or label set file.
    """

    def __init__(
        self,
        manifest: CaseManifest | str | os.PathLike,
        label_set: LabelSet | str | os.PathLike | None = None,
        labels_csv: str | os.PathLike | None = None,
    ) -> None:
        self.manifest = manifest if isinstance(manifest, CaseManifest) else CaseManifest(manifest)
        wanted = label_set if isinstance(label_set, LabelSet) or label_set is None else load_label_set(label_set)
        self.label_set: LabelSet = wanted or _label_set_of_manifest(self.manifest, None)
        # The manifest itself refuses to give the cases of an empty split, which is no fault here.
        filled = [split for split in SPLITS if self.manifest.content[split]]
        cases = {split: self.manifest.cases(split) if split in filled else [] for split in SPLITS}
        if labels_csv is None:
            self._labels, lines = _labels_from_manifest(self.manifest, cases, self.label_set)
        else:
            table = read_label_csv(labels_csv, self.label_set)
            self._labels, lines = _labels_from_table(table, cases, self.manifest, self.label_set)
        self._row_of_volume = {
            case["volume_id"]: self._labels[split][index] for split in SPLITS for index, case in enumerate(cases[split])
        }
        self.description = "\n".join([*lines, *_describe_counts(self._labels, self.names)])
        logger.info(self.description)

    @property
    def names(self) -> tuple[str, ...]:
        """The findings' names, in the order of the labels."""
        return self.label_set.names

    @property
    def num_findings(self) -> int:
        """Length of the label vector."""
        return self.label_set.num_findings

    def cases(self, split: str | Sequence[str], max_cases: int | None = None) -> list[dict[str, Any]]:
        """Return the cases of one or several splits, as `CaseManifest.cases` does, with ``"labels"`` of this set.

        Args:
            split: "training", "validation", "test", or several of them.
            max_cases: keep the first so many; None keeps all.

        Raises:
            ManifestError: if there is no such split, or it has no case.
        """
        cases = self.manifest.cases(split, max_cases)
        return [{**case, "labels": self._row_of_volume[case["volume_id"]].tolist()} for case in cases]

    def positive_weights(self, max_weight: float = 20.0) -> list[float]:
        """Return negatives / positives of the known training labels: a positive's weight in binary cross-entropy.

        Args:
            max_weight: weights are clipped to [1 / max_weight, max_weight]; at least 1.

        Returns:
            One weight per finding; 1.0, with a warning, for findings without a positive or without a negative.

        Raises:
            ValueError: if max_weight is below 1.
        """
        if not max_weight >= 1:
            raise ValueError(f"max_weight must be at least 1, got {max_weight}.")
        positives, negatives = _count(self._labels["training"])
        usable = (positives > 0) & (negatives > 0)
        one_sided = [name for name, both in zip(self.names, usable, strict=True) if not both]
        if one_sided:
            logger.warning(
                "%s: the positive weight is 1 for %s: without a positive or without a negative in training.",
                self.manifest.path,
                ", ".join(one_sided),
            )
        ratios = np.divide(negatives, positives, out=np.ones(self.num_findings), where=usable)
        return np.clip(ratios, 1 / max_weight, max_weight).tolist()

    def trainable_findings(self) -> list[bool]:
        """Return for each finding whether training holds both a positive and a negative; others can learn nothing.

        Raises:
            ManifestError: if that is so of none.
        """
        positives, negatives = _count(self._labels["training"])
        trainable = (positives > 0) & (negatives > 0)
        if not trainable.any():
            raise ManifestError(
                f"{self.manifest.path}: no finding of {self.label_set.name} has both a positive and a negative among "
                "the training cases, so nothing can be trained; look at the labels, or give others with --labels_csv."
            )
        return trainable.tolist()

    def training_prevalence(self) -> list[float]:
        """Return positives / known training labels for each finding; NaN where none is known."""
        positives, negatives = _count(self._labels["training"])
        known = positives + negatives
        return np.divide(positives, known, out=np.full(self.num_findings, math.nan), where=known > 0).tolist()

    def finding_regions(self) -> list[list[int]]:
        """Return the indices (1 to 20) of the regions where each finding is found; an empty list means anywhere."""
        return [[region_by_name(name).index for name in finding.regions] for finding in self.label_set.findings]


def _label_set_of_manifest(manifest: CaseManifest, given: LabelSet | None) -> LabelSet:
    name = manifest.content.get("label_set")
    if given is not None and given.name == name:
        own = given
    else:
        try:
            own = load_label_set(str(name))
        except (ValueError, FileNotFoundError) as error:
            raise ManifestError(
                f"{manifest.path}: its labels are of {name!r}, which cannot be loaded here ({error}); give the path of "
                "its .json file as the label set."
            ) from None
    if list(own.names) != manifest.label_names:
        differing = sorted(set(own.names) ^ set(manifest.label_names)) or "the same names in another order"
        raise ManifestError(
            f"{manifest.path}: its label_names are not those of {own.name} ({differing}); prepare the data again."
        )
    return own


def _labels_from_manifest(
    manifest: CaseManifest, cases: Mapping[str, Sequence[Mapping[str, Any]]], wanted: LabelSet
) -> tuple[dict[str, np.ndarray], list[str]]:
    own = _label_set_of_manifest(manifest, wanted)
    if not describe_mapping(own, wanted)["supported"]:
        raise ValueError(
            f"{manifest.path}: none of the {wanted.num_findings} findings of {wanted.name} follows from its labels of "
            f"{own.name}; choose another label set, or give a CSV of labels that fits it."
        )
    labels = {}
    for split in SPLITS:
        rows = np.array([case["labels"] for case in cases[split]], dtype=np.float32)
        labels[split] = map_labels(rows.reshape(len(cases[split]), own.num_findings), own, wanted)
    return labels, [mapping_in_words(own, wanted)]


def _labels_from_table(
    table: LabelTable, cases: Mapping[str, Sequence[Mapping[str, Any]]], manifest: CaseManifest, wanted: LabelSet
) -> tuple[dict[str, np.ndarray], list[str]]:
    labels: dict[str, np.ndarray] = {}
    used: set[str] = set()
    without_row: list[str] = []
    for split in SPLITS:
        labels[split] = np.full((len(cases[split]), wanted.num_findings), math.nan, dtype=np.float32)
        for index, case in enumerate(cases[split]):
            # Overlapping depth windows are cases of their own, named after the volume that `source` names.
            names = [case["volume_id"], volume_name(case.get("source", "")), case.get("scan_id", "")]
            rows = [name for name in names if name in table.labels]
            used.update(rows)
            if rows:
                labels[split][index] = table.labels[rows[0]]
            else:
                without_row.append(case["volume_id"])
    unused = sorted(set(table.labels) - used)
    if not used:
        known = f"such as {without_row[0]!r}" if without_row else "it has none"
        raise ValueError(
            f"{table.path}: none of its {len(unused)} ids (such as {unused[0]!r}) is a volume or scan of "
            f"{manifest.path} ({known}); give the labels of that data set."
        )
    num_cases = sum(len(cases[split]) for split in SPLITS)
    lines = [
        table.mapping,
        f"{table.path}: {len(used)} of {len(table.labels)} ids label {num_cases - len(without_row)} of {num_cases} "
        "prepared cases",
        *table.remarks,
    ]
    if unused:
        lines.append(f"rows without a prepared case: {_listed(unused)}")
    if without_row:
        lines.append(f"prepared cases without a row, all their labels unknown: {_listed(without_row)}")
    return labels, lines


def _listed(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _NUM_NAMED} more" if len(ids) > _NUM_NAMED else ""
    return f"{len(ids)}: {', '.join(ids[:_NUM_NAMED])}{more}"


def _count(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of positives and of negatives in each column; unknown is neither."""
    return (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)


def _describe_counts(labels: Mapping[str, np.ndarray], names: Sequence[str]) -> list[str]:
    counts = {split: _count(labels[split]) for split in SPLITS}
    lines = []
    for split, (positives, negatives) in counts.items():
        known = positives.sum() + negatives.sum()
        total = f"{known} of {labels[split].size} labels known, {positives.sum()} positive"
        lines.append(f"{split}: {len(labels[split])} cases, {total}" if len(labels[split]) else f"{split}: no case")
    problems: dict[str, np.ndarray] = {}
    if len(labels["training"]):
        positive, negative = (count > 0 for count in counts["training"])
        problems = {
            "unknown in all training cases, left out of the loss": ~positive & ~negative,
            "never positive in training, left out of the loss": ~positive & negative,
            "never negative in training, left out of the loss": positive & ~negative,
        }
    if len(labels["validation"]):
        problems["no positive in validation; its metrics will be undefined"] = counts["validation"][0] == 0
    for problem, concerned in problems.items():
        if concerned.any():
            lines.append(f"{problem}: {', '.join(name for name, one in zip(names, concerned, strict=True) if one)}")
    return lines
