"""CT-RATE's CSV files: their names, columns and rows, for synthetic scans."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.finding_record import CT_RATE_18, VLM3D_18
from data_prep.synthesis_plan import VolumePlan

__all__ = [
    "LABEL_COLUMNS",
    "METADATA_COLUMNS",
    "REPORT_COLUMNS",
    "VLM3D_LABEL_COLUMNS",
    "csv_bytes",
    "metadata_row",
    "read_rows",
    "table_paths",
]

LABEL_COLUMNS = ("VolumeName", *CT_RATE_18)
VLM3D_LABEL_COLUMNS = ("VolumeName", *VLM3D_18)
REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
METADATA_COLUMNS = (
    "VolumeName",
    "Manufacturer",
    "SeriesDescription",
    "ManufacturerModelName",
    "PatientSex",
    "PatientAge",
    "ReconstructionDiameter",
    "DistanceSourceToDetector",
    "DistanceSourceToPatient",
    "GantryDetectorTilt",
    "TableHeight",
    "RotationDirection",
    "ExposureTime",
    "XRayTubeCurrent",
    "Exposure",
    "FilterType",
    "GeneratorPower",
    "FocalSpots",
    "ConvolutionKernel",
    "PatientPosition",
    "RevolutionTime",
    "SingleCollimationWidth",
    "TotalCollimationWidth",
    "TableSpeed",
    "TableFeedPerRotation",
    "SpiralPitchFactor",
    "DataCollectionCenterPatient",
    "ReconstructionTargetCenterPatient",
    "ExposureModulationType",
    "CTDIvol",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceLocation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "XYSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "NumberofSlices",
    "ZSpacing",
    "StudyDate",
)

_KERNEL_NAMES = {
    "Philips": {"soft": "B", "sharp": "YA"},
    "Siemens Healthineers": {"soft": "['Br40f', '3']", "sharp": "['Bl56f', '3']"},
}
# CT-RATE says valid in some names and validation in others.
_SPLIT_IN_NAME = {
    "labels": {"train": "train", "valid": "valid"},
    "metadata": {"train": "train", "valid": "validation"},
    "reports": {"train": "train", "valid": "validation"},
}


def table_paths(split: str) -> dict[str, str]:
    """Return the paths of a split's tables, relative to the data set: labels, vlm3d_labels, metadata, reports,
    no_chest.
    """
    return {
        "labels": f"multi_abnormality_labels/{_SPLIT_IN_NAME['labels'][split]}_predicted_labels.csv",
        "vlm3d_labels": f"multi_abnormality_labels_vlm3d_18/{_SPLIT_IN_NAME['labels'][split]}_labels.csv",
        "metadata": f"metadata/{_SPLIT_IN_NAME['metadata'][split]}_metadata.csv",
        "reports": f"radiology_text_reports/{_SPLIT_IN_NAME['reports'][split]}_reports.csv",
        "no_chest": f"metadata/no_chest_{split}.txt",
    }


def csv_bytes(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return a CSV file's content; a missing value becomes an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_rows(content: bytes) -> list[dict[str, str]]:
    """Read a CSV file's content back into rows."""
    return list(csv.DictReader(io.StringIO(content.decode())))


def metadata_row(
    volume: VolumePlan, affine_lps: np.ndarray, sex: str, age_years: int, seed: Sequence[int]
) -> dict[str, Any]:
    """Return the 44 columns of one volume.

    Args:
        volume: the reconstruction.
        affine_lps: (4, 4), its grid.
        sex, age_years: of the patient.
        seed: of the scan; all reconstructions of a scan share machine, dose and date.
    """
    rng = np.random.default_rng([*seed, 31])
    manufacturer = "Siemens Healthineers" if volume.rescale_intercept == -8192 else "Philips"
    depth, height, width = volume.size
    spacing_z, spacing_y, spacing_x = volume.spacing_mm
    origin = [round(float(v), 4) for v in affine_lps[:3, 3]]
    current = int(rng.integers(80, 480))
    return {
        "VolumeName": f"{volume.volume_id}.nii.gz",
        "Manufacturer": manufacturer,
        "SeriesDescription": "HRCT" if volume.kernel == "sharp" else "Thorax",
        "ManufacturerModelName": "iCT 256" if manufacturer == "Philips" else "SOMATOM go.All",
        "PatientSex": sex,
        "PatientAge": f"{age_years:03d}Y",
        "ReconstructionDiameter": round(spacing_x * width),
        "DistanceSourceToDetector": "" if manufacturer == "Philips" else "983",
        "DistanceSourceToPatient": "" if manufacturer == "Philips" else "535",
        "GantryDetectorTilt": 0,
        "TableHeight": int(rng.integers(70, 180)),
        "RotationDirection": "CW",
        "ExposureTime": int(rng.choice([412, 507, 622])),
        "XRayTubeCurrent": current,
        "Exposure": current // 2,
        "FilterType": _KERNEL_NAMES["Philips"][volume.kernel] if manufacturer == "Philips" else "",
        "ConvolutionKernel": _KERNEL_NAMES[manufacturer][volume.kernel],
        "PatientPosition": "HFS",
        "ExposureModulationType": "Z DOM" if manufacturer == "Philips" else "OFF_OFF",
        "CTDIvol": round(float(rng.uniform(3, 14)), 4),
        "ImagePositionPatient": str(origin),
        "ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]",
        "SliceLocation": round(origin[2], 1),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": height,
        "Columns": width,
        "XYSpacing": f"[{spacing_x}, {spacing_y}]",
        "RescaleIntercept": volume.rescale_intercept,
        "RescaleSlope": 1,
        "RescaleType": "HU",
        "NumberofSlices": depth,
        "ZSpacing": spacing_z,
        "StudyDate": f"{int(rng.integers(2015, 2023))}{int(rng.integers(1, 13)):02d}{int(rng.integers(1, 29)):02d}",
    }
