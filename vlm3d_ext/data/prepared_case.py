"""One prepared case on disk: grey levels, regions and spacing, the geometry beside them in JSON.

The JSON is written last, so it marks the case as whole. Grey levels and regions are in one of two forms:

- an NPZ with the keys of MedSAM2's files (`imgs`, `gts`, `spacing`); files made elsewhere are read too. Those do not
  say in which order their spacing is; ours is `[z, y, x]`, and a file without our JSON is taken to follow it.
- two chunked volumes (`vlm3d_ext.data.chunked_volume`), ``<volume_id>.b2nd`` with grey levels and spacing, and
  ``<volume_id>_regions.b2nd``: larger by a fifth, read six times as fast, and in parts.
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
from vlm3d_ext.data.chunked_volume import CHUNKED_EXTENSION, ChunkedVolume, DamagedVolumeError, write_chunked_volume
from vlm3d_ext.data.npz_arrays import NpzArrays, PickledArrayError

__all__ = [
    "VOLUME_FORMATS",
    "PreparedCase",
    "PreparedCaseError",
    "is_whole_case",
    "prepared_case_files",
    "prepared_case_paths",
    "prepared_image_path",
    "read_prepared_case",
    "read_prepared_npz",
    "read_prepared_patch",
    "read_sidecar",
    "write_prepared_case",
]

VOLUME_FORMATS = ("npz", "blosc2")
"""The forms in which grey levels and regions are written; any of them is read."""

_KEYS = ("imgs", "gts", "spacing")
_EXTENSIONS = {"npz": ".npz", "blosc2": CHUNKED_EXTENSION}
# Ends the name of a chunked case's regions, and therefore no id of a case in that form.
_REGIONS = "_regions"
_ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")
_NPY_SIGNATURE = b"\x93NUMPY"


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


def prepared_case_paths(folder: str | os.PathLike, volume_id: str, volume_format: str = "npz") -> tuple[Path, Path]:
    """Return the paths of a case's volume and JSON below the `prepared/` folder.

    Raises:
        ValueError: if `volume_id` is not a plain name without extension, or the format unknown.
    """
    if volume_format not in _EXTENSIONS:
        raise ValueError(f"volume_format must be one of {list(VOLUME_FORMATS)}, got {volume_format!r}.")
    if (
        not volume_id
        or Path(volume_id).name != volume_id
        or volume_id.startswith(".")
        or volume_id.endswith((".npz", CHUNKED_EXTENSION, ".gz", ".nii"))
    ):
        raise ValueError(
            f"a volume_id is a plain name without folder or extension, such as 'train_1_a_1', got {volume_id!r}."
        )
    volumes = Path(folder) / "volumes"
    return volumes / f"{volume_id}{_EXTENSIONS[volume_format]}", volumes / f"{volume_id}.json"


def prepared_case_files(folder: str | os.PathLike, volume_id: str) -> list[Path]:
    """Return every file that a case may have in `volumes/`, in any form, the JSON first."""
    npz, sidecar = prepared_case_paths(folder, volume_id)
    if volume_id.endswith(_REGIONS):
        return [sidecar, npz]
    chunked, _ = prepared_case_paths(folder, volume_id, "blosc2")
    return [sidecar, npz, chunked, _regions_path(chunked)]


def is_whole_case(folder: str | os.PathLike, volume_id: str) -> bool:
    """Whether all files of the case exist, in one form or the other, that is, whether writing it came to its end."""
    sidecar, npz, *chunked = prepared_case_files(folder, volume_id)
    return sidecar.is_file() and (npz.is_file() or (bool(chunked) and all(path.is_file() for path in chunked)))


def write_prepared_case(
    folder: str | os.PathLike,
    volume_id: str,
    imgs: np.ndarray,
    gts: np.ndarray | None,
    spacing_mm: Sequence[float] | np.ndarray,
    sidecar: dict[str, Any],
    volume_format: str = "npz",
) -> tuple[Path, Path]:
    """Write the volume, `volumes/<volume_id>.npz` or `.b2nd`, then `volumes/<volume_id>.json`.

    Args:
        folder: the `prepared/` folder.
        volume_id: name of the case, without extension.
        imgs: (D, H, W) or (C, D, H, W), uint8.
        gts: (D, H, W), uint8 regions; None where there is no anatomical mask, stored as all background.
        spacing_mm: `[z, y, x]` in mm of the prepared grid.
        sidecar: JSON content: where the case comes from, its grids, its window.
        volume_format: one of `VOLUME_FORMATS`. What another form left of the case is removed.

    Returns:
        The two paths.

    Raises:
        PreparedCaseError: if the arrays are not what a reader would accept; nothing is written.
        ValueError: if the format is unknown; nothing is written.
        OSError: if a file cannot be written.
    """
    image_path, json_path = prepared_case_paths(folder, volume_id, volume_format)
    if volume_format != "npz" and volume_id.endswith(_REGIONS):
        raise PreparedCaseError(
            f"{image_path}: would be taken for the regions of {volume_id.removesuffix(_REGIONS)!r}, expected an id "
            f"that does not end in {_REGIONS}; rename the scan, or write NPZ."
        )
    if gts is None:
        gts = np.zeros(imgs.shape[-3:], dtype=np.uint8)
    spacing = np.asarray(spacing_mm, dtype=np.float32)
    _check_dtype(image_path, imgs, gts)
    _check_shapes(image_path, imgs.shape, gts.shape)
    _check_labels(image_path, int(gts.max()))
    _check_spacing(image_path, spacing)
    # An old JSON beside a new volume would mark a half-replaced case as whole, an old volume be taken for the new one.
    for path in prepared_case_files(folder, volume_id):
        path.unlink(missing_ok=True)
    if volume_format == "npz":
        write_npz(image_path, {"imgs": imgs, "gts": gts, "spacing": spacing})
    else:
        write_chunked_volume(_regions_path(image_path), gts, {})
        write_chunked_volume(image_path, imgs, {"spacing_mm": spacing.tolist(), "has_regions": bool(gts.any())})
    write_json(json_path, sidecar)
    return image_path, json_path


def read_prepared_case(
    path: str | os.PathLike, out: tuple[np.ndarray | None, np.ndarray | None] | None = None
) -> PreparedCase:
    """Read a prepared case in either form, told by the extension.

    Args:
        path: the .npz, or the .b2nd of the grey levels.
        out: places for `imgs` and `gts`, uint8, C-contiguous. Each is filled if it has the shape of what is read, but
            for an axis of length 1 in front, and otherwise left alone.

    Returns:
        The case, whose arrays can be written to: views of the places that were filled, else arrays of their own.

    Raises:
        PreparedCaseError: if a file is missing, damaged, holds pickled objects, lacks a key, or an array has the wrong
            dtype, shape or range.
    """
    path = Path(path)
    imgs_out, gts_out = out or (None, None)
    if path.suffix != CHUNKED_EXTENSION:
        return _read_npz(path, imgs_out, gts_out)
    try:
        image, regions = _open_chunked(path)
        imgs = image.read(_place(imgs_out, image.shape))
        gts = regions.read(_place(gts_out, regions.shape))
    except DamagedVolumeError as error:
        raise PreparedCaseError(str(error)) from None
    return PreparedCase(imgs, gts, _chunked_spacing(path, image))


def read_prepared_npz(path: str | os.PathLike) -> PreparedCase:
    """Read the NPZ of a prepared case, ours or one in MedSAM2's form. Pickled objects are never loaded.

    Raises:
        PreparedCaseError: as `read_prepared_case`.
    """
    return _read_npz(Path(path), None, None)


def read_prepared_patch(path: str | os.PathLike, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Read a part of a case's grey levels.

    Of a .b2nd, only the chunks that the part touches are read and checked. An NPZ has none: all of it is inflated, at
    the cost of the whole case.

    Args:
        path: the .npz, or the .b2nd of the grey levels.
        start: (k, j, i) of the first voxel.
        size: (d, h, w) voxels.

    Returns:
        (d, h, w) or (C, d, h, w) uint8.

    Raises:
        PreparedCaseError: if the file is not a sound prepared case, as far as it is read.
        ValueError: if the part reaches beyond the volume.
    """
    path = Path(path)
    start, size = tuple(start), tuple(size)
    if path.suffix == CHUNKED_EXTENSION:
        try:
            image = ChunkedVolume(path)
            channels = image.shape[:-3]
            return image.read_patch((*(0 for _ in channels), *start), (*channels, *size))
        except DamagedVolumeError as error:
            raise PreparedCaseError(str(error)) from None
    imgs = _read_npz(path, None, None).imgs
    inside = (s >= 0 and n >= 1 and s + n <= length for s, n, length in zip(start, size, imgs.shape[-3:], strict=True))
    if not all(inside):
        raise ValueError(f"{path}: the patch from {start} of size {size} is not within {imgs.shape[-3:]}.")
    k, j, i = (slice(s, s + n) for s, n in zip(start, size, strict=True))
    return imgs[..., k, j, i].copy()


