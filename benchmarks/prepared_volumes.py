"""Prepared data sets of smooth random volumes, for what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from vlm3d_ext.data.anatomical_regions import NUM_REGIONS
from vlm3d_ext.data.atomic_files import write_json
from vlm3d_ext.data.prepared_case import write_prepared_case
from vlm3d_ext.text.label_set import load_label_set

__all__ = ["smooth_volume", "write_prepared_set"]

_LABEL_SET = "ct_rate_18"
_COARSE = (8, 16, 16)
_REPORT = {
    "findings": "There is a small right pleural effusion. The heart is enlarged. No pneumothorax is seen.",
    "impression": "Small right pleural effusion.",
}


def smooth_volume(size: Sequence[int], seed: int, noise: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
    """Return grey levels and regions, (D, H, W) uint8, that compress about as those of a scan do.

    Args:
        size: (D, H, W).
        seed: no two give the same.
        noise: standard deviation of what is not smooth, in grey levels.
    """
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, *_COARSE, generator=random)
    smooth = interpolate(coarse, list(size), mode="trilinear")[0, 0]
    grey = 400 * smooth - 72 + noise * torch.randn(list(size), generator=random)
    # what a window cuts off is flat, as air and bone are
    grey = torch.where(smooth < 0.4, torch.zeros(()), grey).clamp(0, 255)
    regions = torch.where(smooth < 0.4, torch.zeros(()), (smooth - 0.4) * NUM_REGIONS)
    return grey.round().to(torch.uint8).numpy(), regions.clamp(0, NUM_REGIONS).to(torch.uint8).numpy()


def write_prepared_set(
    folder: Path, num_cases: int, size: Sequence[int], volume_format: str = "npz", noise: float = 6.0
) -> Path:
    """Write prepared cases and their manifest.

    Args:
        folder: made if need be.
        num_cases: all of them training cases.
        size: (D, H, W).
        volume_format: of `write_prepared_case`.
        noise: of `smooth_volume`.

    Returns:
        The manifest's path.
    """
    labels = list(load_label_set(_LABEL_SET).names)
    cases: list[dict[str, Any]] = []
    for number in range(num_cases):
        volume_id = f"train_{number + 1}_a_1"
        imgs, gts = smooth_volume(size, number, noise)
        image, sidecar = write_prepared_case(
            folder, volume_id, imgs, gts, (5.0, 0.75, 0.75), {"volume_id": volume_id}, volume_format=volume_format
        )
        cases.append(
            {
                "volume_id": volume_id, "scan_id": f"train_{number + 1}_a", "patient_id": f"train_{number + 1}",
                "image": f"volumes/{image.name}", "geometry": f"volumes/{sidecar.name}", "has_anatomical_mask": True,
                "labels": [number % 2] * len(labels), "lesion_masks": {}, "report": _REPORT,
            }
        )  # fmt: skip
    content = {
        "name": "random", "label_set": _LABEL_SET, "label_names": labels, "fingerprint": f"random {num_cases} {size}",
        "training": cases, "validation": [], "test": [],
    }  # fmt: skip
    path = folder / "manifest.json"
    write_json(path, content)
    return path
