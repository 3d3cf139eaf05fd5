"""The random draws of the encoder's pre-training, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Randomizable, Transform

from ..data.anatomical_regions import NUM_REGIONS
from ..text.sentence_bank import Sentence, SentenceBank

__all__ = ["RandPatchMaskd", "RandReportSentencesd", "RandUseAnatomicalMaskd"]


class RandPatchMaskd(Randomizable, Transform):
    """Chooses which tokens to hide: adds ``patch_mask`` (N,) bool.

    Whole blocks of tokens are hidden, because a single hidden token can be filled in from its neighbours without
    knowing any anatomy.

    Source: the block-wise masks of BEiT (Bao et al. 2022) on a fixed lattice, as in SimMIM (Xie et al. 2022), in three
    dimensions.

    Args:
        patch_size: (D, H, W) voxels of a token.
        mask_ratio: share of blocks that are hidden, 0 to 1.
        block_size: (D, H, W) tokens of a block.
        probability: of hiding anything in a draw. The other draws see the whole volume, so that what a report speaks of
            is not hidden in all of them.

    Raises:
        ValueError: if the ratio is not in [0, 1].
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        mask_ratio: float,
        block_size: Sequence[int] = (1, 2, 2),
        probability: float = 1.0,
    ) -> None:
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask_ratio must lie in [0, 1], got {mask_ratio}.")
        self.patch_size = tuple(patch_size)
        self.mask_ratio = mask_ratio
        self.probability = probability
        self.block_size = tuple(block_size)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the sample with its mask."""
        grid = [math.ceil(s / p) for s, p in zip(data["image"].shape[1:], self.patch_size, strict=True)]
        blocks = [math.ceil(g / b) for g, b in zip(grid, self.block_size, strict=True)]
        num_blocks = math.prod(blocks)
        hidden = np.zeros(num_blocks, dtype=bool)
        if self.R.random_sample() < self.probability:
            hidden[self.R.permutation(num_blocks)[: round(self.mask_ratio * num_blocks)]] = True
        hidden = hidden.reshape(blocks)
        for axis, size in enumerate(self.block_size):
            hidden = hidden.repeat(size, axis=axis)
        hidden = hidden[: grid[0], : grid[1], : grid[2]]
        return {**data, "patch_mask": torch.from_numpy(hidden.reshape(-1).copy())}


class RandUseAnatomicalMaskd(Randomizable, Transform):
    """Decides whether this draw is guided by the mask or by the encoder's own prediction: adds ``use_anatomical_mask``
    () bool.

    Both ways must be trained, because most users have no mask at inference. A case that says itself whether its mask is
    used (`vlm3d_ext.data.case_manifest.with_and_without_mask`) is left as it is.

    Args:
        probability: of using the mask, where there is one.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the sample with its decision."""
        wanted = data.get("use_anatomical_mask", self.R.random_sample() < self.probability)
        use = bool(wanted) and bool(data["has_anatomical_mask"])
        return {**data, "use_anatomical_mask": torch.tensor(use)}


class RandReportSentencesd(Randomizable, Transform):
    """Draws sentences that are said of the scan and sentences that are not.

    Adds ``sentence_ngrams`` (S, L) int64, ``sentence_regions`` (S, 20) bool, ``sentence_is_true`` (S,) bool and
    ``sentence_mask`` (S,) bool, with S = num_true + num_untrue; removes ``report``. Untrue ones are drawn evenly from
    the distinct sentences of the bank, so that rare statements come up as often as common ones, and never from the
    sample's own report. A case without a report gets no sentence.

    Args:
        bank: sentences of the training reports.
        num_true: sentences drawn from the report; with fewer sentences all are taken.
        num_untrue: sentences drawn from the bank; they also fill the rows that a short report leaves free.
    """

    def __init__(self, bank: SentenceBank, num_true: int = 8, num_untrue: int = 24) -> None:
        self.bank = bank
        self.num_true = num_true
        self.num_untrue = num_untrue

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the sample with its sentences in place of its report."""
        data = dict(data)
        own = self.bank.sentences_of(data.pop("report"))
        size = self.num_true + self.num_untrue
        ngrams = torch.zeros(size, self.bank.max_ngrams, dtype=torch.int64)
        regions = torch.zeros(size, NUM_REGIONS, dtype=torch.bool)
        is_true = torch.zeros(size, dtype=torch.bool)
        present = torch.zeros(size, dtype=torch.bool)
        for row, (sentence, true) in enumerate(self._draw(own)):
            ngrams[row, : len(sentence.ngram_ids)] = torch.tensor(sentence.ngram_ids)
            regions[row] = torch.tensor(sentence.regions, dtype=torch.bool)
            is_true[row] = true
            present[row] = True
        data.update(sentence_ngrams=ngrams, sentence_regions=regions, sentence_is_true=is_true, sentence_mask=present)
        return data

    def _draw(self, own: list[Sentence]) -> list[tuple[Sentence, bool]]:
        if not own:
            return []
        drawn = [(own[i], True) for i in self.R.permutation(len(own))[: self.num_true]]
        own_texts = {sentence.text for sentence in own}
        # drawing twice as many as needed leaves enough after the sample's own have been put aside
        for i in self.R.randint(0, len(self.bank.sentences), 2 * self.num_untrue) if self.bank.sentences else ():
            sentence = self.bank.sentences[i]
            if sentence.text not in own_texts and len(drawn) < self.num_true + self.num_untrue:
                own_texts.add(sentence.text)
                drawn.append((sentence, False))
        return drawn
