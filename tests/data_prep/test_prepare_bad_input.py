"""Every kind of bad input: the bad one is listed with one useful line, the good neighbours are prepared."""

import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.prepare import main
from tests.data_prep.tiny_release import GEOMETRY, SIZE, TinyRelease, chest_hu, lung_regions, write_volume
from vlm3d_ext.data.labelled_cases import LabelledCases
from vlm3d_ext.data.prepared_case import read_prepared_npz
from vlm3d_ext.data.volume_geometry import VolumeGeometry

BAD = "train_2_a_1"
GOOD = ("train_1_a_1", "train_3_a_1")


def prepare(source, output, *more):
    return main(["--source", str(source), "--output", str(output), *SIZE, "--workers", "0", *more])


def outcomes_of(output):
    return {case["volume_id"]: case for case in json.loads((output / "preparation_log.json").read_text())["cases"]}


def nifti_bytes(array, affine=None):
    return nib.Nifti1Image(array, GEOMETRY.affine_ras if affine is None else affine).to_bytes()


def with_header(**fields):
    image = nib.Nifti1Image(chest_hu(0).T, GEOMETRY.affine_ras)
    for name, value in fields.items():
        image.header[name] = value
    # Written by hand: nibabel itself would put such headers right.
    return image.header.binaryblock + b"\0\0\0\0" + chest_hu(0).tobytes()


def spoil_volume(path, kind):
    hu = chest_hu(0)
    ijk = hu.T
    if kind == "truncated gzip":
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "wrong magic":
        path.write_bytes(gzip.compress(b"\x00\x01 this is no image" * 100))
    elif kind == "no gzip":
        path.write_bytes(b"<html>404</html>")
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "2D":
        path.write_bytes(gzip.compress(nifti_bytes(ijk[:, :, 0])))
    elif kind == "4D":
        path.write_bytes(gzip.compress(nifti_bytes(np.stack([ijk, ijk], axis=-1))))
    elif kind in ("NaN", "infinite"):
        values = ijk.astype(np.float32)
        values[3, 4, 5] = np.nan if kind == "NaN" else np.inf
        path.write_bytes(gzip.compress(nifti_bytes(values)))
    elif kind == "constant":
        path.write_bytes(gzip.compress(nifti_bytes(np.zeros_like(ijk))))
    elif kind == "zero spacing":
        path.write_bytes(gzip.compress(with_header(pixdim=[1, 4, 0, 5, 1, 1, 1, 1])))
    elif kind == "negative spacing":
        path.write_bytes(gzip.compress(with_header(pixdim=[1, 4, 4, -5, 1, 1, 1, 1])))
    elif kind == "singular affine":
        path.write_bytes(gzip.compress(with_header(srow_y=[0, 0, 0, 0])))
    elif kind == "sheared affine":
        path.write_bytes(gzip.compress(with_header(srow_y=[0, -4, 1, 0])))
    elif kind == "nii beside nii.gz":
        path.with_suffix("").write_bytes(nifti_bytes(ijk))
    elif kind == "HU applied twice":
        write_volume(path, (hu - 1024).astype(np.int16))
    elif kind == "HU not applied":
        write_volume(path, (hu + 1024).astype(np.int16))


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("truncated gzip", "truncated"),
        ("wrong magic", "NIfTI"),
        ("no gzip", "gzip"),
        ("empty file", "gzip"),
        ("2D", "3"),
        ("4D", "3"),
        ("NaN", "NaN"),
        ("infinite", "infinite"),
        ("constant", "every voxel is 0"),
        ("zero spacing", "spacing"),
        ("negative spacing", "spacing"),
        ("singular affine", "singular"),
        ("sheared affine", "sheared"),
        ("nii beside nii.gz", "train_2_a_1.nii"),
        ("HU applied twice", "twice"),
        ("HU not applied", "not applied"),
    ],
)
def test_a_bad_volume_is_listed_and_its_neighbours_prepared(tmp_path, capsys, kind, word):
    release = TinyRelease(tmp_path / "raw")
    for volume_id in (*GOOD, BAD):
        release.add(volume_id)
    release.write_tables()
    spoil_volume(release.path_of(BAD), kind)

    assert prepare(release.root, tmp_path / "out") == 3

    outcomes = outcomes_of(tmp_path / "out")
    reason = outcomes[BAD]["reason"]
    assert outcomes[BAD]["status"] == "refused" and word in reason and f"{BAD}.nii" in reason
    assert "\n" not in reason and str(tmp_path) not in reason
    assert [outcomes[volume_id]["status"] for volume_id in GOOD] == ["prepared", "prepared"]
    assert f"refused {BAD}" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if BAD in path.name]
    assert read_prepared_npz(tmp_path / "out" / "volumes" / f"{GOOD[0]}.npz").imgs.any()


