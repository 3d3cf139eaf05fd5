"""A joint network of a few thousand weights, and batches for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tests.networks.tiny_localizer import HIDDEN, tiny_stages
from vlm3d_ext.losses import PartialDiceCrossEntropy, WeightedBinaryCrossEntropy
from vlm3d_ext.networks.blocks.prompted_text_encoder import PromptedTextEncoder
from vlm3d_ext.networks.heads import MultiLabelClassifier
from vlm3d_ext.networks.nets import (
    LesionLocalizationModule,
    MultiTaskTraining,
    ScanEvidence,
    VLM3DMultiTask,
    VolumeClassifier,
    report_generator_network,
)

SIZE = (4, 16, 16)
FINDINGS, DISEASES = 18, 5
PROMPT = "<image>\nClassified findings: none\nReport:"


def tiny_vision(max_noise: float = 0.0) -> ScanEvidence:
    """Return encoder, classifier and localizer of equal encoders, seeded."""
    stages = tiny_stages(max_noise)
    torch.manual_seed(1)
    head = MultiLabelClassifier(
        hidden_size=HIDDEN, text_hidden_size=16, projection_dim=8, num_soft_tokens=2, num_attention_heads=2,
        attention_head_dim=3, dropout=0.0,
    )  # fmt: skip
    head.text_embeddings.normal_()
    encoder = stages["encoder"]
    localizer = LesionLocalizationModule(**{**stages, "encoder": copy.deepcopy(encoder)})
    return ScanEvidence(encoder, VolumeClassifier(copy.deepcopy(encoder), head), localizer)


def tiny_multitask(language_model: Path, network: type[VLM3DMultiTask] = VLM3DMultiTask, max_noise: float = 0.0) -> Any:
    """Return the joint network in evaluation mode; its adapters do something."""
    vision = tiny_vision(max_noise)
    torch.manual_seed(2)
    generator = report_generator_network(
        HIDDEN, num_queries=2, projector_layers=1, projector_heads=2, language_model=str(language_model),
        dtype="float32", lora_rank=2, lora_alpha=4, max_prompt_tokens=1600, max_report_tokens=24,
    )  # fmt: skip
    for weight in generator.language_model.adapters.values():
        torch.nn.init.normal_(weight, std=0.05)
    return network(vision, generator).eval()


def tiny_training(language_model: Path, text_model: Path, max_noise: float = 0.0, **options: Any) -> MultiTaskTraining:
    """Return the joint network in training; batch statistics are left out, so that cases do not meet in them."""
    training = MultiTaskTraining(
        tiny_multitask(language_model, max_noise=max_noise),
        PromptedTextEncoder(str(text_model)),
        WeightedBinaryCrossEntropy([2.0] * FINDINGS),
        PartialDiceCrossEntropy(absent_voxels=20.0),
        **options,
    ).train()
    for module in training.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return training


def tiny_batch(batch: int = 2, seed: int = 0, crops: bool = True) -> dict[str, Any]:
    """Return a batch in which every case has everything."""
    random = torch.Generator().manual_seed(seed)
    size = (4, 8, 8) if crops else SIZE
    shape = (batch, 2, DISEASES, *size) if crops else (batch, DISEASES, *size)
    batch_of: dict[str, Any] = {
        "image": torch.rand(batch, 1, *SIZE, generator=random),
        "labels": torch.randint(0, 2, (batch, FINDINGS), generator=random).float(),
        "target": torch.randint(0, 2, shape, generator=random).to(torch.uint8),
        "anatomical_mask": torch.randint(0, 21, (batch, *SIZE), generator=random),
        "has_anatomical_mask": torch.ones(batch, dtype=torch.bool),
        "use_anatomical_mask": torch.ones(batch, dtype=torch.bool),
        "spacing_mm": torch.tensor([[5.0, 2.0, 2.0], [3.0, 2.0, 1.0], [4.0, 1.0, 1.0]])[:batch],
        "prompt": [PROMPT] * batch,
        "report": ["Findings: nodule.", "Findings: normal lung.", "Findings: effusion."][:batch],
    }
    if crops:
        batch_of["crop_start"] = torch.tensor([[[0, 0, 0], [0, 8, 4]]] * batch)
    return batch_of
