"""Layer normalisation in the type of what it normalises."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from .autocast import autocast_dtype

__all__ = ["ResidualLayerNorm"]


class ResidualLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` that takes and returns bfloat16 where the residual stream is bfloat16.

    Autocast would copy its input to float32 and keep that copy for the backward pass, only for the next matrix product
    to round the result again; mean and variance are summed in float32 in either case. In float32 nothing differs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x`, of its own type."""
        if autocast_dtype(x.device) is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
