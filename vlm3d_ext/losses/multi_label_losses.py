"""Losses of multi-label classification in which an unknown label takes no part.

Labels are 1, 0 or NaN. Each loss is a mean over samples of the mean over the sample's known and trained labels, so that
equal shares of a batch on several ranks average to the value of the whole batch on one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

__all__ = ["AsymmetricLoss", "WeightedBinaryCrossEntropy"]


def _known_entries(logits: Tensor, labels: Tensor, trained: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits and targets that are 0 wherever a label is unknown or not trained, and where they are known."""
    known = ~torch.isnan(labels) & trained
    # put aside before anything is computed: after it, the gradient of an infinite logit would be 0 times infinity
    return torch.where(known, logits.float(), 0.0), torch.where(known, labels.float(), 0.0), known


def _mean_over_known(values: Tensor, known: Tensor) -> Tensor:
    """Return the mean over samples of the mean over known labels of trained findings; 0 for a sample without any."""
    return (torch.where(known, values, 0.0).sum(1) / known.sum(1).clamp_min(1)).mean()


class WeightedBinaryCrossEntropy(nn.Module):
    """Binary cross-entropy in which the positives of a label have a weight: w · y · -log p - (1 - y) · log(1 - p).

    Args:
        positive_weights: w of each of the L labels, such as negatives / positives in training.
        trained_findings: which labels are trained at all; None trains all. A label without a positive, or without a
            negative, in training would only learn a constant.

    Raises:
        ValueError: if a weight is not positive and finite, or none of the labels is to be trained.
    """

    weights: Tensor
    trained_findings: Tensor

    def __init__(self, positive_weights: Sequence[float], trained_findings: Sequence[bool] | None = None) -> None:
        super().__init__()
        weights = torch.tensor(list(positive_weights), dtype=torch.float32)
        if not ((weights > 0) & weights.isfinite()).all():
            raise ValueError(f"positive_weights must be greater than 0 and finite, got {list(positive_weights)}.")
        self.register_buffer("weights", weights)
        self.register_buffer("trained_findings", _as_mask(trained_findings, len(weights)))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of logits (B, L) against labels (B, L) of 1, 0 or NaN."""
        logits, target, known = _known_entries(logits, labels, self.trained_findings)
        loss = -(self.weights * target * logsigmoid(logits) + (1 - target) * logsigmoid(-logits))
        return _mean_over_known(loss, known)


class AsymmetricLoss(nn.Module):
    """Focal loss with separate focusing of positives and negatives, and a margin that drops easy negatives.

    With p the probability and p_m = max(p - margin, 0): -(1 - p)^gamma_positive · log p for positives,
    -p_m^gamma_negative · log(1 - p_m) for negatives. With both exponents and the margin 0, binary cross-entropy.

    Source: Ridnik et al., "Asymmetric loss for multi-label classification", ICCV 2021, equations 5 to 7.

    Args:
        num_findings: L.
        gamma_positive: focusing of positives.
        gamma_negative: focusing of negatives.
        margin: shift of a negative's probability, in [0, 1).
        trained_findings: as in `WeightedBinaryCrossEntropy`.

    Raises:
        ValueError: if an exponent is negative, or the margin is not in [0, 1).
    """

    trained_findings: Tensor

    def __init__(
        self,
        num_findings: int,
        gamma_positive: float = 0.0,
        gamma_negative: float = 4.0,
        margin: float = 0.05,
        trained_findings: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        if gamma_positive < 0 or gamma_negative < 0 or not 0 <= margin < 1:
            raise ValueError(
                f"gammas must be at least 0 and the margin in [0, 1), got {gamma_positive}, {gamma_negative}, {margin}."
            )
        self.gamma_positive, self.gamma_negative, self.margin = gamma_positive, gamma_negative, margin
        self.register_buffer("trained_findings", _as_mask(trained_findings, num_findings))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of logits (B, L) against labels (B, L) of 1, 0 or NaN."""
        logits, target, known = _known_entries(logits, labels, self.trained_findings)
        log_probability, log_complement = logsigmoid(logits), logsigmoid(-logits)
        # powers by their logarithms: at 0, that of an exponent below 1 has an infinite slope
        positive = -torch.exp(self.gamma_positive * log_complement) * log_probability
        if self.margin:
            shifted = (log_probability.exp() - self.margin).clamp_min(torch.finfo(torch.float32).tiny)
            negative = -(shifted**self.gamma_negative) * torch.log1p(-shifted)
        else:
            negative = -torch.exp(self.gamma_negative * log_probability) * log_complement
        return _mean_over_known(target * positive + (1 - target) * negative, known)


def _as_mask(trained_findings: Sequence[bool] | None, num_findings: int) -> Tensor:
    if trained_findings is None:
        return torch.ones(num_findings, dtype=torch.bool)
    mask = torch.tensor(list(trained_findings), dtype=torch.bool)
    if len(mask) != num_findings or not mask.any():
        raise ValueError(
            f"trained_findings must name at least one of {num_findings} findings, got {list(trained_findings)}."
        )
    return mask
