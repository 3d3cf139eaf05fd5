"""Counting inside patches: what a token's voxels are, and which region they belong to.

Shapes: B batch, N tokens (ordered z, y, x), V voxels of a token, C input channels, R regions, K intensity bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["pad_to_patches", "region_histograms_of_tokens", "region_shares_of_mask", "volume_to_patches"]


def pad_to_patches(volume: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Append zeros along the last three axes until their sizes are multiples of the patch."""
    padding = [(-s) % p for s, p in zip(volume.shape[-3:], patch_size, strict=True)]
    return pad(volume, (0, padding[2], 0, padding[1], 0, padding[0])) if any(padding) else volume


def volume_to_patches(image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Cut (B, C, d, h, w) into (B, N, C · V), channel by channel; padded with zeros to whole patches."""
    image = pad_to_patches(image, patch_size)
    batch, channels, depth, height, width = image.shape
    p_d, p_h, p_w = patch_size
    patches = image.view(batch, channels, depth // p_d, p_d, height // p_h, p_h, width // p_w, p_w)
    return patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels * p_d * p_h * p_w)


def region_shares_of_mask(anatomical_mask: Tensor, patch_size: Sequence[int], num_regions: int) -> Tensor:
    """Return the share of background and of each region in each token.

    Args:
        anatomical_mask: (B, d, h, w) integers 0 to `num_regions`; what is added to fill a patch is background.
        patch_size: (D, H, W) voxels of a token.
        num_regions: R.

    Returns:
        (B, N, 1 + R) in [0, 1]; sums to 1 in each token.
    """
    labels = volume_to_patches(anatomical_mask[:, None], patch_size).long()
    counts = torch.zeros(*labels.shape[:2], 1 + num_regions, device=labels.device)
    counts.scatter_add_(2, labels, torch.ones_like(labels, dtype=counts.dtype))
    return counts / labels.shape[-1]


@torch.no_grad()
def region_histograms_of_tokens(
    image: Tensor, anatomical_mask: Tensor | None, patch_size: Sequence[int], num_regions: int, num_bins: int
) -> Tensor:
    """Return the histogram of each token's intensities; with a mask, one for background and for each region.

    Args:
        image: (B, C, d, h, w) in [0, 1].
        anatomical_mask: (B, d, h, w) integers 0 to `num_regions`, or None.
        patch_size: (D, H, W) voxels of a token.
        num_regions: R.
        num_bins: K equal bins of [0, 1]; values outside count in the first or last bin.

    Returns:
        (B, N, C, 1 + R, K) shares of the token's voxels, which sum to 1 over the last two axes; without a mask
        (B, N, C, 1, K).
    """
    batch, channels = image.shape[:2]
    # whole numbers of two bytes: cutting into patches moves memory about, and a float takes twice as much
    bins = (image * num_bins).clamp_(0, num_bins - 1).to(torch.int16)
    index = volume_to_patches(bins, patch_size).unflatten(2, (channels, -1))  # (B, N, C, V)
    groups = 1
    if anatomical_mask is not None:
        groups = 1 + num_regions
        first_bin = anatomical_mask[:, None].to(torch.int16) * num_bins
        index = index + volume_to_patches(first_bin, patch_size)[:, :, None]
    counts = torch.zeros(batch, index.shape[1], channels, groups * num_bins, device=image.device)
    counts.scatter_add_(3, index.long(), counts.new_ones(()).expand(index.shape))
    return counts.unflatten(3, (groups, num_bins)) / index.shape[-1]
