"""Batches of scans of different sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils.data import default_collate

from .lesion_cases import UNKNOWN

__all__ = ["collate_padded"]


def collate_padded(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate samples, filling images and anatomical masks up with zeros and targets with "unknown" to the largest size
    of the batch.

    ``valid_size`` (B, 3), the real voxels of each image, is kept where anything was filled up, by this function or by a
    transform before it, and left out where nothing was: masked attention is slower. Crops have one size already.

    Args:
        samples: each with ``image`` (C, d, h, w), and maybe ``anatomical_mask`` (d, h, w) and ``target``, (L, d, h, w)
            or crops (K, L, ...).
    """
    sizes = [tuple(sample["image"].shape[1:]) for sample in samples]
    largest = tuple(max(size[axis] for size in sizes) for axis in range(3))
    filled = []
    for sample, size in zip(samples, sizes, strict=True):
        sample = {"valid_size": torch.tensor(size), **sample}
        missing = [most - n for most, n in zip(largest, size, strict=True)]
        widths = (0, missing[2], 0, missing[1], 0, missing[0])
        if any(missing):
            sample["image"] = pad(sample["image"], widths)
            if "anatomical_mask" in sample:
                sample["anatomical_mask"] = pad(sample["anatomical_mask"], widths)
            if "target" in sample and tuple(sample["target"].shape[1:]) == size:
                sample["target"] = pad(sample["target"], widths, value=UNKNOWN)
        filled.append(sample)
    if all(tuple(sample["valid_size"].tolist()) == largest for sample in filled):
        filled = [{name: value for name, value in sample.items() if name != "valid_size"} for sample in filled]
    return default_collate(filled)
