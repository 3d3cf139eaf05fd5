"""Losses of masks that are not all known.

Shapes: B batch, L diseases, then voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..data.lesion_cases import UNKNOWN

__all__ = ["PartialDiceCrossEntropy"]


class PartialDiceCrossEntropy(nn.Module):
    """Soft Dice loss plus binary cross-entropy per scan and disease, over the voxels that are known.

    - Where the disease is there: Dice loss, and cross-entropy in which lesion voxels weigh (background voxels / lesion
      voxels) ** `balance`. A nodule is a thousandth of its crop: unweighted, the network learns first that there is
      none, and from there the gradient of Dice is too small to come back.
    - Where it is known to be absent: cross-entropy, and s / (s + `absent_voxels`) of the squared probabilities' sum s,
      which counts false positives as Dice counts true ones: by how much is drawn, not by how little that is of the
      scan.
    - A scan and disease of which no voxel is known counts nowhere.

    The mean is taken over scans of the mean over their known diseases, so that ranks add up.

    Source: Dice loss, Milletari et al. 2016 (V-Net), section 3, without squares; compound loss as in nnU-Net (Isensee
    et al. 2021).

    Args:
        dice_weight: of the Dice loss.
        absent_weight: of its counterpart for absent diseases. A scan has few of the diseases and lacks many: at the
            weight of Dice, drawing nothing at all is learnt first, and hard ones stay so.
        cross_entropy_weight: of the cross-entropy.
        balance: exponent of the weight of lesion voxels; 0 weighs all voxels alike, 1 lesion and background alike.
        absent_voxels: number of surely drawn voxels at which an absent disease costs half of `absent_weight`.
        smooth: voxels added to numerator and denominator of Dice, so that a lesion of few voxels has a gradient.
    """

    def __init__(
        self,
        dice_weight: float = 1.0,
        absent_weight: float = 0.25,
        cross_entropy_weight: float = 1.0,
        balance: float = 0.5,
        absent_voxels: float = 100.0,
        smooth: float = 1.0,
    ) -> None:
        super().__init__()
        self.dice_weight = dice_weight
        self.absent_weight = absent_weight
        self.cross_entropy_weight = cross_entropy_weight
        self.balance = balance
        self.absent_voxels = absent_voxels
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss.

        Args:
            logits: (B, L, ...).
            target: (B, L, ...) uint8 of 0, 1 and `UNKNOWN`.

        Raises:
            ValueError: if the shapes differ.
        """
        if logits.shape != target.shape:
            raise ValueError(
                f"logits are {tuple(logits.shape)}, the target is {tuple(target.shape)}; expected the same."
            )
        logits, target = logits.flatten(2).float(), target.flatten(2)
        known = (target != UNKNOWN).float()
        # A factor of zero would let an infinite logit through as NaN.
        logits = logits.masked_fill(target == UNKNOWN, 0)
        truth = (target == 1).float()
        num_known, num_lesion = known.sum(-1), truth.sum(-1)
        present = (num_lesion > 0).float()

        lesion_weight = ((num_known - num_lesion).clamp_min(1) / num_lesion.clamp_min(1)) ** self.balance
        weight = known + truth * (lesion_weight[..., None] - 1)
        entropy = binary_cross_entropy_with_logits(logits, truth, reduction="none") * weight
        entropy = entropy.sum(-1) / weight.sum(-1).clamp_min(1)

        drawn = logits.sigmoid() * known
        overlap = (drawn * truth).sum(-1)
        dice = 1 - (2 * overlap + self.smooth) / (drawn.sum(-1) + num_lesion + self.smooth)
        invented = drawn.square().sum(-1)
        invented = invented / (invented + self.absent_voxels)

        per_disease = self.cross_entropy_weight * entropy + torch.where(
            present > 0, self.dice_weight * dice, self.absent_weight * invented
        )
        is_known = (num_known > 0).float()
        per_scan = (per_disease * is_known).sum(1) / is_known.sum(1).clamp_min(1)
        return per_scan.mean()
