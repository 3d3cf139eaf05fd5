"""One loss out of several named ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["WeightedLossSum"]


class WeightedLossSum(nn.Module):
    """Weighted sum of the losses that a network returns under ``"losses"``.

    Where the network returns ``"log_variances"`` of some of them, s, such a loss L counts as exp(-s) · L + a · s before
    it is weighted, a being its share of the batch under ``"available"``; see
    `vlm3d_ext.networks.nets.MultiTaskTraining`.

    Args:
        weights: loss name -> weight; 0 switches a loss off.

    Raises:
        ValueError: at the first call, if the network's losses and the weights are not the same names.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def forward(self, predictions: Mapping[str, Mapping[str, Tensor]], target: object = None) -> Tensor:
        """Return the scalar sum over ``predictions["losses"]``; `target` is unused, the network has seen it."""
        losses: dict[str, Tensor] = dict(predictions["losses"])
        if losses.keys() != self.weights.keys():
            raise ValueError(
                f"the network returns the losses {sorted(losses)}, weights are given for {sorted(self.weights)}."
            )
        for name, log_variance in predictions.get("log_variances", {}).items():
            regulariser = log_variance * float(predictions["available"][name])
            losses[name] = torch.exp(-log_variance) * losses[name] + regulariser
        # a weight of 0 keeps the loss in the graph: distributed training expects a gradient for every parameter
        return sum((self.weights[name] * loss for name, loss in losses.items()), start=next(iter(losses.values())) * 0)
