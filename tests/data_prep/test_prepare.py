import json
import os
import stat
import sys

import nibabel as nib
import numpy as np
import pytest

from data_prep import preparation_run
from data_prep.prepare import main
from tests.data_prep.tiny_release import (
    GEOMETRY,
    LABEL_NAMES,
    SIZE,
    TinyRelease,
    chest_hu,
    folder_bytes,
    lung_regions,
    write_volume,
)
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.prepared_case import read_prepared_npz, read_sidecar
from vlm3d_ext.data.volume_geometry import VolumeGeometry


def prepare(source, output, *more, workers="0"):
    return main(["--source", str(source), "--output", str(output), *SIZE, "--workers", workers, *more])


def log_of(output):
    return json.loads((output / "preparation_log.json").read_text())


@pytest.fixture
def release(tmp_path):
    release = TinyRelease(tmp_path / "raw")
    for number in range(1, 7):
        release.add(f"train_{number}_a_1", positive=("Lung nodule",) if number % 2 else (), seed=number)
    release.add("train_1_a_2", positive=("Lung nodule",), seed=11)
    release.add("valid_1_a_1", positive=("Lung nodule",), seed=20)
    release.add_anatomical_mask("train_1_a_1")
    nodule = np.zeros(GEOMETRY.shape, dtype=np.uint8)
    nodule[4:8, 6:12, 14:20] = 3
    write_volume(release.root / "lesion_masks" / "lung_nodule" / "train_1_a_1.nii.gz", nodule)
    release.write_tables()
    return release


def test_manifest_of_a_release(release, tmp_path, capsys):
    assert prepare(release.root, tmp_path / "out") == 0

    manifest = CaseManifest(tmp_path / "out" / "manifest.json")
    content = manifest.content
    assert content["label_names"] == list(LABEL_NAMES) and content["label_set"] == "ct_rate_18"
    assert content["source_root"] == "../raw"
    assert [case["volume_id"] for case in manifest.cases("test")] == ["valid_1_a_1"]
    validation = {case["patient_id"] for case in manifest.cases("validation")}
    training = {case["patient_id"] for case in manifest.cases("training")}
    assert validation and training and validation | training == {f"train_{number}" for number in range(1, 7)}
    case = next(case for case in manifest.cases(["training", "validation"]) if case["volume_id"] == "train_1_a_1")
    assert case["has_anatomical_mask"] and list(case["lesion_masks"]) == ["lung_nodule"]
    assert (tmp_path / "out" / content["source_root"] / case["lesion_masks_source"]["lung_nodule"]).is_file()
    assert (tmp_path / "out" / content["source_root"] / case["source"]).is_file()
    assert case["report"] == {"findings": "Text of train_1_a.", "impression": ""}
    nodule = content["class_counts"]["training"]["Lung nodule"]
    assert sum(nodule.values()) == len(content["training"]) and nodule["unknown"] == 0
    assert content["positive_weights"]["Lung nodule"] == nodule["negative"] / nodule["positive"]
    assert content["positive_weights"]["Cardiomegaly"] is None
    assert log_of(tmp_path / "out")["summary"]["prepared"] == 8
    assert "8 prepared" in capsys.readouterr().out


