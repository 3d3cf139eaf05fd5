"""From voxels to tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .autocast import autocast_dtype
from .patches import volume_to_patches

__all__ = ["PatchEmbedding"]


class PatchEmbedding(nn.Conv3d):
    """A 3D convolution whose stride is its kernel: each patch of voxels becomes one token.

    In half precision it is computed as the matrix product that it is: for kernels as large as these, convolutions in
    bfloat16 take forty times as long on a CPU. In float32 it is left to the convolution, which needs no copy.
    """

    def forward(self, image: Tensor) -> Tensor:
        """Return tokens (B, D, H, W, C) of an image (B, in_channels, d, h, w) of whole patches."""
        dtype = autocast_dtype(image.device) or self.weight.dtype
        if dtype == torch.float32:
            return super().forward(image).permute(0, 2, 3, 4, 1)
        patch_size = self.kernel_size
        grid = [n // p for n, p in zip(image.shape[2:], patch_size, strict=True)]
        # cut in the type of the product: rearranging moves half the bytes
        patches = volume_to_patches(image.to(dtype), patch_size)
        return linear(patches, self.weight.flatten(1), self.bias).unflatten(1, grid)
