"""From a case of the manifest to tensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform

from ..data.kept_files import ReadsFiles
from ..data.prepared_case import read_prepared_npz

__all__ = ["LoadPreparedCased"]


class LoadPreparedCased(ReadsFiles, Transform):
    """Reads the NPZ of a case and keeps what a network needs.

    Input: a case of `CaseManifest.cases`. Output, a new dictionary: ``volume_id`` (str), ``image`` (C, D, H, W) float32
    in [0, 1], ``anatomical_mask`` (D, H, W) uint8, ``has_anatomical_mask`` () bool, ``spacing_mm`` (3,) float32 [z, y,
    x], ``labels`` (L,) float32 with NaN for unknown, ``report``; ``use_anatomical_mask`` where the case says it; and
    what `keep` names, as it is.

    Args:
        keep: further entries of the case to hand on.

    Raises:
        PreparedCaseError: if the file is not a sound prepared case.
    """

    def __init__(self, keep: Sequence[str] = ()) -> None:
        self.keep = tuple(keep)

    def __call__(self, case: Mapping[Hashable, Any]) -> dict[str, Any]:
        """Return the loaded case."""
        imgs, gts, spacing = self.kept_files.read(case["image"], _arrays)
        imgs = imgs if imgs.ndim == 4 else imgs[None]
        decided = {"use_anatomical_mask": case["use_anatomical_mask"]} if "use_anatomical_mask" in case else {}
        return {
            **decided,
            "volume_id": case["volume_id"],
            "image": torch.from_numpy(imgs.astype(np.float32) / 255.0),
            "anatomical_mask": torch.from_numpy(gts.copy()),
            "has_anatomical_mask": torch.tensor(bool(case["has_anatomical_mask"])),
            "spacing_mm": torch.from_numpy(spacing.astype(np.float32)),
            "labels": torch.tensor(case["labels"], dtype=torch.float32),
            "report": case.get("report"),
            **{name: case[name] for name in self.keep if name in case},
        }


def _arrays(path: str) -> tuple[np.ndarray, ...]:
    case = read_prepared_npz(path)
    return case.imgs, case.gts, case.spacing
