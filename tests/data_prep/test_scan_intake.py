"""The door for a user's scans: every accepted form, the mix of all, and what a later run finds of an earlier one."""

import hashlib
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from data_prep.prepare import main
from data_prep.scan_intake import ScanIntake, ScanIntakeError
from tests.data_prep.chest_scans import GEOMETRY, PREPARATION, SIZE, chest, write_dicom
from tests.data_prep.tiny_release import folder_bytes, write_volume
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.dicom_series import dicom_series_files
from vlm3d_ext.data.prepared_case import read_prepared_npz, read_sidecar
from vlm3d_ext.data.volume_geometry import VolumeGeometry

ROOT = Path(__file__).parents[2]


def taken_in(scan, output, preparation=PREPARATION, **options):
    """Run an intake; returns it and its cases by volume id."""
    intake = ScanIntake(scan, output, preparation, **options)
    manifest = CaseManifest(intake.run())
    assert manifest.path == output / "prepared" / "manifest.json"
    assert not manifest.content["training"] and not manifest.content["validation"]
    cases = {case["volume_id"]: case for case in manifest.cases("test")}
    assert all(math.isnan(label) for case in cases.values() for label in case["labels"])
    return intake, cases


def logged(output):
    return json.loads((output / "intake_log.json").read_text())


@pytest.fixture
def prepared(tmp_path):
    """A folder of one case as `data_prep.prepare` makes it for training."""
    scan = write_volume(tmp_path / "training" / "known.nii.gz", chest(7), GEOMETRY)
    assert main(["--source", str(scan), "--output", str(tmp_path / "known"), *SIZE, "--workers", "0"]) == 0
    return tmp_path / "known"


# What is accepted


@pytest.mark.parametrize("name", ["a scan.nii", "a scan.nii.gz"])
def test_a_nifti_file_gives_the_bytes_of_the_training_preparation(tmp_path, name):
    scan = write_volume(tmp_path / "raw" / name, chest(1), GEOMETRY)
    intake, cases = taken_in(scan, tmp_path / "out")

    assert main(["--source", str(scan), "--output", str(tmp_path / "train"), *SIZE, "--workers", "0"]) == 0
    expected = (tmp_path / "train" / "volumes" / "a_scan.npz").read_bytes()
    assert Path(cases["a_scan"]["image"]).read_bytes() == expected
    assert intake.sources == {"a_scan": {"path": scan, "format": "nifti", "series_number": None}}
    assert intake.refused == [] and intake.notes == {"a_scan": []}


def test_a_dicom_folder_is_the_same_scan_as_its_nifti(tmp_path):
    series = write_dicom(tmp_path / "series 1", chest(1))
    intake, cases = taken_in(series, tmp_path / "dicom")
    _, of_nifti = taken_in(write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY), tmp_path / "nifti")

    one, other = (read_prepared_npz(case["image"]) for case in (cases["series_1"], of_nifti["a"]))
    np.testing.assert_array_equal(one.imgs, other.imgs)
    grids = [VolumeGeometry.from_dict(read_sidecar(case["geometry"])["source_geometry"]) for case in cases.values()]
    assert grids[0].is_close(GEOMETRY)
    source = intake.sources["series_1"]
    assert source == {"path": series, "format": "dicom", "series_number": None}
    assert len(dicom_series_files(source["path"], source["series_number"])) == GEOMETRY.shape[0]


def test_an_npz_with_its_sidecar_keeps_the_grids_of_its_scan(tmp_path, prepared):
    content = read_sidecar(prepared / "volumes" / "known.json")
    content.update(patient_name="Doe^Jane", source="Doe_Jane.nii.gz")
    (prepared / "volumes" / "known.json").write_text(json.dumps(content))
    intake, cases = taken_in(prepared / "volumes" / "known.npz", tmp_path / "out")

    assert Path(cases["known"]["image"]).read_bytes() == (prepared / "volumes" / "known.npz").read_bytes()
    sidecar = read_sidecar(cases["known"]["geometry"])
    for key in ("prepared_geometry", "source_geometry", "canonical_geometry", "hu_check", "depth_window", "window"):
        assert sidecar[key] == content[key]
    assert sidecar["source"] == "known.npz" and "Doe" not in Path(cases["known"]["geometry"]).read_text()
    assert intake.sources["known"]["format"] == "npz" and intake.notes == {"known": []}


