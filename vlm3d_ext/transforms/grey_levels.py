"""Grey levels stay bytes up to the device that computes, and become numbers there.

A volume of bytes is a quarter of what its numbers are, to copy and to keep. What is drawn for each sample, a change of
contrast and of brightness, travels beside the bytes and is applied to the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.transforms import RandomizableTransform

__all__ = ["INTENSITY_DRAWS", "RandIntensityFactord", "RandIntensityOffsetd", "network_image"]

_FACTOR, _OFFSET = INTENSITY_DRAWS = ("intensity_factor", "intensity_offset")
_LARGEST_GREY_LEVEL = 255.0


class RandIntensityFactord(RandomizableTransform):
    """Draws a factor for the whole image: adds ``intensity_factor`` () float32, which `network_image` applies.

    It draws from the same random state what MONAI's `RandScaleIntensityd` draws, and `network_image` gives the same
    voxels, bit for bit.

    Args:
        size: largest relative change.
        prob: of any change.
    """

    def __init__(self, size: float, prob: float = 0.5) -> None:
        super().__init__(prob)
        self.size = size

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sample with its factor."""
        self.randomize(None)
        change = self.R.uniform(low=-self.size, high=self.size) if self._do_transform else 0.0
        return {**data, _FACTOR: torch.tensor(1 + change, dtype=torch.float32)}


class RandIntensityOffsetd(RandomizableTransform):
    """Draws an offset for the whole image: adds ``intensity_offset`` () float32, which `network_image` applies after
    the factor.

    It draws from the same random state what MONAI's `RandShiftIntensityd` draws.

    Args:
        size: largest absolute change, in units of the [0, 1] image.
        prob: of any change.
    """

    def __init__(self, size: float, prob: float = 0.5) -> None:
        super().__init__(prob)
        self.size = size

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sample with its offset."""
        self.randomize(None)
        change = self.R.uniform(low=-self.size, high=self.size) if self._do_transform else 0.0
        return {**data, _OFFSET: torch.tensor(change, dtype=torch.float32)}


def network_image(
    batch: Mapping[str, Any], device: torch.device | str | None = None, non_blocking: bool = False
) -> torch.Tensor:
    """Return the image of a batch as the network takes it.

    Args:
        batch: with ``image`` (B, C, D, H, W): uint8 grey levels, or anything else, which is only moved. What the
            transforms of this file have drawn is applied; what ``valid_size`` says is filled up stays 0.
        device: where to; None is where the image is.
        non_blocking: whether the copy may go on while this returns.

    Returns:
        Float32 in [0, 1], but for the changes drawn.
    """
    image = batch["image"].to(device, non_blocking=non_blocking)
    if image.dtype != torch.uint8:
        return image
    # CUDA divides by a plain number as it multiplies by its reciprocal, which is another number in the last bit
    image = image.float().div_(torch.full((), _LARGEST_GREY_LEVEL, device=image.device))
    factor, offset = batch.get(_FACTOR), batch.get(_OFFSET)
    if factor is not None and bool((factor != 1).any()):
        image.mul_(_of_samples(factor, image))
    if offset is not None and bool((offset != 0).any()):
        image.add_(_of_samples(offset, image))
        for row, size in enumerate(batch["valid_size"].tolist() if "valid_size" in batch else ()):
            for axis, valid in enumerate(size, start=1):
                image[row].narrow(axis, valid, image.shape[axis + 1] - valid).zero_()
    return image


def _of_samples(values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return values.to(image.device).reshape(-1, *[1] * (image.ndim - 1))
