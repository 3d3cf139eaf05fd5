"""All sources of lesion masks together: which of them a case's masks come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.lesion_masks import FOLDER, LesionMask, LesionMaskIndex, find_lesion_masks
from data_prep.raw_case import RawCase
from data_prep.rexgrounding import REXGROUNDINGCT, ReXGroundingRelease, read_rexgrounding
from data_prep.totalsegmentator_lesions import TOTALSEGMENTATOR, find_totalsegmentator_lesions

__all__ = ["LESION_MASK_SOURCES", "LesionMasks", "find_all_lesion_masks"]

LESION_MASK_SOURCES = (FOLDER, REXGROUNDINGCT, TOTALSEGMENTATOR)
"""Names of the sources, in the order in which they are asked: the user's own, people's, a program's."""

_SHOWN_VOLUMES = 3


@dataclass
class LesionMasks:
    """The masks of several sources.

    Args:
        indexes: one per source; the first that has a disease of a volume gives its mask.
        rexgrounding: the release, if it is one of the sources.
    """

    indexes: Sequence[LesionMaskIndex]
    rexgrounding: ReXGroundingRelease | None = None
    _passed_over: Counter[tuple[str, str]] = field(default_factory=Counter)

    def masks_of(self, case: RawCase) -> tuple[dict[str, LesionMask], list[str]]:
        """Return disease key -> mask of a case, and notes on masks that another source's went before.

        Raises:
            UnusableScanError: if one source has two masks of a disease.
        """
        masks: dict[str, LesionMask] = {}
        notes = []
        for index in self.indexes:
            for disease, mask in index.masks_of(case).items():
                if disease in masks:
                    notes.append(f"{disease}: mask of {index.source} not used, {masks[disease].source} has one")
                    self._passed_over[index.source, masks[disease].source] += 1
                else:
                    masks[disease] = mask
        return masks, notes

    def remarks(self, volume_ids: set[str]) -> list[str]:
        """Say what was found and is not used, once `masks_of` was asked for every case.

        Args:
            volume_ids: all volumes of the raw data.
        """
        remarks = [remark for index in self.indexes for remark in index.remarks]
        for (source, before), number in sorted(self._passed_over.items()):
            remarks.append(f"lesion masks: {number} mask(s) of {source} not used, because {before} has them too")
        for index in self.indexes:
            strangers = sorted(set(index.by_volume) - volume_ids)
            if strangers:
                what = "lesion masks" if index.source == FOLDER else f"lesion masks of {index.source}"
                remarks.append(
                    f"{what}: {len(strangers)} volume(s) such as {strangers[:_SHOWN_VOLUMES]} have masks but no scan "
                    f"here"
                )
        return remarks


def find_all_lesion_masks(
    folder: Path | None = None, rexgrounding_folder: Path | None = None, totalsegmentator_folder: Path | None = None
) -> LesionMasks:
    """Index the lesion masks of the sources that have a folder; opens no mask.

    Args:
        folder: the user's own masks.
        rexgrounding_folder: a release of ReXGroundingCT.
        totalsegmentator_folder: CT-RATE's ``ts_seg``.

    Raises:
        LayoutError: if ReXGroundingCT's tables cannot be used.
    """
    release = read_rexgrounding(rexgrounding_folder) if rexgrounding_folder else None
    indexes = [find_lesion_masks(folder)] if folder else []
    indexes += [release.index] if release else []
    indexes += [find_totalsegmentator_lesions(totalsegmentator_folder)] if totalsegmentator_folder else []
    return LesionMasks(indexes, release)
