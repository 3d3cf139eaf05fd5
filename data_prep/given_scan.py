"""What a user calls the scan: found where it is, or refused by name before anything is written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_prep.scan_kind import ScanKind, scan_kind

__all__ = ["ACCEPTED", "ScanIntakeError", "content_sha256", "locate_scan"]

ACCEPTED = "a .nii or .nii.gz file, the folder of a DICOM series, a prepared .npz, or a folder of these"


class ScanIntakeError(ValueError):
    """No scan could be taken in; the message is one line: what was given, what is wrong, what was expected, what to
    do."""


def locate_scan(scan: Path, output_dir: Path, series_number: int | None = None) -> Path:
    """Return the path of a file or folder that may be, or hold, a scan; resolved as far as its own name allows.

    Args:
        scan: as given.
        output_dir: where results go.
        series_number: the series that is asked for, which a file does not have.

    Raises:
        ScanIntakeError: if there is nothing, it is the folder of the results, or a file that is no scan by itself.
    """
    if not scan.exists():
        raise ScanIntakeError(f"{scan}: no such file or folder, expected {ACCEPTED}; check the path.")
    # A file keeps its name, since download managers' links point to files that are named by a hash.
    source = scan.resolve() if scan.is_dir() else scan.parent.resolve() / scan.name
    if source == output_dir.resolve():
        raise ScanIntakeError(
            f"output_dir {output_dir}: is the folder of the scans, expected another, so that results are not "
            "taken for scans; choose one."
        )
    if scan.is_dir():
        return source
    kind = scan_kind(scan)
    if kind is ScanKind.PICTURE:
        raise ScanIntakeError(
            f"{scan}: is a picture, expected a CT volume: {ACCEPTED}; pass the scan, not a photo of it."
        )
    if kind is ScanKind.DICOM:
        raise ScanIntakeError(
            f"{scan}: is a single DICOM file, expected the folder with all slices of the series; pass {scan.parent}."
        )
    if kind is ScanKind.OTHER:
        raise ScanIntakeError(f"{scan}: is no scan, expected {ACCEPTED}; check the path.")
    if series_number is not None:
        raise ScanIntakeError(
            f"{scan}: series_number {series_number} is for folders of DICOM series, and this is a file; leave "
            "series_number out."
        )
    return source


def content_sha256(path: Path) -> str:
    """Digest of all files that a scan is read from.

    Names and sizes do not do: two patients' uncompressed scans of one name often have one size, and one output folder
    may serve for both in turn.
    """
    if path.is_dir():
        paths = sorted(child for child in path.iterdir() if child.is_file())
    else:
        paths = [child for child in (path, path.with_suffix(".json")) if child.is_file()]
        paths = paths if scan_kind(path) is ScanKind.NPZ else paths[:1]
    digest = hashlib.sha256()
    for child in paths:
        with child.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
