"""The vision encoder: a CT volume in, one global, 20 region and all local features out.

Shape letters: B batch; D, H, W the token grid; N = D H W tokens; P = H W places in a slab; R regions; C channels;
K intensity bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...data.anatomical_regions import NUM_REGIONS
from ..blocks import AnatomicalStructureEncoder, VolumeTransformerBlock
from ..layers import (
    FullAttention,
    PatchEmbedding,
    RegionAwareAttention,
    ResidualLayerNorm,
    RotaryDepthEmbedding,
    SineCosinePositionEmbedding,
    SliceAwareAttention,
    check_activation_checkpointing,
    pad_to_patches,
    region_histograms_of_tokens,
    run_block,
    token_centres_mm,
)

__all__ = ["RegionTokenEncoder", "ThreeDVisionEncoder", "TokenFeatures", "VisionFeatures"]

_SMALLEST_SHARE = 1e-6  # far below one voxel of a token; keeps logarithms and quotients finite

ATTENTION_LAYERS: dict[str, type[nn.Module]] = {"slice_aware": SliceAwareAttention, "full": FullAttention}


class VisionFeatures(NamedTuple):
    """What the encoder gives.

    Attributes:
        global_features: (B, C), of the whole volume.
        local_features: (B, N, C), one per token, ordered z, then y, then x.
        region_features: (B, R, C), one per anatomical region.
        region_logits: (B, N, 1 + R), before the softmax over background and regions: the logarithm of the share of the
            token that the encoder itself gives to each.
        token_mask: (B, N) bool, True for tokens that hold real voxels; None where nothing was padded.
        bin_region_logits: (B, N, in_channels, 1 + R, K), before the softmax over background and regions (axis 3): to
            which region those voxels of the token belong whose intensity lies in a bin.
        mask_histograms: of the same shape, the shares of the token's voxels that the anatomical mask counts in each
            region and bin, whether it guided the features or not; None without a mask.
    """

    global_features: Tensor
    local_features: Tensor
    region_features: Tensor
    region_logits: Tensor
    token_mask: Tensor | None
    bin_region_logits: Tensor
    mask_histograms: Tensor | None


class TokenFeatures(NamedTuple):
    """What the trunk gives, before the regions are gathered.

    Attributes:
        local_features: (B, N, C).
        positions_mm: (B, N, 3) token centres z, y, x from the centre of the volume.
        token_ml: (B,) volume of one token in millilitres.
        histograms: (B, N, in_channels, K) shares of the token's voxels in each intensity bin.
        token_mask: (B, N) bool or None, as in `VisionFeatures`.
    """

    local_features: Tensor
    positions_mm: Tensor
    token_ml: Tensor
    histograms: Tensor
    token_mask: Tensor | None


class ThreeDVisionEncoder(nn.Module):
    """Vision transformer for CT volumes with slice-aware and region-aware attention.

    The trunk turns the volume into local features. A token is its linear patch embedding plus a linear embedding of the
    square root of its intensity histogram, for a linear layer cannot count voxels. A linear layer predicts to which
    region the voxels of each token belong, for each intensity bin apart: in a token on the chest wall the black voxels
    are lung and the bright ones are not, unless what surrounds it speaks for a consolidation. This, or the anatomical
    mask where there is one, tells `AnatomicalStructureEncoder` and `RegionAwareAttention` where the regions are and
    what is in them.

    Full size is the default: 64 × 512 × 512 voxels make 16 × 32 × 32 = 16,384 tokens.

    Args:
        in_channels: intensity windows of the input.
        patch_size: (D, H, W) voxels of a token.
        hidden_size: channels C.
        num_layers: transformer blocks.
        num_heads: attention heads.
        num_depth_heads: heads that look along depth instead of inside the slab.
        mlp_dim: hidden channels of the MLPs.
        num_regions: anatomical regions R.
        num_intensity_bins: K equal bins of [0, 1] in which the intensities of tokens and regions are counted, per input
            channel.
        attention: "slice_aware", or "full" for comparison.
        reference_spacing_mm: voxel spacing [z, y, x] assumed where `forward` is given none.
        activation_checkpointing: what each block keeps for the backward pass, see `run_block`: "none", "selective" or
            "full".

    Raises:
        ValueError: if `attention` or `activation_checkpointing` is not one of those named.
    """

    reference_spacing_mm: Tensor

    def __init__(
        self,
        in_channels: int = 1,
        patch_size: Sequence[int] = (4, 16, 16),
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_depth_heads: int = 3,
        mlp_dim: int = 3072,
        num_regions: int = NUM_REGIONS,
        num_intensity_bins: int = 8,
        attention: str = "slice_aware",
        reference_spacing_mm: Sequence[float] = (4.7, 0.74, 0.74),
        activation_checkpointing: str = "none",
    ) -> None:
        super().__init__()
        if attention not in ATTENTION_LAYERS:
            raise ValueError(f"attention must be one of {sorted(ATTENTION_LAYERS)}, got {attention!r}.")
        self.in_channels = in_channels
        self.patch_size = (patch_size[0], patch_size[1], patch_size[2])
        self.hidden_size = hidden_size
        self.num_regions = num_regions
        self.num_intensity_bins = num_intensity_bins
        self.activation_checkpointing = check_activation_checkpointing(activation_checkpointing)
        self.register_buffer(
            "reference_spacing_mm", torch.tensor(reference_spacing_mm, dtype=torch.float32), persistent=False
        )
        self.patch_embedding = PatchEmbedding(in_channels, hidden_size, self.patch_size, stride=self.patch_size)
        self.intensity_embedding = nn.Linear(in_channels * num_intensity_bins, hidden_size, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(hidden_size))
        self.position_embedding = SineCosinePositionEmbedding(hidden_size)
        self.depth_rotation = RotaryDepthEmbedding(hidden_size // num_heads)
        self.blocks = nn.ModuleList(
            VolumeTransformerBlock(hidden_size, num_heads, num_depth_heads, mlp_dim, ATTENTION_LAYERS[attention])
            for _ in range(num_layers)
        )
        self.norm = ResidualLayerNorm(hidden_size)
        self.region_classifier = nn.Linear(hidden_size, in_channels * (1 + num_regions) * num_intensity_bins)
        self.region_attention = RegionAwareAttention(hidden_size, num_heads)
        self.region_norm = nn.LayerNorm(hidden_size)
        self.apply(_initialise)
        nn.init.xavier_uniform_(self.intensity_embedding.weight)  # as the patch embedding, to which it is added
        # not initialised like the trunk: at 0.02 what is measured would drown in the mean token it is added to
        self.structure_encoder = AnatomicalStructureEncoder(hidden_size, num_regions, in_channels * num_intensity_bins)

    def forward(
        self,
        image: Tensor,
        anatomical_mask: Tensor | None = None,
        spacing_mm: Tensor | None = None,
        use_anatomical_mask: Tensor | None = None,
        valid_size: Tensor | None = None,
        patch_mask: Tensor | None = None,
    ) -> VisionFeatures:
        """Encode volumes.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1]; sizes that are not multiples of the patch are padded here.
            anatomical_mask: (B, d, h, w) integers 0 to R, or None.
            spacing_mm: (B, 3) voxel spacing [z, y, x]; None assumes `reference_spacing_mm`.
            use_anatomical_mask: (B,) bool, True for volumes whose mask is to be used; None uses every mask given. The
                others are encoded with the predicted shares.
            valid_size: (B, 3) voxels [d, h, w] of each volume before it was padded to the batch's size; None where
                nothing was.
            patch_mask: (B, N) bool, True for tokens to hide behind the mask token (pre-training).

        Returns:
            The features; see `VisionFeatures`.

        Raises:
            ValueError: if the image has not the channels of the network.
        """
        tokens = self.encode_tokens(image, spacing_mm, valid_size, patch_mask)
        return self.gather_regions(tokens, image, anatomical_mask, use_anatomical_mask)

    def encode_tokens(
        self,
        image: Tensor,
        spacing_mm: Tensor | None = None,
        valid_size: Tensor | None = None,
        patch_mask: Tensor | None = None,
    ) -> TokenFeatures:
        """Run the trunk; the arguments are those of `forward`."""
        if image.shape[1] != self.in_channels:
            raise ValueError(
                f"the encoder was built for {self.in_channels} input channel(s) (intensity windows), got an image of "
                f"shape {tuple(image.shape)}; prepare the data with as many --window names, or set in_channels."
            )
        batch_size = image.shape[0]  # len() would fix the batch size when the network is exported
        spacing_mm = self.reference_spacing_mm.expand(batch_size, 3) if spacing_mm is None else spacing_mm
        size = image.shape[2:]
        image = pad_to_patches(image, self.patch_size)
        if valid_size is None and image.shape[2:] != size:
            valid_size = torch.tensor([tuple(size)], device=image.device).expand(batch_size, 3)

        tokens = self.patch_embedding(image)  # (B, D, H, W, C)
        depth, height, width = tokens.shape[1:4]
        histograms = region_histograms_of_tokens(
            image, None, self.patch_size, self.num_regions, self.num_intensity_bins
        ).squeeze(3)
        tokens = tokens + self.intensity_embedding(histograms.flatten(2).sqrt().to(tokens.dtype)).view(tokens.shape)
        if patch_mask is not None:
            hidden = patch_mask.view(-1, depth, height, width, 1)
            tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        centres_mm = token_centres_mm((depth, height, width), self.patch_size, spacing_mm, valid_size)
        tokens = (tokens + self.position_embedding(*centres_mm).to(tokens.dtype)).flatten(2, 3)  # (B, D, P, C)
        grid_mask = self._token_mask((depth, height, width), valid_size)

        rotation = self.depth_rotation(centres_mm[0])
        for block in self.blocks:
            tokens = run_block(block, self.activation_checkpointing, tokens, rotation, grid_mask)

        positions_mm = torch.stack(
            [
                centres_mm[0][:, :, None, None].expand(-1, depth, height, width),
                centres_mm[1][:, None, :, None].expand(-1, depth, height, width),
                centres_mm[2][:, None, None, :].expand(-1, depth, height, width),
            ],
            dim=-1,
        ).flatten(1, 3)
        return TokenFeatures(
            self.norm(tokens).flatten(1, 2),
            positions_mm,
            spacing_mm.prod(-1) * math.prod(self.patch_size) / 1000,
            histograms,
            grid_mask.flatten(1) if grid_mask is not None else None,
        )

    def gather_regions(
        self,
        tokens: TokenFeatures,
        image: Tensor,
        anatomical_mask: Tensor | None = None,
        use_anatomical_mask: Tensor | None = None,
    ) -> VisionFeatures:
        """Gather global and region features from the trunk's tokens; the other arguments are those of `forward`."""
        bin_region_logits, counts = self._predict_regions(tokens.local_features, tokens.histograms)
        region_logits = counts.sum(-1).mean(2).clamp_min(_SMALLEST_SHARE).log()
        # only masks teach the encoder where regions are, or it could move a region to wherever a text loss likes
        counts = counts.detach()
        measured = None
        if anatomical_mask is not None:
            measured = region_histograms_of_tokens(
                image, anatomical_mask, self.patch_size, self.num_regions, self.num_intensity_bins
            )
            use_mask = use_anatomical_mask.view(-1, 1, 1, 1, 1) if use_anatomical_mask is not None else None
            counts = measured if use_mask is None else torch.where(use_mask, measured, counts)
        # the whole volume takes the place of background
        counts = torch.cat([tokens.histograms[:, :, :, None], counts[:, :, :, 1:]], dim=3)
        if tokens.token_mask is not None:
            counts = counts * tokens.token_mask[:, :, None, None, None]
        shares = counts.sum(-1).mean(2).transpose(1, 2)  # (B, 1 + R, N)
        intensities = counts.sum(1).transpose(1, 2)  # (B, 1 + R, in_channels, K)
        intensities = intensities / intensities.sum(-1, keepdim=True).clamp_min(_SMALLEST_SHARE)
        queries = self.structure_encoder(shares, tokens.positions_mm, tokens.token_ml, intensities.flatten(2))
        gathered = self.region_attention(queries, tokens.local_features, shares, tokens.token_mask)
        gathered = self.region_norm(queries + gathered)
        return VisionFeatures(
            gathered[:, 0],
            tokens.local_features,
            gathered[:, 1:],
            region_logits,
            tokens.token_mask,
            bin_region_logits,
            measured,
        )

    def _token_mask(self, grid_size: tuple[int, int, int], valid_size: Tensor | None) -> Tensor | None:
        """Return (B, D, P) bool, True for tokens with at least one real voxel; None where nothing was padded."""
        if valid_size is None:
            return None
        inside = [
            torch.arange(grid_size[axis], device=valid_size.device) * self.patch_size[axis] < valid_size[:, axis, None]
            for axis in range(3)
        ]
        return (inside[0][:, :, None, None] & inside[1][:, None, :, None] & inside[2][:, None, None, :]).flatten(2)

    def _predict_regions(self, local_features: Tensor, histograms: Tensor) -> tuple[Tensor, Tensor]:
        """Say of each intensity bin of each token which part of its voxels belongs to which region.

        Args:
            local_features: (B, N, C).
            histograms: (B, N, in_channels, K), those of `TokenFeatures`.

        Returns:
            (B, N, in_channels, 1 + R, K), logits over the regions of each bin's voxels; and, of the same shape, the
            shares of the token's voxels that follow, which sum to 1 over the last two axes.
        """
        logits = self.region_classifier(local_features).float()
        logits = logits.unflatten(-1, (self.in_channels, 1 + self.num_regions, self.num_intensity_bins))
        return logits, logits.softmax(3) * histograms[:, :, :, None]


class RegionTokenEncoder(ThreeDVisionEncoder):
    """`ThreeDVisionEncoder` for export: one image in, one tensor out, the same weights under the same names."""

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        """Return (B, 1 + R, C): the global feature, then the region features, found without a mask.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1], of `reference_spacing_mm`.
        """
        features = super().forward(image)
        return torch.cat([features.global_features[:, None], features.region_features], dim=1)


def _initialise(module: nn.Module) -> None:
    """Truncated normal of 0.02 for linear layers, as ViT; the patch convolution as a linear layer on its patch."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