def test_an_npz_alone_lies_on_its_own_grid_and_a_note_says_so(tmp_path):
    imgs = np.random.default_rng(0).integers(0, 256, (8, 16, 18), dtype=np.uint8)
    gts = np.zeros_like(imgs)
    gts[2:4] = 3
    np.savez(tmp_path / "x.npz", imgs=imgs, gts=gts, spacing=np.array([25.0, 17.5, 17.5], dtype=np.float32))
    intake, cases = taken_in(tmp_path / "x.npz", tmp_path / "out")

    sidecar = read_sidecar(cases["x"]["geometry"])
    expected = VolumeGeometry.from_spacing((8, 16, 18), (25.0, 17.5, 17.5)).to_dict()
    assert sidecar["prepared_geometry"] == sidecar["source_geometry"] == sidecar["canonical_geometry"] == expected
    np.testing.assert_array_equal(read_prepared_npz(cases["x"]["image"]).imgs, imgs)
    assert cases["x"]["has_anatomical_mask"] is True
    (note,) = intake.notes["x"]
    assert "origin 0" in note and "[25.0, 17.5, 17.5] mm" in note and "masks lie on the grid of the NPZ" in note


def test_several_windows_are_channels_and_one_channel_of_one_window_is_taken(tmp_path):
    arrays = {"gts": np.zeros((8, 16, 18), np.uint8), "spacing": np.ones(3, np.float32)}
    imgs = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 18), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", imgs=imgs, **arrays)
    np.savez(tmp_path / "one.npz", imgs=imgs[:1], **arrays)
    two = {**PREPARATION, "window": ["wide", "lung"], "window_centre_width_hu": [[0.0, 2000.0], [-600.0, 1500.0]]}
    _, cases = taken_in(tmp_path / "two.npz", tmp_path / "out2", two)
    assert read_prepared_npz(cases["two"]["image"]).imgs.shape == (2, 8, 16, 18)
    _, cases = taken_in(tmp_path / "one.npz", tmp_path / "out1")
    np.testing.assert_array_equal(read_prepared_npz(cases["one"]["image"]).imgs, imgs[0])


def test_a_folder_with_everything_at_any_depth(tmp_path, prepared, caplog):
    folder = tmp_path / "mix"
    write_volume(folder / "anna" / "ct.nii.gz", chest(1), GEOMETRY)
    write_volume(folder / "ben" / "2024" / "ct.nii", chest(2), GEOMETRY)
    write_dicom(folder / "carl" / "export" / "IMG", chest(3))
    shutil.copytree(prepared, folder / "earlier")
    (folder / "anna" / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"x" * 200)
    (folder / "notes.txt").write_text("x")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    with caplog.at_level(logging.INFO, logger="data_prep.scan_intake"):
        intake, cases = taken_in(folder, folder / "results")

    assert list(cases) == ["anna_ct", "ben_2024_ct", "carl_export_IMG", "earlier_volumes_known"]
    assert [intake.sources[name]["format"] for name in cases] == ["nifti", "nifti", "dicom", "npz"]
    assert "4 scans prepared (0 of them finished before), 0 refused, 5 other files ignored" in caplog.text
    content = logged(folder / "results")
    assert content["summary"] == {"prepared": 4, "refused": 0, "ignored_files": 5}
    assert [entry["path"] for entry in content["scans"]][:2] == ["../anna/ct.nii.gz", "../ben/2024/ct.nii"]
    images = {name: hashlib.sha256(Path(case["image"]).read_bytes()).hexdigest() for name, case in cases.items()}
    assert len(set(images.values())) == 4

    _, again = taken_in(folder, folder / "results")
    assert again == cases, "results in the folder of the scans are not taken for scans"


