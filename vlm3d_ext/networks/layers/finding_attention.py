"""What a finding looks at: attention from its text embedding to the regions where it lives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FindingAttention"]


class FindingAttention(nn.Module):
    """Multi-head attention with one query per finding, made of its text, and the scan's global and region features.

    A finding attends to the global feature and to the regions where it is found, to no other. Since queries come from
    text, a finding that was never trained has one as well.

    Source: scaled dot-product attention, Vaswani et al. 2017, equation 1; the query from text as in fVLM (Shui et al.,
    ICLR 2025), where it is learnt per organ.

    Args:
        channels: C of the features.
        text_channels: E of the text embeddings, and of the output.
        num_tokens: T, 1 + number of regions.
        num_heads: attention heads.
        head_dim: channels of a head.
    """

    def __init__(self, channels: int, text_channels: int, num_tokens: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        inner = num_heads * head_dim
        self.token_embedding = nn.Parameter(torch.randn(num_tokens, channels) * 0.5)
        self.query = nn.Linear(text_channels, inner)
        self.key = nn.Linear(channels, inner)
        self.value = nn.Linear(channels, inner)
        self.output = nn.Linear(inner, text_channels, bias=False)

    def forward(self, features: Tensor, text_embeddings: Tensor, attends: Tensor) -> Tensor:
        """Return what each finding sees, (B, L, E).

        Args:
            features: (B, T, C), whitened: the global feature, then the regions.
            text_embeddings: (L, E) of unit length.
            attends: (L, T) bool, True where a finding may look; at least once in each row.
        """
        heads = (self.num_heads, self.head_dim)
        # unit vectors of E channels have elements of about E^-0.5, linear layers expect 1
        query = self.query(text_embeddings * text_embeddings.shape[-1] ** 0.5).unflatten(-1, heads)
        key = self.key(features + self.token_embedding).unflatten(-1, heads)
        value = self.value(features).unflatten(-1, heads)
        scores = torch.einsum("lhd,bthd->blht", query, key) * self.head_dim**-0.5
        weights = scores.masked_fill(~attends[None, :, None], float("-inf")).softmax(-1)
        return self.output(torch.einsum("blht,bthd->blhd", weights, value).flatten(2))