@pytest.mark.parametrize("kind", ["anatomical shape", "anatomical label", "lesion shape", "lesion label"])
def test_a_bad_mask_refuses_its_case(tmp_path, kind):
    release = TinyRelease(tmp_path / "raw")
    for volume_id in (*GOOD, BAD):
        release.add(volume_id)
    release.write_tables()
    labels = lung_regions()
    smaller = VolumeGeometry((11, 20, 24), GEOMETRY.affine_lps)
    lesion = release.root / "lesion_masks" / "lung_nodule" / f"{BAD}.nii.gz"
    if kind == "anatomical shape":
        path = release.add_anatomical_mask(BAD)
        write_volume(path, labels[1:], smaller)
    elif kind == "anatomical label":
        release.add_anatomical_mask(BAD, np.where(labels > 0, 200, 0).astype(np.uint8))
    elif kind == "lesion shape":
        write_volume(lesion, labels[1:], smaller)
    else:
        write_volume(lesion, labels * np.float32(0.3))

    assert prepare(release.root, tmp_path / "out") == 3

    outcomes = outcomes_of(tmp_path / "out")
    word = {"shape": "[11, 20, 24]", "label": "200" if kind.startswith("anatomical") else "whole"}[kind.split()[1]]
    assert word in outcomes[BAD]["reason"] and BAD in outcomes[BAD]["reason"]
    assert str(tmp_path) not in outcomes[BAD]["reason"]
    assert outcomes[GOOD[0]]["status"] == outcomes[GOOD[1]]["status"] == "prepared"


def test_a_repaired_case_is_prepared_at_the_next_run(tmp_path):
    release = TinyRelease(tmp_path / "raw")
    for volume_id in (*GOOD, BAD):
        release.add(volume_id)
    release.write_tables()
    whole = release.path_of(BAD).read_bytes()
    release.path_of(BAD).write_bytes(whole[:-2000])
    assert prepare(release.root, tmp_path / "out") == 3
    release.path_of(BAD).write_bytes(whole)

    assert prepare(release.root, tmp_path / "out") == 0


def test_a_case_that_goes_bad_takes_its_old_files_along(tmp_path):
    release = TinyRelease(tmp_path / "raw")
    for volume_id in (*GOOD, BAD):
        release.add(volume_id)
    release.write_tables()
    assert prepare(release.root, tmp_path / "out") == 0
    spoil_volume(release.path_of(BAD), "truncated gzip")

    assert prepare(release.root, tmp_path / "out") == 3

    assert not (tmp_path / "out" / "volumes" / f"{BAD}.npz").exists()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    listed = {case["volume_id"] for split in ("training", "validation", "test") for case in manifest[split]}
    assert listed == set(GOOD)


def test_tables_with_every_fault_at_once(tmp_path):
    release = TinyRelease(tmp_path / "raw")
    for number in range(1, 6):
        release.add(f"train_{number}_a_1")
    rows = release.labels["train"]
    rows[1][3] = "maybe"
    rows.append(list(rows[2]))
    rows.append([rows[3][0], *["1"] * 18])
    rows.append(["train_77_a_1.nii.gz", *["0"] * 18])
    release.label_columns.append("Comment")
    for row in rows:
        row.append("text")

    assert prepare(release.write_tables(), tmp_path / "out") == 3

    log = json.loads((tmp_path / "out" / "preparation_log.json").read_text())
    outcomes = outcomes_of(tmp_path / "out")
    assert {name for name, case in outcomes.items() if case["status"] == "refused"} == {"train_2_a_1", "train_4_a_1"}
    assert "row 3" in outcomes["train_2_a_1"]["reason"] and "'maybe'" in outcomes["train_2_a_1"]["reason"]
    assert "row 4 is repeated in row(s) 7" in outcomes["train_3_a_1"]["notes"][0]
    assert "rows 5 and 8" in outcomes["train_4_a_1"]["reason"]
    assert log["rows_without_file"] == ["train_77_a_1"] and log["summary"]["rows_without_file"] == 1
    assert "Comment" in log["remarks"][0]