def test_the_crop_policy_is_followed(tmp_path):
    crop = {**PREPARATION, "depth_policy": "crop", "spacing_mm": [12.0, 9.0, 9.0]}
    _, cases = taken_in(write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY), tmp_path / "out", crop)
    assert read_prepared_npz(cases["a"]["image"]).spacing.tolist() == [12.0, 9.0, 9.0]


def test_a_link_to_a_folder_is_not_followed_and_it_is_said(tmp_path, caplog):
    write_volume(tmp_path / "elsewhere" / "b.nii.gz", chest(2), GEOMETRY)
    write_volume(tmp_path / "raw" / "a.nii.gz", chest(1), GEOMETRY)
    (tmp_path / "raw" / "more").symlink_to(tmp_path / "elsewhere")
    _, cases = taken_in(tmp_path / "raw", tmp_path / "out")
    assert list(cases) == ["a"] and "more: is a link to a folder, which is not followed" in caplog.text
    assert "more: is a link" in logged(tmp_path / "out")["remarks"][0]


@pytest.mark.parametrize("name", ["classification", "Localization", "multitask", "report_generation"])
def test_no_scan_is_called_like_the_index_of_a_folder_of_results(tmp_path, name):
    write_volume(tmp_path / "raw" / f"{name}.nii.gz", chest(1), GEOMETRY)
    write_volume(tmp_path / "raw" / f"{name}_2.nii.gz", chest(2), GEOMETRY)
    first, second = taken_in(tmp_path / "raw", tmp_path / "out")[1]
    assert {first, second} > {f"{name}_2"} and name not in (first, second)


def test_equal_names_in_different_folders_get_different_ids(tmp_path):
    for seed, name in enumerate(("a/ct.nii.gz", "b/ct.nii.gz", "a_ct.nii.gz"), start=1):
        write_volume(tmp_path / "raw" / name, chest(seed), GEOMETRY)
    intake, cases = taken_in(tmp_path / "raw", tmp_path / "out")
    assert len(cases) == 3 and "b_ct" in cases
    assert {source["path"].relative_to(tmp_path / "raw").as_posix() for source in intake.sources.values()} == {
        "a/ct.nii.gz",
        "b/ct.nii.gz",
        "a_ct.nii.gz",
    }


def test_names_too_long_for_a_file_are_cut_and_stay_apart(tmp_path):
    deep = tmp_path.joinpath("raw", *(f"{number}." + "1" * 62 for number in range(4)))
    for seed in (1, 2):
        write_volume(deep / f"ct{seed}.nii.gz", chest(seed), GEOMETRY)
    _, cases = taken_in(tmp_path / "raw", tmp_path / "out")
    assert len(cases) == 2 and all(len(name) <= 160 for name in cases)


def test_a_series_with_scans_in_its_subfolders(tmp_path):
    write_dicom(tmp_path / "export", chest(1))
    write_volume(tmp_path / "export" / "more" / "ct.nii.gz", chest(2), GEOMETRY)
    _, cases = taken_in(tmp_path / "export", tmp_path / "out")
    assert list(cases) == ["export", "export_more_ct"]


def test_the_process_gets_its_threads_back(tmp_path):
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    try:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(3)
        taken_in(write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY), tmp_path / "out")
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 3
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


# Notes on what is accepted


