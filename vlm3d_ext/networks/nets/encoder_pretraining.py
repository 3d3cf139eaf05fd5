"""The encoder with the heads that its pre-training needs and later bundles do not."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...losses import masked_reconstruction_loss, region_share_loss, sentence_alignment_loss
from ..blocks import HashedNgramSentenceEncoder
from ..layers import volume_to_patches
from .three_d_vision_encoder import ThreeDVisionEncoder

__all__ = ["EncoderPretraining", "PretrainingHeads"]


class PretrainingHeads(nn.Module):
    """What pre-training adds: a reconstruction layer, a sentence encoder, and the space where image and text meet.

    Args:
        hidden_size: channels C of the encoder.
        patch_voxels: voxels of a token times input channels.
        num_text_buckets: ids of the hashed n-grams.
        text_embedding_dim: channels of their embeddings.
        projection_dim: channels of the common space.
        initial_logit_bias: start of the bias b in scale · cosine + b; near the log odds of a true sentence among those
            drawn.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        patch_voxels: int = 4 * 16 * 16,
        num_text_buckets: int = 16384,
        text_embedding_dim: int = 128,
        projection_dim: int = 512,
        initial_logit_bias: float = -1.0,
    ) -> None:
        super().__init__()
        self.reconstruction = nn.Linear(hidden_size, patch_voxels)
        self.sentence_encoder = HashedNgramSentenceEncoder(num_text_buckets, text_embedding_dim, projection_dim)
        self.image_projection = nn.Linear(hidden_size, projection_dim)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(initial_logit_bias))

    def sentence_logits(
        self, global_features: Tensor, region_features: Tensor, sentence_ngrams: Tensor, sentence_regions: Tensor
    ) -> Tensor:
        """Return (B, S): scale · cosine(sentence, the features it speaks of) + bias.

        Args:
            global_features: (B, C).
            region_features: (B, R, C).
            sentence_ngrams: (B, S, L) ids, padded with 0.
            sentence_regions: (B, S, R) bool; a sentence about certain regions meets the mean of their features, any
                other the global feature.
        """
        regions = sentence_regions.to(region_features.dtype)
        num_regions = regions.sum(-1, keepdim=True)
        region_mean = torch.bmm(regions, region_features) / num_regions.clamp_min(1)
        image_side = torch.where(num_regions > 0, region_mean, global_features[:, None])
        image_side = normalize(self.image_projection(image_side), dim=-1)
        text_side = normalize(self.sentence_encoder(sentence_ngrams), dim=-1)
        return self.log_logit_scale.exp() * (image_side * text_side).sum(-1) + self.logit_bias


class EncoderPretraining(nn.Module):
    """Runs the encoder on a partly hidden volume and returns three losses.

    ``reconstruction``: hidden patches from what is left (`masked_reconstruction_loss`). ``region_share``: which regions
    the voxels of a token belong to (`region_share_loss`). ``report_alignment``: which sentences are said of this scan
    (`sentence_alignment_loss`).

    Args:
        encoder: the encoder to train; its weights are what later bundles use.
        heads: the rest, which no later bundle needs.
    """

    def __init__(self, encoder: ThreeDVisionEncoder, heads: PretrainingHeads) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = heads

    def forward(
        self,
        image: Tensor,
        anatomical_mask: Tensor,
        spacing_mm: Tensor,
        has_anatomical_mask: Tensor,
        use_anatomical_mask: Tensor,
        patch_mask: Tensor,
        sentence_ngrams: Tensor,
        sentence_regions: Tensor,
        sentence_is_true: Tensor,
        sentence_mask: Tensor,
    ) -> dict[str, dict[str, Tensor]]:
        """Return ``{"losses": {"reconstruction", "region_share", "report_alignment"}}``, scalars.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1].
            anatomical_mask: (B, d, h, w) integers; all zero where there is none.
            spacing_mm: (B, 3).
            has_anatomical_mask: (B,) bool, whether the mask can teach.
            use_anatomical_mask: (B,) bool, whether the mask guides the region features of this draw.
            patch_mask: (B, N) bool, tokens to hide.
            sentence_ngrams: (B, S, L) ids, padded with 0.
            sentence_regions: (B, S, R) bool, the regions a sentence speaks of; none means the whole scan.
            sentence_is_true: (B, S) bool.
            sentence_mask: (B, S) bool, False where there is no sentence.
        """
        features = self.encoder(
            image,
            anatomical_mask=anatomical_mask,
            spacing_mm=spacing_mm,
            use_anatomical_mask=use_anatomical_mask & has_anatomical_mask,
            patch_mask=patch_mask,
        )
        # nothing is asked of the other tokens: reconstructing them would cost, and change no weight
        hidden_patches = volume_to_patches(image, self.encoder.patch_size)[patch_mask]
        reconstruction = self.heads.reconstruction(features.local_features[patch_mask])
        logits = self.heads.sentence_logits(
            features.global_features, features.region_features, sentence_ngrams, sentence_regions
        )
        return {
            "losses": {
                "reconstruction": masked_reconstruction_loss(reconstruction, hidden_patches, patch_mask),
                "region_share": region_share_loss(
                    features.bin_region_logits, features.mask_histograms, has_anatomical_mask, features.token_mask
                ),
                "report_alignment": sentence_alignment_loss(logits, sentence_is_true, sentence_mask),
            }
        }
