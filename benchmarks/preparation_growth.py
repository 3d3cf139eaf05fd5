"""Preparation over files and over slices, and the planning of data sets of thousands of files."""

from __future__ import annotations

import csv
import gc
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.ct_rate_layout import read_ct_rate
from data_prep.manifest import build_manifest
from data_prep.preparation_run import MaskSources, PreparationResult, plan_cases, run_preparation
from data_prep.preparation_settings import PreparationSettings
from data_prep.raw_case import RawDataset
from data_prep.scan_folder import read_scan_folder
from data_prep.synthetic_scan import nifti_bytes
from vlm3d_ext.data.atomic_files import write_gzip, write_json
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.prepared_case import read_prepared_npz, read_sidecar
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.text.label_set import load_label_set

from .growth import growth_row, time_growth
from .row import ResultsDiffer, Row

__all__ = ["scaling_planning", "scaling_preparation"]

_LABEL_SET = load_label_set("ct_rate_18")
_FIELD_MM = 320.0
_COMPRESSION_LEVEL = 1


def scaling_preparation(
    files: Sequence[int] = (4, 8, 16, 32),
    slices: Sequence[int] = (32, 64, 128, 256),
    scan_size: tuple[int, int, int] = (48, 192, 192),
    slice_size: tuple[int, int] = (384, 384),
    spatial_size: Sequence[int] = (16, 64, 64),
    rounds: int = 5,
) -> Row:
    """exponent of preparation's CPU time over the number of scans, and over the slices of one scan"""
    settings = PreparationSettings(spatial_size=tuple(spatial_size), windows=("wide",))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in files:
            for seed in range(number):
                _write_scan(folder / f"files_{number}" / f"scan_{seed}.nii.gz", scan_size, seed)
        for number in slices:
            _write_scan(folder / f"slices_{number}" / "scan.nii.gz", (number, *slice_size), 0)

        def prepare(kind: str) -> Any:
            def run(number: int, turn: int) -> None:
                _prepare(folder / f"{kind}_{number}", folder / f"{kind}_{number}_{turn}", settings)

            return run

        series = {
            "scans": time_growth(prepare("files"), files, rounds),
            "slices": time_growth(prepare("slices"), slices, rounds),
        }
        _check_scans(folder, files)
        largest = _check_slices(folder, slices)
    return growth_row(
        "scaling_preparation",
        scaling_preparation.__doc__ or "",
        series,
        f"the {files[0]} scans are prepared to the same bytes among {files[-1]}; a scan of {slices[-1]} slices comes "
        f"to within {largest} grey levels of the same one of {slices[0]}",
        size=f"scans of {scan_size} each, slices of {slice_size}, to {tuple(spatial_size)}",
    )


def scaling_planning(files: Sequence[int] = (1000, 2000, 4000, 8000), rounds: int = 5) -> Row:
    """exponent of the CPU time of reading CT-RATE's tables, planning its cases, and its manifest, over files"""
    settings = PreparationSettings()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sidecar = _example_sidecar(folder)
        datasets: dict[int, RawDataset] = {}
        for number in files:
            _write_release(folder / f"release_{number}", number)

        def read(number: int, _: int) -> None:
            datasets[number] = read_ct_rate(folder / f"release_{number}", label_set=_LABEL_SET)

        def plan(number: int, _: int) -> None:
            tasks = plan_cases(datasets[number], settings, MaskSources(), folder / "prepared").tasks
            if len(tasks) != number:
                raise ResultsDiffer(f"{number} files give {len(tasks)} cases to prepare")

        def manifest(number: int, _: int) -> None:
            path = folder / f"manifest_{number}.json"
            write_json(path, _manifest(datasets[number], settings, sidecar), durable=False)
            CaseManifest(path).cases(["training"])

        series = {
            "tables and files": time_growth(read, files, rounds),
            "plan": time_growth(plan, files, rounds),
            "manifest": time_growth(manifest, files, rounds),
        }
        # Python looks through all objects again and again while they become more
        gc.disable()
        try:
            series["manifest without garbage collection"] = time_growth(manifest, files, rounds)
        finally:
            gc.enable()
        few, many = (
            {case["volume_id"]: case for case in json.loads((folder / f"manifest_{n}.json").read_bytes())["training"]}
            for n in (files[0], files[-1])
        )
    if len(many) != files[-1] or few != {volume_id: many.get(volume_id) for volume_id in few}:
        raise ResultsDiffer(f"the {len(few)} cases of {files[0]} files are not among the {len(many)} of {files[-1]}")
    return growth_row(
        "scaling_planning",
        scaling_planning.__doc__ or "",
        series,
        f"the {files[0]} cases are the same among {files[-1]}",
    )


