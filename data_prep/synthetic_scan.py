"""One synthetic scan: drawn, checked against its own truth, and written in CT-RATE's layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.finding_record import DRAWN_LESIONS, Finding, ct_rate_labels, present_keys, vlm3d_labels
from data_prep.phantom import PhantomSample, ThoraxPhantom
from data_prep.phantom_body import draw_patient_body
from data_prep.phantom_findings import choose_findings
from data_prep.phantom_lung_findings import keep_parts
from data_prep.phantom_reports import write_report
from data_prep.synthesis_plan import ScanPlan, VolumePlan
from data_prep.synthesis_tables import metadata_row
from vlm3d_ext.data.atomic_files import write_gzip, write_json

__all__ = [
    "PADDING_HU",
    "RECORD_FOLDER",
    "ScanTask",
    "finished_record",
    "nifti_bytes",
    "render_scan",
    "volume_path",
    "write_scan",
]

PADDING_HU = -8192
"""What CT-RATE's v2 holds outside the circular field of view of some scanners."""

RECORD_FOLDER = ".scan_records"
"""Holds one JSON file per finished scan; it is written last, so it marks the scan's files as whole."""

_MASK_FOLDER = "anatomy_segmentation_labels/ts_seg/ts_total"
_COMPRESSION_LEVEL = 3  # noise hardly compresses; a higher level costs time only


@dataclass(frozen=True)
class ScanTask:
    """What a worker needs to write one scan."""

    output: Path
    release: str
    plan: ScanPlan


def volume_path(release: str, split: str, volume_id: str) -> str:
    """Return where a volume lies below the data set, such as train_fixed/train_1/train_1_a/train_1_a_1.nii.gz."""
    scan_id, _, _ = volume_id.rpartition("_")
    patient_id, _, _ = scan_id.rpartition("_")
    folder = f"{split}_fixed" if release == "v2" else split
    return f"{folder}/{patient_id}/{scan_id}/{volume_id}.nii.gz"


def nifti_bytes(voxels: np.ndarray, affine_lps: np.ndarray | None) -> bytes:
    """Return an uncompressed NIfTI file of a (D, H, W) array.

    Args:
        affine_lps: (4, 4), LPS mm; None leaves the header blank, as CT-RATE v1 has it (no qform, no sform, unit
            spacing).
    """
    affine = None
    if affine_lps is not None:
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine_lps  # NIfTI means RAS
    image = nib.Nifti1Image(np.ascontiguousarray(voxels.transpose(2, 1, 0)), affine)
    if affine is not None:
        image.header.set_xyzt_units("mm")
    return image.to_bytes()


def render_scan(plan: ScanPlan) -> tuple[ThoraxPhantom, list[PhantomSample]]:
    """Draw all reconstructions of a scan; what has no voxel on one of the grids is no finding and is taken out.

    Returns:
        the phantom with the findings that are left, one sample per volume.
    """
    body = draw_patient_body(plan.patient_seed)
    findings = choose_findings(body, plan.finding_keys, plan.scan_seed, plan.least_radius_mm)
    while True:
        phantom = ThoraxPhantom(plan.patient_seed, findings)
        samples = [_sample(phantom, volume, number) for number, volume in enumerate(plan.volumes)]
        visible = _visible(findings, samples)
        if len(visible) == len(findings) and all(a is b for a, b in zip(visible, findings, strict=True)):
            return phantom, samples
        findings = visible  # with fewer parts each time, so this ends


def _sample(phantom: ThoraxPhantom, volume: VolumePlan, number: int) -> PhantomSample:
    return phantom.sample(
        volume.size,
        volume.spacing_mm,
        noise_hu=volume.noise_hu,
        noise_smoothness_mm=volume.noise_smoothness_mm,
        noise_seed=number,
    )


def _visible(findings: tuple[Finding, ...], samples: list[PhantomSample]) -> tuple[Finding, ...]:
    """Return the findings, the same objects where nothing is missing, without what a sample has no voxel of."""
    kept: list[Finding] = []
    for finding in findings:
        drawn = present_keys([finding]) & set(DRAWN_LESIONS)
        if not all(drawn <= set(sample.lesion_masks) for sample in samples):
            continue
        left: Finding | None = finding
        if "lobes" in finding.geometry:
            parts = range(len(finding.geometry["lobes"]))
            seen = [n for n in parts if all(sample.part_voxels.get((finding.key, n), 0) for sample in samples)]
            left = finding if len(seen) == len(parts) else keep_parts(finding, seen)
        if left is not None:
            kept.append(left)
    return tuple(kept)


def write_scan(task: ScanTask) -> dict[str, Any]:
    """Draw and write one scan: volumes, anatomy, lesion masks, and last its record, which is returned."""
    plan, output = task.plan, task.output
    phantom, samples = render_scan(plan)
    files: list[str] = []

    def put(relative: str, voxels: np.ndarray, affine_lps: np.ndarray | None) -> None:
        write_gzip(output / relative, nifti_bytes(voxels, affine_lps), _COMPRESSION_LEVEL, durable=False)
        files.append(relative)

    rows = []
    for volume, sample in zip(plan.volumes, samples, strict=True):
        affine = sample.affine_lps
        put(volume_path(task.release, plan.split, volume.volume_id), *_stored(task.release, volume, sample))
        mask_path = volume_path("v2", plan.split, volume.volume_id)
        put(f"{_MASK_FOLDER}/{mask_path}", sample.anatomy, affine)
        for key, mask in sample.lesion_masks.items():
            put(f"lesion_masks/{key}/{volume.volume_id}.nii.gz", mask.astype(np.uint8), affine)
        rows.append(metadata_row(volume, affine, phantom.body.sex, phantom.body.age_years, plan.scan_seed))
    report = write_report(phantom.findings, phantom.body, [*plan.scan_seed, 41])
    record = {
        "scan_id": plan.scan_id,
        "patient_id": plan.patient_id,
        "split": plan.split,
        "volumes": [volume.volume_id for volume in plan.volumes],
        "findings": [finding.to_json() for finding in phantom.findings],
        "labels": ct_rate_labels(phantom.findings),
        "vlm3d_labels": vlm3d_labels(phantom.findings),
        "report": [report.clinical_information, report.technique, report.findings, report.impression],
        "metadata": rows,
        "files": files,
    }
    write_json(record_path(output, plan), record, durable=False)
    return record


def record_path(output: Path, plan: ScanPlan) -> Path:
    """Return the path of a scan's record."""
    return output / RECORD_FOLDER / f"{plan.scan_id}.json"


def finished_record(output: Path, plan: ScanPlan) -> dict[str, Any] | None:
    """Return the record of a scan whose files are all there, else None."""
    try:
        record = json.loads(record_path(output, plan).read_text())
    except FileNotFoundError:
        return None
    return record if all((output / relative).is_file() for relative in record["files"]) else None


def _stored(release: str, volume: VolumePlan, sample: PhantomSample) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the int16 voxels as the release stores them, and their affine."""
    hu = np.rint(sample.hu).astype(np.int16)
    if volume.padded:
        _, height, width = hu.shape
        v = (np.arange(height) - (height - 1) / 2) / (height / 2)
        u = (np.arange(width) - (width - 1) / 2) / (width / 2)
        hu[:, v[:, None] ** 2 + u[None, :] ** 2 > 1.0] = PADDING_HU
    if release == "v2":
        return hu, sample.affine_lps
    # What scanners store is not negative; the metadata's intercept gives the HU back.
    return np.maximum(hu.astype(np.int32) - volume.rescale_intercept, 0).astype(np.int16), None