def test_another_part_of_the_body_is_prepared_with_a_warning(tmp_path, caplog):
    no_lungs = np.where(chest(1) < -700, chest(1), 40).astype(np.int16)
    no_lungs[:, 6:18, 6:22] = 40
    write_volume(tmp_path / "raw" / "abdomen.nii.gz", no_lungs, GEOMETRY)
    write_volume(tmp_path / "raw" / "chest.nii.gz", chest(2), GEOMETRY)
    intake, cases = taken_in(tmp_path / "raw", tmp_path / "out")
    assert len(cases) == 2 and intake.notes["chest"] == []
    assert intake.notes["abdomen"][0].startswith("does not look like a chest CT: 0 ml of aerated lung")
    assert "abdomen: does not look like a chest CT" in caplog.text
    entry = next(entry for entry in logged(tmp_path / "out")["scans"] if entry["volume_id"] == "abdomen")
    assert entry["status"] == "prepared" and entry["notes"] == intake.notes["abdomen"]
    again, _ = taken_in(tmp_path / "raw", tmp_path / "out")
    assert again.notes == intake.notes, "a finished case keeps its notes"


def test_sixteen_slices_are_enough_and_fifteen_are_not(tmp_path):
    for count in (15, 16):
        hu = chest(count)[:count]
        grid = VolumeGeometry.from_spacing(hu.shape, (6.0, 10.0, 10.0))
        write_volume(tmp_path / "raw" / f"of{count}.nii.gz", hu, grid)
    intake, cases = taken_in(tmp_path / "raw", tmp_path / "out")
    assert list(cases) == ["of16"]
    assert [note.split(":")[0] for note in intake.notes["of16"]] == ["thick slices", "short coverage"]
    assert [one["reason"] for one in intake.refused] == [
        "of15.nii.gz: has 15 axial slices, expected at least 16; pass the whole scan."
    ]


