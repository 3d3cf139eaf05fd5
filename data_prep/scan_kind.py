"""What kind of thing a file is that someone calls a scan, by its name and its first bytes."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

__all__ = ["NIFTI_EXTENSIONS", "NPZ_EXTENSION", "ScanKind", "is_dicom_file", "scan_kind"]

NIFTI_EXTENSIONS = (".nii.gz", ".nii")
NPZ_EXTENSION = ".npz"

_DICOM_EXTENSIONS = (".dcm", ".ima")
_DICOM_PREAMBLE = 128  # bytes before "DICM", DICOM PS3.10 section 7.1
_DICOM_DIRECTORY = "DICOMDIR"  # the table of contents of an exported medium, DICOM PS3.10 section 8.6
_PICTURE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
_PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".heic")


class ScanKind(Enum):
    """The kinds of file."""

    NIFTI = "nifti"
    NPZ = "npz"
    DICOM = "dicom"
    PICTURE = "picture"
    OTHER = "other"


def scan_kind(path: Path) -> ScanKind:
    """Return the kind of a file.

    The name decides first, as it does for the readers: whether the content is what the name says is for them to find
    out.
    """
    name = path.name.lower()
    if name.endswith(NIFTI_EXTENSIONS):
        return ScanKind.NIFTI
    if name.endswith(NPZ_EXTENSION):
        return ScanKind.NPZ
    if is_dicom_file(path):
        return ScanKind.DICOM
    if name.endswith(_PICTURE_EXTENSIONS) or _first_bytes(path).startswith(_PICTURE_SIGNATURES):
        return ScanKind.PICTURE
    return ScanKind.OTHER


def is_dicom_file(path: Path) -> bool:
    """Whether a file is an object of DICOM; the directory of an exported medium holds no image and is none."""
    if path.name.upper() == _DICOM_DIRECTORY:
        return False
    return path.suffix.lower() in _DICOM_EXTENSIONS or _first_bytes(path)[_DICOM_PREAMBLE:] == b"DICM"


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_DICOM_PREAMBLE + 4)
    except OSError:
        return b""
