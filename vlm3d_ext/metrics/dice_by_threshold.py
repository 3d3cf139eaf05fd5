"""Dice of probability maps at many thresholds, over an evaluator's epoch and all ranks.

Shape letters: B batch, N scans, T thresholds, L diseases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import ignite.distributed as idist
import torch
from ignite.metrics import Metric
from monai.utils import evenly_divisible_all_gather
from torch import Tensor

from ..data.lesion_cases import UNKNOWN

__all__ = ["DiceByThreshold", "probabilities_and_target"]

_CANDIDATES = (*(n / 20 for n in range(2, 20)), 0.98, 0.99)


def probabilities_and_target(output: Any) -> tuple[Tensor, Tensor]:
    """Return what a localizer in training returns among its predictions."""
    return output["pred"]["probabilities"], output["pred"]["target"]


class DiceByThreshold(Metric):
    """Mean over diseases of the best mean Dice over scans that have the disease; keeps the best two thresholds of each.

    The first says which voxels belong to a lesion: the one with the best mean Dice. The second says from which
    probability, reached somewhere in it, a lesion is believed at all: extent and presence are two questions, and one
    threshold for both either shaves lesions off or draws specks in every healthy scan. A presence threshold's worth is
    the mean Dice with scans that do not reach it at 0, less `false_positive_cost` times the share of lesion-free scans
    that reach it. After the epoch, on every rank, `best_thresholds`, `presence_thresholds` and `dice`, each (L,), hold
    what was found; for a disease that no scan has both thresholds are 0.5, and Dice is NaN.

    Source: two thresholds, one for the seed and one for what it is extended to, Canny 1986, section VII (hysteresis).

    Args:
        thresholds: candidates, rising, in (0, 1]; a voxel is drawn from its threshold on. Those from the best one on
        are
            the candidates for presence.
        false_positive_cost: in Dice.
        output_transform: from the engine's output to probabilities (B, L, d, h, w) and targets of 0, 1, 255 (unknown).

    Raises:
        ValueError: if the candidates are none, do not rise, or one lies outside (0, 1].
    """

    def __init__(
        self,
        thresholds: Sequence[float] = _CANDIDATES,
        false_positive_cost: float = 0.0,
        output_transform: Callable[[Any], Any] = probabilities_and_target,
    ) -> None:
        edges = list(thresholds)
        if not edges or edges[0] <= 0 or edges[-1] > 1 or any(b <= a for a, b in pairwise(edges)):
            raise ValueError(f"thresholds must rise within (0, 1], got {edges}.")
        self.thresholds = torch.tensor(edges, dtype=torch.float32)
        self.false_positive_cost = false_positive_cost
        self.best_thresholds = torch.zeros(0)
        self.presence_thresholds = torch.zeros(0)
        self.dice = torch.zeros(0)
        super().__init__(output_transform=output_transform)

    def reset(self) -> None:
        """Forget what was added."""
        self._counts: list[Tensor] = []

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        """Add a batch.

        Raises:
            ValueError: if the shapes differ.
        """
        probabilities, target = output
        if probabilities.shape != target.shape:
            raise ValueError(
                f"probabilities are {tuple(probabilities.shape)}, the target is {tuple(target.shape)}; "
                f"expected the same."
            )
        for drawn, truth in zip(probabilities.flatten(2), target.flatten(2), strict=True):
            self._counts.append(torch.stack([self._count(d, t) for d, t in zip(drawn, truth, strict=True)]))

    def _count(self, probabilities: Tensor, truth: Tensor) -> Tensor:
        """Return (T, 4): voxels drawn rightly, drawn, true, known; by sorting each voxel once into its threshold."""
        known = truth != UNKNOWN
        edges = self.thresholds.to(probabilities.device)
        bins = torch.bucketize(probabilities[known].float(), edges, right=True)  # number of thresholds reached
        lesion = truth[known] == 1
        size = len(edges) + 1
        reached = torch.bincount(bins, minlength=size).flip(0).cumsum(0).flip(0)[1:]
        rightly = torch.bincount(bins[lesion], minlength=size).flip(0).cumsum(0).flip(0)[1:]
        total = lesion.sum().expand(len(edges)), known.sum().expand(len(edges))
        return torch.stack([rightly, reached, *total], dim=1).double().cpu()

    def compute(self) -> float:
        """Gather all ranks' scans and return the mean over diseases, NaN without any. Call it on every rank."""
        counts = self._gather()
        rightly, drawn, true, known = counts.unbind(-1)  # each (N, L, T)
        present = (true > 0) & (known > 0)
        absent = (true == 0) & (known > 0)
        # of each scan, so that its sum over scans is the mean over those that have the disease; NaN if none has
        dice = torch.where(present, 2 * rightly / (drawn + true).clamp_min(1), 0) / present.sum(0)  # (N, L, T)
        false_positives = ((drawn > 0) & absent).sum(0) / absent.sum(0).clamp_min(1)
        found = present.any(0)[:, 0] if len(counts) else torch.zeros(counts.shape[1], dtype=torch.bool)
        best = torch.where(found, dice.sum(0).nan_to_num(-1.0).argmax(1), 0)  # (L,)

        # a scan reaches a presence threshold where anything is drawn at it
        at_best = dice.gather(2, best[None, :, None].expand(len(dice), -1, 1))  # (N, L, 1)
        believed = torch.where(drawn > 0, at_best, 0).sum(0)  # (L, T)
        worth = (believed - self.false_positive_cost * false_positives).nan_to_num(-1.0)
        too_low = torch.arange(len(self.thresholds)) < best[:, None]
        presence = worth.masked_fill(too_low, -math.inf).argmax(1)

        nothing = torch.tensor(float("nan"), dtype=dice.dtype)
        self.dice = torch.where(found, believed.gather(1, presence[:, None])[:, 0], nothing)
        self.best_thresholds = torch.where(found, self.thresholds[best], torch.tensor(0.5))
        self.presence_thresholds = torch.where(found, self.thresholds[presence], torch.tensor(0.5))
        return float(self.dice.nanmean())

    def _gather(self) -> Tensor:
        own = torch.stack(self._counts) if self._counts else None
        if idist.get_world_size() == 1:
            return own if own is not None else torch.zeros(0, 1, len(self.thresholds), 4, dtype=torch.float64)
        sizes = idist.all_gather(own.shape[1] if own is not None else 0)
        width = int(max(torch.as_tensor(sizes).tolist()))
        # a rank without scans must take part in the gathering all the same
        if own is None:
            own = torch.zeros(0, width, len(self.thresholds), 4, dtype=torch.float64)
        return torch.as_tensor(evenly_divisible_all_gather(own, concat=True)).cpu()
