import pytest

from data_prep.scan_kind import ScanKind, scan_kind

DICOM = b"\0" * 128 + b"DICM"


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.NII.GZ", b"", ScanKind.NIFTI),
        ("a.nii", DICOM, ScanKind.NIFTI),
        ("a.npz", b"", ScanKind.NPZ),
        ("IM0001", DICOM, ScanKind.DICOM),
        ("old.dcm", b"no preamble", ScanKind.DICOM),
        ("DICOMDIR", DICOM, ScanKind.OTHER),
        ("a.jpeg", b"", ScanKind.PICTURE),
        ("a", b"\xff\xd8\xff\xe0", ScanKind.PICTURE),
        ("a", b"\x89PNG\r\n\x1a\n", ScanKind.PICTURE),
        ("a.txt", b"text", ScanKind.OTHER),
        ("empty", b"", ScanKind.OTHER),
    ],
)
def test_the_name_decides_before_the_first_bytes(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    assert scan_kind(tmp_path / name) is kind


def test_a_file_that_is_not_there_is_of_no_kind(tmp_path):
    assert scan_kind(tmp_path / "gone") is ScanKind.OTHER