def prepared_image_path(sidecar_path: str | os.PathLike) -> Path:
    """Return the path of the volume that a case's JSON belongs to, beside it.

    Raises:
        PreparedCaseError: if the JSON cannot be read.
    """
    sidecar_path = Path(sidecar_path)
    named = read_sidecar(sidecar_path).get("image")
    name = Path(named).name if isinstance(named, str) else f"{sidecar_path.stem}.npz"
    return sidecar_path.with_name(name)


def read_sidecar(path: str | os.PathLike) -> dict[str, Any]:
    """Read the JSON beside a prepared volume; `path` may name either of the two files.

    Raises:
        PreparedCaseError: if it is missing or no JSON object.
    """
    path = Path(path).with_suffix(".json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PreparedCaseError(
            f"{path}: no such file, so where the voxels lie is unknown; expected it beside the volume; prepare the "
            "scan again."
        ) from None
    except ValueError:
        raise PreparedCaseError(f"{path}: is not JSON, expected a geometry sidecar; prepare the scan again.") from None
    if not isinstance(content, dict):
        raise PreparedCaseError(
            f"{path}: holds a {type(content).__name__}, expected a JSON object; prepare the scan again."
        )
    return content


def _read_npz(path: Path, imgs_out: np.ndarray | None, gts_out: np.ndarray | None) -> PreparedCase:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise PreparedCaseError(
            f"{path}: no such file; expected a prepared case (.npz); prepare the scan first."
        ) from None
    except OSError as error:
        raise PreparedCaseError(
            f"{path}: cannot be read ({error.strerror}); expected a prepared case; check the file's permissions and "
            "disk."
        ) from None
    if content.startswith(_NPY_SIGNATURE):
        raise PreparedCaseError(
            f"{path}: holds a single array, expected an NPZ with {', '.join(_KEYS)}; prepare it again."
        )
    if content and not content.startswith(_ZIP_SIGNATURES):
        raise PreparedCaseError(
            f"{path}: is a pickle or no NPZ at all, expected an NPZ of plain numbers; do not open it by other means, "
            "prepare the scan again."
        )
    try:
        npz = NpzArrays(content)
        missing = [key for key in _KEYS if key not in npz.names]
        if missing:
            raise PreparedCaseError(
                f"{path}: lacks {', '.join(missing)}, has {sorted(npz.names)}; expected {', '.join(_KEYS)}; "
                "prepare it again."
            )
        imgs, gts = npz.read("imgs", imgs_out), npz.read("gts", gts_out)
        spacing = npz.read("spacing")
    except PreparedCaseError:
        raise
    except PickledArrayError as error:
        raise PreparedCaseError(
            f"{path}: {error.name} holds pickled Python objects, which can run code, expected plain numbers; prepare "
            "the scan again."
        ) from None
    except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error):
        raise PreparedCaseError(
            f"{path}: is damaged or no NPZ, expected a whole file; prepare the scan again."
        ) from None
    if spacing.dtype.kind not in "iuf":
        raise PreparedCaseError(f"{path}: spacing is {spacing.dtype}, expected numbers in mm; prepare the scan again.")
    spacing = spacing.astype(np.float32)
    _check_dtype(path, imgs, gts)
    _check_shapes(path, imgs.shape, gts.shape)
    _check_labels(path, int(gts.max()))
    _check_spacing(path, spacing)
    return PreparedCase(imgs, gts, spacing)


