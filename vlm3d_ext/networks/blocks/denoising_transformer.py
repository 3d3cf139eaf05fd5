"""Stage 2 of the localizer: the encoder's local features, refined in the light of the disease texts.

Shape letters: B batch; D slabs, P places in a slab, N = D P tokens; C channels; L diseases.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from monai.networks.blocks import MLPBlock
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from ..layers import RotaryDepthEmbedding, SliceAwareAttention, check_activation_checkpointing, run_block

__all__ = ["DenoisedFeatures", "DenoisingTransformer", "TextCrossAttention"]


class DenoisedFeatures(NamedTuple):
    """What `DenoisingTransformer` gives.

    Attributes:
        features: (B, D, P, C), refined.
        loss: scalar, mean squared error of the clean features that were to be given back; None where no noise was put.
    """

    features: Tensor
    loss: Tensor | None


class TextCrossAttention(nn.Module):
    """Tokens attend to the disease texts, and to a null token that stands for none of them.

    Args:
        hidden_size: channels C of tokens and texts.
        num_heads: attention heads.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.null_text = nn.Parameter(torch.randn(1, hidden_size) * 0.02)

    def forward(self, x: Tensor, texts: Tensor) -> Tensor:
        """Return what tokens (B, N, C) gather from texts (B, L, C), (B, N, C)."""
        batch, num_tokens, channels = x.shape
        texts = torch.cat([self.null_text.to(texts.dtype).expand(batch, 1, channels), texts], dim=1)
        q = self.query(x).view(batch, num_tokens, self.num_heads, -1).transpose(1, 2)
        key_value = self.key_value(texts).view(batch, texts.shape[1], 2, self.num_heads, -1)
        k, v = key_value.permute(2, 0, 3, 1, 4)
        gathered = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, num_tokens, channels)
        return self.out_proj(gathered)


class _DenoisingBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, num_depth_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = SliceAwareAttention(hidden_size, num_heads, num_depth_heads)
        self.text_norm = nn.LayerNorm(hidden_size)
        self.text_attention = TextCrossAttention(hidden_size, num_heads)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = MLPBlock(hidden_size, mlp_dim)

    def forward(self, x: Tensor, texts: Tensor, rotation: tuple[Tensor, Tensor], token_mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, token_mask)
        x = x + self.text_attention(self.text_norm(x).flatten(1, 2), texts).view(x.shape)
        return x + self.mlp(self.mlp_norm(x))


class DenoisingTransformer(nn.Module):
    """Refines local features by self-attention over the scan and cross-attention to the disease texts.

    In training, Gaussian noise is put on the features it is given, of a standard deviation drawn evenly from
    [0, `max_noise`] for each scan, and a linear layer on its output is trained to give the clean features back: what it
    hands on must be explained by the surroundings and the texts, not copied. Features are normalised (layer norm
    without weights) first, so that the noise has a meaning for any encoder.

    Source: denoising autoencoders, Vincent et al. 2008, section 2.3; self- and cross-attention blocks as in the
    transformer decoder, Vaswani et al. 2017, section 3.1.

    Args:
        hidden_size: channels C.
        num_layers: blocks.
        num_heads: attention heads.
        num_depth_heads: heads that look along depth, see `SliceAwareAttention`.
        mlp_dim: hidden channels of the MLPs.
        max_noise: largest standard deviation of the noise, in those of a token's channels.
        activation_checkpointing: what each block keeps for the backward pass, see `run_block`: "none", "selective" or
            "full".
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_layers: int = 4,
        num_heads: int = 12,
        num_depth_heads: int = 3,
        mlp_dim: int = 1024,
        max_noise: float = 0.5,
        activation_checkpointing: str = "none",
    ) -> None:
        super().__init__()
        self.max_noise = max_noise
        self.activation_checkpointing = check_activation_checkpointing(activation_checkpointing)
        self.depth_rotation = RotaryDepthEmbedding(hidden_size // num_heads)
        self.blocks = nn.ModuleList(
            _DenoisingBlock(hidden_size, num_heads, num_depth_heads, mlp_dim) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.reconstruction = nn.Linear(hidden_size, hidden_size)
        # without noise nothing reaches it, and data-parallel training waits for the gradient of each trainable weight
        self.reconstruction.requires_grad_(max_noise > 0)

    def forward(
        self, features: Tensor, texts: Tensor, depth_mm: Tensor, token_mask: Tensor | None = None
    ) -> DenoisedFeatures:
        """Refine.

        Args:
            features: (B, D, P, C) of the encoder.
            texts: (B, L, C), see `TextEmbedder`.
            depth_mm: (B, D) heights of the slabs.
            token_mask: (B, D, P) bool, True for tokens that hold real voxels; None where all do.
        """
        clean = layer_norm(features, features.shape[-1:])
        x = clean
        noisy = self.training and self.max_noise > 0
        if noisy:
            strength = torch.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=x.dtype) * self.max_noise
            x = x + strength * torch.randn_like(x)
        rotation = self.depth_rotation(depth_mm)
        for block in self.blocks:
            x = run_block(block, self.activation_checkpointing, x, texts, rotation, token_mask)
        x = self.norm(x)
        return DenoisedFeatures(x, self._loss(x, clean.detach(), token_mask) if noisy else None)

    def _loss(self, x: Tensor, clean: Tensor, token_mask: Tensor | None) -> Tensor:
        error = (self.reconstruction(x).float() - clean.float()).square().mean(-1)
        if token_mask is None:
            return error.mean()
        weights = token_mask.to(error.dtype)
        return ((error * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)).mean()
