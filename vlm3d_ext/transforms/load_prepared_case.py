"""From a case of the manifest to tensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform

from ..data.batch_slots import FillsSlots
from ..data.kept_files import ReadsFiles
from ..data.prepared_case import read_prepared_case

__all__ = ["LoadPreparedCased"]


class LoadPreparedCased(ReadsFiles, FillsSlots, Transform):
    """Reads the volume of a case and keeps what a network needs.

    Input: a case of `CaseManifest.cases`. Output, a new dictionary: ``volume_id`` (str), ``image`` (C, D, H, W) uint8
    grey levels (`network_image` makes numbers of them), ``anatomical_mask`` (D, H, W) uint8, ``has_anatomical_mask`` ()
    bool, ``spacing_mm`` (3,) float32 [z, y, x], ``labels`` (L,) float32 with NaN for unknown, ``report``;
    ``use_anatomical_mask`` where the case says it; and what `keep` names, as it is. Image and mask lie in the slot
    where there is one of their shape.

    Args:
        keep: further entries of the case to hand on.

    Raises:
        PreparedCaseError: if the file is not a sound prepared case.
    """

    def __init__(self, keep: Sequence[str] = ()) -> None:
        self.keep = tuple(keep)

    def __call__(self, case: Mapping[Hashable, Any]) -> dict[str, Any]:
        """Return the loaded case."""
        image, regions, spacing = self._read(case["image"])
        decided = {"use_anatomical_mask": case["use_anatomical_mask"]} if "use_anatomical_mask" in case else {}
        return {
            **decided,
            "volume_id": case["volume_id"],
            "image": torch.from_numpy(image),
            "anatomical_mask": torch.from_numpy(regions),
            "has_anatomical_mask": torch.tensor(bool(case["has_anatomical_mask"])),
            "spacing_mm": torch.from_numpy(spacing.astype(np.float32)),
            "labels": torch.tensor(case["labels"], dtype=torch.float32),
            "report": case.get("report"),
            **{name: case[name] for name in self.keep if name in case},
        }

    def _read(self, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return image (C, D, H, W), regions and spacing, which may be written to."""
        image_place, regions_place = (
            self.slot.row(name) if self.slot else None for name in ("image", "anatomical_mask")
        )
        if self.kept_files.max_bytes:
            imgs, gts, spacing = self.kept_files.read(path, _arrays)
            image = _copied(imgs if imgs.ndim == 4 else imgs[None], image_place)
            regions = _copied(gts, regions_place)
        else:
            loaded = read_prepared_case(path, (image_place, regions_place))
            image = loaded.imgs if loaded.imgs.ndim == 4 else loaded.imgs[None]
            regions, spacing = loaded.gts, loaded.spacing
        if self.slot:
            self.slot.expect("image", image)
            self.slot.expect("anatomical_mask", regions)
        return image, regions, spacing


def _copied(array: np.ndarray, place: np.ndarray | None) -> np.ndarray:
    """Return a copy, in its place if it fits there."""
    copy = place if place is not None and place.shape == array.shape else np.empty_like(array)
    np.copyto(copy, array)
    return copy


def _arrays(path: str) -> tuple[np.ndarray, ...]:
    case = read_prepared_case(path)
    return case.imgs, case.gts, case.spacing