def _open_chunked(path: Path) -> tuple[ChunkedVolume, ChunkedVolume]:
    image, regions = ChunkedVolume(path), ChunkedVolume(_regions_path(path))
    _check_shapes(path, image.shape, regions.shape)
    # The largest value of each volume was noted when it was written; looking for it again costs as much as reading.
    _check_labels(_regions_path(path), regions.max_value)
    return image, regions


def _chunked_spacing(path: Path, image: ChunkedVolume) -> np.ndarray:
    try:
        spacing = np.asarray(image.description["spacing_mm"], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        raise PreparedCaseError(
            f"{path}: says {image.description!r} of itself, expected a spacing_mm [z, y, x]; is it a mask, or another "
            "program's? Pass the case's own file, or prepare the scan again."
        ) from None
    _check_spacing(path, spacing)
    return spacing


def _regions_path(image_path: Path) -> Path:
    return image_path.with_name(f"{image_path.stem}{_REGIONS}{CHUNKED_EXTENSION}")


def _place(out: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    fits = out is not None and out.shape in (shape, (1, *shape)) and out.dtype == np.uint8
    return out.reshape(shape) if out is not None and fits else None


def _check_dtype(path: Path, imgs: np.ndarray, gts: np.ndarray) -> None:
    for name, array in (("imgs", imgs), ("gts", gts)):
        if array.dtype != np.uint8:
            raise PreparedCaseError(
                f"{path}: {name} is {array.dtype}, expected uint8; apply a window to HU, and map labels to the "
                f"{NUM_REGIONS} regions."
            )


def _check_shapes(path: Path, imgs: tuple[int, ...], gts: tuple[int, ...]) -> None:
    if len(imgs) not in (3, 4) or 0 in imgs:
        raise PreparedCaseError(
            f"{path}: imgs has shape {imgs}, expected (D, H, W) or (C, D, H, W); prepare the scan again."
        )
    if gts != imgs[-3:]:
        raise PreparedCaseError(
            f"{path}: gts has shape {gts}, but imgs {imgs}; expected the same (D, H, W); prepare the scan again."
        )


def _check_labels(path: Path, highest: int) -> None:
    if highest > NUM_REGIONS:
        raise PreparedCaseError(
            f"{path}: gts has label {highest}, expected 0 to {NUM_REGIONS}; map the labels to the {NUM_REGIONS} "
            "regions first."
        )


def _check_spacing(path: Path, spacing: np.ndarray) -> None:
    if spacing.shape != (3,) or not np.isfinite(spacing).all() or spacing.min() <= 0:
        raise PreparedCaseError(
            f"{path}: spacing is {spacing.tolist()}, expected three positive numbers [z, y, x] in mm; correct it at "
            "its source."
        )
