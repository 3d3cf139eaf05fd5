"""The encoder's transformer block."""

from __future__ import annotations

import torch
from monai.networks.blocks import MLPBlock
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..layers import ResidualLayerNorm, SliceAwareAttention

__all__ = ["VolumeTransformerBlock"]


class _GELU(nn.GELU):
    """Overwrites its input where no gradient needs it: the hidden tensor is the largest of all."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class VolumeTransformerBlock(nn.Module):
    """Pre-normalised attention and MLP with residuals, over tokens (B, D, P, C) that keep their slab and their place.

    Source: ViT (Dosovitskiy et al. 2021), equations 2 and 3.

    Args:
        hidden_size: channels C.
        num_heads: attention heads.
        num_depth_heads: how many of them look along depth.
        mlp_dim: hidden channels of the MLP.
        attention: the attention layer's class.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_depth_heads: int,
        mlp_dim: int,
        attention: type[nn.Module] = SliceAwareAttention,
    ) -> None:
        super().__init__()
        self.attention_norm = ResidualLayerNorm(hidden_size)
        self.attention = attention(hidden_size, num_heads, num_depth_heads)
        self.mlp_norm = ResidualLayerNorm(hidden_size)
        self.mlp = MLPBlock(hidden_size, mlp_dim)
        self.mlp.fn = _GELU()

    def forward(
        self, x: Tensor, depth_rotation: tuple[Tensor, Tensor] | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        """Return (B, D, P, C); the arguments are those of the attention layer."""
        x = x + self.attention(self.attention_norm(x), depth_rotation, token_mask)
        return x + self.mlp(self.mlp_norm(x))
