"""The cases of a manifest for all tasks at once, and which of them an epoch of joint training takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .labelled_cases import LabelledCases
from .lesion_cases import LesionCases, has_lesion

__all__ = ["SAMPLINGS", "JointCases"]

SAMPLINGS = ("available", "task_weighted")
TASKS = ("classification", "localization", "generation")

logger = logging.getLogger(__name__)


class JointCases:
    """The cases of a manifest with ``labels`` of a label set and ``disease_labels`` of a disease set.

    A case takes part in each task for which it has something: known labels, a lesion mask (or a label that says there
    is none), a report.

    Args:
        labelled_cases: the labels.
        lesion_cases: the lesions, of the same manifest.

    Raises:
        ValueError: if the two are of different manifests.
    """

    def __init__(self, labelled_cases: LabelledCases, lesion_cases: LesionCases) -> None:
        if labelled_cases.manifest.fingerprint != lesion_cases.manifest.fingerprint:
            raise ValueError(
                f"labels are of {labelled_cases.manifest.path}, lesions of {lesion_cases.manifest.path}; give both one "
                "manifest."
            )
        self.labelled_cases = labelled_cases
        self.lesion_cases = lesion_cases

    def cases(self, split: str | Sequence[str], max_cases: int | None = None) -> list[dict[str, Any]]:
        """Return the cases of one or several splits; see `LabelledCases.cases` and `LesionCases.cases`."""
        return [
            {**labelled, "disease_labels": drawn["disease_labels"]}
            for labelled, drawn in zip(
                self.labelled_cases.cases(split, max_cases), self.lesion_cases.cases(split, max_cases), strict=True
            )
        ]

    def sampled(
        self,
        split: str = "training",
        sampling: str = "available",
        task_weights: Mapping[str, float] | None = None,
        seed: int = 0,
        max_cases: int | None = None,
    ) -> list[dict[str, Any]]:
        """Return the cases of one epoch, each with the ``crop_disease`` that its crops are to show first, or None.

        - "available": every case once. It crops at the rarest of the diseases that it has a mask of.
        - "task_weighted": as many draws as there are cases, shared out between the tasks by their weights. In
          classification the findings come up equally often, in localization the diseases, so that rare ones are seen
          more often than they occur; in generation all reports do. Cases with the same finding take turns. A drawn case
          still has the losses of all its tasks.

        Args:
            split: usually "training".
            sampling: one of `SAMPLINGS`.
            task_weights: of "classification", "localization" and "generation", for "task_weighted"; at least one above
                0, none below.
            seed: of the order in which cases take turns.
            max_cases: use the first so many of the split.

        Raises:
            ValueError: for another sampling, or weights that are not such.
        """
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {SAMPLINGS}, got {sampling!r}.")
        cases = self.cases(split, max_cases)
        num_with_mask = {
            key: sum(has_lesion(case, key) for case in cases) for key in self.lesion_cases.disease_set.keys
        }
        cases = [{**case, "crop_disease": _rarest(case, num_with_mask)} for case in cases]
        if sampling == "available":
            return cases
        weights = dict(task_weights or dict.fromkeys(TASKS, 1.0))
        if set(weights) != set(TASKS) or min(weights.values()) < 0 or not sum(weights.values()) > 0:
            raise ValueError(
                f"task_weights must be numbers from 0 on for {TASKS}, not all of them 0, got {dict(weights)}."
            )
        return self._task_weighted(cases, weights, seed)

    def _task_weighted(
        self, cases: list[dict[str, Any]], weights: Mapping[str, float], seed: int
    ) -> list[dict[str, Any]]:
        groups = {
            "classification": [
                [{**case} for case in cases if case["labels"][index] == 1]
                for index in range(self.labelled_cases.num_findings)
            ],
            "localization": [
                [{**case, "crop_disease": key} for case in cases if has_lesion(case, key)]
                for key in self.lesion_cases.disease_set.keys
            ],
            "generation": [[{**case} for case in cases if _has_report(case)]],
        }
        # a task that no case has gives its share to the others
        weights = {task: weight for task, weight in weights.items() if any(groups[task])}
        total = sum(weights.values())
        if not total:
            logger.warning("No case has a positive finding, a lesion mask or a report; every case is taken once.")
            return cases
        random = np.random.default_rng(seed)
        drawn: list[dict[str, Any]] = []
        counts = _shares([weight / total for weight in weights.values()], len(cases))
        for task, count in zip(weights, counts, strict=True):
            turns = [_in_turn(group, random.permutation) for group in groups[task] if group]
            drawn += [next(turns[number % len(turns)]) for number in range(count)]
        return drawn


def _shares(shares: Sequence[float], total: int) -> list[int]:
    """Return whole numbers in proportion to `shares` that sum to `total`."""
    edges = [round(edge * total) for edge in np.cumsum([0.0, *shares])]
    return [int(end - start) for start, end in zip(edges, [*edges[1:-1], total], strict=False)]


def _in_turn(cases: Sequence[dict[str, Any]], permutation: Callable[[int], np.ndarray]) -> Iterator[dict[str, Any]]:
    """Yield all cases in a random order, then all again in another, and so on."""
    while True:
        for index in permutation(len(cases)):
            yield cases[index]


def _has_report(case: Mapping[str, Any]) -> bool:
    report = case.get("report") or {}
    return bool(report.get("findings") or report.get("impression"))


def _rarest(case: Mapping[str, Any], num_with_mask: Mapping[str, int]) -> str | None:
    present = [key for key in num_with_mask if has_lesion(case, key)]
    return min(present, key=lambda key: num_with_mask[key], default=None)
