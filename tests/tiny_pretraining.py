"""A small encoder with its pre-training heads, and batches of a tiny prepared release for it."""

from __future__ import annotations

import math

import torch
from torch.utils.data import DataLoader

from tests.prepared_release import make_prepared_release
from vlm3d_ext.data.case_manifest import SPLITS, CaseManifest
from vlm3d_ext.data.seeded_dataset import SeededDataset
from vlm3d_ext.networks.nets import EncoderPretraining, PretrainingHeads, ThreeDVisionEncoder
from vlm3d_ext.text.sentence_bank import SentenceBank
from vlm3d_ext.transforms import encoder_pretraining_transforms

PATCH = (4, 8, 8)


def make_network(seed=0):
    """Return the pre-training network of a small encoder with the weights of a seed, in evaluation mode."""
    torch.manual_seed(seed)
    encoder = ThreeDVisionEncoder(
        patch_size=PATCH, hidden_size=24, num_layers=1, num_heads=3, num_depth_heads=1, mlp_dim=16
    )
    return EncoderPretraining(encoder, PretrainingHeads(24, math.prod(PATCH), 64, 8, 16)).eval()


def make_loaders(folder, num_cases=(20, 8, 12), batch_size=4):
    """Write a tiny release; return a loader per split, with the draws of pre-training, and the names of the labels."""
    manifest = CaseManifest(make_prepared_release(folder, num_cases))
    transform = encoder_pretraining_transforms(PATCH, 0.5, SentenceBank.from_cases(manifest.cases("training"), 64))
    loaders = {split: DataLoader(SeededDataset(manifest.cases(split), transform), batch_size) for split in SPLITS}
    return loaders, manifest.label_names