def test_labels_of_another_set_are_counted_and_named(tmp_path, capsys):
    release = TinyRelease(tmp_path / "raw")
    for number in range(1, 5):
        release.add(f"train_{number}_a_1", positive=("Lung opacity", "Emphysema"))
    release.add("valid_1_a_1")

    options = ["--label-set", "vlm3d_18", "--validation-fraction", "0.5"]
    assert prepare(release.write_tables(), tmp_path / "out", *options) == 0

    remarks = json.loads((tmp_path / "out" / "preparation_log.json").read_text())["remarks"]
    mapped = [
        remark for remark in remarks if "ct_rate_18 as vlm3d_18: 11 of 18 supported (8 exact, 1 derived" in remark
    ]
    assert len(mapped) == 2 and "7 unknown: Pneumothorax, Pneumonia, Pulmonary edema, Mass" in mapped[0]
    untrained = next(remark for remark in remarks if "cannot be trained" in remark)
    # An opacity may or may not be ground glass, so here no case is known to have or not to have that either.
    assert untrained.endswith(
        ": Ground-glass opacity, Pneumothorax, Pneumonia, Pulmonary edema, Mass, Mediastinal widening, Pleural "
        "thickening, Fracture"
    )
    unscored = next(remark for remark in remarks if "metrics will be undefined" in remark)
    assert "Lung nodule" in unscored and "Mass" in unscored and "Emphysema" not in unscored
    printed = capsys.readouterr().out
    assert all(f"note: {remark}" in printed for remark in remarks)
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["class_counts"]["training"]
    assert counts["Mass"]["negative"] == 0 and counts["Mass"]["unknown"] == counts["Emphysema"]["positive"] > 0


def test_a_misspelt_label_column_stops_the_run_with_the_nearest_name(tmp_path, capsys):
    release = TinyRelease(tmp_path / "raw")
    release.add("train_1_a_1")
    release.label_columns[release.label_columns.index("Emphysema")] = "emphysemas"
    release.write_tables()

    for label_set in ("ct_rate_18", "vlm3d_18", "ct_rate_18+vlm3d_18"):
        assert prepare(release.root, tmp_path / "out", "--label-set", label_set) == 2
        error = capsys.readouterr().err
        assert "train_predicted_labels.csv" in error and error.count("\n") == 1
        assert "1 of 18 are missing: 'Emphysema' (nearest present: 'emphysemas')" in error
    assert not (tmp_path / "out").exists()


def test_the_union_of_two_sets_is_prepared_and_read_again(tmp_path):
    release = TinyRelease(tmp_path / "raw")
    release.add("train_1_a_1", positive=("Arterial wall calcification",))
    assert prepare(release.write_tables(), tmp_path / "out", "--label-set", "ct_rate_18+vlm3d_18") == 0

    labelled = LabelledCases(tmp_path / "out" / "manifest.json")
    labels = dict(zip(labelled.names, labelled.cases(["training", "validation"])[0]["labels"], strict=True))
    assert len(labels) == 28 and labels["Calcification"] == 1 and labels["Fibrosis"] == 0 and np.isnan(labels["Mass"])


def test_dicom_faults_beside_a_good_series_and_nothing_of_the_patient(tmp_path, capfd):
    pytest.importorskip("pydicom", reason="pydicom writes the small series")
    from tests.data.test_dicom_series import DATE, NAME, PATIENT_ID, SERIES_UID, write_series, write_slice

    raw = tmp_path / "raw"
    raw.mkdir()
    write_series(raw / "good")
    for number in (0, 1, 2, 4, 5):
        write_slice(raw / "missing" / f"{number}.dcm", number)
    write_series(raw / "two")
    for number in range(3):
        write_slice(raw / "two" / f"b{number}.dcm", number, SeriesInstanceUID="1.2.3", SeriesNumber=8)
    write_series(raw / "skew", ImageOrientationPatient=[1, 0, 0, 0.1, 0.995, 0])
    (raw / "junk").mkdir()
    (raw / "junk" / "IM1").write_bytes(b"\0" * 128 + b"DICM" + b"junk" * 20)

    assert prepare(raw, tmp_path / "out") == 3

    outcomes = outcomes_of(tmp_path / "out")
    assert outcomes.pop("good")["status"] == "prepared"
    words = {"missing": "1 slices missing", "two": "2 series", "skew": "not orthogonal", "junk": "junk"}
    assert set(outcomes) == set(words)
    for volume_id, word in words.items():
        assert outcomes[volume_id]["status"] == "refused" and word in outcomes[volume_id]["reason"]
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*.json"))
    printed = "".join(capfd.readouterr()).replace(str(tmp_path), "")
    for identifier in (*NAME.split("^"), PATIENT_ID, DATE, SERIES_UID):
        assert identifier.encode() not in written and identifier not in printed


