"""Batch normalisation that computes on several ranks what it computes on one, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["SynchronizedBatchNorm"]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SynchronizedBatchNorm(nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` whose statistics in training are those of all ranks' batches together.

    With running statistics a voxel's features do not depend on how the volume was cropped, unlike with instance or
    group normalisation: a network trained on crops may draw whole scans. `torch.nn.SyncBatchNorm` needs CUDA; this one
    also runs on CPU processes. Every rank must hold equally many voxels, as crops of one size do.

    Source: Ioffe and Szegedy 2015, algorithms 1 and 2.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised tensor (B, C, D, H, W)."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        x = input.float()
        num_ranks = dist.get_world_size()
        mean = _SumOverRanks.apply(x.mean((0, 2, 3, 4))) / num_ranks
        centred = x - mean.view(-1, 1, 1, 1)
        variance = _SumOverRanks.apply(centred.square().mean((0, 2, 3, 4))) / num_ranks
        with torch.no_grad():
            count = x[:, 0].numel() * num_ranks
            momentum = self.momentum if self.momentum is not None else 0.1
            assert self.running_mean is not None and self.running_var is not None
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / max(count - 1, 1), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(-1, 1, 1, 1) + self.bias.view(-1, 1, 1, 1)).to(input.dtype)