def _write_scan(path: Path, shape: Sequence[int], seed: int) -> None:
    """Write a body with two lungs in air, alike from slice to slice, so that it is the same cut into any number."""
    depth, height, width = shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    hu = np.where(x**2 + y**2 < 0.8, 40.0, -1000.0)
    for side in (-1, 1):
        hu[((x - 0.45 * side) / 0.3) ** 2 + (y / 0.5) ** 2 < 1] = -850.0
    hu += np.random.default_rng(seed).normal(0, 8, hu.shape)
    voxels = np.broadcast_to(np.rint(hu).astype(np.int16), (depth, height, width))
    spacing = (_FIELD_MM / depth, _FIELD_MM / height, _FIELD_MM / width)
    geometry = VolumeGeometry.from_spacing((depth, height, width), spacing, (-160.0, -160.0, 100.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gzip(path, nifti_bytes(voxels, geometry.affine_lps), level=_COMPRESSION_LEVEL, durable=False)


def _prepare(source: Path, output: Path, settings: PreparationSettings) -> PreparationResult:
    """Prepare a folder of scans in this very process, so that no start of a worker is measured."""
    dataset = read_scan_folder(source, num_labels=_LABEL_SET.num_findings)
    result = run_preparation(
        dataset, settings, MaskSources(), output,
        run_settings=settings.to_dict(), label_set=_LABEL_SET, num_workers=0, quiet=True,
    )  # fmt: skip
    if result.refused:
        raise ResultsDiffer(f"{source.name}: {result.refused[0].volume_id} was refused: {result.refused[0].reason}")
    return result


def _check_scans(folder: Path, files: Sequence[int]) -> None:
    few, many = (folder / f"files_{number}_0" / "volumes" for number in (files[0], files[-1]))
    names = sorted(path.name for path in few.iterdir())
    changed = [name for name in names if (few / name).read_bytes() != (many / name).read_bytes()]
    if changed or len(list(many.glob("*.json"))) != files[-1]:
        raise ResultsDiffer(f"{changed or files[-1]}: what is prepared of a scan depends on how many are")


def _check_slices(folder: Path, slices: Sequence[int]) -> int:
    """Return by how many grey levels the prepared scans of the fewest and the most slices differ."""
    few, many = (
        read_prepared_npz(folder / f"slices_{n}_0" / "volumes" / "scan.npz").imgs for n in (slices[0], slices[-1])
    )
    difference = int(np.abs(few.astype(int) - many).max())
    if difference > 1:
        raise ResultsDiffer(f"scans of {slices[0]} and of {slices[-1]} slices are {difference} grey levels apart")
    return difference


def _write_release(root: Path, number: int) -> None:
    """Write CT-RATE's tables and, in place of volumes, empty files: planning opens none."""
    labels, reports = [["VolumeName", *_LABEL_SET.names]], [["VolumeName", "Findings_EN", "Impressions_EN"]]
    for index in range(number):
        scan_id = f"train_{index // 2 + 1}_a"
        volume_id = f"{scan_id}_{index % 2 + 1}"
        folder = root / "train_fixed" / scan_id.rpartition("_")[0] / scan_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{volume_id}.nii.gz").touch()
        values = [str((index // 2 + label) % 2) for label in range(_LABEL_SET.num_findings)]
        labels.append([f"{volume_id}.nii.gz", *values])
        reports.append([f"{volume_id}.nii.gz", f"Findings of {scan_id}. No pneumothorax is seen.", "Not given."])
    for name, rows in (
        ("multi_abnormality_labels/train_predicted_labels.csv", labels),
        ("radiology_text_reports/train_reports.csv", reports),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def _example_sidecar(folder: Path) -> dict[str, Any]:
    """Return the sidecar of a small scan that is really prepared."""
    _write_scan(folder / "example" / "scan.nii.gz", (8, 24, 24), 0)
    settings = PreparationSettings(spatial_size=(8, 16, 16), windows=("wide",))
    _prepare(folder / "example", folder / "example_prepared", settings)
    return read_sidecar(folder / "example_prepared" / "volumes" / "scan.json")


def _manifest(dataset: RawDataset, settings: PreparationSettings, sidecar: Mapping[str, Any]) -> dict[str, Any]:
    return build_manifest(
        name="ct_rate_v2", label_set=_LABEL_SET.name, label_names=_LABEL_SET.names, settings=settings.to_dict(),
        source_root="../raw", cases=dataset.cases,
        sidecars={case.volume_id: [{**sidecar, "volume_id": case.volume_id}] for case in dataset.cases},
    )  # fmt: skip
