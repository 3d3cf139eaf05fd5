"""What the joint network's inference says of input that it cannot use, or only in part; good scans go on."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.bundles.bundle_runs import messages_of
from tests.bundles.handed_in_scans import (
    DISEASES,
    KINDS,
    infer,
    mask_image,
    page_text,
    probabilities_of,
    records_of,
    stored_mask,
    write_identified_dicom,
)
from tests.data.identified_series import identifiers_in
from tests.data_prep.chest_scans import GEOMETRY, chest, write_dicom
from tests.data_prep.tiny_release import write_volume
from vlm3d_ext.data.volume_geometry import VolumeGeometry

JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF" + b"x" * 300
LOCALIZER = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
LONG = (2000, 64, 64)
FEW_SLICES = VolumeGeometry.from_spacing((15, 24, 28), (6.0, 10.0, 10.0))


def write_study(folder: Path) -> Path:
    """Write two series that may both be meant, numbers 4 and 5."""
    write_identified_dicom(folder, chest(1), SeriesNumber=4)
    return write_dicom(folder, chest(2), prefix="b", SeriesNumber=5, SeriesInstanceUID="1.2.9")


def head() -> np.ndarray:
    """Return a head instead of a chest: a skull, brain, and air around it."""
    k, j, i = np.mgrid[-1:1:40j, -1:1:24j, -1:1:28j]
    radius = np.sqrt(k**2 + j**2 + i**2)
    hu = np.where(radius < 0.8, 35, -1000)
    hu[(radius > 0.7) & (radius < 0.8)] = 900
    return (hu + np.random.default_rng(0).normal(0, 5, hu.shape)).astype(np.int16)


def long_chest() -> np.ndarray:
    """Return 2,000 slices, lungs in the middle."""
    hu = np.full(LONG, -1000, dtype=np.int16)
    hu[:, 10:54, 5:59] = 40
    hu[700:1300, 20:45, 10:28] = -850
    return hu


@pytest.fixture(scope="module")
def output(scan_options, tmp_path_factory) -> Path:
    """Results of a folder with good, odd and bad scans."""
    folder = tmp_path_factory.mktemp("odd") / "scans"
    write_volume(folder / "good.nii.gz", chest(1), GEOMETRY)
    write_volume(folder / "head.nii.gz", head(), GEOMETRY)
    thick = VolumeGeometry.from_spacing((16, 24, 28), (6.0, 10.0, 10.0))
    write_volume(folder / "of16.nii.gz", chest(1)[:16], thick)
    write_volume(folder / "of2000.nii", long_chest(), VolumeGeometry.from_spacing(LONG, (0.2, 6.0, 6.0)))
    with_scout = write_identified_dicom(folder / "with_localizer", chest(1))
    write_dicom(with_scout, chest(2)[:2], prefix="scout", ImageType=LOCALIZER)
    chosen = write_identified_dicom(folder / "with_others", chest(1), SeriesNumber=4)
    write_dicom(chosen, chest(2)[:3], prefix="x", SeriesNumber=9, SeriesInstanceUID="1.2.9", Modality="OT")
    write_identified_dicom(folder / "without_uids", chest(1), StudyInstanceUID=None, SeriesInstanceUID=None)
    # and what is none
    write_study(folder / "two_series")
    write_identified_dicom(folder / "mr", chest(1), Modality="MR")
    (folder / "half.nii.gz").write_bytes((folder / "good.nii.gz").read_bytes()[:-3000])
    write_volume(folder / "of15.nii.gz", chest(1)[:15], FEW_SLICES)
    small = np.zeros((4, 4, 4), dtype=np.uint8)
    np.savez(folder / "other_size.npz", imgs=small, gts=small, spacing=np.ones(3, dtype=np.float32))
    (folder / "photo.jpg").write_bytes(JPEG)
    infer(scan_options(folder, folder.parent / "results", dicom_sr=True))
    return folder.parent / "results"


GOOD = ["good", "head", "of16", "of2000", "with_localizer", "with_others", "without_uids"]
REFUSED = {
    "half": "half.nii.gz",
    "mr": "modality is MR, expected CT",
    "of15": "has 15 axial slices, expected at least 16",
    "other_size": "holds 1 windows of 4 x 4 x 4 voxels, expected 1 (wide) of 8 x 16 x 18",
    "two_series": "number 4: CT, 40 slices every 5 mm; number 5: CT, 40 slices every 5 mm",
}


def test_the_good_ones_are_all_there_and_the_bad_ones_in_the_log(output):
    assert list(records_of(output)) == GOOD
    for record in records_of(output).values():
        assert set(record["files"]) >= KINDS and all((output / name).is_file() for name in record["files"].values())
    log = json.loads((output / "intake_log.json").read_text())
    assert log["summary"] == {"prepared": 7, "refused": 5, "ignored_files": 1}
    reasons = {entry["volume_id"]: entry["reason"] for entry in log["scans"] if entry["status"] == "refused"}
    assert reasons.keys() == REFUSED.keys()
    for volume_id, words in REFUSED.items():
        assert words in reasons[volume_id] and "\n" not in reasons[volume_id]
        assert not list(output.rglob(f"{volume_id}.*"))
    for path in output.rglob("challenge_*.json"):
        assert all(volume_id in path.read_text() for volume_id in GOOD), path


@pytest.mark.parametrize(
    ("volume_id", "words"),
    [
        ("head", "does not look like a chest CT: 0 ml of aerated lung"),
        ("of16", "thick slices: one every 6 mm"),
        ("of16", "short coverage: 96 mm"),
        ("with_localizer", "2 localizer images skipped"),
        ("with_others", "of 2 series the only one that can be a chest scan was taken, number 4: CT, 40 slices"),
        ("without_uids", "no DICOM objects: "),
    ],
)
def test_what_is_odd_is_said_in_the_record_and_on_the_page(output, volume_id, words):
    assert any(words in note for note in records_of(output)[volume_id]["notes"])
    assert words in page_text(output, volume_id)


def test_scans_without_anything_odd_have_no_note(output):
    assert {name for name, record in records_of(output).items() if not record["notes"]} == {"good", "of2000"}


def test_a_series_without_uids_has_everything_but_dicom_objects(output):
    assert set(records_of(output)["without_uids"]["files"]) == KINDS
    assert "StudyInstanceUID, SeriesInstanceUID" in str(records_of(output)["without_uids"]["notes"])
    written = {path.stem for path in output.glob("dicom_s*/*.dcm")}
    assert written == {"with_localizer", "with_others"}
    for disease in DISEASES:
        np.testing.assert_array_equal(
            stored_mask(output, "without_uids", disease), stored_mask(output, "good", disease)
        )


def test_a_chest_among_other_images_is_the_chest(output):
    for volume_id in ("with_localizer", "with_others"):
        assert probabilities_of(output, volume_id) == pytest.approx(probabilities_of(output, "good"), abs=1e-5)


def test_two_thousand_slices_are_drawn_on_their_own_grid(output):
    image = mask_image(output, "of2000", "lung_nodule")
    assert image.shape == LONG[::-1] and np.asarray(image.dataobj).any()
    np.testing.assert_allclose(image.affine, np.diag([-6.0, -6.0, 0.2, 1.0]), atol=1e-4)
    assert (output / "pages" / "of2000.html").stat().st_size < 8_000_000


def test_a_series_is_chosen_by_its_number(scan_options, output, tmp_path):
    study = write_study(tmp_path / "study")
    options = scan_options(study, tmp_path / "out")
    reason = reason_of(options)
    assert "number 4: CT, 40 slices every 5 mm; number 5" in reason and "--series_number" in reason
    records = infer({**options, "series_number": 4})
    assert probabilities_of(tmp_path / "out", "study") == pytest.approx(probabilities_of(output, "good"), abs=1e-5)
    first = records["study"]["files"]["dicom_seg"]
    drawn = (tmp_path / "out" / first).read_bytes()
    infer({**options, "series_number": 5})
    assert probabilities_of(tmp_path / "out", "study") != pytest.approx(probabilities_of(output, "good"), abs=1e-5)
    # series 5 has no frame of reference, so what was drawn on series 4 goes
    assert drawn and not (tmp_path / "out" / first).exists()


def reason_of(options) -> str:
    """Return the first cause of the error that a run ends with: one line, without any identifier."""
    *_, reason = messages_of(lambda: infer(options))
    assert "\n" not in reason and identifiers_in(reason.encode()) == []
    return reason


def write_nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


def write_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


CASES = {
    "photo": (lambda folder: write_file(folder / "me.jpg", JPEG), "me.jpg: is a picture, expected a CT volume"),
    "photo called a scan": (lambda folder: write_file(folder / "me.nii.gz", JPEG), "me.nii.gz: "),
    "empty folder": (lambda folder: write_nothing(folder / "empty"), "empty: holds no scan among its 0 files"),
    "nothing there": (lambda folder: folder / "nowhere.nii.gz", "nowhere.nii.gz: no such file or folder"),
    "one slice": (
        lambda folder: write_dicom(folder / "s", chest(1)) / "IM0000",
        "is a single DICOM file, expected the folder with all slices",
    ),
    "mr series": (
        lambda folder: write_identified_dicom(folder / "s", chest(1), Modality="MR"),
        "modality is MR, expected CT; pass the folder of a CT series",
    ),
    "localizers alone": (
        lambda folder: write_identified_dicom(folder / "s", chest(1)[:3], ImageType=LOCALIZER),
        "all 3 images are localizers",
    ),
    "a gap": (
        lambda folder: remove(write_identified_dicom(folder / "s", chest(1)), "jane_0017"),
        "1 slices missing at",
    ),
    "15 slices": (
        lambda folder: write_volume(folder / "s.nii", chest(1)[:15], FEW_SLICES),
        "has 15 axial slices, expected at least 16; pass the whole scan.",
    ),
    "a mask": (
        lambda folder: write_volume(folder / "s.nii", (chest(1) > 0).astype(np.uint8), GEOMETRY),
        "s.nii",
    ),
    "four dimensions": (lambda folder: write_4d(folder / "s.nii.gz"), "s.nii.gz"),
}  # fmt: skip


def remove(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def write_4d(path: Path) -> Path:
    nib.save(nib.Nifti1Image(np.stack([chest(1).T] * 2, axis=-1), GEOMETRY.affine_ras), path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_scan_is_one_line(scan_options, tmp_path, name):
    make, words = CASES[name]
    reason = reason_of(scan_options(make(tmp_path), tmp_path / "out"))
    assert words in reason and ("expected" in reason or "missing" in reason) and reason.endswith(".")
    assert "--no-hu-check" not in reason and "--output" not in reason
    assert not (tmp_path / "out" / "scans").exists(), "nothing is begun"


@pytest.fixture
def scan(tmp_path) -> Path:
    return write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_that_is_a_file(scan_options, scan, tmp_path, below):
    (tmp_path / "out").write_text("mine")
    reason = reason_of(scan_options(scan, tmp_path / "out" / below))
    assert f"output_dir {tmp_path / 'out'}" in reason and "is a file or lies below one, expected a folder" in reason
    assert (tmp_path / "out").read_text() == "mine"


def test_a_missing_checkpoint_names_the_command_that_makes_it(scan_options, scan, tmp_path):
    reason = reason_of(scan_options(scan, tmp_path / "out", ckpt_path=str(tmp_path / "none.pt")))
    assert f"checkpoint {tmp_path / 'none.pt'} does not exist" in reason
    assert "bundles/multitask/configs/train.json" in reason and "--ckpt_path" in reason
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bundle", ["encoder", "report_generation"])
def test_a_checkpoint_of_another_bundle_is_refused_and_leaves_the_folder_free(
    scan_options, scan, lesion_encoder_run, tmp_path, bundle
):
    other = lesion_encoder_run.parent / bundle / "models" / "model.pt"
    reason = reason_of(scan_options(scan, tmp_path / "out", ckpt_path=str(other)))
    assert f"{other} has no entry 'preparation'; it has [" in reason and "--ckpt_path" in reason
    assert list(infer(scan_options(scan, tmp_path / "out"))) == ["a"]


def test_a_damaged_checkpoint_is_named(scan_options, scan, tmp_path):
    options = scan_options(scan, tmp_path / "out")
    broken = write_file(tmp_path / "broken.pt", Path(options["ckpt_path"]).read_bytes()[:5000])
    messages = messages_of(lambda: infer({**options, "ckpt_path": str(broken)}))
    assert any(message.startswith(f"{broken} is no readable checkpoint") for message in messages)
    assert not (tmp_path / "out").exists()


def test_a_series_number_for_a_file_is_refused(scan_options, scan, tmp_path):
    assert "series_number 3 is for folders of DICOM series" in reason_of(
        scan_options(scan, tmp_path / "out", series_number=3)
    )


@pytest.mark.parametrize("name", ["classification", "multitask", "Localization"])
def test_a_scan_that_is_called_like_an_index_does_not_take_its_place(scan_options, tmp_path, name):
    write_volume(tmp_path / "scans" / f"{name}.nii.gz", chest(1), GEOMETRY)
    options = scan_options(tmp_path / "scans", tmp_path / "out")
    (volume_id,) = infer(options)
    assert volume_id.startswith(f"{name}_")
    assert list(infer(options)) == [volume_id], "the folder takes a second run"


def test_a_small_scan_in_a_network_of_fixed_spacing_has_its_places_inside(scan_options, scan, tmp_path):
    """The prepared grid reaches beyond the scan, and the network sees regions there, too."""
    options = scan_options(scan, tmp_path / "out")
    content = torch.load(options["ckpt_path"], weights_only=True)
    content["preparation"]["settings"] |= {"depth_policy": "crop", "spacing_mm": [40.0, 30.0, 30.0]}
    torch.save(content, tmp_path / "crop.pt")
    assert list(infer({**options, "ckpt_path": str(tmp_path / "crop.pt")})) == ["a"]
    assert (tmp_path / "out" / "pages" / "a.html").is_file()
