"""Attention over the tokens of a volume: divided (slice-aware) and, for comparison, full.

Shape letters: B batch, D slabs along depth, P places in a slab (H * W), K heads, E channels of a head, C = K * E.
Both layers take and return (B, D, P, C), so a network chooses one by its class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .positions import RotaryDepthEmbedding

__all__ = ["FullAttention", "SliceAwareAttention"]


class SliceAwareAttention(nn.Module):
    """Heads that look around inside their slab, and heads that look along depth at their place in the slab.

    One set of query, key and value weights serves both kinds of head; the number of token pairs falls from (D P)²
    to D P (P + D). Two layers connect every token with every other. Depth heads rotate queries and keys by physical
    height (`RotaryDepthEmbedding`), so they see millimetres, not slice numbers.

    Source: the factorised dot-product attention of ViViT (Arnab et al. 2021, section 3.3, model 4), with depth in place
    of time.

    Args:
        hidden_size: channels C.
        num_heads: heads K; must divide `hidden_size`.
        num_depth_heads: how many of them look along depth, 1 to K - 1.

    Raises:
        ValueError: if the sizes do not fit.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_depth_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}.")
        if not 0 < num_depth_heads < num_heads:
            raise ValueError(
                f"num_depth_heads must lie between 1 and num_heads - 1, got {num_depth_heads} of {num_heads}."
            )
        self.num_heads = num_heads
        self.num_depth_heads = num_depth_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x: Tensor, depth_rotation: tuple[Tensor, Tensor] | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, D, P, C).
            depth_rotation: cosine and sine, each (B, D, E / 2); None leaves depth heads blind to distance.
            token_mask: (B, D, P) bool, True for tokens that hold real voxels; None where all do.

        Returns:
            (B, D, P, C). What is written at masked tokens means nothing.
        """
        batch, depth, places, _ = x.shape
        num_slice_heads = self.num_heads - self.num_depth_heads
        qkv = self.qkv(x).view(batch, depth, places, 3, self.num_heads, -1)

        q, k, v = qkv[..., :num_slice_heads, :].permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # 3 × (B D, K, P, E)
        slice_mask = _key_mask(token_mask.flatten(0, 1)) if token_mask is not None else None
        in_slab = scaled_dot_product_attention(q, k, v, attn_mask=slice_mask)
        in_slab = in_slab.view(batch, depth, num_slice_heads, places, -1).permute(0, 1, 3, 2, 4)

        q, k, v = qkv[..., num_slice_heads:, :].permute(3, 0, 2, 4, 1, 5)  # 3 × (B, P, K, D, E)
        if depth_rotation is not None:
            cosine, sine = (part[:, None, None] for part in depth_rotation)
            q, k = (RotaryDepthEmbedding.rotate(part, cosine, sine) for part in (q, k))
        depth_mask = _key_mask(token_mask.transpose(1, 2).flatten(0, 1)) if token_mask is not None else None
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        along_depth = scaled_dot_product_attention(q, k, v, attn_mask=depth_mask)
        along_depth = along_depth.view(batch, places, self.num_depth_heads, depth, -1).permute(0, 3, 1, 2, 4)

        return self.out_proj(torch.cat([in_slab, along_depth], dim=3).flatten(3))


class FullAttention(nn.Module):
    """Every token attends to every token, as in ViT; the expensive reference for `SliceAwareAttention`.

    Args:
        hidden_size: channels C.
        num_heads: heads K; must divide `hidden_size`.
        num_depth_heads: accepted so that both layers are built alike; has no effect here.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_depth_heads: int = 0) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x: Tensor, depth_rotation: tuple[Tensor, Tensor] | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        """Attend over all D P tokens; arguments and result as in `SliceAwareAttention.forward`, without rotation."""
        batch, depth, places, _ = x.shape
        q, k, v = self.qkv(x).view(batch, depth * places, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mask = _key_mask(token_mask.flatten(1)) if token_mask is not None else None
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, depth, places, -1))


def _key_mask(mask: Tensor) -> Tensor:
    """Return (S, 1, 1, L) for sequences (S, L); one of padding only attends to itself instead of yielding NaN."""
    return (mask | ~mask.any(dim=-1, keepdim=True))[:, None, None]
