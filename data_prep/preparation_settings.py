"""What the preparation was asked to do, and the digest that tells whether a prepared case is still what was asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.anatomical_masks import PLEURA_THICKNESS_MM, MaskCoding
from vlm3d_ext.data.depth_policies import DEPTH_POLICIES
from vlm3d_ext.data.intensity_windows import DEFAULT_WINDOW, window_centre_width
from vlm3d_ext.data.prepared_case import VOLUME_FORMATS

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
        volume_format: how prepared volumes and masks are stored: ``"npz"``, or ``"blosc2"``, chunked.

    Raises:
        ValueError: if a value is out of range or a name unknown.
    """

    spatial_size: tuple[int, int, int] = (64, 512, 512)
    depth_policy: str = "resample"
    spacing_mm: tuple[float, float, float] = (2.0, 0.742, 0.742)
    windows: tuple[str, ...] = (DEFAULT_WINDOW,)
    check_hu: bool = True
    mask_coding: MaskCoding = field(default_factory=MaskCoding)
    volume_format: str = "npz"

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
        if self.volume_format not in VOLUME_FORMATS:
            raise ValueError(f"--volume-format must be one of {list(VOLUME_FORMATS)}, got {self.volume_format!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON content; settings that have no effect (a spacing under ``"resample"``) are left out.

        So is the format ``"npz"``, for cases prepared before there was another to stay finished.
        """
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
        if self.volume_format != "npz":
            content["volume_format"] = self.volume_format
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PreparationSettings:
        """Return the settings that `to_dict` described, such as a manifest or a checkpoint holds.

        Further keys, which say where data came from and not how they were prepared, are passed over.

        Raises:
            ValueError: if a key is missing, the format is another version's, or a window, the coding of masks or the
                thickness of the pleura is not what it is here: the same scan would give other voxels.
        """
        needed = ("format_version", "spatial_size", "depth_policy", "window", "check_hu", "mask_coding")
        missing = [key for key in needed if key not in content]
        if missing:
            raise ValueError(
                f"preparation settings need the keys {', '.join(needed)}; {', '.join(missing)} missing; take the "
                "'settings' of the training data's manifest.json."
            )
        if content["format_version"] != _FORMAT_VERSION:
            raise ValueError(
                f"the data were prepared in format {content['format_version']!r}, expected {_FORMAT_VERSION}; train on "
                "data prepared with this version, or use the version that they were prepared with."
            )
        names = content["window"]
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"window must be a list of names of intensity windows, got {names!r}.")
        try:
            settings = cls(
                spatial_size=_three(content, "spatial_size", int),
                depth_policy=content["depth_policy"],
                spacing_mm=_three(content, "spacing_mm", float) if "spacing_mm" in content else cls.spacing_mm,
                windows=tuple(names),
                check_hu=bool(content["check_hu"]),
                mask_coding=MaskCoding(**content["mask_coding"]),
                volume_format=content.get("volume_format", cls.volume_format),
            )
        except TypeError:
            raise ValueError(
                f"mask_coding is {content['mask_coding']!r}, expected {asdict(MaskCoding())!r} or its like; take the "
                "'settings' of the training data's manifest.json."
            ) from None
        ours = settings.to_dict()
        for key in ("window_centre_width_hu", "pleura_thickness_mm"):
            if content.get(key, ours[key]) != ours[key]:
                raise ValueError(
                    f"the data were prepared with {key} {content[key]!r}, which is {ours[key]!r} here; use the version "
                    "that they were prepared with."
                )
        return settings

    @property
    def digest(self) -> str:
        """SHA-256 of `to_dict()`."""
        return digest_of(self.to_dict())


def _three(content: Mapping[str, Any], key: str, kind: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    values = content[key]
    try:
        first, second, third = (kind(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"{key} must be three numbers [z, y, x], got {values!r}.") from None
    return first, second, third
