"""Everything a user may hand in by mistake: one clear line each, and never a stop for the good scans beside it."""

import json
import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.scan_intake import ScanIntake, ScanIntakeError
from tests.data.test_dicom_series import DATE, NAME, PATIENT_ID, SERIES_UID
from tests.data_prep.chest_scans import GEOMETRY, PREPARATION, SETTINGS, chest, write_dicom
from tests.data_prep.tiny_release import folder_bytes, write_volume
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.volume_geometry import VolumeGeometry

JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF" + b"x" * 300
PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 300


def error_of(scan, output, preparation=PREPARATION, **options):
    with pytest.raises(ScanIntakeError) as caught:
        ScanIntake(scan, output, preparation, **options).run()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and "--no-hu-check" not in message
    assert "--output" not in message and "--source" not in message
    return message


def reason_beside_a_good_scan(folder, output):
    """The one refusal of a folder, after checking that the good scan in it was prepared."""
    write_volume(folder / "good.nii.gz", chest(1), GEOMETRY)
    intake = ScanIntake(folder, output, PREPARATION)
    manifest = CaseManifest(intake.run())
    assert [case["volume_id"] for case in manifest.cases("test")] == ["good"]
    (refused,) = intake.refused
    log = json.loads((output / "intake_log.json").read_text())
    entry = next(entry for entry in log["scans"] if entry["volume_id"] == refused["volume_id"])
    assert (entry["status"], entry["reason"]) == ("refused", refused["reason"])
    assert log["summary"]["prepared"] == log["summary"]["refused"] == 1
    assert not (output / "prepared" / "volumes" / f"{refused['volume_id']}.npz").exists()
    assert "\n" not in refused["reason"] and refused["reason"].startswith(refused["source"])
    assert str(folder) not in refused["reason"] and refused["reason"].endswith(".")
    return refused["reason"]


# What is given itself


def test_a_path_that_does_not_exist(tmp_path):
    message = error_of(tmp_path / "nowhere.nii.gz", tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'nowhere.nii.gz'}: no such file or folder, expected a .nii or .nii.gz file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["scan", "output_dir"])
@pytest.mark.parametrize("value", ["", " ", None])
def test_an_empty_path_is_not_the_working_directory(tmp_path, name, value):
    paths = {"scan": tmp_path, "output_dir": tmp_path / "out", name: value}
    assert error_of(paths["scan"], paths["output_dir"]) == f"{name} is empty, expected a path; set {name}."


@pytest.mark.parametrize(("name", "content"), [("me.jpg", JPEG), ("me.png", PNG), ("no_extension", JPEG)])
def test_a_photo(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = error_of(tmp_path / name, tmp_path / "out")
    assert f"{name}: is a picture, expected a CT volume" in message and "not a photo of it" in message


def test_a_photo_called_nifti_is_found_out(tmp_path):
    (tmp_path / "me.nii.gz").write_bytes(JPEG)
    assert error_of(tmp_path / "me.nii.gz", tmp_path / "out").startswith("me.nii.gz: ")


def test_photos_beside_a_scan_are_counted_and_alone_are_no_scan(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(JPEG)
    message = error_of(tmp_path, tmp_path / "out")
    assert f"{tmp_path}: holds no scan among its 3 files, expected a .nii" in message
    write_volume(tmp_path / "good.nii.gz", chest(1), GEOMETRY)
    intake = ScanIntake(tmp_path, tmp_path / "out", PREPARATION)
    intake.run()
    assert list(intake.sources) == ["good"] and intake.refused == []
    assert json.loads((tmp_path / "out" / "intake_log.json").read_text())["summary"]["ignored_files"] == 3


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no scan among its 0 files" in error_of(tmp_path / "empty", tmp_path / "out")


def test_a_single_dicom_file_points_to_its_folder(tmp_path):
    series = write_dicom(tmp_path / "series", chest(1))
    message = error_of(series / "IM0000", tmp_path / "out")
    assert "is a single DICOM file, expected the folder with all slices" in message and f"pass {series}." in message


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "scan.zip").write_bytes(b"PK\x03\x04")
    assert "scan.zip: is no scan, expected a .nii or .nii.gz file" in error_of(tmp_path / "scan.zip", tmp_path / "out")


# Settings


def test_windows_along_depth_are_refused_by_name(tmp_path):
    message = error_of(tmp_path, tmp_path / "out", {**PREPARATION, "depth_policy": "windows", "spacing_mm": [5, 9, 9]})
    assert "depth_policy is 'windows'" in message and "expected 'resample' or 'crop'" in message


def test_settings_of_another_version_are_refused(tmp_path):
    assert "preparation: the data were prepared in format 1" in error_of(
        tmp_path, tmp_path / "out", {**PREPARATION, "format_version": 1}
    )


def test_a_series_number_that_has_no_effect(tmp_path):
    scan = write_volume(tmp_path / "raw" / "a.nii.gz", chest(1), GEOMETRY)
    assert "series_number 3 is for folders of DICOM series" in error_of(scan, tmp_path / "out", series_number=3)
    assert "series_number 3 has no effect" in error_of(tmp_path / "raw", tmp_path / "out", series_number=3)


def test_a_label_set_of_ones_own_is_replaced_with_a_warning(tmp_path, caplog):
    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    manifest = CaseManifest(ScanIntake(scan, tmp_path / "out", {**PREPARATION, "label_set": "mine"}).run())
    assert len(manifest.label_names) == 18 and "label set 'mine' of the training data does not ship" in caplog.text


# The output


def test_an_output_that_is_a_file_or_lies_below_one(tmp_path):
    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    (tmp_path / "out").write_text("x")
    assert f"output_dir {tmp_path / 'out'}: is a file or lies below one" in error_of(scan, tmp_path / "out")
    assert "is a file or lies below one" in error_of(scan, tmp_path / "out" / "deeper")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "prepared").write_text("x")
    assert "is a file or lies below one" in error_of(scan, tmp_path / "half")


