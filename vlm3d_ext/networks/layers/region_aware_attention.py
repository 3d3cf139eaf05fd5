"""Attention of anatomical-region queries to the tokens, guided by where the regions are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["RegionAwareAttention"]


class RegionAwareAttention(nn.Module):
    """One query per region attends to all tokens; the region's share of a token multiplies the attention it gets.

    With share s of a region in a token, attention is proportional to (s + floor) exp(q·k / √E): the logarithm of the
    share is added to the logits. Tokens outside the region are not shut out, so a lesion beside an organ is still seen;
    a region that the volume does not hold attends evenly. The output adds the region's share-weighted mean token, so an
    untrained layer already returns the region's content.

    Source: the organ queries of fVLM (Shui et al. 2025), with a soft share in place of its hard, max-pooled mask.

    Args:
        hidden_size: channels C.
        num_heads: attention heads.
        share_floor: share given to tokens outside the region, which keeps the logarithm finite.
    """

    def __init__(self, hidden_size: int, num_heads: int, share_floor: float = 1e-3) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.share_floor = share_floor
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, tokens: Tensor, shares: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Gather one feature per query.

        Args:
            queries: (B, R, C).
            tokens: (B, N, C).
            shares: (B, R, N) in [0, 1]: how much of each token belongs to each query's region.
            token_mask: (B, N) bool, True for tokens that hold real voxels.

        Returns:
            (B, R, C).
        """
        batch, num_queries, channels = queries.shape
        head_shape = (batch, -1, self.num_heads, channels // self.num_heads)
        q = self.query(queries).view(head_shape).transpose(1, 2)
        k, v = (part.reshape(head_shape).transpose(1, 2) for part in self.key_value(tokens).chunk(2, dim=-1))
        logit_bias = torch.log(shares.float() + self.share_floor)
        if token_mask is not None:
            shares = shares * token_mask[:, None]
            logit_bias = logit_bias.masked_fill(~token_mask[:, None], float("-inf"))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=logit_bias[:, None].to(q.dtype))
        attended = attended.transpose(1, 2).reshape(batch, num_queries, channels)
        total = shares.sum(-1, keepdim=True).clamp_min(1e-6)
        mean = torch.bmm(shares.to(tokens.dtype), tokens) / total.to(tokens.dtype)
        return mean + self.out_proj(attended)
