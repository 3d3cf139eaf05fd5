"""A raw CT-RATE release of a few voxels a scan, with every table, for tests of the preparation."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np

from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.text.label_set import load_label_set

LABEL_NAMES = load_label_set("ct_rate_18").names
GEOMETRY = VolumeGeometry.from_spacing((12, 20, 24), (5.0, 4.0, 4.0), (-46.0, -38.0, 100.0))
SIZE = ["--spatial-size", "8", "16", "16"]


def chest_hu(seed: int, geometry: VolumeGeometry = GEOMETRY) -> np.ndarray:
    """A body with two lungs in air, (D, H, W) int16 HU; no two seeds give the same."""
    rng = np.random.default_rng(seed)
    depth, height, width = geometry.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    plane = np.where(x**2 + y**2 < 0.8, 40.0, -1000.0)
    for side in (-1, 1):
        plane[((x - 0.45 * side) / 0.3) ** 2 + (y / 0.5) ** 2 < 1] = -850.0
    hu = np.repeat(plane[None], depth, axis=0) + rng.normal(0, 8, geometry.shape)
    return np.rint(hu).astype(np.int16)


def lung_regions(geometry: VolumeGeometry = GEOMETRY) -> np.ndarray:
    """The lungs of `chest_hu` as TotalSegmentator v2 class ids: left upper 10 and lower 11, right upper 12 and lower
    14."""
    hu = chest_hu(0, geometry)
    depth, _, width = geometry.shape
    lungs = (hu > -925) & (hu < -700)
    labels = np.zeros(geometry.shape, dtype=np.uint8)
    labels[lungs] = 14
    labels[:, :, width // 2 :][lungs[:, :, width // 2 :]] = 11  # x grows towards the patient's left
    upper = np.zeros_like(lungs)
    upper[depth // 2 :] = True
    labels[lungs & upper & (labels == 11)] = 10
    labels[lungs & upper & (labels == 14)] = 12
    return labels


def write_volume(path: Path, array: np.ndarray, geometry: VolumeGeometry | None = GEOMETRY) -> Path:
    """Write a (D, H, W) array as NIfTI; a geometry of None leaves the header blank, as CT-RATE v1 does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.ascontiguousarray(array.T), np.eye(4) if geometry is None else geometry.affine_ras)
    nib.save(image, path)
    return path


def write_csv(path: Path, columns: list[str], rows: list[list[str]]) -> Path:
    """Write a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


class TinyRelease:
    """Writes volumes at once and tables by `write_tables`.

    Args:
        root: an empty folder.
        release: ``"v1"`` or ``"v2"``.
    """

    def __init__(self, root: Path, release: str = "v2") -> None:
        self.root = root
        self.release = release
        self.labels: dict[str, list[list[str]]] = {"train": [], "valid": []}
        self.reports: dict[str, list[list[str]]] = {"train": [], "valid": []}
        self.metadata: dict[str, list[list[str]]] = {"train": [], "valid": []}
        self.label_columns = ["VolumeName", *LABEL_NAMES]

    def path_of(self, volume_id: str) -> Path:
        """Where CT-RATE keeps the volume."""
        split, patient, scan, _ = volume_id.split("_")
        folder = split + ("_fixed" if self.release == "v2" else "")
        return self.root / folder / f"{split}_{patient}" / f"{split}_{patient}_{scan}" / f"{volume_id}.nii.gz"

    def add(self, volume_id: str, positive: tuple[str, ...] = (), seed: int = 0, rows: bool = True) -> Path:
        """Add a volume and its rows in all tables."""
        split, scan_id = volume_id.split("_")[0], volume_id.rsplit("_", 1)[0]
        hu = chest_hu(seed)
        # v1 stores values whose slope 1 and intercept -1024 are in the metadata table only.
        stored = hu if self.release == "v2" else (hu + 1024).astype(np.int16)
        path = write_volume(self.path_of(volume_id), stored, GEOMETRY if self.release == "v2" else None)
        if rows:
            values = ["1" if name in positive else "0" for name in LABEL_NAMES]
            self.labels[split].append([f"{volume_id}.nii.gz", *values])
            self.reports[split].append([f"{volume_id}.nii.gz", "Not given.", "", f"Text of {scan_id}.", "Not given."])
            self.metadata[split].append([f"{volume_id}.nii.gz", "1", "-1024", "[4.0, 4.0]", "5.0", "Maker"])
        return path

    def add_anatomical_mask(self, volume_id: str, labels: np.ndarray | None = None) -> Path:
        """Add a mask where CT-RATE keeps TotalSegmentator's."""
        relative = self.path_of(volume_id).relative_to(self.root)
        folder = self.root / "anatomy_segmentation_labels" / "ts_seg" / "ts_total"
        return write_volume(folder / relative, lung_regions() if labels is None else labels)

    def write_tables(self) -> Path:
        """Write labels, reports and metadata of both splits; returns the root."""
        for split, long_name in (("train", "train"), ("valid", "validation")):
            label_path = self.root / "multi_abnormality_labels" / f"{split}_predicted_labels.csv"
            write_csv(label_path, self.label_columns, self.labels[split])
            write_csv(
                self.root / "radiology_text_reports" / f"{long_name}_reports.csv",
                ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"],
                self.reports[split],
            )
            write_csv(
                self.root / "metadata" / f"{long_name}_metadata.csv",
                ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing", "Manufacturer"],
                self.metadata[split],
            )
        return self.root


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: relative path -> content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