def test_the_folder_of_the_scans_is_no_output(tmp_path):
    write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    assert "is the folder of the scans, expected another" in error_of(tmp_path, tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="needs locks on folders")
def test_a_second_run_in_the_same_output_is_told_to_wait(tmp_path):
    import fcntl

    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    (tmp_path / "out" / "prepared").mkdir(parents=True)
    descriptor = os.open(tmp_path / "out" / "prepared", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert "another preparation is running there" in error_of(scan, tmp_path / "out")
    finally:
        os.close(descriptor)


# One bad scan among good ones


def spoiled_nifti(path, kind):
    hu = chest(0)
    if kind == "NaN":
        values = hu.astype(np.float32)
        values[3, 4, 5] = np.nan
        return write_volume(path, values, GEOMETRY)
    if kind == "4D":
        nib.save(nib.Nifti1Image(np.stack([hu.T, hu.T], axis=-1), GEOMETRY.affine_ras), path)
    elif kind == "2D":
        nib.save(nib.Nifti1Image(hu[0].T, GEOMETRY.affine_ras), path)
    elif kind == "not in HU":
        return write_volume(path, (hu + 1024).astype(np.int16), GEOMETRY)
    elif kind == "HU twice":
        return write_volume(path, (hu - 1024).astype(np.int16), GEOMETRY)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "half":
        write_volume(path, hu, GEOMETRY)
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "few slices":
        return write_volume(path, hu[:15], VolumeGeometry.from_spacing((15, 24, 28), (5.0, 10.0, 10.0)))
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("NaN", "1 of 26880 voxels are NaN or infinite"),
        ("4D", "expected"),
        ("2D", "expected"),
        (
            "not in HU",
            "it is no CT (a mask, an MR), or slope and intercept were not applied; leave it out, or export it in HU.",
        ),
        ("HU twice", "applied twice"),
        ("empty", "expected"),
        ("half", "expected"),
        ("few slices", "has 15 axial slices, expected at least 16"),
    ],
)
def test_a_bad_nifti(tmp_path, kind, words):
    (tmp_path / "raw").mkdir()
    spoiled_nifti(tmp_path / "raw" / "bad.nii.gz", kind)
    alone = error_of(tmp_path / "raw" / "bad.nii.gz", tmp_path / "alone")
    reason = reason_beside_a_good_scan(tmp_path / "raw", tmp_path / "out")
    assert words in reason and alone == reason