@pytest.mark.skipif(os.name == "nt", reason="needs the resource module")
def test_two_thousand_slices_fit_into_bounded_memory(tmp_path):
    hu = np.full((2000, 128, 128), -1000, dtype=np.int16)
    hu[:, 20:108, 10:118] = 40
    hu[700:1300, 40:90, 20:55] = -850
    scan = write_volume(tmp_path / "long.nii", hu, VolumeGeometry.from_spacing(hu.shape, (0.2, 3.0, 3.0)))
    program = (
        "import json, resource, sys\n"
        "from data_prep.scan_intake import ScanIntake\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "intake = ScanIntake(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))\n"
        "intake.run()\n"
        "print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, intake.notes]))\n"
    )
    arguments = [sys.executable, "-c", program, str(scan), str(tmp_path / "out"), json.dumps(PREPARATION)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    kilobytes, notes = json.loads(done.stdout)
    assert notes == {"long": []}
    assert kilobytes * 1024 < 5 * hu.nbytes, f"{kilobytes / 1024:.0f} MiB for a volume of {hu.nbytes / 2**20:.0f} MiB"


# Series


def test_localizers_are_skipped_and_the_chest_is_chosen_among_series(tmp_path):
    series = write_dicom(tmp_path / "study", chest(1), SeriesNumber=4)
    write_dicom(series, chest(2)[:3], prefix="dose", SeriesNumber=99, SeriesInstanceUID="1.2.9", Modality="OT")
    write_dicom(series, chest(2)[:2], prefix="scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    intake, cases = taken_in(series, tmp_path / "out")
    assert list(cases) == ["study"]
    assert intake.notes["study"] == [
        "2 localizer images skipped",
        "of 2 series the only one that can be a chest scan was taken, number 4: CT, 40 slices every 5 mm; left out: "
        "number 99: OT, 3 slices",
    ]


def test_the_series_number_chooses_among_several_chests(tmp_path):
    series = write_dicom(tmp_path / "study", chest(1), SeriesNumber=4)
    write_dicom(series, chest(2), prefix="b", SeriesNumber=5, SeriesInstanceUID="1.2.9")
    with pytest.raises(
        ScanIntakeError, match=r"holds 2 series \(number 4: CT, 40 slices every 5 mm; number 5: .*--series"
    ):
        ScanIntake(series, tmp_path / "out", PREPARATION).run()

    intake, cases = taken_in(series, tmp_path / "out", series_number=5)
    of_five = Path(cases["study"]["image"]).read_bytes()
    assert intake.sources["study"]["series_number"] == 5
    assert logged(tmp_path / "out")["scans"][0]["series_number"] == 5
    _, cases = taken_in(series, tmp_path / "out", series_number=4)
    assert Path(cases["study"]["image"]).read_bytes() != of_five, "another series is another scan"


# What an earlier run left


def test_another_patients_scan_of_the_same_name_and_size_is_prepared_anew(tmp_path):
    first = write_volume(tmp_path / "first" / "ct.nii", chest(1), GEOMETRY)
    second = write_volume(tmp_path / "second" / "ct.nii", chest(2), GEOMETRY)
    assert first.stat().st_size == second.stat().st_size
    _, cases = taken_in(first, tmp_path / "out")
    image = Path(cases["ct"]["image"]).read_bytes()
    _, cases = taken_in(second, tmp_path / "out")
    assert Path(cases["ct"]["image"]).read_bytes() != image
    _, alone = taken_in(second, tmp_path / "alone")
    assert Path(alone["ct"]["image"]).read_bytes() == Path(cases["ct"]["image"]).read_bytes()


def test_finished_cases_are_kept_and_a_new_one_is_added(tmp_path):
    write_volume(tmp_path / "raw" / "a.nii.gz", chest(1), GEOMETRY)
    _, cases = taken_in(tmp_path / "raw", tmp_path / "out")
    written = Path(cases["a"]["image"]).stat().st_mtime_ns
    write_volume(tmp_path / "raw" / "b.nii.gz", chest(2), GEOMETRY)
    _, cases = taken_in(tmp_path / "raw", tmp_path / "out")
    assert list(cases) == ["a", "b"] and Path(cases["a"]["image"]).stat().st_mtime_ns == written


def test_cases_of_another_networks_settings_are_not_mixed(tmp_path):
    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    taken_in(scan, tmp_path / "out")
    with pytest.raises(ScanIntakeError, match=r"holds a prepared with other settings, .* choose another output_dir"):
        ScanIntake(scan, tmp_path / "out", {**PREPARATION, "spatial_size": [8, 16, 20]}).run()


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_while_preparing_and_started_again(tmp_path):
    for number in range(12):
        write_volume(tmp_path / "raw" / f"p{number}" / "ct.nii.gz", chest(number), GEOMETRY)
    (tmp_path / "raw" / "p3" / "ct.nii.gz").write_bytes(b"no volume")
    # Both lie at one depth, so that paths relative to them are the same.
    _, whole_cases = taken_in(tmp_path / "raw", tmp_path / "whole")
    program = (
        "import json, sys\n"
        "from data_prep.scan_intake import ScanIntake\n"
        "ScanIntake(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])).run()\n"
    )
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", program, str(tmp_path / "raw"), str(killed), json.dumps(PREPARATION)]
    rng = random.Random(0)
    finished = []
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        before = num_finished(killed)
        while num_finished(killed) <= before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished.append({path: path.stat().st_mtime_ns for path in (killed / "prepared" / "volumes").glob("*.json")})
    assert len(finished[0]) < 11, "the first kill came after the last case; the test needs more of them"
    (killed / "prepared" / "volumes" / ".p1_ct.npz.abc.partial").write_bytes(b"half")
    (killed / ".intake_log.json.abc.partial").write_bytes(b"half")

    intake, cases = taken_in(tmp_path / "raw", killed)
    assert list(cases) == list(whole_cases) and len(intake.refused) == 1
    assert folder_bytes(killed) == folder_bytes(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == moment for path, moment in finished[-1].items()), "finished ones are kept"


def num_finished(output):
    return len(list((output / "prepared" / "volumes").glob("*.json")))


def test_worker_processes_give_the_same_bytes(tmp_path):
    for number in range(3):
        write_volume(tmp_path / "raw" / f"{number}.nii.gz", chest(number), GEOMETRY)
    taken_in(tmp_path / "raw", tmp_path / "none")
    taken_in(tmp_path / "raw", tmp_path / "pool", num_workers=2)
    assert folder_bytes(tmp_path / "none") == folder_bytes(tmp_path / "pool")
