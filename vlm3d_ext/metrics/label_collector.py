"""Logits and labels of an evaluator's whole epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.metrics import Metric
from monai.utils import evenly_divisible_all_gather
from torch import Tensor

from .multi_label import macro_auroc

__all__ = ["MultiLabelScores", "logits_and_labels"]


def logits_and_labels(output: Any) -> tuple[Tensor, Tensor]:
    """Return the logits and labels that a network in training returns among its predictions."""
    return output["pred"]["logits"], output["pred"]["labels"]


class MultiLabelScores(Metric):
    """Macro AUROC over all cases and all ranks; keeps the logits and labels for what else is to be computed.

    After the epoch `logits` and `labels` hold the same arrays on every rank.

    Several ranks: with `num_cases`, rows are put back into the order in which torch's ``DistributedSampler`` dealt
    them (one case to each rank in turn), which without shuffling is the data set's order, and the cases that it
    repeats at the end to give all ranks equally many are dropped. Without `num_cases` the ranks' rows follow each
    other, and such repetitions stay.

    Args:
        num_cases: length of the data set, or None.
        output_transform: from the engine's output to (logits (B, L), labels (B, L) of 1, 0 or NaN); each may also be a
            list of B tensors (L,), as MONAI decollates batches. Both may be (B, W, L) for cases that are looked at in W
            ways, which become W rows for each case.

    Raises:
        ValueError: from `compute`, if the ranks saw fewer than `num_cases` cases, or more than the sampler repeats.
    """

    def __init__(
        self, num_cases: int | None = None, output_transform: Callable[[Any], Any] = logits_and_labels
    ) -> None:
        self.num_cases = num_cases
        self.logits = self.labels = np.zeros((0, 0))
        super().__init__(output_transform=output_transform)

    def reset(self) -> None:
        """Forget what was added."""
        self._batches: list[Tensor] = []
        self._num_ways = 1

    def update(self, output: tuple[Tensor | Sequence[Tensor], Tensor | Sequence[Tensor]]) -> None:
        """Add a batch.

        Raises:
            ValueError: unless logits and labels both are (B, L), or both (B, W, L).
        """
        logits, labels = (_as_matrix(part) for part in output)
        if logits.ndim not in (2, 3) or logits.shape != labels.shape:
            raise ValueError(
                f"logits and labels must both be (batch, labels), got {tuple(logits.shape)} and {tuple(labels.shape)}."
            )
        self._num_ways = logits.shape[1] if logits.ndim == 3 else 1
        self._batches.append(torch.stack([logits.flatten(1), labels.flatten(1)], dim=1))

    def compute(self) -> float:
        """Gather all ranks' cases and return the macro AUROC, NaN where no label is defined. Call it on every rank."""
        gathered = self._gather().double()
        # the ways of a case travel side by side, so that a repeated case is dropped whole
        ways = max(_all_ranks(self._num_ways))
        self.logits, self.labels = (gathered[:, part].unflatten(1, (ways, -1)).flatten(0, 1).numpy() for part in (0, 1))
        return macro_auroc(self.labels, self.logits) if gathered.numel() else float("nan")

    def _gather(self) -> Tensor:
        width = max(_all_ranks(self._batches[0].shape[2] if self._batches else 0))
        # a rank without cases must take part in the gathering all the same
        own = torch.cat(self._batches) if self._batches else torch.zeros(0, 2, width)
        if idist.get_world_size() == 1:
            of_ranks = [own]
        else:
            of_ranks = list(torch.split(evenly_divisible_all_gather(own, concat=True).cpu(), _all_ranks(len(own))))
        return torch.cat(of_ranks) if self.num_cases is None else self._in_order(of_ranks, self.num_cases)

    @staticmethod
    def _in_order(of_ranks: list[Tensor], num_cases: int) -> Tensor:
        total = sum(len(rows) for rows in of_ranks)
        if not num_cases <= total < num_cases + len(of_ranks):
            raise ValueError(
                f"{len(of_ranks)} rank(s) saw {total} cases, expected {num_cases} and at most one repeated on each "
                f"other rank; give the data set's length, and a DistributedSampler to each rank's loader."
            )
        places = [(place, rank) for rank, rows in enumerate(of_ranks) for place in range(len(rows))]
        order = sorted(range(total), key=lambda index: places[index])
        return torch.cat(of_ranks)[order][:num_cases]


def _as_matrix(part: Tensor | Sequence[Tensor]) -> Tensor:
    tensor = part if isinstance(part, Tensor) else torch.stack(list(part))
    # a plain tensor: MONAI's MetaTensor would carry its metadata along
    return torch.as_tensor(tensor.detach().cpu().float().numpy())


def _all_ranks(number: int) -> list[int]:
    gathered = idist.all_gather(number)
    return [int(value) for value in gathered] if isinstance(gathered, (list, Tensor)) else [int(gathered)]