def test_a_nifti_beside_its_uncompressed_twin(tmp_path):
    write_volume(tmp_path / "raw" / "u.nii", chest(1), GEOMETRY)
    write_volume(tmp_path / "raw" / "u.nii.gz", chest(2), GEOMETRY)
    write_volume(tmp_path / "raw" / "good.nii.gz", chest(3), GEOMETRY)
    intake = ScanIntake(tmp_path / "raw", tmp_path / "out", PREPARATION)
    assert [case["volume_id"] for case in CaseManifest(intake.run()).cases("test")] == ["good"]
    assert sorted(one["source"] for one in intake.refused) == ["u.nii", "u.nii.gz"]
    assert all("lies beside it and may hold another volume" in one["reason"] for one in intake.refused)


@pytest.mark.parametrize(
    ("changes", "num_slices", "words"),
    [
        ({"Modality": "MR"}, 40, "modality is MR, expected CT"),
        ({}, 1, "has fewer than 2 slices, 1; expected a volume"),
        ({}, 15, "has 15 axial slices, expected at least 16"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, 3, "all 3 images are localizers"),
        ({"PixelSpacing": None}, 40, "lacks ImagePositionPatient, ImageOrientationPatient or PixelSpacing"),
    ],
)
def test_a_bad_dicom_folder(tmp_path, changes, num_slices, words):
    write_dicom(tmp_path / "raw" / "series", chest(2)[:num_slices], **changes)
    assert words in reason_beside_a_good_scan(tmp_path / "raw", tmp_path / "out")


def test_when_no_scan_can_be_used_the_first_reason_and_the_log_are_named(tmp_path):
    for name in ("a", "b"):
        write_volume(tmp_path / "raw" / f"{name}.nii.gz", chest(1)[:15], GEOMETRY)
    message = error_of(tmp_path / "raw", tmp_path / "out")
    assert f"{tmp_path / 'raw'}: none of its 2 scans can be used; {tmp_path / 'out' / 'intake_log.json'}" in message
    assert "the first: a.nii.gz: has 15 axial slices" in message
    assert json.loads((tmp_path / "out" / "intake_log.json").read_text())["summary"]["refused"] == 2


def test_a_scan_that_cannot_be_opened_is_refused_with_its_name(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "gone.nii.gz").symlink_to(tmp_path / "elsewhere.nii.gz")
    assert "gone.nii.gz" in reason_beside_a_good_scan(tmp_path / "raw", tmp_path / "out")


# NPZ


def arrays(**changes):
    imgs = np.random.default_rng(0).integers(0, 256, SETTINGS.spatial_size, dtype=np.uint8)
    return {"imgs": imgs, "gts": np.zeros_like(imgs), "spacing": np.full(3, 2.0, np.float32), **changes}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (arrays(imgs=arrays()["imgs"].astype(np.float32)), "imgs is float32, expected uint8"),
        (arrays(imgs=np.stack([arrays()["imgs"]] * 2)), "holds 2 windows of 8 x 16 x 18 voxels, expected 1 (wide) of"),
        (
            arrays(imgs=arrays()["imgs"][:, :12], gts=arrays()["gts"][:, :12]),
            "holds 1 windows of 8 x 12 x 18 voxels, expected 1 (wide) of 8 x 16 x 18",
        ),
        (arrays(gts=np.full(SETTINGS.spatial_size, 21, np.uint8)), "gts has label 21, expected 0 to 20"),
        (arrays(spacing=np.array([2.0, 0.0, 2.0])), "spacing is [2.0, 0.0, 2.0], expected three positive numbers"),
        (arrays(imgs=np.zeros(SETTINGS.spatial_size, np.uint8)), "every grey level is 0, expected a picture"),
        ({"imgs": arrays()["imgs"], "spacing": arrays()["spacing"]}, "lacks gts, has ['imgs', 'spacing']"),
        (arrays(imgs=np.array([{"a": 1}], dtype=object)), "imgs holds pickled Python objects, which can run code"),
    ],
)
def test_a_bad_npz(tmp_path, content, words):
    (tmp_path / "raw").mkdir()
    np.savez(tmp_path / "raw" / "bad.npz", **content)
    assert words in reason_beside_a_good_scan(tmp_path / "raw", tmp_path / "out")


def test_files_that_only_end_like_an_npz(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "bad.npz").write_bytes(pickle.dumps({"imgs": 1}))
    assert "is a pickle" in reason_beside_a_good_scan(tmp_path / "raw", tmp_path / "out")
    (tmp_path / "raw" / "bad.npz").write_bytes(b"PK\x03\x04 half")
    assert "is damaged or no NPZ" in reason_beside_a_good_scan(tmp_path / "raw", tmp_path / "out")


