"""Lesions of a mask and the bins of their size in which detection is reported."""

from __future__ import annotations

import math
from types import MappingProxyType

from ..data.connected_components import Lesion, label_lesions, lesions_of

__all__ = ["SIZE_BINS", "Lesion", "label_lesions", "lesions_of", "size_bin"]

SIZE_BINS = MappingProxyType({"small": (1, 9), "medium": (10, 1000), "large": (1001, math.inf)})
"""Name of the bin -> least and greatest number of voxels, both included."""


def size_bin(num_voxels: int) -> str:
    """Return the bin of a lesion: "small" (< 10 voxels), "medium" (10 to 1000) or "large" (> 1000).

    Raises:
        ValueError: if there is no voxel.
    """
    for name, (least, greatest) in SIZE_BINS.items():
        if least <= num_voxels <= greatest:
            return name
    raise ValueError(f"a lesion has at least 1 voxel, got {num_voxels}.")