def test_arrays_and_masks_of_a_case(release, tmp_path):
    prepare(release.root, tmp_path / "out")

    case = read_prepared_npz(tmp_path / "out" / "volumes" / "train_1_a_1.npz")
    sidecar = read_sidecar(tmp_path / "out" / "volumes" / "train_1_a_1.npz")
    prepared = VolumeGeometry.from_dict(sidecar["prepared_geometry"])
    # 12 slices of 5 mm on 8; 24 columns of 4 mm on 16: the wider side of the plane decides, the other is padded.
    np.testing.assert_allclose(case.spacing, [7.5, 6.0, 6.0])
    assert case.imgs.shape == (8, 16, 16) == prepared.shape
    assert case.imgs[:, 8, 8].min() > 100, "soft tissue in the middle is grey"
    assert case.imgs[:, 0].max() == 0, "air outside the body is black"
    np.testing.assert_array_equal(case.imgs[:, 8, 4], 0)  # lung
    assert {1, 2, 3, 5, 19} == set(np.unique(case.gts)) - {0}
    # Left is where x is large; the upper lobe is where z is large.
    assert (case.gts[-1, :, 8:] == 1).any() and not (case.gts[-1, :, :8] == 1).any()
    assert (case.gts[0, :, :8] == 5).any()
    image = nib.load(tmp_path / "out" / sidecar["lesion_masks"]["lung_nodule"])
    mask = np.asarray(image.dataobj)
    np.testing.assert_allclose(image.affine, prepared.affine_ras, atol=1e-5)
    assert set(np.unique(mask)) == {0, 1}
    # In prepared voxels the box reaches from 2.67 to 5.33 along z, from 5.33 to 9.33 along y, from 9.33 to 13.33
    # along x. More
    # than half covered are 2 slices with 4 x 4 voxels each, but for the corner where both shares are 0.67.
    assert mask.sum() == 2 * (4 * 4 - 1)
    assert sidecar["source_geometry"] == GEOMETRY.to_dict() and sidecar["source"].startswith("train_fixed/")


def test_v1_and_v2_of_one_scan_give_the_same_voxels(tmp_path):
    for name in ("v1", "v2"):
        release = TinyRelease(tmp_path / name, name)
        release.add("train_1_a_1", seed=3)
        release.write_tables()
        assert prepare(tmp_path / name, tmp_path / f"out_{name}") == 0

    first, second = (
        read_prepared_npz(tmp_path / f"out_{name}" / "volumes" / "train_1_a_1.npz") for name in ("v1", "v2")
    )
    np.testing.assert_array_equal(first.imgs, second.imgs)
    np.testing.assert_array_equal(first.spacing, second.spacing)


def test_masks_fit_v1_volumes_too(tmp_path):
    release = TinyRelease(tmp_path / "v1", "v1")
    release.add("train_1_a_1")
    folder = release.write_tables() / "anatomy_segmentation_labels" / "ts_seg" / "ts_total"
    # CT-RATE's masks lie on the v2 grid, with a place in space that the v1 volume does not know.
    write_volume(folder / "train_fixed" / "train_1" / "train_1_a" / "train_1_a_1.nii.gz", lung_regions())

    assert prepare(tmp_path / "v1", tmp_path / "out") == 0

    gts = read_prepared_npz(tmp_path / "out" / "volumes" / "train_1_a_1.npz").gts
    assert (gts[-1, :, 8:] == 1).any() and not (gts[-1, :, :8] == 1).any()


def test_number_of_workers_and_continuing_change_no_byte(release, tmp_path):
    prepare(release.root, tmp_path / "a")
    before = folder_bytes(tmp_path / "a")
    prepare(release.root, tmp_path / "b", workers="2")
    (tmp_path / "a" / "volumes" / "train_2_a_1.json").unlink()
    (tmp_path / "a" / "volumes" / ".train_2_a_1.json.x.partial").write_bytes(b"{")
    prepare(release.root, tmp_path / "a", workers="2")

    assert folder_bytes(tmp_path / "b") == before
    assert folder_bytes(tmp_path / "a") == before


def test_finished_cases_are_kept_unless_their_inputs_change(release, tmp_path):
    prepare(release.root, tmp_path / "out")
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "volumes").iterdir()}
    release.add_anatomical_mask("train_2_a_1")

    assert prepare(release.root, tmp_path / "out", "--validation-fraction", "0.5") == 0

    changed = {
        path.name for path in (tmp_path / "out" / "volumes").iterdir() if path.stat().st_mtime_ns != files[path.name]
    }
    assert changed == {"train_2_a_1.npz", "train_2_a_1.json"}
    assert read_prepared_npz(tmp_path / "out" / "volumes" / "train_2_a_1.npz").gts.any()


