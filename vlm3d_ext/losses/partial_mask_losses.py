"""Losses of masks that are not all known.

Shapes: B batch, L diseases, then voxels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..data.lesion_cases import UNKNOWN

__all__ = ["PartialDiceCrossEntropy"]


class PartialDiceCrossEntropy(nn.Module):
    """Soft Dice loss plus binary cross-entropy per scan and disease, over the voxels that are known.

    Dice counts only where the disease is there: on a scan without lesions it would be all or nothing. There
    cross-entropy alone pushes false positives down. A scan and disease of which no voxel is known counts nowhere. The
    mean is taken over scans of the mean over their known diseases, so that ranks add up.

    Source: Dice loss, Milletari et al. 2016 (V-Net), section 3, without squares; compound loss as in nnU-Net (Isensee
    et al. 2021).

    Args:
        dice_weight: of the Dice loss.
        cross_entropy_weight: of the cross-entropy.
        positive_weight: of lesion voxels in the cross-entropy.
        smooth: voxels added to numerator and denominator of Dice, so that a lesion of few voxels has a gradient.
    """

    def __init__(
        self,
        dice_weight: float = 1.0,
        cross_entropy_weight: float = 1.0,
        positive_weight: float = 1.0,
        smooth: float = 1.0,
    ) -> None:
        super().__init__()
        self.dice_weight = dice_weight
        self.cross_entropy_weight = cross_entropy_weight
        self.positive_weight = positive_weight
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
        truth = (target == 1).float()
        num_known = known.sum(-1)
        weight = known * (1 + (self.positive_weight - 1) * truth)
        entropy = (binary_cross_entropy_with_logits(logits, truth, reduction="none") * weight).sum(-1)
        entropy = entropy / num_known.clamp_min(1)
        drawn = logits.sigmoid() * known
        overlap = (drawn * truth).sum(-1)
        dice = 1 - (2 * overlap + self.smooth) / (drawn.sum(-1) + truth.sum(-1) + self.smooth)
        present = (truth.sum(-1) > 0).float()
        per_disease = self.cross_entropy_weight * entropy + self.dice_weight * dice * present
        is_known = (num_known > 0).float()
        per_scan = (per_disease * is_known).sum(1) / is_known.sum(1).clamp_min(1)
        return per_scan.mean()
