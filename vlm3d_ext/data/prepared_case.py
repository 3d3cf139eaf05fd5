"""One prepared case on disk: grey levels, regions and spacing in an NPZ, the geometry beside it in JSON.

The JSON is written last, so it marks the case as whole. The NPZ has the keys of MedSAM2's files (`imgs`, `gts`,
`spacing`), and files made elsewhere are read too. Those do not say in which order their spacing is; ours is `[z, y,
x]`, and a file without our JSON is taken to follow it.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm3d_ext.data.anatomical_regions import NUM_REGIONS
from vlm3d_ext.data.atomic_files import write_json, write_npz

__all__ = [
    "PreparedCase",
    "PreparedCaseError",
    "is_whole_case",
    "prepared_case_paths",
    "read_prepared_npz",
    "read_sidecar",
    "write_prepared_case",
]

_KEYS = ("imgs", "gts", "spacing")


class PreparedCaseError(ValueError):
    """A prepared case that must not be used; the message is one line: file, value found, what was expected, what to
    do."""


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """The arrays of one prepared case.

    Args:
        imgs: (D, H, W) uint8 grey levels, or (C, D, H, W) with several windows.
        gts: (D, H, W) uint8, 0 background, 1 to 20 anatomical regions.
        spacing: (3,) float32, `[z, y, x]` in mm.
    """

    imgs: np.ndarray
    gts: np.ndarray
    spacing: np.ndarray


def prepared_case_paths(folder: str | os.PathLike, volume_id: str) -> tuple[Path, Path]:
    """Return the paths of a case's NPZ and JSON below the `prepared/` folder.

    Raises:
        ValueError: if `volume_id` is not a plain name without extension.
    """
    if (
        not volume_id
        or Path(volume_id).name != volume_id
        or volume_id.startswith(".")
        or volume_id.endswith((".npz", ".gz", ".nii"))
    ):
        raise ValueError(
            f"a volume_id is a plain name without folder or extension, such as 'train_1_a_1', got {volume_id!r}."
        )
    volumes = Path(folder) / "volumes"
    return volumes / f"{volume_id}.npz", volumes / f"{volume_id}.json"


def is_whole_case(folder: str | os.PathLike, volume_id: str) -> bool:
    """Whether both files of the case exist, that is, whether writing it came to its end."""
    return all(path.is_file() for path in prepared_case_paths(folder, volume_id))


def write_prepared_case(
    folder: str | os.PathLike,
    volume_id: str,
    imgs: np.ndarray,
    gts: np.ndarray | None,
    spacing_mm: Sequence[float] | np.ndarray,
    sidecar: dict[str, Any],
) -> tuple[Path, Path]:
    """Write `volumes/<volume_id>.npz`, then `volumes/<volume_id>.json`.

    Args:
        folder: the `prepared/` folder.
        volume_id: name of the case, without extension.
        imgs: (D, H, W) or (C, D, H, W), uint8.
        gts: (D, H, W), uint8 regions; None where there is no anatomical mask, stored as all background.
        spacing_mm: `[z, y, x]` in mm of the prepared grid.
        sidecar: JSON content: where the case comes from, its grids, its window.

    Returns:
        The two paths.

    Raises:
        PreparedCaseError: if the arrays are not what a reader would accept; nothing is written.
        OSError: if a file cannot be written.
    """
    npz_path, json_path = prepared_case_paths(folder, volume_id)
    if gts is None:
        gts = np.zeros(imgs.shape[-3:], dtype=np.uint8)
    spacing = np.asarray(spacing_mm, dtype=np.float32)
    _check_arrays(npz_path, imgs, gts, spacing)
    # An old JSON beside a new NPZ would mark a half-replaced case as whole.
    json_path.unlink(missing_ok=True)
    write_npz(npz_path, {"imgs": imgs, "gts": gts, "spacing": spacing})
    write_json(json_path, sidecar)
    return npz_path, json_path


def read_prepared_npz(path: str | os.PathLike) -> PreparedCase:
    """Read the NPZ of a prepared case, ours or one in MedSAM2's form. Pickled objects are never loaded.

    Raises:
        PreparedCaseError: if the file is missing, damaged, holds pickled objects, lacks a key, or an array has the
            wrong dtype, shape or range.
    """
    path = Path(path)
    if not path.is_file():
        raise PreparedCaseError(f"{path}: no such file; expected a prepared case (.npz); prepare the scan first.")
    try:
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise PreparedCaseError(
                f"{path}: holds a single array, expected an NPZ with {', '.join(_KEYS)}; prepare it again."
            )
        with content:
            missing = [key for key in _KEYS if key not in content.files]
            if missing:
                raise PreparedCaseError(
                    f"{path}: lacks {', '.join(missing)}, has {sorted(content.files)}; expected {', '.join(_KEYS)}; "
                    "prepare it again."
                )
            arrays = {key: _loaded(path, content, key) for key in _KEYS}
    except PreparedCaseError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error):
            raise PreparedCaseError(
                f"{path}: is a pickle, expected an NPZ of plain numbers; do not open it by other means, prepare the "
                "scan again."
            ) from None
        raise PreparedCaseError(
            f"{path}: is damaged or no NPZ, expected a whole file; prepare the scan again."
        ) from None
    spacing = arrays["spacing"]
    if spacing.dtype.kind not in "iuf":
        raise PreparedCaseError(f"{path}: spacing is {spacing.dtype}, expected numbers in mm; prepare the scan again.")
    spacing = spacing.astype(np.float32)
    _check_arrays(path, arrays["imgs"], arrays["gts"], spacing)
    return PreparedCase(arrays["imgs"], arrays["gts"], spacing)


def read_sidecar(path: str | os.PathLike) -> dict[str, Any]:
    """Read the JSON beside a prepared NPZ; `path` may name either of the two files.

    Raises:
        PreparedCaseError: if it is missing or no JSON object.
    """
    path = Path(path).with_suffix(".json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PreparedCaseError(
            f"{path}: no such file, so where the voxels lie is unknown; expected it beside the .npz; prepare the scan "
            "again."
        ) from None
    except ValueError:
        raise PreparedCaseError(f"{path}: is not JSON, expected a geometry sidecar; prepare the scan again.") from None
    if not isinstance(content, dict):
        raise PreparedCaseError(
            f"{path}: holds a {type(content).__name__}, expected a JSON object; prepare the scan again."
        )
    return content


def _loaded(path: Path, content: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        return content[key]
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise PreparedCaseError(
            f"{path}: {key} holds pickled Python objects, which can run code, expected plain numbers; prepare the scan "
            "again."
        ) from None


def _check_arrays(path: Path, imgs: np.ndarray, gts: np.ndarray, spacing: np.ndarray) -> None:
    for name, array in (("imgs", imgs), ("gts", gts)):
        if array.dtype != np.uint8:
            raise PreparedCaseError(
                f"{path}: {name} is {array.dtype}, expected uint8; apply a window to HU, and map labels to the "
                f"{NUM_REGIONS} regions."
            )
    if imgs.ndim not in (3, 4) or 0 in imgs.shape:
        raise PreparedCaseError(
            f"{path}: imgs has shape {imgs.shape}, expected (D, H, W) or (C, D, H, W); prepare the scan again."
        )
    if gts.shape != imgs.shape[-3:]:
        raise PreparedCaseError(
            f"{path}: gts has shape {gts.shape}, but imgs {imgs.shape}; expected the same (D, H, W); prepare the scan "
            "again."
        )
    if gts.max() > NUM_REGIONS:
        raise PreparedCaseError(
            f"{path}: gts has label {int(gts.max())}, expected 0 to {NUM_REGIONS}; map the labels to the {NUM_REGIONS} "
            "regions first."
        )
    if spacing.shape != (3,) or not np.isfinite(spacing).all() or spacing.min() <= 0:
        raise PreparedCaseError(
            f"{path}: spacing is {spacing.tolist()}, expected three positive numbers [z, y, x] in mm; correct it at "
            "its source."
        )
