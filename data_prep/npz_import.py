"""A case that comes prepared, as NPZ: checked against what it should be, and its grids found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.preparation_settings import PreparationSettings
from vlm3d_ext.data.prepared_case import PreparedCase, PreparedCaseError, read_prepared_npz, read_sidecar
from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = ["ImportedCase", "import_npz"]

_GRIDS = ("prepared_geometry", "source_geometry", "canonical_geometry")
# The NPZ holds float32; seven digits of a spacing are what survives.
_SPACING_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class ImportedCase:
    """A prepared case made elsewhere.

    Args:
        case: its arrays.
        geometry: the grid that they are on.
        source_geometry: the grid of the scan that they were made from; without a sidecar the same one.
        description: what the sidecar of the case says of these, plain JSON content.
    """

    case: PreparedCase
    geometry: VolumeGeometry
    source_geometry: VolumeGeometry
    description: dict[str, Any]


def import_npz(path: Path, settings: PreparationSettings) -> ImportedCase:
    """Read an NPZ, and the JSON sidecar of the same name where it is there.

    Nothing but grids and numbers is taken over from a sidecar: what else it says may be a patient's.

    Args:
        path: the .npz.
        settings: what the case must have been prepared with.

    Raises:
        PreparedCaseError: if a file is damaged, or the case was prepared otherwise: another size, other windows,
            another depth policy.
    """
    case = _checked_arrays(path, settings)
    sidecar_path = path.with_suffix(".json")
    if not sidecar_path.is_file():
        depth, height, width = case.imgs.shape[-3:]
        grid = VolumeGeometry.from_spacing((depth, height, width), [float(value) for value in case.spacing])
        notes = [
            f"no geometry beside the NPZ: its axes are taken as the patient's (left, back, up) with spacing "
            f"{[round(value, 4) for value in grid.spacing_mm]} mm [z, y, x] and origin 0, so masks lie on the grid of "
            "the NPZ"
        ]
        return _imported(case, dict.fromkeys(_GRIDS, grid), settings, None, None, notes)
    content = read_sidecar(sidecar_path)
    _check_settings(sidecar_path, content, settings)
    grids = _grids(sidecar_path, content, case)
    return _imported(case, grids, settings, _two_numbers(content), _hu_check(content), _notes(content, settings))


def _checked_arrays(path: Path, settings: PreparationSettings) -> PreparedCase:
    case = read_prepared_npz(path)
    num_windows = len(settings.windows)
    imgs = case.imgs
    if num_windows == 1 and imgs.ndim == 4 and imgs.shape[0] == 1:
        imgs = imgs[0]
    found = (imgs.shape[0] if imgs.ndim == 4 else 1, *imgs.shape[-3:])
    if found != (num_windows, *settings.spatial_size):
        raise PreparedCaseError(
            f"{path}: holds {found[0]} windows of {_size(found[1:])} voxels, expected {num_windows} "
            f"({', '.join(settings.windows)}) of {_size(settings.spatial_size)}, as the network was trained on; pass "
            "the scan's NIfTI or DICOM files instead."
        )
    same_spacing = np.allclose(case.spacing, settings.spacing_mm, rtol=_SPACING_TOLERANCE, atol=0)
    if settings.depth_policy == "crop" and not same_spacing:
        raise PreparedCaseError(
            f"{path}: has spacing {[round(float(value), 4) for value in case.spacing]} mm, expected "
            f"{list(settings.spacing_mm)}, as the network was trained on; pass the scan's NIfTI or DICOM files instead."
        )
    lowest, highest = int(imgs.min()), int(imgs.max())
    if lowest == highest:
        raise PreparedCaseError(f"{path}: every grey level is {lowest}, expected a picture; leave the file out.")
    return replace(case, imgs=imgs)


def _check_settings(path: Path, content: dict[str, Any], settings: PreparationSettings) -> None:
    """Compare what the sidecar says with the settings; what it does not say cannot be compared."""
    window = content.get("depth_window")
    if isinstance(window, dict) and window.get("count", 1) != 1:
        raise PreparedCaseError(
            f"{path}: is one of {window['count']} windows of its scan, expected the whole scan in one case; pass the "
            "scan's NIfTI or DICOM files instead."
        )
    for key, wanted in (("window", list(settings.windows)), ("depth_policy", settings.depth_policy)):
        if content.get(key, wanted) != wanted:
            raise PreparedCaseError(
                f"{path}: {key} is {content[key]!r}, expected {wanted!r}, as the network was trained on; pass the "
                "scan's NIfTI or DICOM files instead."
            )


def _grids(path: Path, content: dict[str, Any], case: PreparedCase) -> dict[str, VolumeGeometry]:
    next_step = "correct it, or take it away for the NPZ to be taken as it is."
    try:
        grids = {name: VolumeGeometry.from_dict(content[name]) for name in _GRIDS}
    except (KeyError, TypeError, ValueError) as error:
        raise PreparedCaseError(f"{path}: lacks a grid ({error}), expected {', '.join(_GRIDS)}; {next_step}") from None
    prepared = grids["prepared_geometry"]
    if prepared.shape != case.imgs.shape[-3:]:
        raise PreparedCaseError(
            f"{path}: its grid has {_size(prepared.shape)} voxels, expected {_size(case.imgs.shape[-3:])} as the NPZ; "
            f"{next_step}"
        )
    if not np.allclose(prepared.spacing_mm, case.spacing, rtol=_SPACING_TOLERANCE, atol=0):
        raise PreparedCaseError(
            f"{path}: its grid has spacing {[round(value, 4) for value in prepared.spacing_mm]} mm, expected "
            f"{[round(float(value), 4) for value in case.spacing]} as the NPZ; {next_step}"
        )
    if not grids["source_geometry"].canonical().is_close(grids["canonical_geometry"]):
        raise PreparedCaseError(
            f"{path}: canonical_geometry is another grid than source_geometry in LPS order, expected the same; "
            f"{next_step}"
        )
    return grids


def _imported(
    case: PreparedCase,
    grids: dict[str, VolumeGeometry],
    settings: PreparationSettings,
    stored_values: list[float] | None,
    hu_check: dict[str, Any] | None,
    notes: list[str],
) -> ImportedCase:
    description = {
        **{name: grids[name].to_dict() for name in _GRIDS},
        "depth_policy": settings.depth_policy,
        "depth_window": {"index": 0, "count": 1},
        "window": list(settings.windows),
        "stored_values": stored_values,
        "hu_check": hu_check or {"done": False, "low_percentile_hu": None},
        "has_anatomical_mask": bool(case.gts.any()),
        "notes": notes,
    }
    return ImportedCase(case, grids["prepared_geometry"], grids["source_geometry"], description)


def _notes(content: dict[str, Any], settings: PreparationSettings) -> list[str]:
    unsaid = [key for key in ("window", "depth_policy") if key not in content]
    if unsaid:
        return [f"the geometry beside the NPZ does not say its {' and '.join(unsaid)}; taken to be as expected"]
    digest = content.get("settings_digest")
    if digest is not None and digest != settings.digest:
        return ["the case was prepared with other settings of masks or of the HU check than the training data"]
    return []


def _two_numbers(content: dict[str, Any]) -> list[float] | None:
    values = content.get("stored_values")
    if not isinstance(values, list) or len(values) != 2 or not all(_is_number(value) for value in values):
        return None
    return [float(value) for value in values]


def _hu_check(content: dict[str, Any]) -> dict[str, Any] | None:
    check = content.get("hu_check")
    if not isinstance(check, dict) or not _is_number(check.get("low_percentile_hu")):
        return None
    return {"done": check.get("done") is True, "low_percentile_hu": float(check["low_percentile_hu"])}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(length) for length in shape)
