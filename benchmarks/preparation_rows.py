"""Preparing a raw scan: our reading and resampling against a chain of MONAI's transforms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    CastToTyped,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    SpatialResample,
)

from data_prep.case_preparation import CaseTask, prepare_case
from data_prep.preparation_settings import PreparationSettings
from data_prep.raw_case import RawCase
from vlm3d_ext.data.hounsfield_units import AIR_HU
from vlm3d_ext.data.intensity_windows import window_centre_width
from vlm3d_ext.data.scan_reader import read_scan
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import resample_to_grey_levels, target_geometry

from .measuring import time_pairs
from .row import ResultsDiffer, Row
from .volumes import FULL_SIZE, chest_ct, temporary_folder

__all__ = ["preparation", "preparation_whole_case"]

_WINDOW = "soft_tissue"


class _ResampleTo:
    """MONAI's resampling onto the very grid of our preparation, which is what Spacingd does with a grid of its own."""

    def __init__(self, target: VolumeGeometry) -> None:
        self.target = target
        self.resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True, dtype=np.float32)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        image = self.resample(
            data["image"], dst_affine=torch.as_tensor(self.target.affine_ras), spatial_size=self.target.shape[::-1]
        )
        return {**data, "image": image}


def _chain(target: VolumeGeometry) -> Compose:
    centre, width = window_centre_width(_WINDOW)
    return Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", "LPS", labels=None),
            _ResampleTo(target),
            ScaleIntensityRanged("image", centre - width / 2, centre + width / 2, 0, 255, clip=True),
            CastToTyped("image", torch.uint8),
        ]
    )


def _ours(path: Path, antialias: bool) -> np.ndarray:
    scan = read_scan(path)
    target = target_geometry(scan.geometry, FULL_SIZE)[0]
    return resample_to_grey_levels(scan.hu, scan.geometry, target, [_WINDOW], AIR_HU, antialias)[0]


def _theirs(chain: Compose, path: Path) -> np.ndarray:
    """Return (D, H, W) uint8."""
    return chain({"image": str(path)})["image"][0].numpy().T


def _inside(source: VolumeGeometry, target: VolumeGeometry) -> tuple[slice, ...]:
    """Return the part of the target whose voxel centres lie among those of the source, where no padding is seen."""
    to_source = np.linalg.inv(source.affine_lps) @ target.affine_lps
    slices = []
    for axis, (size, most) in enumerate(zip(target.shape, source.shape, strict=True)):
        column = 2 - axis
        places = to_source[column, column] * np.arange(size) + to_source[column, 3]
        inside = np.flatnonzero((places >= 0) & (places <= most - 1))
        slices.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(slices)


def preparation(repeats: int = 5) -> Row:
    """CPU time from .nii.gz to grey levels at (64, 512, 512) against a chain of MONAI's transforms, both linear"""
    with temporary_folder() as folder:
        path, what = chest_ct(folder)
        geometry = read_scan(path).geometry
        target = target_geometry(geometry, FULL_SIZE)[0]
        chain = _chain(target)
        part = _inside(geometry, target)
        ours, theirs = _ours(path, antialias=False)[part], _theirs(chain, path)[part]
        apart = np.abs(ours.astype(np.int16) - theirs)
        if apart.max() > 1:
            raise ResultsDiffer(f"grey levels are up to {apart.max()} apart, {np.mean(apart > 1):.2%} by more than 1")
        times = time_pairs(lambda _: _ours(path, antialias=False), lambda _: _theirs(chain, path), repeats)
        antialiased = time_pairs(lambda _: _ours(path, antialias=True), lambda _: _ours(path, antialias=False), repeats)
    return Row.of_times(
        "preparation",
        preparation.__doc__ or "",
        times,
        0.25,
        f"grey levels are at most {apart.max()} apart, {np.mean(apart > 0):.2%} of them by 1",
        scan=f"{what}, {geometry.shape}",
        **{"averaging over slices, our default, against linear": antialiased.ratio},
    )


def preparation_whole_case(repeats: int = 5) -> Row:
    """CPU time of preparing a case as the command does, checks, averaging and NPZ included, against MONAI's chain and
    np.savez_compressed"""
    with temporary_folder() as folder:
        path, what = chest_ct(folder)
        geometry = read_scan(path).geometry
        chain = _chain(target_geometry(geometry, FULL_SIZE)[0])
        settings = PreparationSettings(spatial_size=FULL_SIZE, windows=(_WINDOW,))
        case = RawCase("case", "case", "case", "test", path, path.name)

        def ours(_: int) -> None:
            outcome = prepare_case(CaseTask(case, settings, folder / "prepared"))
            if outcome.status != "prepared":
                raise ResultsDiffer(f"our side refused the scan: {outcome.reason}")

        def peer(_: int) -> None:
            image = _theirs(chain, path)
            np.savez_compressed(folder / "peer.npz", imgs=image, gts=np.zeros_like(image))

        times = time_pairs(ours, peer, repeats)
    return Row.of_times(
        "preparation_whole_case",
        " ".join((preparation_whole_case.__doc__ or "").split()),
        times,
        None,
        "both write grey levels and a mask of the same shape; the row preparation compares the grey levels",
        scan=f"{what}, {geometry.shape}",
    )