def test_nii_beside_nii_gz_in_a_folder(tmp_path):
    write_volume(tmp_path / "raw" / "good.nii.gz", chest_hu(1))
    write_volume(tmp_path / "raw" / "twin.nii.gz", chest_hu(1))
    (tmp_path / "raw" / "twin.nii").write_bytes(nifti_bytes(chest_hu(2).T))

    assert prepare(tmp_path / "raw", tmp_path / "out") == 3

    outcomes = outcomes_of(tmp_path / "out")
    assert outcomes.pop("good")["status"] == "prepared"
    assert len(outcomes) == 2 and all("twin.nii" in case["reason"] for case in outcomes.values())


def run_command(source, output, *more, **options):
    return subprocess.run(
        [sys.executable, "-m", "data_prep.prepare", "--source", str(source), "--output", str(output), *SIZE, *more],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        **options,
    )


def test_full_disk_refuses_what_does_not_fit(tmp_path):
    write_volume(tmp_path / "raw" / "small.nii.gz", chest_hu(1))
    noisy = chest_hu(2).astype(np.int16)
    noisy += np.random.default_rng(0).integers(-100, 100, noisy.shape, dtype=np.int16)
    write_volume(tmp_path / "raw" / "noisy.nii.gz", noisy)
    larger = ["--window", "wide", "--spatial-size", "24", "40", "40"]  # so that the manifest is not the largest file
    assert prepare(tmp_path / "raw", tmp_path / "free", *larger) == 0
    size = {path.name: path.stat().st_size for path in (tmp_path / "free").rglob("*.*")}
    limit = (size["small.npz"] + size["noisy.npz"]) // 2
    assert max(size["small.npz"], size["manifest.json"]) < limit < size["noisy.npz"]

    run = run_command(
        tmp_path / "raw",
        tmp_path / "out",
        *larger,
        "--workers",
        "2",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )

    assert run.returncode == 3, run.stderr
    outcomes = outcomes_of(tmp_path / "out")
    assert outcomes["small"]["status"] == "prepared"
    assert outcomes["noisy"]["status"] == "refused" and "free space" in outcomes["noisy"]["reason"]
    assert "Traceback" not in run.stderr
    assert not list((tmp_path / "out").rglob("*.partial")) and not list((tmp_path / "out").rglob("noisy*"))
    assert prepare(tmp_path / "raw", tmp_path / "out", *larger) == 0


def test_no_space_for_anything(tmp_path):
    write_volume(tmp_path / "raw" / "scan.nii.gz", chest_hu(1))

    run = run_command(
        tmp_path / "raw", tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    )

    assert run.returncode == 2
    assert "free space" in run.stderr and "Traceback" not in run.stderr


def test_read_only_output(tmp_path):
    write_volume(tmp_path / "raw" / "scan.nii.gz", chest_hu(1))
    output = tmp_path / "out"
    output.mkdir()
    output.chmod(0o555)
    if os.access(output, os.W_OK):  # root may write anywhere but into the kernel's own file systems
        output = Path("/sys/prepared")
        if not Path("/sys/kernel").is_dir():
            pytest.skip("no folder that root cannot write to")

    run = run_command(tmp_path / "raw", output)

    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {output}: ") and run.stderr.strip().count("\n") == 0
    assert "check permissions" in run.stderr
    assert "Traceback" not in run.stderr


def test_output_that_is_a_file_and_source_that_is_not_there(tmp_path, capsys):
    write_volume(tmp_path / "raw" / "scan.nii.gz", chest_hu(1))
    (tmp_path / "out").write_text("")

    assert prepare(tmp_path / "raw", tmp_path / "out") == 2
    assert prepare(tmp_path / "absent", tmp_path / "new") == 2
    assert prepare(tmp_path / "out", tmp_path / "new") == 3  # a file that is no scan

    lines = capsys.readouterr().err
    assert "no such file or folder" in lines and "Traceback" not in lines
