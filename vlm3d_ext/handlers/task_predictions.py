"""One task's predictions, of a network that has this task only or of `vlm3d_ext.networks.nets.VLM3DMultiTask`.

Handlers that measure or write one task's results find them here, and so serve single-task bundles and the joint one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..networks.nets.image_prefix_language_model import GeneratedTexts

__all__ = ["WrittenReports", "classification_ways", "lesion_probabilities", "own_classification", "written_reports"]


def own_classification(prediction: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return what `MultiLabelClassifier` gave for a batch: ``logits``, ``probabilities``, ``predictions``."""
    return prediction.get("classification", prediction)


def classification_ways(
    prediction: Mapping[str, Any], batch: Mapping[str, Any]
) -> list[tuple[Mapping[str, Tensor], Tensor, Tensor]]:
    """Return the ways in which a batch was classified: the classifier's output, whether each row was guided by its
    anatomical mask, and which rows count, both (B,) bool."""
    everything = torch.ones(len(batch["volume_id"]), dtype=torch.bool)
    ways = [(own_classification(prediction), batch["use_anatomical_mask"], everything)]
    if "guided_classification" in prediction:
        ways.append((prediction["guided_classification"], everything, batch["has_anatomical_mask"]))
    return ways


def lesion_probabilities(prediction: Mapping[str, Any], diseases: Sequence[str]) -> Tensor:
    """Return (B, diseases, D, H, W) in [0, 1]."""
    if "localization" in prediction:
        return torch.stack([prediction["localization"][disease] for disease in diseases], dim=1)
    return prediction["probabilities"]


@dataclass(frozen=True)
class WrittenReports:
    """The reports of a batch.

    Attributes:
        generated: one for each case.
        prompts: what was asked.
        num_lesions_left_out: of each prompt.
        evidence_of: the volume whose evidence each report was written from.
    """

    generated: GeneratedTexts
    prompts: Sequence[str]
    num_lesions_left_out: Sequence[int]
    evidence_of: Sequence[str]


def written_reports(prediction: Any, batch: Mapping[str, Any]) -> WrittenReports:
    """Return the reports of a batch, and what they were written from."""
    if isinstance(prediction, GeneratedTexts):
        left_out = [int(number) for number in batch["num_lesions_left_out"]]
        return WrittenReports(prediction, batch["prompt"], left_out, batch["evidence_of"])
    of_task = prediction["generation"]
    return WrittenReports(of_task["generated"], of_task["prompt"], of_task["num_lesions_left_out"], batch["volume_id"])
