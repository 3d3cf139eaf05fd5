"""Mean of a loss over an evaluator's epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ignite.distributed as idist
import torch
from ignite.metrics import Metric

__all__ = ["MeanLoss"]


class MeanLoss(Metric):
    """Mean over all cases, and over all ranks, of a loss that the network returns.

    Args:
        loss: function of the network's predictions, for instance `WeightedLossSum`; or
        name: name of one of the losses under ``"losses"``.

    Raises:
        ValueError: unless exactly one of the two is given.
    """

    def __init__(self, loss: Callable[[Any], torch.Tensor] | None = None, name: str | None = None) -> None:
        if (loss is None) == (name is None):
            raise ValueError(f"MeanLoss takes either a loss or the name of one, got loss={loss} and name={name!r}.")
        self.loss = loss if loss is not None else lambda predictions: predictions["losses"][name]
        super().__init__(output_transform=lambda output: (output["pred"], len(output["image"])))

    def reset(self) -> None:
        """Forget what was added."""
        self._sum, self._count = 0.0, 0

    def update(self, output: tuple[Any, int]) -> None:
        """Add a batch: the network's predictions, and the number of cases they are the mean of."""
        predictions, size = output
        self._sum += float(self.loss(predictions)) * size
        self._count += size

    def compute(self) -> float:
        """Return the mean."""
        total = torch.as_tensor(idist.all_reduce(torch.tensor([self._sum, self._count], dtype=torch.float64)))
        return float(total[0] / total[1])