def sidecar(**changes):
    grid = VolumeGeometry.from_spacing(SETTINGS.spatial_size, (2.0, 2.0, 2.0)).to_dict()
    content = dict.fromkeys(("prepared_geometry", "source_geometry", "canonical_geometry"), grid)
    return {**content, "window": ["wide"], "depth_policy": "resample", "depth_window": {"count": 1}, **changes}


def grid(shape, spacing):
    return VolumeGeometry.from_spacing(shape, spacing).to_dict()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no json", "is not JSON, expected a geometry sidecar"),
        ({"title": "another kind of JSON"}, "lacks a grid ('prepared_geometry')"),
        (sidecar(window=["lung"]), "window is ['lung'], expected ['wide'], as the network was trained on"),
        (sidecar(depth_policy="crop"), "depth_policy is 'crop', expected 'resample'"),
        (sidecar(depth_window={"index": 0, "count": 3}), "is one of 3 windows of its scan"),
        (
            sidecar(prepared_geometry=grid((8, 16, 20), (2.0, 2.0, 2.0))),
            "its grid has 8 x 16 x 20 voxels, expected 8 x",
        ),
        (sidecar(prepared_geometry=grid((8, 16, 18), (2.0, 2.0, 3.0))), "its grid has spacing [2.0, 2.0, 3.0] mm"),
        (sidecar(source_geometry=grid((9, 9, 9), (2.0, 2.0, 2.0))), "canonical_geometry is another grid than"),
    ],
)
def test_a_bad_sidecar(tmp_path, content, words):
    (tmp_path / "raw").mkdir()
    np.savez(tmp_path / "raw" / "bad.npz", **arrays())
    (tmp_path / "raw" / "bad.json").write_text(content if isinstance(content, str) else json.dumps(content))
    write_volume(tmp_path / "raw" / "good.nii.gz", chest(1), GEOMETRY)
    intake = ScanIntake(tmp_path / "raw", tmp_path / "out", PREPARATION)
    assert [case["volume_id"] for case in CaseManifest(intake.run()).cases("test")] == ["good"]
    (refused,) = intake.refused
    assert refused["reason"].startswith("bad.json: ") and words in refused["reason"]


def test_the_good_sidecar_of_these_tests_is_taken(tmp_path):
    np.savez(tmp_path / "x.npz", **arrays())
    (tmp_path / "x.json").write_text(json.dumps(sidecar()))
    intake = ScanIntake(tmp_path / "x.npz", tmp_path / "out", PREPARATION)
    intake.run()
    assert intake.notes == {"x": []}


# Identity


def test_nothing_of_dicom_headers_reaches_files_names_or_messages(tmp_path, caplog, capfd):
    write_dicom(tmp_path / "raw" / "one", chest(1))
    write_dicom(tmp_path / "raw" / "bad", chest(2), Modality="MR", SeriesDescription=NAME, InstitutionName=PATIENT_ID)
    write_dicom(tmp_path / "raw" / "short", chest(3)[:15], ProtocolName=NAME)
    mixed = write_dicom(tmp_path / "raw" / "mixed", chest(4), SeriesNumber=4, SeriesDescription=NAME)
    write_dicom(mixed, chest(5), prefix="b", SeriesNumber=5, SeriesInstanceUID=SERIES_UID + ".7", StudyID=PATIENT_ID)
    with caplog.at_level("DEBUG"):
        intake = ScanIntake(tmp_path / "raw", tmp_path / "out", PREPARATION)
        manifest = intake.run()
    assert list(intake.notes) == ["one"] and len(intake.refused) == 3
    written = "".join(capfd.readouterr()) + caplog.text + repr([intake.refused, intake.notes, manifest])
    contents = folder_bytes(tmp_path / "out")
    for identifier in (NAME, "Doe", "Jane", PATIENT_ID, DATE, SERIES_UID):
        assert identifier not in written.replace(str(tmp_path), "")
        assert not any(identifier.encode() in content or identifier in name for name, content in contents.items())
    assert {Path(name).stem for name in contents if name.endswith(".npz")} == {"one"}, "the folder's own name"
