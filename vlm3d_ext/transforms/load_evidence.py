"""From a case and its evidence to what the report generator reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import Randomizable, Transform
from torch.nn.functional import pad
from torch.utils.data import default_collate

from ..data.evidence_store import EvidenceStore
from ..text.lesion_locations import LesionLocation
from ..text.report_prompt import ReportPrompt
from ..text.report_sections import ReportSections, write_report

__all__ = ["LoadEvidenced", "WritePromptd", "collate_evidence", "reference_report"]

logger = logging.getLogger(__name__)


def reference_report(case: Mapping[Any, Any]) -> str:
    """Return the report of a case as ``"Findings: ... Impression: ..."``; "" where it has none."""
    report = case.get("report") or {}
    return write_report(
        ReportSections(findings=report.get("findings") or "", impression=report.get("impression") or "")
    )


class WritePromptd(Randomizable, Transform):
    """Adds ``prompt``, what the evidence on a case says, ``report``, the case's own as one text, and
    ``num_lesions_left_out`` of the prompt.

    ``evidence_of``, where the case has it, names the volume whose evidence is taken instead (the control that shows the
    generator other patients' scans).

    Args:
        store: where the evidence is.
        prompt: name or path of the template.
        max_prompt_tokens: lesions that make the prompt longer are left out, from the last on.
        count_tokens: how many tokens a prompt takes (`vlm3d_ext.text.report_prompt.PromptTokenCounter`); None counts
            words.
        lesion_dropout: probability of leaving out each lesion's line.
        finding_flips: probability of naming an unlikely finding, or of not naming a likely one, for each finding. The
            classifier knows its training cases too well; without flips the generator would learn to trust it blindly.
    """

    def __init__(
        self,
        store: EvidenceStore,
        prompt: str = "chest_ct_report",
        max_prompt_tokens: int = 512,
        count_tokens: Callable[[str], int] | None = None,
        lesion_dropout: float = 0.0,
        finding_flips: float = 0.0,
    ) -> None:
        self.store = store
        self.prompt = ReportPrompt(prompt)
        self.max_prompt_tokens = max_prompt_tokens
        self.count_tokens = count_tokens or (lambda text: len(text.split()))
        self.lesion_dropout = lesion_dropout
        self.finding_flips = finding_flips

    def __call__(self, data: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the sample with its prompt.

        Raises:
            ResultStoreError: if there is no readable evidence on it.
            ValueError: if the prompt does not fit even without lesions.
        """
        volume_id = str(data.get("evidence_of", data["volume_id"]))
        evidence = self.store.read(volume_id)
        prompt, left_out = self.prompt.fitted(
            self._findings(evidence["findings"]),
            self._lesions(evidence["lesions"]),
            self.count_tokens,
            self.max_prompt_tokens,
        )
        if left_out:
            logger.warning(
                "%s: the prompt is longer than max_prompt_tokens = %d; %d of %d lesions are left out of it.",
                volume_id,
                self.max_prompt_tokens,
                left_out,
                len(evidence["lesions"]),
            )
        return {**data, "prompt": prompt, "num_lesions_left_out": left_out, "report": reference_report(data)}

    def _findings(self, findings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float]]:
        named = []
        for name, finding in findings.items():
            flipped = self.finding_flips > 0 and self.R.random_sample() < self.finding_flips
            if bool(finding["prediction"]) == flipped:
                continue
            probability = float(finding["probability"])
            if flipped:  # as probable as one that is named, or the flip would show
                threshold = float(finding["threshold"])
                probability = threshold + (1 - threshold) * self.R.random_sample()
            named.append((name, probability))
        return named

    def _lesions(self, lesions: Sequence[Mapping[str, Any]]) -> list[str]:
        return [
            LesionLocation.from_json(lesion).sentence()
            for lesion in lesions
            if not (self.lesion_dropout > 0 and self.R.random_sample() < self.lesion_dropout)
        ]


class LoadEvidenced(WritePromptd):
    """Reads the evidence on a case, and writes the prompt: all that the report generator reads of it.

    Input: a case of `CaseManifest.cases`, maybe with ``evidence_of`` (see `WritePromptd`). Output, a new dictionary:
    ``volume_id``, ``evidence_of``; ``local_features`` (N, V), ``global_features`` (V,), ``region_features`` (R, V),
    float32; ``prompt`` and ``report``, texts; ``num_lesions_left_out`` of the prompt; ``labels`` (F,) float32 with NaN
    for unknown.
    """

    def __call__(self, case: Mapping[Hashable, Any]) -> dict[str, Any]:
        """Return what the generator reads of the case; for the errors see `WritePromptd`."""
        volume_id = str(case.get("evidence_of", case["volume_id"]))
        written = super().__call__(case)
        features = self.store.read_features(volume_id)
        local = torch.from_numpy(features["local_features"]).float()
        return {
            "volume_id": case["volume_id"],
            "evidence_of": volume_id,
            "local_features": local.flatten(0, -2),
            "global_features": torch.from_numpy(features["global_features"]),
            "region_features": torch.from_numpy(features["region_features"]),
            "prompt": written["prompt"],
            "num_lesions_left_out": written["num_lesions_left_out"],
            "report": written["report"],
            "labels": torch.tensor(case["labels"], dtype=torch.float32),
        }


def collate_evidence(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate samples of `LoadEvidenced`, filling local features up with zeros to the most tokens of the batch.

    ``token_mask`` (B, N), False where filled up, is there only where anything was.
    """
    sizes = [sample["local_features"].shape[0] for sample in samples]
    largest = max(sizes)
    filled = []
    for sample, size in zip(samples, sizes, strict=True):
        sample = {**sample, "local_features": pad(sample["local_features"], (0, 0, 0, largest - size))}
        if min(sizes) < largest:
            sample["token_mask"] = torch.arange(largest) < size
        filled.append(sample)
    return default_collate(filled)
