"""Dice of probability maps at many thresholds, over an evaluator's epoch and all ranks.

Shape letters: B batch, N scans, T thresholds, S presence thresholds, L diseases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.metrics import Metric
from monai.utils import evenly_divisible_all_gather
from scipy import ndimage
from torch import Tensor

from ..data.connected_components import foreground_box, label_lesions
from ..data.lesion_cases import UNKNOWN

__all__ = ["DiceByThreshold", "probabilities_and_target"]

_THRESHOLDS = tuple(n / 10 for n in range(1, 10))
_PRESENCE_THRESHOLDS = (*_THRESHOLDS, 0.95, 0.98, 0.99, 0.995)


def probabilities_and_target(output: Any) -> tuple[Tensor, Tensor]:
    """Return what a localizer in training returns among its predictions."""
    return output["pred"]["probabilities"], output["pred"]["target"]


class DiceByThreshold(Metric):
    """Mean over diseases of the best mean Dice over scans that have the disease; keeps the two thresholds it takes.

    The first says which voxels belong to a lesion, the second from which probability, reached somewhere in it, a
    lesion is believed at all: extent and presence are two questions, and one threshold for both either shaves lesions
    off or draws specks in every healthy scan. The two are chosen together, for on scans with lesions the second takes
    false ones away, too. A pair is worth its mean Dice less `false_positive_cost` times the share of lesion-free scans
    in which it draws anything. After the epoch, on every rank, `best_thresholds`, `presence_thresholds` and `dice`,
    each (L,), hold what was found; for a disease that no scan has both thresholds are 0.5, and Dice is NaN.

    Connected components are found once per threshold in each scan that has the disease, which takes seconds per scan
    and disease at 64 × 512 × 512.

    Source: two thresholds, one for the seed and one for what it is extended to, Canny 1986, section VII (hysteresis).

    Args:
        thresholds: candidates for extent, rising, in (0, 1]; a voxel is drawn from its threshold on.
        presence_thresholds: candidates for presence, likewise; those below an extent are not tried with it.
        false_positive_cost: in Dice.
        output_transform: from the engine's output to probabilities (B, L, d, h, w) and targets of 0, 1, 255 (unknown).

    Raises:
        ValueError: if candidates are none, do not rise, or one lies outside (0, 1], or no presence threshold reaches
        the
            highest extent.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = _THRESHOLDS,
        presence_thresholds: Sequence[float] = _PRESENCE_THRESHOLDS,
        false_positive_cost: float = 0.0,
        output_transform: Callable[[Any], Any] = probabilities_and_target,
    ) -> None:
        for name, edges in (("thresholds", list(thresholds)), ("presence_thresholds", list(presence_thresholds))):
            if not edges or edges[0] <= 0 or edges[-1] > 1 or any(b <= a for a, b in pairwise(edges)):
                raise ValueError(f"{name} must rise within (0, 1], got {edges}.")
        if presence_thresholds[-1] < thresholds[-1]:
            raise ValueError(
                f"presence_thresholds end at {presence_thresholds[-1]}, below the highest of thresholds, "
                f"{thresholds[-1]}."
            )
        # in float32, as probabilities are and as the network keeps them
        self.thresholds = np.array(thresholds, dtype=np.float32)
        self.candidates = np.array(presence_thresholds, dtype=np.float32)
        self.false_positive_cost = false_positive_cost
        self.best_thresholds = torch.zeros(0)
        self.presence_thresholds = torch.zeros(0)
        self.dice = torch.zeros(0)
        super().__init__(output_transform=output_transform)

    def reset(self) -> None:
        """Forget what was added."""
        self._rows: list[Tensor] = []

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
        drawn, truth = probabilities.float().cpu().numpy(), target.cpu().numpy()
        for scan in range(len(drawn)):
            rows = [self._measure(p, t) for p, t in zip(drawn[scan], truth[scan], strict=True)]
            self._rows.append(torch.from_numpy(np.stack(rows)))

    def _measure(self, probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Return (2 + T S + S,) of one scan and disease: whether it is there, whether it is known to be absent, Dice of
        each pair, and whether anything reaches each presence threshold."""
        known = truth != UNKNOWN
        lesion = truth == 1
        num_lesion = int(lesion.sum())
        dice = np.zeros((len(self.thresholds), len(self.candidates)))
        probabilities = np.where(known, probabilities, 0)
        reached = probabilities.max(initial=0) >= self.candidates
        if num_lesion:
            for row, threshold in enumerate(self.thresholds):
                dice[row] = self._dice_of_pairs(probabilities, lesion, num_lesion, threshold)
        is_absent = bool(known.any()) and not num_lesion
        return np.concatenate([[num_lesion > 0, is_absent], dice.ravel(), reached]).astype(np.float64)

    def _dice_of_pairs(
        self, probabilities: np.ndarray, lesion: np.ndarray, num_lesion: int, threshold: np.float32
    ) -> np.ndarray:
        drawn = probabilities >= threshold
        box = foreground_box(drawn)
        if box is None:
            return np.zeros(len(self.candidates))
        labels, count = label_lesions(drawn[box])
        index = np.arange(1, count + 1)
        largest = np.asarray(ndimage.maximum(probabilities[box], labels, index))
        size = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        rightly = np.bincount(labels.ravel(), weights=lesion[box].ravel(), minlength=count + 1)[1:]
        kept = largest[None] >= np.maximum(self.candidates, threshold)[:, None]  # (S, components)
        return 2 * (kept @ rightly) / (kept @ size + num_lesion)

    def compute(self) -> float:
        """Gather all ranks' scans and return the mean over diseases, NaN without any. Call it on every rank."""
        rows = self._gather().numpy()  # (N, L, 2 + T S + S)
        pairs = (len(self.thresholds), len(self.candidates))
        present, absent = rows[..., 0], rows[..., 1]
        dice = rows[..., 2 : 2 + pairs[0] * pairs[1]].reshape(*rows.shape[:2], *pairs)
        reached = rows[..., 2 + pairs[0] * pairs[1] :]
        num_present = present.sum(0)[:, None, None]
        mean_dice = (dice * present[..., None, None]).sum(0) / np.maximum(num_present, 1)  # (L, T, S)
        false_positives = (reached * absent[..., None]).sum(0) / np.maximum(absent.sum(0)[:, None], 1)  # (L, S)
        worth = mean_dice - self.false_positive_cost * false_positives[:, None]
        worth = np.where(self.candidates >= self.thresholds[:, None], worth, -np.inf)
        best = worth.reshape(len(worth), -1).argmax(1)
        extent, presence = np.unravel_index(best, pairs)
        found = num_present[:, 0, 0] > 0
        at_best = mean_dice[np.arange(len(worth)), extent, presence]
        self.dice = torch.from_numpy(np.where(found, at_best, np.nan))
        self.best_thresholds = torch.from_numpy(np.where(found, self.thresholds[extent], np.float32(0.5)))
        self.presence_thresholds = torch.from_numpy(np.where(found, self.candidates[presence], np.float32(0.5)))
        return float(self.dice.nanmean())

    def _gather(self) -> Tensor:
        width = 2 + len(self.thresholds) * len(self.candidates) + len(self.candidates)
        own = torch.stack(self._rows) if self._rows else None
        if idist.get_world_size() == 1:
            return own if own is not None else torch.zeros(0, 1, width, dtype=torch.float64)
        sizes = idist.all_gather(own.shape[1] if own is not None else 0)
        diseases = int(max(torch.as_tensor(sizes).tolist()))
        # a rank without scans must take part in the gathering all the same
        if own is None:
            own = torch.zeros(0, diseases, width, dtype=torch.float64)
        return torch.as_tensor(evenly_divisible_all_gather(own, concat=True)).cpu()