def test_other_settings_need_overwrite(release, tmp_path, capsys):
    prepare(release.root, tmp_path / "out", "--depth-policy", "windows", "--spacing-mm", "4", "6", "6")
    foreign = tmp_path / "out" / "lesion_masks" / "lung_nodule" / "mine.nii.gz"
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_bytes(b"x")
    before = folder_bytes(tmp_path / "out")

    more = ["--depth-policy", "windows", "--spacing-mm", "9", "6", "6"]
    assert prepare(release.root, tmp_path / "out", *more) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert folder_bytes(tmp_path / "out") == before

    assert prepare(release.root, tmp_path / "out", *more, "--overwrite") == 0
    prepare(release.root, tmp_path / "fresh", *more)
    after = folder_bytes(tmp_path / "out")
    assert after.pop("lesion_masks/lung_nodule/mine.nii.gz") == b"x"
    assert after == folder_bytes(tmp_path / "fresh")


def test_depth_windows_are_cases_of_their_own(release, tmp_path):
    prepare(release.root, tmp_path / "out", "--depth-policy", "windows", "--spacing-mm", "4", "6", "6")

    # 60 mm in windows of 32 mm that overlap by a quarter: (60 - 32) / 24, rounded up, and one.
    cases = CaseManifest(tmp_path / "out" / "manifest.json").cases("test")
    assert [case["volume_id"] for case in cases] == [f"valid_1_a_1_window_{index}" for index in range(3)]
    assert {case["scan_id"] for case in cases} == {"valid_1_a"}
    heights = [read_sidecar(case["geometry"])["prepared_geometry"]["affine_lps"][2][3] for case in cases]
    assert heights == sorted(heights)
    assert log_of(tmp_path / "out")["summary"]["prepared"] == 8


def test_several_intensity_windows_become_channels(release, tmp_path):
    prepare(release.root, tmp_path / "out", "--window", "lung", "soft_tissue")

    imgs = read_prepared_npz(tmp_path / "out" / "volumes" / "train_1_a_1.npz").imgs
    assert imgs.shape == (2, 8, 16, 16)
    assert imgs[0, 4, 8, 4] > 60 and imgs[1, 4, 8, 4] == 0  # lung shows in the lung window only


def test_a_small_lesion_is_kept_and_a_cropped_one_is_noted(release, tmp_path):
    speck = np.zeros(GEOMETRY.shape, dtype=np.uint8)
    speck[0, 10, 12] = 1  # the lowest slice
    write_volume(release.root / "lesion_masks" / "lung_nodule" / "train_3_a_1.nii.gz", speck)
    mask = "lesion_masks/lung_nodule/train_3_a_1.nii.gz"

    prepare(release.root, tmp_path / "coarse", "--spatial-size", "4", "4", "4")
    prepare(release.root, tmp_path / "crop", "--depth-policy", "crop", "--spacing-mm", "4", "6", "6")

    assert np.asarray(nib.load(tmp_path / "coarse" / mask).dataobj).any()
    assert not np.asarray(nib.load(tmp_path / "crop" / mask).dataobj).any()
    entry = next(case for case in log_of(tmp_path / "crop")["cases"] if case["volume_id"] == "train_3_a_1")
    assert entry["notes"] == ["lung_nodule: 1 voxels in the scan, all outside the prepared grid"]


def test_scan_folder_and_single_file(tmp_path):
    file = write_volume(tmp_path / "raw" / "some patient" / "ct.nii.gz", chest_hu(1))

    assert prepare(tmp_path / "raw", tmp_path / "folder") == 0
    assert prepare(file, tmp_path / "file") == 0

    assert CaseManifest(tmp_path / "folder" / "manifest.json").cases("test")[0]["volume_id"] == "some_patient_ct"
    case = CaseManifest(tmp_path / "file" / "manifest.json").cases("test")[0]
    assert case["volume_id"] == "ct" and np.isnan(case["labels"]).all() and case["report"] is None


