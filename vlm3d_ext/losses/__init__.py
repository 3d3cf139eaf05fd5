from .multi_label_losses import AsymmetricLoss, WeightedBinaryCrossEntropy
from .partial_mask_losses import PartialDiceCrossEntropy
from .pretraining_losses import masked_reconstruction_loss, region_share_loss, sentence_alignment_loss
from .weighted_loss_sum import WeightedLossSum

__all__ = [
    "AsymmetricLoss",
    "PartialDiceCrossEntropy",
    "WeightedBinaryCrossEntropy",
    "WeightedLossSum",
    "masked_reconstruction_loss",
    "region_share_loss",
    "sentence_alignment_loss",
]
