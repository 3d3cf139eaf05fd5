"""What the preparation was asked to do, and the digest that tells whether a prepared case is still what was asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.anatomical_masks import PLEURA_THICKNESS_MM, MaskCoding
from vlm3d_ext.data.depth_policies import DEPTH_POLICIES
from vlm3d_ext.data.intensity_windows import DEFAULT_WINDOW, window_centre_width

__all__ = ["ANATOMICAL_MASK_MODES", "PreparationSettings", "digest_of"]

ANATOMICAL_MASK_MODES = ("auto", "none", "totalsegmentator")

_FORMAT_VERSION = (
    2  # goes up whenever the same settings would give other bytes, so that old cases are not mixed with new ones
)


def digest_of(content: Any) -> str:
    """Return the SHA-256 of plain JSON content, independent of the order of keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class PreparationSettings:
    """The settings that decide the bytes of a prepared case.

    Settings that decide only which cases there are and what the manifest says of them (label set, split) are not
    among them: changing those needs no case to be made again.

    Args:
        spatial_size: (D, H, W) of the prepared volume.
        depth_policy: how a chest comes onto D slices: ``"resample"``, ``"crop"`` or ``"windows"``.
        spacing_mm: [z, y, x] for ``"crop"`` and ``"windows"``.
        windows: names of intensity windows, one image channel each.
        check_hu: refuse scans whose air is not where air lies.
        mask_coding: what the numbers of anatomical masks mean.

    Raises:
        ValueError: if a value is out of range or a name unknown.
    """

    spatial_size: tuple[int, int, int] = (64, 512, 512)
    depth_policy: str = "resample"
    spacing_mm: tuple[float, float, float] = (2.0, 0.742, 0.742)
    windows: tuple[str, ...] = (DEFAULT_WINDOW,)
    check_hu: bool = True
    mask_coding: MaskCoding = field(default_factory=MaskCoding)

    def __post_init__(self) -> None:
        if len(self.spatial_size) != 3 or min(self.spatial_size) < 2:
            raise ValueError(
                f"--spatial-size must be three whole numbers of at least 2, got {list(self.spatial_size)}."
            )
        if self.depth_policy not in DEPTH_POLICIES:
            raise ValueError(f"--depth-policy must be one of {list(DEPTH_POLICIES)}, got {self.depth_policy!r}.")
        if len(self.spacing_mm) != 3 or not all(0 < value < 100 for value in self.spacing_mm):
            raise ValueError(f"--spacing-mm must be three numbers between 0 and 100, got {list(self.spacing_mm)}.")
        if not self.windows or len(set(self.windows)) != len(self.windows):
            raise ValueError(f"--window must name different intensity windows, got {list(self.windows)}.")
        for name in self.windows:
            window_centre_width(name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON content; settings that have no effect (a spacing under ``"resample"``) are left out."""
        content = {
            "format_version": _FORMAT_VERSION,
            "spatial_size": list(self.spatial_size),
            "depth_policy": self.depth_policy,
            "window": list(self.windows),
            "window_centre_width_hu": [list(window_centre_width(name)) for name in self.windows],
            "check_hu": self.check_hu,
            "mask_coding": asdict(self.mask_coding),
            "pleura_thickness_mm": PLEURA_THICKNESS_MM,
        }
        if self.depth_policy != "resample":
            content["spacing_mm"] = list(self.spacing_mm)
        return content

    @property
    def digest(self) -> str:
        """SHA-256 of `to_dict()`."""
        return digest_of(self.to_dict())
