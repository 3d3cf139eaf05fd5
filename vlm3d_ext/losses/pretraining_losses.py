"""Losses of the encoder's pre-training.

Each is a mean over *all* samples of the batch, in which a sample without a target (no mask, no report) counts as zero.
Equal shares of a batch on several ranks therefore average to the value of the whole batch on one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["masked_reconstruction_loss", "region_share_loss", "sentence_alignment_loss"]


def _mean_over_samples(values: Tensor, weight: Tensor) -> Tensor:
    """Return the mean over samples of each sample's weighted mean of `values`; both (B, ...)."""
    values, weight = values.flatten(1), weight.flatten(1).to(values.dtype)
    return ((values * weight).sum(1) / weight.sum(1).clamp_min(1e-6)).mean()


def masked_reconstruction_loss(reconstruction: Tensor, patches: Tensor, patch_mask: Tensor) -> Tensor:
    """Return the mean absolute error of hidden patches.

    Source: SimMIM (Xie et al. 2022), section 3.2: L1 on the masked patches only.

    Args:
        reconstruction: (M, V) predicted voxels of the M hidden tokens alone, in the order of `patch_mask`.
        patches: (M, V) their true voxels, in [0, 1].
        patch_mask: (B, N) bool, True where the token was hidden; a sample without hidden tokens counts as zero.
    """
    error = (reconstruction.float() - patches.float()).abs().mean(-1)
    of_tokens = error.new_zeros(patch_mask.shape).masked_scatter(patch_mask, error)
    return _mean_over_samples(of_tokens, patch_mask)


def region_share_loss(
    bin_region_logits: Tensor, counts: Tensor, has_mask: Tensor, token_mask: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy between predicted and true regions of the voxels of each token, by intensity bin.

    It is the mean over voxels and channels of -log p(region of the voxel | token, intensity bin of the voxel): the
    intensities themselves are seen, so they need not be predicted. With a single bin it is the cross-entropy between
    predicted and true shares of the token.

    Args:
        bin_region_logits: (B, N, C, 1 + R, K), before the softmax over the 1 + R regions.
        counts: (B, N, C, 1 + R, K) shares of the token's voxels in each region and bin, which sum to 1 over the last
            two axes (`region_histograms_of_tokens`).
        has_mask: (B,) bool; samples without a mask count as zero.
        token_mask: (B, N) bool, True for tokens with real voxels.
    """
    cross_entropy = -(counts * bin_region_logits.float().log_softmax(3)).sum((3, 4)).mean(2)
    weight = has_mask[:, None].expand_as(cross_entropy)
    return _mean_over_samples(cross_entropy, weight if token_mask is None else weight & token_mask)


def sentence_alignment_loss(logits: Tensor, is_true: Tensor, sentence_mask: Tensor) -> Tensor:
    """Return the pairwise sigmoid loss between an image and sentences that are or are not said of it.

    Unlike a softmax over the batch it needs no large batch, and several sentences may be true.

    Source: SigLIP (Zhai et al. 2023), equation 1.

    Args:
        logits: (B, S) similarity of image and sentence, scaled and shifted.
        is_true: (B, S) bool, True where the sentence stands in the image's report.
        sentence_mask: (B, S) bool, True where there is a sentence.
    """
    sign = torch.where(is_true, 1.0, -1.0)
    return _mean_over_samples(-logsigmoid(sign * logits.float()), sentence_mask)
