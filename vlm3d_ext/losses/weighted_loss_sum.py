"""One loss out of several named ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["WeightedLossSum"]


class WeightedLossSum(nn.Module):
    """Weighted sum of the losses that a network returns under ``"losses"``.

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
        losses = predictions["losses"]
        if losses.keys() != self.weights.keys():
            raise ValueError(
                f"the network returns the losses {sorted(losses)}, weights are given for {sorted(self.weights)}."
            )
        # a weight of 0 keeps the loss in the graph: distributed training expects a gradient for every parameter
        return sum((self.weights[name] * loss for name, loss in losses.items()), start=next(iter(losses.values())) * 0)
