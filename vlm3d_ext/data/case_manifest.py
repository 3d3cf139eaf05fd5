"""Reading the manifest that `data_prep.prepare` writes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "SPLITS",
    "CaseManifest",
    "ManifestError",
    "with_and_without_mask",
    "with_other_patients_evidence",
    "with_report",
]

SPLITS = ("training", "validation", "test")
_CASE_KEYS = ("volume_id", "patient_id", "image", "geometry", "has_anatomical_mask", "labels", "lesion_masks")
_NEXT_STEP = "Make it with `python -m data_prep.prepare --source RAW --output FOLDER`, or point --manifest at another."


class ManifestError(ValueError):
    """The manifest is absent or cannot be right; the message says what to do."""


class CaseManifest:
    """A prepared data set: its cases by split, its label names, its fingerprint.

    The format is described in docs/design.md. Paths in cases become absolute. Manifests of earlier versions lack
    ``lesion_masks_original_grid`` and ``lesion_masks_partial``; their cases get empty ones.

    Args:
        path: the manifest.json.

    Raises:
        ManifestError: if the file is missing, is not such a manifest, lists a volume twice, gives one too few or too
            many labels, or has a patient in two splits.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
            self.content: dict[str, Any] = dict(json.loads(content))
            self.label_names: list[str] = list(self.content["label_names"])
            self.fingerprint: str = self.content["fingerprint"]
            self._cases = {split: self.content[split] for split in SPLITS}
        except FileNotFoundError:
            raise ManifestError(f"{self.path}: no such manifest. {_NEXT_STEP}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ManifestError(f"{self.path}: not JSON ({error}). {_NEXT_STEP}") from None
        except KeyError as error:
            raise ManifestError(f"{self.path}: a manifest needs the key {error}. {_NEXT_STEP}") from None
        except (TypeError, ValueError):
            raise ManifestError(f"{self.path}: JSON, but not an object with lists of cases. {_NEXT_STEP}") from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._check()

    def _check(self) -> None:
        split_of_patient: dict[str, str] = {}
        seen: set[str] = set()
        for split in SPLITS:
            for number, case in enumerate(self._cases[split]):
                absent = [key for key in _CASE_KEYS if key not in case]
                if absent:
                    raise ManifestError(f"{self.path}: {split} case {number} has no {absent[0]!r}. {_NEXT_STEP}")
                volume_id, patient_id = case["volume_id"], case["patient_id"]
                if volume_id in seen:
                    raise ManifestError(f"{self.path}: volume {volume_id} is listed twice. {_NEXT_STEP}")
                seen.add(volume_id)
                if len(case["labels"]) not in (0, len(self.label_names)):
                    raise ManifestError(
                        f"{self.path}: volume {volume_id} has {len(case['labels'])} labels, expected "
                        f"{len(self.label_names)} or none. {_NEXT_STEP}"
                    )
                if split_of_patient.setdefault(patient_id, split) != split:
                    raise ManifestError(
                        f"{self.path}: patient {patient_id} is in {split_of_patient[patient_id]} and in {split}; "
                        f"results would be worthless. {_NEXT_STEP}"
                    )

    def cases(self, split: str | Sequence[str], max_cases: int | None = None) -> list[dict[str, Any]]:
        """Return the cases of one or several splits, with absolute paths and labels as floats (unknown is NaN).

        Args:
            split: "training", "validation", "test", or several of them.
            max_cases: keep the first so many; None keeps all.

        Raises:
            ManifestError: if there is no such split, or it has no case.
        """
        names = [split] if isinstance(split, str) else list(split)
        unknown = [name for name in names if name not in SPLITS]
        if unknown:
            raise ManifestError(f"{self.path}: no split {unknown[0]!r}; the splits are {list(SPLITS)}.")
        cases = [self._resolve(case) for name in names for case in self._cases[name]][:max_cases]
        if not cases:
            counts = {name: len(self._cases[name]) for name in SPLITS}
            raise ManifestError(
                f"{self.path}: no case in {' or '.join(names)} (the manifest has {counts}). {_NEXT_STEP}"
            )
        return cases

    def _resolve(self, case: dict[str, Any]) -> dict[str, Any]:
        folder = self.path.parent.resolve()

        def absolute(paths: dict[str, str]) -> dict[str, str]:
            return {disease: str(folder / path) for disease, path in paths.items()}

        labels = [math.nan if value is None else float(value) for value in case["labels"]]
        return {
            **case,
            "image": str(folder / case["image"]),
            "geometry": str(folder / case["geometry"]),
            "labels": labels or [math.nan] * len(self.label_names),
            "lesion_masks": absolute(case["lesion_masks"]),
            "lesion_masks_original_grid": absolute(case.get("lesion_masks_original_grid", {})),
            "lesion_masks_partial": list(case.get("lesion_masks_partial", ())),
        }


def with_and_without_mask(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each case without its anatomical mask, then each that has one with it, marked ``use_anatomical_mask``.

    What is measured on both says what a missing mask costs.
    """
    unguided = [{**case, "use_anatomical_mask": False} for case in cases]
    return unguided + [{**case, "use_anatomical_mask": True} for case in cases if case["has_anatomical_mask"]]


def with_report(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cases that have a report with findings or an impression.

    Raises:
        ManifestError: if none has.
    """
    kept = [case for case in cases if any((case.get("report") or {}).get(key) for key in ("findings", "impression"))]
    if not kept:
        raise ManifestError(
            f"none of the {len(cases)} cases has a report; prepare data with reports, or write some with "
            "`python -m data_prep.write_reports`."
        )
    return kept


def with_other_patients_evidence(cases: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Return each case marked ``evidence_of`` a volume of another patient.

    This is the control that tells what a report generator sees of the scan from what it knows of reports.

    Volumes are dealt out so that each serves once, or nearly so; the same for the same cases and seed.

    Raises:
        ManifestError: if all cases are of one patient.
    """
    if len({case["patient_id"] for case in cases}) < 2:
        raise ManifestError("the control needs scans of at least two patients; evaluate more cases.")
    order = sorted(
        range(len(cases)), key=lambda row: hashlib.sha256(f"{seed} {cases[row]['volume_id']}".encode()).digest()
    )
    shuffled = []
    for place, row in enumerate(order):
        steps = range(1, len(order))
        other = next(
            cases[order[(place + step) % len(order)]]
            for step in steps
            if cases[order[(place + step) % len(order)]]["patient_id"] != cases[row]["patient_id"]
        )
        shuffled.append({**cases[row], "evidence_of": other["volume_id"]})
    return shuffled
