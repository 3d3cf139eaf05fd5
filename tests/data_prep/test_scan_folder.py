import errno
import os

import pytest

from data_prep.raw_case import LayoutError
from data_prep.scan_folder import read_scan_folder


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def dicom(path):
    touch(path).write_bytes(b"\0" * 128 + b"DICM")
    return path


def names(dataset):
    return [case.volume_id for case in dataset.cases]


def test_files_and_series_at_any_depth(tmp_path):
    touch(tmp_path / "first patient" / "ct.nii.gz")
    touch(tmp_path / "first patient" / "follow-up" / "ct.nii")
    dicom(tmp_path / "series" / "IM0001")
    dicom(tmp_path / "series" / "IM0002")
    touch(tmp_path / "readme.txt")
    touch(tmp_path / ".hidden.nii.gz")
    touch(tmp_path / "segmentations" / "liver.nii.gz")

    dataset = read_scan_folder(tmp_path, num_labels=3)

    assert names(dataset) == ["first_patient_ct", "first_patient_follow-up_ct", "series"]
    assert [case.patient_id for case in dataset.cases] == ["first_patient", "first_patient", "series"]
    assert [case.source for case in dataset.cases][-1] == "series"
    assert all(case.split == "test" and case.labels == (None,) * 3 for case in dataset.cases)
    assert dataset.ignored_files == 1


def test_a_single_file_and_a_single_series(tmp_path):
    file = touch(tmp_path / "a scan.nii.gz")
    series = dicom(tmp_path / "2.25.1" / "IM0001").parent

    assert names(read_scan_folder(file)) == ["a_scan"]
    dataset = read_scan_folder(series)
    assert names(dataset) == ["2_25_1"] and dataset.cases[0].path == series and dataset.root == tmp_path


def test_a_medium_with_a_dicom_directory(tmp_path):
    dicom(tmp_path / "DICOMDIR")
    dicom(tmp_path / "PAT0" / "SER0" / "IM0")
    dataset = read_scan_folder(tmp_path)
    assert names(dataset) == ["PAT0_SER0"] and dataset.ignored_files == 1


def test_a_series_with_scans_below_it_keeps_the_name_of_its_folder(tmp_path):
    dicom(tmp_path / "export" / "IM0")
    touch(tmp_path / "export" / "b" / "ct.nii.gz")
    dataset = read_scan_folder(tmp_path / "export")
    assert names(dataset) == ["export", "export_b_ct"] and dataset.root == tmp_path


def test_prepared_cases_only_where_they_are_asked_for(tmp_path):
    for name in ("a.npz", "a.json", "b.nii.gz", "other.json"):
        touch(tmp_path / name)
    dataset = read_scan_folder(tmp_path, with_prepared=True)
    assert names(dataset) == ["a", "b"] and dataset.ignored_files == 1
    assert names(read_scan_folder(tmp_path)) == ["b"]


def test_a_name_too_long_for_a_file_keeps_its_end_and_gets_a_hash(tmp_path):
    folder = tmp_path.joinpath(*("1" * 64 for _ in range(3)))
    for end in ("x", "y"):
        touch(folder / f"{end}.nii.gz")
    found = names(read_scan_folder(tmp_path))
    assert all(len(name) == 160 for name in found) and len(set(found)) == 2
    assert {name[-10] for name in found} == {"x", "y"}


def test_colliding_names_get_a_suffix_that_does_not_depend_on_order(tmp_path):
    for name in ("a/b_c.nii.gz", "a_b/c.nii.gz", "A_b_c.nii", "other.nii.gz"):
        touch(tmp_path / name)

    found = names(read_scan_folder(tmp_path))

    assert len(set(found)) == 4 and "other" in found
    assert sum(name.lower().startswith("a_b_c_") for name in found) == 3
    (tmp_path / "other.nii.gz").unlink()
    assert set(names(read_scan_folder(tmp_path))) == set(found) - {"other"}


def test_split_by_patient_keeps_a_patient_together(tmp_path):
    for patient in range(40):
        for scan in "ab":
            touch(tmp_path / "images" / f"p{patient}" / f"{scan}.nii.gz")

    cases = read_scan_folder(tmp_path, split="by_patient", validation_fraction=0.2, test_fraction=0.2).cases

    splits = {case.patient_id: set() for case in cases}
    for case in cases:
        splits[case.patient_id].add(case.split)
    assert len(splits) == 40 and all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) == {"training", "validation", "test"}


def test_nothing_to_prepare(tmp_path):
    touch(tmp_path / "out" / "x.nii.gz")
    with pytest.raises(LayoutError, match="neither a NIfTI file"):
        read_scan_folder(tmp_path, skip=[tmp_path / "out"])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "open" / "ct.nii.gz")
    touch(tmp_path / "closed" / "ct.nii.gz")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # chmod would not stop root

    dataset = read_scan_folder(tmp_path)

    assert names(dataset) == ["open_ct"]
    assert dataset.remarks[0].startswith("closed: the folder cannot be read (Permission denied)")
