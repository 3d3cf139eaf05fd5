"""From vision features to embeddings that a language model reads.

Shape letters: B batch; Q queries; N vision tokens; V vision channels; C channels of the language model; h heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["VisionToLLMProjector"]


class _CrossAttentionLayer(nn.Module):
    """Queries attend to vision tokens whose keys and values are given, then an MLP; both pre-norm and residual."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, hidden_size))

    def forward(self, x_BQC: Tensor, key_BhNc: Tensor, value_BhNc: Tensor, mask: Tensor | None) -> Tensor:
        query = self.query(self.norm(x_BQC)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        heard = scaled_dot_product_attention(query, key_BhNc, value_BhNc, attn_mask=mask)
        x_BQC = x_BQC + self.out(heard.transpose(1, 2).flatten(2))
        return x_BQC + self.mlp(self.mlp_norm(x_BQC))


class VisionToLLMProjector(nn.Module):
    """Learnable queries that gather global, region and dense features into a prefix for a language model.

    As in a Q-Former (Li et al., "BLIP-2", ICML 2023) the number of embeddings does not depend on the number of tokens.
    As in a Perceiver resampler (Alayrac et al., "Flamingo", NeurIPS 2022) the queries do not attend to each other: the
    language model lets them do so anyway. Keys and values of the vision tokens are computed once for all layers;
    projecting thousands of tokens is what costs here.

    Args:
        vision_channels: V, channels of every kind of vision feature.
        output_channels: C, the language model's hidden size; the width of the layers too.
        num_queries: Q, embeddings of the prefix.
        num_layers: cross-attention layers.
        num_heads: attention heads.
        mlp_ratio: hidden channels of the MLPs, as a multiple of C. 1.5 makes 259M parameters at C = 4096.
        num_regions: region features that have an embedding of their own.
        output_scale: root mean square of each embedding at the beginning; with that of the language model's token
            embeddings the prefix neither drowns in the text nor drowns it out.

    Raises:
        ValueError: if C is no multiple of the number of heads.
    """

    def __init__(
        self,
        vision_channels: int,
        output_channels: int,
        num_queries: int = 256,
        num_layers: int = 3,
        num_heads: int = 16,
        mlp_ratio: float = 1.5,
        num_regions: int = 20,
        output_scale: float = 0.02,
    ) -> None:
        super().__init__()
        if output_channels % num_heads:
            raise ValueError(
                f"the language model's width {output_channels} is no multiple of {num_heads} heads; choose another "
                "projector_heads."
            )
        self.num_heads = num_heads
        self.num_queries = num_queries
        self.output_channels = output_channels
        self.vision_norm = nn.LayerNorm(vision_channels)
        self.global_embedding = nn.Parameter(torch.randn(vision_channels) * 0.02)
        self.region_embeddings = nn.Parameter(torch.randn(num_regions, vision_channels) * 0.02)
        self.key_value = nn.Linear(vision_channels, 2 * output_channels)
        self.queries = nn.Parameter(torch.randn(num_queries, output_channels))
        self.layers = nn.ModuleList(
            _CrossAttentionLayer(output_channels, num_heads, int(mlp_ratio * output_channels))
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(output_channels)
        nn.init.constant_(self.norm.weight, output_scale)

    def forward(
        self,
        global_features: Tensor,
        region_features: Tensor,
        local_features: Tensor,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the prefix (B, Q, C).

        Args:
            global_features: (B, V).
            region_features: (B, R, V); R may be 0 for images without regions.
            local_features: (B, N, V), usually pooled in-plane.
            token_mask: (B, N) bool, False for tokens that only fill up a batch; None where all are real.
        """
        regions = region_features + self.region_embeddings[: region_features.shape[1]]
        vision = torch.cat([(global_features + self.global_embedding)[:, None], regions, local_features], dim=1)
        key, value = (
            self.key_value(self.vision_norm(vision)).unflatten(-1, (2 * self.num_heads, -1)).transpose(1, 2).chunk(2, 1)
        )
        mask = None
        if token_mask is not None:
            others = token_mask.new_ones(token_mask.shape[0], vision.shape[1] - token_mask.shape[1])
            mask = torch.cat([others, token_mask], dim=1)[:, None, None]
        x_BQC = self.queries.expand(vision.shape[0], -1, -1)
        for layer in self.layers:
            x_BQC = layer(x_BQC, key, value, mask)
        return self.norm(x_BQC)
