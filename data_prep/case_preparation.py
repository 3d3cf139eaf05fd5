"""One raw scan -> its prepared files. Runs in a worker process; everything it needs comes in a `CaseTask`."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from data_prep.anatomical_masks import add_pleura, read_anatomical_mask
from data_prep.lesion_mask_reading import ScanLesions, read_lesion_masks
from data_prep.lesion_masks import DRAWN_DISEASES, LesionMask
from data_prep.npz_import import import_npz
from data_prep.preparation_settings import PreparationSettings
from data_prep.raw_case import RawCase
from data_prep.totalsegmentator_command import run_totalsegmentator
from vlm3d_ext.data.chunked_volume import CHUNKED_EXTENSION
from vlm3d_ext.data.hounsfield_units import low_percentile_hu
from vlm3d_ext.data.prepared_case import (
    VOLUME_FORMATS,
    is_whole_case,
    prepared_case_files,
    prepared_case_paths,
    read_sidecar,
    write_prepared_case,
)
from vlm3d_ext.data.scan import Rescale, Scan
from vlm3d_ext.data.scan_reader import read_scan, write_chunked_mask
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import (
    resample_binary_mask,
    resample_mask,
    resample_to_grey_levels,
    target_geometry,
    write_mask_nifti,
)

__all__ = [
    "CaseOutcome",
    "CaseTask",
    "PreparedVolume",
    "one_line",
    "prepare_case",
    "prepare_volumes",
    "read_finished_sidecars",
    "remove_prepared_files",
]

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_SPACE = {*_DISK_FULL, errno.EFBIG}


@dataclass(frozen=True)
class CaseTask:
    """One case to prepare.

    Args:
        case: the raw scan.
        settings: what decides the bytes.
        output: folder of the prepared data set.
        anatomical_mask: file or folder, or None.
        run_totalsegmentator: make the anatomical mask with TotalSegmentator.
        lesion_masks: disease key -> where its mask is.
        resample_lesion_masks: bring lesion masks on another grid onto the scan's, instead of refusing the case.
        input_digest: stands for the scan's and masks' identity (see `data_prep.preparation_run`).
        hidden_paths: absolute folder -> what stands for it in messages and in the sidecar, so that they are the same
            on every machine.
        inspect_scan: returns notes on a scan, given its path and itself, or refuses it; None to ask nothing.
    """

    case: RawCase
    settings: PreparationSettings
    output: Path
    anatomical_mask: Path | None = None
    run_totalsegmentator: bool = False
    lesion_masks: Mapping[str, LesionMask] = field(default_factory=dict)
    resample_lesion_masks: bool = False
    input_digest: str = ""
    hidden_paths: Mapping[str, str] = field(default_factory=dict)
    inspect_scan: Callable[[Path, Scan], Sequence[str]] | None = None


@dataclass(frozen=True)
class CaseOutcome:
    """What became of a case.

    Args:
        volume_id: the raw scan's id.
        status: ``"prepared"``, ``"excluded"`` or ``"refused"``.
        reason: why, one line; empty for prepared cases.
        notes: remarks, in the order in which they were made.
        disk_full: whether the reason is that there is no space left, for this case or any other.
    """

    volume_id: str
    status: str
    reason: str = ""
    notes: tuple[str, ...] = ()
    disk_full: bool = False


@dataclass(frozen=True, eq=False)
class PreparedVolume:
    """One prepared volume in memory, before it is written.

    Args:
        volume_id: its id; the scan's own, or the scan's with ``_window_<n>`` under the depth policy ``"windows"``.
        imgs: (D, H, W) uint8, or (C, D, H, W) with several intensity windows.
        gts: (D, H, W) uint8 regions; all 0 without an anatomical mask.
        geometry: the prepared grid.
        lesion_masks: disease key -> (D, H, W) uint8, 0 or 1, on the prepared grid.
        original_lesion_masks: the same diseases' masks on `source_geometry`.
        source_geometry: the scan's own grid, as stored.
        sidecar: plain JSON content.
    """

    volume_id: str
    imgs: np.ndarray
    gts: np.ndarray
    geometry: VolumeGeometry
    lesion_masks: Mapping[str, np.ndarray]
    original_lesion_masks: Mapping[str, np.ndarray]
    source_geometry: VolumeGeometry
    sidecar: dict[str, Any]


def prepare_case(task: CaseTask) -> CaseOutcome:
    """Prepare a case and write it; whatever is wrong with it becomes the outcome's reason.

    The sidecar of a case is removed first and written last, so that its presence means that all other files are there
    and belong to it. A refused case leaves no file.
    """
    # The pool has a process per core already; more threads would only fight for them.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    notes: tuple[str, ...] = ()
    try:
        remove_prepared_files(task.output, task.case.volume_id)
        for volume in prepare_volumes(task):
            _write(task, volume)
            notes = tuple(volume.sidecar["notes"])
    except Exception as error:
        # A full disk can make even the removal fail; the missing sidecar says enough then.
        try:
            remove_prepared_files(task.output, task.case.volume_id)
        except OSError:
            pass
        disk_full = isinstance(error, OSError) and error.errno in _DISK_FULL
        return CaseOutcome(task.case.volume_id, "refused", one_line(error, task.hidden_paths), disk_full=disk_full)
    return CaseOutcome(task.case.volume_id, "prepared", notes=notes)


def prepare_volumes(task: CaseTask) -> list[PreparedVolume]:
    """Read a scan and its masks and bring them onto the prepared grid, in memory.

    A case whose path is an NPZ is on that grid already, and is checked instead.

    Raises:
        UnusableScanError: if the scan or a mask cannot be used.
        PreparedCaseError: if an NPZ cannot be used, or was prepared otherwise than asked for.
    """
    case, settings = task.case, task.settings
    if case.path.suffix.lower() == ".npz" and not case.path.is_dir():
        return [_imported_volume(task)]
    rescale = Rescale(*case.stored_values) if case.stored_values else None
    scan = read_scan(
        case.path,
        rescale=rescale,
        spacing_mm=case.spacing_mm,
        check_hu=settings.check_hu,
        series_number=case.series_number,
    )
    if task.inspect_scan is not None:
        scan = replace(scan, notes=(*scan.notes, *task.inspect_scan(case.path, scan)))
    mask_path = task.anatomical_mask
    if task.run_totalsegmentator:
        mask_path = run_totalsegmentator(scan, task.output / "anatomical_masks" / f"{case.volume_id}.nii.gz")
    regions = read_anatomical_mask(mask_path, scan, case, settings.mask_coding) if mask_path else None
    lesions = read_lesion_masks(task.lesion_masks, scan, case, resample=task.resample_lesion_masks)
    original_lesions = {
        disease: np.ascontiguousarray(scan.source_geometry.from_canonical(mask))
        for disease, mask in lesions.masks.items()
    }
    spacing_mm = None if settings.depth_policy == "resample" else settings.spacing_mm
    targets = target_geometry(scan.geometry, settings.spatial_size, settings.depth_policy, spacing_mm)
    return [
        _prepare_volume(task, scan, regions, lesions, original_lesions, target, index, len(targets))
        for index, target in enumerate(targets)
    ]


def _imported_volume(task: CaseTask) -> PreparedVolume:
    case = task.case
    imported = import_npz(case.path, task.settings)
    arrays = imported.case
    sidecar = {
        "volume_id": case.volume_id,
        **_image_entry(task.settings, case.volume_id),
        "source": case.source,
        "source_format": "npz",
        **imported.description,
        "lesion_masks": {},
        "lesion_masks_original_grid": {},
        "lesion_masks_partial": [],
        "lesion_masks_source": {},
        "lesion_voxels_in_scan": {},
        "lesion_voxels": {},
        "settings_digest": task.settings.digest,
        "input_digest": task.input_digest,
        "content_sha256": _content_digest([arrays.imgs, arrays.gts]),
    }
    return PreparedVolume(
        volume_id=case.volume_id,
        imgs=arrays.imgs,
        gts=arrays.gts,
        geometry=imported.geometry,
        lesion_masks={},
        original_lesion_masks={},
        source_geometry=imported.source_geometry,
        sidecar=sidecar,
    )


def _prepare_volume(
    task: CaseTask,
    scan: Scan,
    regions: np.ndarray | None,
    lesions: ScanLesions,
    original_lesions: Mapping[str, np.ndarray],
    target: VolumeGeometry,
    index: int,
    count: int,
) -> PreparedVolume:
    case, settings = task.case, task.settings
    volume_id = case.volume_id if settings.depth_policy != "windows" else f"{case.volume_id}_window_{index}"
    notes = [*scan.notes, *lesions.notes]
    channels = resample_to_grey_levels(scan.hu, scan.geometry, target, settings.windows)
    imgs = channels[0] if len(channels) == 1 else channels
    gts = np.zeros(target.shape, dtype=np.uint8)
    if regions is not None:
        gts = add_pleura(resample_mask(regions, scan.geometry, target), target.spacing_mm)
    prepared_lesions = {}
    num_voxels = {disease: int(np.count_nonzero(mask)) for disease, mask in lesions.masks.items()}
    for disease, mask in lesions.masks.items():
        prepared_lesions[disease] = resample_binary_mask(mask, scan.geometry, target)
        if count == 1 and num_voxels[disease] and not prepared_lesions[disease].any():
            # Small lesions are kept by the resampling; only one that was cropped away leaves nothing.
            notes.append(f"{disease}: {num_voxels[disease]} voxels in the scan, all outside the prepared grid")
    sidecar = {
        "volume_id": volume_id,
        **_image_entry(settings, volume_id),
        "source": case.source,
        "source_format": scan.source_format,
        "source_geometry": scan.source_geometry.to_dict(),
        "canonical_geometry": scan.geometry.to_dict(),
        "prepared_geometry": target.to_dict(),
        "depth_policy": settings.depth_policy,
        "depth_window": {"index": index, "count": count},
        "window": list(settings.windows),
        "stored_values": list(case.stored_values) if case.stored_values else None,
        "hu_check": {"done": settings.check_hu, "low_percentile_hu": round(low_percentile_hu(scan.hu), 3)},
        "has_anatomical_mask": regions is not None,
        "lesion_masks": {
            disease: _lesion_path(volume_id, disease, settings.volume_format) for disease in prepared_lesions
        },
        "lesion_masks_original_grid": {
            disease: _original_lesion_path(volume_id, disease) for disease in original_lesions
        },
        "lesion_masks_partial": list(lesions.partial),
        "lesion_masks_source": {
            disease: _relative(task, task.lesion_masks[disease].path) for disease in prepared_lesions
        },
        "lesion_voxels_in_scan": num_voxels,
        "lesion_voxels": {disease: int(np.count_nonzero(mask)) for disease, mask in prepared_lesions.items()},
        "notes": notes,
        "settings_digest": settings.digest,
        "input_digest": task.input_digest,
        "content_sha256": _content_digest([imgs, gts, *prepared_lesions.values(), *original_lesions.values()]),
    }
    return PreparedVolume(
        volume_id=volume_id,
        imgs=imgs,
        gts=gts,
        geometry=target,
        lesion_masks=prepared_lesions,
        original_lesion_masks=original_lesions,
        source_geometry=scan.source_geometry,
        sidecar=sidecar,
    )


def _write(task: CaseTask, volume: PreparedVolume) -> None:
    for disease, mask in volume.lesion_masks.items():
        path = task.output / _lesion_path(volume.volume_id, disease, task.settings.volume_format)
        (write_chunked_mask if path.suffix == CHUNKED_EXTENSION else write_mask_nifti)(path, mask, volume.geometry)
    for disease, mask in volume.original_lesion_masks.items():
        write_mask_nifti(task.output / _original_lesion_path(volume.volume_id, disease), mask, volume.source_geometry)
    write_prepared_case(
        task.output,
        volume.volume_id,
        volume.imgs,
        volume.gts,
        volume.geometry.spacing_mm,
        volume.sidecar,
        task.settings.volume_format,
    )


def _image_entry(settings: PreparationSettings, volume_id: str) -> dict[str, str]:
    """What a sidecar says of its volume's file: nothing where it has the usual name."""
    usual, path = (prepared_case_paths("", volume_id, name)[0] for name in ("npz", settings.volume_format))
    return {} if path == usual else {"image": path.as_posix()}