def test_a_link_to_a_file_named_by_a_hash_keeps_its_own_name(tmp_path):
    blob = write_volume(tmp_path / "blobs" / "0123abcd.nii.gz", chest_hu(1)).rename(tmp_path / "blobs" / "0123abcd")
    link = tmp_path / "snapshot" / "ct.nii.gz"
    link.parent.mkdir()
    link.symlink_to(blob)

    assert prepare(link, tmp_path / "out") == 0
    assert prepare(link.parent, tmp_path / "out") == 0
    assert CaseManifest(tmp_path / "out" / "manifest.json").cases("test")[0]["volume_id"] == "ct"


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])

    assert caught.value.code == 0 and "20% of the patients" in " ".join(capsys.readouterr().out.split())


def test_interrupting_says_how_to_go_on(release, tmp_path, monkeypatch, capsys):
    def interrupted(task):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation_run, "prepare_case", interrupted)

    assert prepare(release.root, tmp_path / "out") == 130
    assert "start the same command again" in capsys.readouterr().err


def test_dry_run_writes_nothing(release, tmp_path, capsys):
    assert prepare(release.root, tmp_path / "out", "--dry-run") == 0

    printed = capsys.readouterr().out
    assert "8 to prepare, 0 excluded, 0 refused" in printed and "Nothing was written" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spacing-mm", "1", "1", "1"], "no effect"),
        (["--split", "test"], "official split"),
        (["--validation-fraction", "1"], "below 1"),
        (["--label-set", "ct_rate_81"], "ct_rate_18"),
        (["--lesion-masks", "absent"], "no such folder"),
        (["--anatomical-masks", "absent"], "no such folder"),
        (["--release", "v1"], "train"),
        (["--spatial-size", "0", "4", "4"], "spatial-size"),
    ],
)
def test_what_a_user_can_do_wrong(release, tmp_path, capsys, arguments, message):
    assert prepare(release.root, tmp_path / "out", *arguments) == 2

    printed = capsys.readouterr().err.strip()
    assert message in printed and "\n" not in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_the_raw_folder_is_no_output(release, capsys):
    before = folder_bytes(release.root)

    assert prepare(release.root, release.root, "--overwrite") == 2

    assert "folder of the raw data" in capsys.readouterr().err
    assert folder_bytes(release.root) == before


def test_two_runs_in_one_folder(release, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    assert prepare(release.root, tmp_path / "out") == 2
    assert "another preparation" in capsys.readouterr().err
    os.close(descriptor)
    assert prepare(release.root, tmp_path / "out") == 0


def test_totalsegmentator_absent(release, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert prepare(release.root, tmp_path / "out", "--anatomical-masks", "totalsegmentator") == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="the stand-in command is a script with a shebang")
def test_totalsegmentator_is_run_with_the_scan_and_its_mask_used(tmp_path, monkeypatch):
    write_volume(tmp_path / "raw" / "ct.nii.gz", chest_hu(1))
    write_volume(tmp_path / "raw" / "other.nii.gz", chest_hu(2))
    command = tmp_path / "bin" / "TotalSegmentator"
    command.parent.mkdir()
    # Stands in for the real command, whose weights no test can have: air of the lungs becomes class 10.
    command.write_text(
        f"#!{sys.executable}\n"
        "import sys, nibabel, numpy\n"
        "options = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert sys.argv[-1] == '--ml'\n"
        "image = nibabel.load(options['-i'])\n"
        "hu = numpy.asarray(image.dataobj)\n"
        "if hu[0, 0, 0] == HU: sys.exit('no GPU memory left')\n"
        "labels = ((hu > -925) & (hu < -700)).astype('uint8') * 10\n"
        "nibabel.save(nibabel.Nifti1Image(labels, image.affine), options['-o'])\n".replace(
            "HU", str(chest_hu(2)[0, 0, 0])
        )
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(command.parent))

    assert prepare(tmp_path / "raw", tmp_path / "out", "--anatomical-masks", "totalsegmentator") == 3

    gts = read_prepared_npz(tmp_path / "out" / "volumes" / "ct.npz").gts
    assert set(np.unique(gts)) == {0, 1, 19}
    refused = next(case for case in log_of(tmp_path / "out")["cases"] if case["status"] == "refused")
    assert refused["volume_id"] == "other" and "no GPU memory left" in refused["reason"]
