"""From the lesion masks of a case to a target, and from a scan to crops around its lesions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from monai.transforms import Randomizable, Transform

from ..data.kept_files import ReadsFiles
from ..data.lesion_cases import UNKNOWN
from ..data.prepared_case import PreparedCaseError
from ..data.scan_reader import read_mask
from ..text.disease_set import DiseaseSet

__all__ = ["LoadLesionTargetsd", "RandLesionCropsd"]


class LoadLesionTargetsd(ReadsFiles, Transform):
    """Reads the lesion masks of a case on its prepared grid: adds ``target`` (L, D, H, W) uint8.

    1 is lesion, 0 is none, 255 is unknown. A disease without a mask, or with an empty one, is 0 everywhere if the label
    says that it is absent, otherwise unknown everywhere (`LesionCases` says what an empty mask means). Where the
    annotation is partial, a shell around the marked lesions is 0 and the rest unknown, so that a lesion nobody marked
    is not punished.

    Takes away ``lesion_masks``, ``lesion_masks_partial`` and ``disease_labels``.

    Args:
        disease_set: the order of the L diseases.
        partial_shell_mm: thickness of the shell around partially annotated lesions.

    Raises:
        UnusableScanError: if a mask cannot be read.
        PreparedCaseError: if a mask has other values than 0 and 1, or lies on another grid than the image.
    """

    def __init__(self, disease_set: DiseaseSet, partial_shell_mm: float = 15.0) -> None:
        self.disease_set = disease_set
        self.partial_shell_mm = partial_shell_mm

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sample with its target."""
        data = dict(data)
        masks, labels = data.pop("lesion_masks"), data.pop("disease_labels")
        partial = data.pop("lesion_masks_partial", ())
        size = tuple(data["image"].shape[1:])
        target = np.empty((self.disease_set.num_diseases, *size), dtype=np.uint8)
        for index, disease in enumerate(self.disease_set.keys):
            mask = self._read(masks[disease], size) if disease in masks else None
            if mask is None or not mask.any():
                target[index] = 0 if labels[index] == 0 else UNKNOWN
                continue
            target[index] = mask
            if disease in partial:
                self._forget_what_is_far(target[index], data["spacing_mm"].tolist())
        data["target"] = torch.from_numpy(target)
        return data

    def _read(self, path: str, size: tuple[int, ...]) -> np.ndarray:
        shape, bits = self.kept_files.read(path, _shape_and_bits)
        if tuple(shape) != size:
            raise PreparedCaseError(
                f"{path}: the mask has shape {tuple(shape.tolist())}, its prepared image {size}; prepare the scan "
                "again."
            )
        return np.unpackbits(bits, count=math.prod(size)).reshape(size)

    def _forget_what_is_far(self, target: np.ndarray, spacing_mm: Sequence[float]) -> None:
        distance = scipy.ndimage.distance_transform_edt(target == 0, sampling=spacing_mm)
        target[distance > self.partial_shell_mm] = UNKNOWN


def _shape_and_bits(path: str) -> tuple[np.ndarray, ...]:
    """Return the shape of a mask of 0 and 1, and its voxels as bits: an eighth of the memory."""
    mask, _ = read_mask(path)
    if mask.max() > 1:
        raise PreparedCaseError(
            f"{path}: the mask has values up to {mask.max()}, expected 0 and 1; prepare the scan again."
        )
    return np.array(mask.shape), np.packbits(mask)


class RandLesionCropsd(Randomizable, Transform):
    """Chooses crops of a scan: adds ``crop_start`` (K, 3) int64, cuts ``target`` to (K, L, *crop_size).

    Every second crop, the first to begin with, holds a voxel of ``crop_disease`` if the case names one; the others
    hold a voxel of any known lesion, or lie anywhere, by equal chance. Positive and negative crops of a disease are
    thus in balance, and so are diseases, if the cases are (`LesionCases.balanced`). A scan smaller than the crop is
    filled up with zeros that are unknown in the target, its anatomical mask with background; ``valid_size`` (3,) says
    how much of it is real.

    Takes away ``crop_disease``.

    Args:
        disease_set: the order of the diseases.
        crop_size: (d, h, w) voxels, multiples of the patch.
        patch_size: (d, h, w) voxels of a token; crops begin where a token begins.
        num_crops: K.

    Raises:
        ValueError: if the crop is no multiple of the patch.
    """

    def __init__(
        self, disease_set: DiseaseSet, crop_size: Sequence[int], patch_size: Sequence[int], num_crops: int = 2
    ) -> None:
        if any(n < p or n % p for n, p in zip(crop_size, patch_size, strict=True)):
            raise ValueError(f"crop_size must be multiples of the patch {tuple(patch_size)}, got {tuple(crop_size)}.")
        self.disease_set = disease_set
        self.crop_size = tuple(crop_size)
        self.patch_size = tuple(patch_size)
        self.num_crops = num_crops

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sample with its crops."""
        data = dict(data)
        image, target = data["image"], data["target"]
        wanted = data.pop("crop_disease", None)
        size = image.shape[1:]
        data["valid_size"] = torch.tensor(tuple(size))
        whole = [max(-(-n // p) * p, crop) for n, p, crop in zip(size, self.patch_size, self.crop_size, strict=True)]
        missing = [w - n for w, n in zip(whole, size, strict=True)]
        if any(missing):
            widths = (0, missing[2], 0, missing[1], 0, missing[0])
            image = data["image"] = torch.nn.functional.pad(image, widths)
            target = torch.nn.functional.pad(target, widths, value=UNKNOWN)
            if "anatomical_mask" in data:
                data["anatomical_mask"] = torch.nn.functional.pad(data["anatomical_mask"], widths)
        present = [index for index in range(len(target)) if bool((target[index] == 1).any())]
        starts, crops = [], []
        for number in range(self.num_crops):
            start = self._start(self._centre(target, present, wanted, number), size, whole)
            starts.append(start)
            crops.append(target[(slice(None), *(slice(s, s + n) for s, n in zip(start, self.crop_size, strict=True)))])
        data["crop_start"] = torch.tensor(starts)
        data["target"] = torch.stack(crops)
        return data

    def _centre(self, target: torch.Tensor, present: list[int], wanted: str | None, number: int) -> list[int] | None:
        """Return a voxel that the crop must hold, or None for any place."""
        if number % 2 == 0 and wanted is not None and self.disease_set.index(wanted) in present:
            disease = self.disease_set.index(wanted)
        elif present and self.R.random_sample() < 0.5:
            disease = present[self.R.randint(len(present))]
        else:
            return None
        voxels = torch.nonzero(target[disease] == 1)
        return voxels[self.R.randint(len(voxels))].tolist()

    def _start(self, centre: list[int] | None, size: Sequence[int], whole: Sequence[int]) -> list[int]:
        start = []
        for axis, (crop, patch) in enumerate(zip(self.crop_size, self.patch_size, strict=True)):
            last = (whole[axis] - crop) // patch
            if centre is None:
                start.append(self.R.randint(last + 1) * patch)
                continue
            # all starts, in patches, with which the crop holds the voxel
            lowest = max(0, -(-(centre[axis] - crop + 1) // patch))
            highest = min(last, centre[axis] // patch)
            start.append(self.R.randint(lowest, highest + 1) * patch)
        return start