def _lesion_path(volume_id: str, disease: str, volume_format: str) -> str:
    extension = ".nii.gz" if volume_format == "npz" else CHUNKED_EXTENSION
    return f"lesion_masks/{disease}/{volume_id}{extension}"


def _original_lesion_path(volume_id: str, disease: str) -> str:
    return f"lesion_masks_original_grid/{disease}/{volume_id}.nii.gz"


def _relative(task: CaseTask, path: Path) -> str:
    """`path` below the data set's root, or with ``..`` where it lies elsewhere."""
    root = task.case.path
    for _ in Path(task.case.source).parts:
        root = root.parent
    return Path(os.path.relpath(path, root)).as_posix()


def _content_digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def one_line(error: BaseException, hidden_paths: Mapping[str, str]) -> str:
    """Return an error as one line without absolute paths, with the next step where the error is of the system."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        text = (
            f"disk full or file size limit reached while writing ({os.strerror(error.errno)}); free space or "
            f"choose another "
            "--output, then start again: finished cases are kept."
        )
    elif isinstance(error, OSError) and error.errno is not None:
        text = (
            f"{error.filename or 'a file'}: {os.strerror(error.errno)}; check permissions and disk, then start again."
        )
    elif isinstance(error, MemoryError):
        text = "not enough memory for this scan; start again with fewer --workers."
    elif isinstance(error, ValueError):
        # Readers name the argument of their function; here it is an option of the command.
        text = str(error).replace("check_hu=False", "--no-hu-check")
    else:
        text = f"{type(error).__name__}: {error}"
    for folder, shown in hidden_paths.items():
        text = text.replace(f"{folder}{os.sep}", shown)
    return " ".join(text.split())


def read_finished_sidecars(output: Path, case: RawCase, depth_policy: str) -> list[dict[str, Any]] | None:
    """Return the sidecars of a case's prepared volumes, or None if the case is not whole."""
    if depth_policy != "windows":
        return [read_sidecar(_sidecar_path(output, case.volume_id))] if is_whole_case(output, case.volume_id) else None
    sidecars: list[dict[str, Any]] = []
    count = 1
    while len(sidecars) < count:
        volume_id = f"{case.volume_id}_window_{len(sidecars)}"
        if not is_whole_case(output, volume_id):
            return None
        sidecars.append(read_sidecar(_sidecar_path(output, volume_id)))
        count = int(sidecars[0]["depth_window"]["count"])
    return sidecars


def _sidecar_path(output: Path, volume_id: str) -> Path:
    return prepared_case_paths(output, volume_id)[1]


def remove_prepared_files(output: Path, volume_id: str) -> None:
    """Remove what is left of a case and of its depth windows, sidecars first."""
    names = [volume_id]
    while any(path.exists() for path in _files_of(output, f"{volume_id}_window_{len(names) - 1}")):
        names.append(f"{volume_id}_window_{len(names) - 1}")
    # From the last window down: should this be interrupted, the next search still finds all that is left.
    for name in reversed(names):
        for path in _files_of(output, name):
            path.unlink(missing_ok=True)


def _files_of(output: Path, volume_id: str) -> list[Path]:
    """Every file that a prepared volume may have, in any format, the sidecar first."""
    lesions = [
        path
        for disease in DRAWN_DISEASES
        for path in (
            *(_lesion_path(volume_id, disease, volume_format) for volume_format in VOLUME_FORMATS),
            _original_lesion_path(volume_id, disease),
        )
    ]
    return [*prepared_case_files(output, volume_id), *(output / path for path in lesions)]
