"""Batches of random numbers of the shapes that bundles train on: what a step costs does not depend on the values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm3d_ext.data.anatomical_regions import NUM_REGIONS
from vlm3d_ext.text.disease_set import load_disease_set
from vlm3d_ext.text.label_set import load_label_set
from vlm3d_ext.text.report_prompt import ReportPrompt

from .shipped_training import ShippedTraining

__all__ = ["evidence_batch", "first_case", "joint_batch", "localization_batch", "pretraining_batch", "report_of_words"]

_SPACING_MM = (5.0, 0.75, 0.75)
_NGRAMS = 64
_LESION_SHARE = 0.01
_SENTENCE = "There is a small pleural effusion on the right side and no pneumothorax . "


def pretraining_batch(training: ShippedTraining, batch_size: int, size: Sequence[int]) -> dict[str, Tensor]:
    """Return a batch of `vlm3d_ext.networks.nets.EncoderPretraining`.

    Half of the cases hide tokens, and half are guided by their mask, as many as the shipped probabilities draw.
    """
    device = training.device
    tokens = math.prod(n // p for n, p in zip(size, training.knob("patch_size"), strict=True))
    sentences = training.knob("num_true_sentences") + training.knob("num_untrue_sentences")
    hidden = torch.rand(batch_size, tokens, device=device) < training.knob("mask_ratio")
    every_other = torch.arange(batch_size, device=device) % 2 == 0
    shape = (batch_size, sentences)
    return {
        **_scans(training, batch_size, size),
        "patch_mask": hidden & every_other[:, None],
        "sentence_ngrams": torch.randint(1, training.knob("num_text_buckets"), (*shape, _NGRAMS), device=device),
        "sentence_regions": torch.rand(*shape, NUM_REGIONS, device=device) < 0.1,
        "sentence_is_true": torch.arange(sentences, device=device).expand(shape) < training.knob("num_true_sentences"),
        "sentence_mask": torch.ones(shape, dtype=torch.bool, device=device),
    }


def localization_batch(training: ShippedTraining, batch_size: int, size: Sequence[int]) -> dict[str, Tensor]:
    """Return a batch of `vlm3d_ext.networks.nets.LocalizationTraining`, whole scans with crops of all diseases."""
    scans = _scans(training, batch_size, size)
    return {name: scans[name] for name in ("image", "spacing_mm")} | _crops(training, batch_size, size)


def joint_batch(training: ShippedTraining, batch_size: int, size: Sequence[int], report_words: int) -> dict[str, Any]:
    """Return a batch of `vlm3d_ext.networks.nets.MultiTaskTraining` in which every case has everything."""
    num_findings = load_label_set(training.knob("label_set")).num_findings
    return {
        **_scans(training, batch_size, size),
        **_crops(training, batch_size, size),
        "labels": torch.randint(0, 2, (batch_size, num_findings), device=training.device).float(),
        "prompt": [_prompt()] * batch_size,
        "report": [report_of_words(report_words)] * batch_size,
    }


def evidence_batch(training: ShippedTraining, batch_size: int, size: Sequence[int]) -> dict[str, Any]:
    """Return a batch of `vlm3d_ext.engines.grpo_iteration.GrpoIteration`: pooled features, prompts, references."""
    channels, pooling = training.knob("hidden_size"), training.knob("pooling")
    grid = [n // p for n, p in zip(size, training.knob("patch_size"), strict=True)]
    tokens = grid[0] * math.ceil(grid[1] / pooling) * math.ceil(grid[2] / pooling)
    return {
        "local_features": torch.randn(batch_size, tokens, channels),
        "global_features": torch.randn(batch_size, channels),
        "region_features": torch.randn(batch_size, NUM_REGIONS, channels),
        "prompt": [_prompt()] * batch_size,
        "report": [report_of_words(60)] * batch_size,
        "labels": torch.zeros(batch_size, load_label_set(training.knob("label_set")).num_findings),
    }


def first_case(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch of the first case alone, its scan whole instead of in crops, as validation sees it."""
    case = {name: value[:1] for name, value in batch.items() if name != "crop_start"}
    if "crop_start" in batch:
        image, num_diseases = case["image"], case["target"].shape[2]
        lesions = torch.rand(1, num_diseases, *image.shape[2:], device=image.device) < _LESION_SHARE
        case["target"] = lesions.to(torch.uint8)
    return case


def report_of_words(num_words: int) -> str:
    """Return a report of so many words, which need not make sense."""
    words = _SENTENCE.split()
    return " ".join(words[number % len(words)] for number in range(num_words))


def _prompt() -> str:
    findings = [("Pleural effusion", 0.83), ("Lung nodule", 0.77), ("Cardiomegaly", 0.64)]
    lesion = "lung nodule in the right lower lobe, 1.2 ml, at 40 % of the height"
    return ReportPrompt().text(findings, [lesion] * 6)


def _scans(training: ShippedTraining, batch_size: int, size: Sequence[int]) -> dict[str, Tensor]:
    device = training.device
    every_other = torch.arange(batch_size, device=device) % 2 == 0
    return {
        "image": torch.rand(batch_size, training.knob("in_channels"), *size, device=device),
        "anatomical_mask": torch.randint(0, NUM_REGIONS + 1, (batch_size, *size), device=device, dtype=torch.uint8),
        "spacing_mm": torch.tensor(_SPACING_MM, device=device).expand(batch_size, 3),
        "has_anatomical_mask": torch.ones(batch_size, dtype=torch.bool, device=device),
        "use_anatomical_mask": every_other,
    }


def _crops(training: ShippedTraining, batch_size: int, size: Sequence[int]) -> dict[str, Tensor]:
    device, crop_size, patch = training.device, training.knob("crop_size"), training.knob("patch_size")
    num_crops = training.knob("num_crops")
    num_diseases = load_disease_set(training.knob("disease_set")).num_diseases
    lesions = torch.rand(batch_size, num_crops, num_diseases, *crop_size, device=device) < _LESION_SHARE
    starts = [
        torch.randint(0, (n - crop) // p + 1, (batch_size, num_crops), device=device) * p
        for n, crop, p in zip(size, crop_size, patch, strict=True)
    ]
    return {"target": lesions.to(torch.uint8), "crop_start": torch.stack(starts, dim=-1)}
