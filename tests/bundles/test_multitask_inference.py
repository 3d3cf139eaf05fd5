"""One scan in, everything out: the joint network's inference as its users run it."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch

from tests.bundles.bundle_runs import BUNDLES, REPOSITORY, command, config_files, messages_of, run_command_here
from tests.bundles.handed_in_scans import (
    DISEASES,
    INFERENCE,
    KINDS,
    NEVER_DRAWN,
    all_contents,
    infer,
    mask_image,
    page_text,
    probabilities_of,
    records_of,
    result_files,
    stored_mask,
    write_identified_dicom,
    write_prepared,
    write_turned,
)
from tests.data.identified_series import FRAME_OF_REFERENCE, identifiers_in, validation_errors
from tests.data.test_dicom_series import SERIES_UID
from tests.data_prep.chest_scans import GEOMETRY, chest
from tests.data_prep.tiny_release import write_volume
from vlm3d_ext.checkpoint_files import file_sha256
from vlm3d_ext.data.dicom_segmentation import read_dicom_segmentation
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.text.disease_set import load_disease_set
from vlm3d_ext.text.label_set import load_label_set

# One chest in four forms: as stored by most, lying obliquely in other axes, as DICOM, and as prepared for training.
PLAIN, TURNED, DICOM, PREPARED = SCANS = ("plain", "turned", "series", "prepared_known")
NAMES = dict(zip(DISEASES, load_disease_set().names, strict=True))
TABLES = {
    "classification": ("probabilities.csv", "predictions.csv", "challenge_classification.json"),
    "localization": ("lesions.csv", "challenge_localization.json"),
    "report_generation": ("reports.csv", "challenge_reports.json"),
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Folder of one chest in four forms."""
    folder = tmp_path_factory.mktemp("handed_in") / "scans"
    write_volume(folder / "plain.nii.gz", chest(1), GEOMETRY)
    write_turned(folder / "turned.nii", chest(1))
    write_identified_dicom(folder / "series", chest(1))
    write_prepared(folder.parent / "cases", seed=1, name="known")
    shutil.copytree(folder.parent / "cases", folder / "prepared")
    return folder


@pytest.fixture(scope="module")
def log() -> io.StringIO:
    """What the run says."""
    return io.StringIO()


@pytest.fixture(scope="module")
def output(scans, scan_options, log) -> Path:
    """Folder of the results."""
    options = scan_options(scans, scans.parent / "results", dicom_sr=True)
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        infer(options)
    return scans.parent / "results"


def test_each_scan_has_a_record_whose_files_are_there(output):
    records = records_of(output)
    assert sorted(records) == sorted(SCANS)
    for volume_id, record in records.items():
        assert record["volume_id"] == volume_id and record["notes"] == []
        assert set(record["files"]) == KINDS | ({"dicom_seg", "dicom_sr"} if volume_id == DICOM else set())
        for name in record["files"].values():
            assert (output / name).stat().st_size > 0, name
    assert {name: record["source_format"] for name, record in records.items()} == {
        PLAIN: "nifti", TURNED: "nifti", DICOM: "dicom", PREPARED: "npz"
    }  # fmt: skip
    assert records[TURNED]["source"] == "turned.nii"


def test_findings_stand_in_files_and_tables(output):
    with open(output / "classification" / "tables" / "probabilities.csv", newline="", encoding="utf-8") as file:
        rows = {row.pop("VolumeName"): row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(SCANS)
    for volume_id, row in rows.items():
        assert list(row) == list(load_label_set("ct_rate_18").names)
        values = {name: float(value) for name, value in row.items()}
        assert values == pytest.approx(probabilities_of(output, volume_id))
        assert all(0 <= value <= 1 for value in values.values()) and len(set(values.values())) > 5


def test_every_table_lists_every_scan(output):
    for task, names in TABLES.items():
        assert {path.name for path in (output / task / "tables").iterdir()} == set(names)
        (path,) = (output / task / "tables").glob("challenge_*.json")
        named = re.findall(r'"input_image_name": "(\w+)', json.dumps(json.loads(path.read_text())))
        assert sorted(named) == sorted(SCANS), task


def test_masks_lie_on_the_scans_own_grids(output, scans):
    sources = {PLAIN: nib.load(scans / "plain.nii.gz"), TURNED: nib.load(scans / "turned.nii")}
    for volume_id in (PLAIN, DICOM, PREPARED, TURNED):
        affine, shape = GEOMETRY.affine_ras, GEOMETRY.shape[::-1]
        if volume_id in sources:
            affine, shape = sources[volume_id].affine, sources[volume_id].shape
        for disease in DISEASES:
            image = mask_image(output, volume_id, disease)
            np.testing.assert_allclose(image.affine, affine, atol=1e-4)
            assert image.shape == shape and image.get_data_dtype() == np.uint8
    assert "".join(nib.aff2axcodes(sources[TURNED].affine)) == "PIR" and sources[TURNED].shape == (24, 40, 28)


def test_all_forms_of_a_scan_are_drawn_alike(output):
    """Voxel by voxel, in axes of their own."""
    for disease in DISEASES:
        expected = stored_mask(output, PLAIN, disease)
        assert expected.any() == (disease != NEVER_DRAWN)
        if expected.any():
            flipped = [np.flip(expected, axis) for axis in range(3)]
            assert not any(np.array_equal(expected, other) for other in flipped), "the mask shows no wrong axis"
        for other in (DICOM, PREPARED):
            np.testing.assert_array_equal(stored_mask(output, other, disease), expected)
        turned = mask_image(output, TURNED, disease)
        geometry = VolumeGeometry.from_ras(turned.shape[::-1], turned.affine)
        canonical = geometry.to_canonical(np.asarray(turned.dataobj).T > 0)
        np.testing.assert_array_equal(canonical, expected)


def test_all_forms_of_a_scan_have_the_same_findings(output):
    expected = probabilities_of(output, PLAIN)
    assert probabilities_of(output, PREPARED) == expected
    for other in (DICOM, TURNED):
        assert probabilities_of(output, other) == pytest.approx(expected, abs=1e-5)


def test_reports_are_text_json_and_on_the_page(output):
    for volume_id in SCANS:
        report = json.loads((output / "report_generation" / f"{volume_id}.json").read_text())
        assert (output / "report_generation" / f"{volume_id}.txt").read_text() == report["report_text"] + "\n"
        page = page_text(output, volume_id)
        assert f"<title>{volume_id}" in page
        words = html.escape(report["report_text"].split(":")[-1].strip()[:20])
        shown = " ".join(re.sub(r"<[^>]*>", " ", page[page.index("<body") :]).split())
        assert " ".join(words.split()[:2]) in shown
    # plain letters, where markup would be; see the tests of the page for markup in texts
    assert json.loads((output / "report_generation" / f"{PLAIN}.json").read_text())["report_text"]


def test_pages_refer_to_nothing_outside(output, scan_options):
    checkpoint = scan_options("", "")["ckpt_path"]
    for volume_id in SCANS:
        page = page_text(output, volume_id)
        assert "default-src 'none'" in page
        assert not re.findall(r"""(?:src|href|action)=["']?(?!#|data:|["'])""", page)
        assert not re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", page), "an address"
        assert file_sha256(checkpoint)[:12] in page
        assert "not for clinical use" in page
    assert "came as a prepared case" in page_text(output, PREPARED) and "came as a prepared" not in page_text(
        output, PLAIN
    )


def test_the_segmentation_holds_the_masks_slice_by_slice(output):
    """In the order of the slices along k, each frame beside the slice that it was drawn on."""
    path = output / "dicom_seg" / f"{DICOM}.dcm"
    masks = {NAMES[key]: stored_mask(output, DICOM, key) for key in DISEASES if key != NEVER_DRAWN}
    read = read_dicom_segmentation(path)
    assert list(read) == list(masks)
    for name, mask in masks.items():
        np.testing.assert_array_equal(read[name], mask)
    dataset = pydicom.dcmread(path)
    assert dataset.FrameOfReferenceUID == FRAME_OF_REFERENCE
    (series,) = dataset.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == SERIES_UID
    uids = [str(item.ReferencedSOPInstanceUID) for item in series.ReferencedInstanceSequence]
    assert uids == [f"{SERIES_UID}.{k + 1}" for k in range(40)]  # `write_dicom` numbers slices from the feet up
    for frame, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        (image,) = groups.DerivationImageSequence[0].SourceImageSequence
        k = uids.index(str(image.ReferencedSOPInstanceUID))
        assert float(groups.PlanePositionSequence[0].ImagePositionPatient[2]) == pytest.approx(100 + 5 * k)
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        np.testing.assert_array_equal(dataset.pixel_array[frame] > 0, list(masks.values())[number - 1][k])


def test_the_structured_report_refers_to_the_series(output):
    dataset = pydicom.dcmread(output / "dicom_sr" / f"{DICOM}.dcm")
    assert SERIES_UID in str(dataset.CurrentRequestedProcedureEvidenceSequence)
    report = json.loads((output / "report_generation" / f"{DICOM}.json").read_text())
    written = " ".join(element.value for element in dataset.iterall() if element.keyword == "TextValue")
    words = [word for text in report["sections"].values() for word in text.split() if word.isascii()]
    assert len(words) > 3 and all(word in written for word in words)


@pytest.mark.parametrize("kind", ["dicom_seg", "dicom_sr"])
def test_dicom_objects_are_valid(output, kind):
    assert validation_errors(output / kind / f"{DICOM}.dcm") == []


def test_nothing_that_identifies_the_patient_leaves_the_series(output, log):
    assert len(identifiers_in((output.parent / "scans" / "series" / "jane_0000").read_bytes())) > 20
    contents = all_contents(output)
    assert len(contents) > 60
    for name, content in contents.items():
        assert identifiers_in(content) == [], name
        assert identifiers_in(name.encode()) == []
        if not name.startswith("dicom_s"):
            assert SERIES_UID.encode() not in content, name
    said = log.getvalue()
    assert "4 scans prepared" in said and identifiers_in(said.encode()) == [] and SERIES_UID not in said


def test_the_patient_module_is_copied_where_it_is_asked_for(scans, scan_options, tmp_path):
    infer(scan_options(scans / "series", tmp_path / "out", copy_patient_module=True))
    dataset = pydicom.dcmread(tmp_path / "out" / "dicom_seg" / "series.dcm")
    assert dataset.PatientID == "MRN-4711" and dataset.PatientName == "Müller^Jane"
    others = {name: content for name, content in all_contents(tmp_path / "out").items() if "dicom_seg" not in name}
    assert all(identifiers_in(content) == [] for content in others.values())


def test_a_second_run_does_nothing(output, scans, scan_options, capsys):
    before = {name: path.stat().st_mtime_ns for name, path in result_files(output).items()}
    contents = all_contents(output)
    infer(scan_options(scans, output, dicom_sr=True))
    assert "Nothing to do" in capsys.readouterr().out
    assert {name: path.stat().st_mtime_ns for name, path in result_files(output).items()} == before
    assert all_contents(output) == contents


def test_changed_scans_are_done_again_and_new_ones_are_added(scan_options, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_volume(tmp_path / "scans" / f"{name}.nii.gz", chest(seed), GEOMETRY)
    options = scan_options(tmp_path / "scans", tmp_path / "out")
    before = infer(options)
    kept = {name: path.stat().st_mtime_ns for name, path in result_files(tmp_path / "out").items() if "/b." in name}
    # the same voxels elsewhere: their masks lie elsewhere
    affine = GEOMETRY.affine_lps + np.array([[0, 0, 0, 31.0]] * 3 + [[0] * 4])
    moved = VolumeGeometry(GEOMETRY.shape, affine)
    write_volume(tmp_path / "scans" / "a.nii.gz", chest(1), moved)
    write_volume(tmp_path / "scans" / "c.nii.gz", chest(3), GEOMETRY)
    after = infer(options)
    assert list(after) == ["a", "b", "c"]
    assert after["b"] == before["b"] and after["a"]["content_sha256"] == before["a"]["content_sha256"]
    for disease in DISEASES:
        np.testing.assert_allclose(mask_image(tmp_path / "out", "a", disease).affine, moved.affine_ras, atol=1e-4)
    assert len(kept) == 13 and all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in kept.items())
    # another picture of the same name
    probabilities = probabilities_of(tmp_path / "out", "a")
    write_volume(tmp_path / "scans" / "a.nii.gz", chest(9) - 40, moved)
    infer(options)
    assert probabilities_of(tmp_path / "out", "a") != probabilities
    table = (tmp_path / "out" / "report_generation" / "tables" / "reports.csv").read_text()
    assert [line.split(",")[0] for line in table.splitlines() if re.match(r"[abc],", line)] == ["a", "b", "c"]


def test_what_an_earlier_scan_of_the_same_name_left_does_not_stay(scan_options, tmp_path):
    """Were its DICOM objects to stay, another patient's lesions would lie beside this one's."""
    write_identified_dicom(tmp_path / "scans" / "a", chest(1))
    options = scan_options(tmp_path / "scans", tmp_path / "out")
    infer(options)
    assert (tmp_path / "out" / "dicom_seg" / "a.dcm").is_file() and not (tmp_path / "out" / "dicom_sr").exists()
    # asked for now, and as little there as for a new scan
    infer({**options, "dicom_sr": True})
    assert (tmp_path / "out" / "dicom_sr" / "a.dcm").is_file()
    shutil.rmtree(tmp_path / "scans" / "a")
    write_volume(tmp_path / "scans" / "a.nii.gz", chest(2), GEOMETRY)
    assert infer(options)["a"]["source_format"] == "nifti"
    assert not list((tmp_path / "out").glob("dicom_s*/*"))


def test_results_of_two_checkpoints_are_not_mixed(output, scans, scan_options, tmp_path):
    contents = all_contents(output)
    options = scan_options(scans, output)
    content = torch.load(options["ckpt_path"], weights_only=True)
    content["model"]["localization.thresholds"][0] *= 0.5
    torch.save(content, tmp_path / "other.pt")
    *_, reason = messages_of(lambda: infer({**options, "ckpt_path": str(tmp_path / "other.pt")}))
    assert "another multitask_sha256" in reason and "--output_dir" in reason and str(output) in reason
    assert {name: value for name, value in all_contents(output).items() if not name.startswith("intake")} == {
        name: value for name, value in contents.items() if not name.startswith("intake")
    }


def test_a_killed_run_goes_on_as_if_nothing_had_happened(scan_options, tmp_path):
    for number in range(5):
        write_volume(tmp_path / "scans" / f"{number}.nii.gz", chest(number), GEOMETRY)
    write_identified_dicom(tmp_path / "scans" / "series", chest(7))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    options = scan_options(tmp_path / "scans", killed)
    process = subprocess.Popen(
        command(config_files(INFERENCE), {**options, "workflow_type": "infer"}),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (len(records_of(killed)) if (killed / "scans").is_dir() else 0) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {name: (killed / "scans" / f"{name}.json").stat().st_mtime_ns for name in records_of(killed)}
    assert 0 < len(done) < 6, "killed too late"
    for name in ("scans", "pages", "localization/masks/lung_nodule", "report_generation", "dicom_seg"):
        (killed / name).mkdir(exist_ok=True)
        (killed / name / ".1.json.abc.partial").write_bytes(b"half")
    infer(options)
    assert all((killed / "scans" / f"{name}.json").stat().st_mtime_ns == time for name, time in done.items())
    infer(scan_options(tmp_path / "scans", whole))
    one, other = all_contents(killed), all_contents(whole)
    # DICOM objects hold the moment when they were made
    assert one.keys() == other.keys() and not any(name.endswith(".partial") for name in one)
    assert [name for name in one if one[name] != other[name]] in ([], ["dicom_seg/series.dcm"])


def test_inference_runs_from_three_places(output, scans, scan_options, tmp_path, monkeypatch):
    """From the repository's root (the run of these tests), from inside the bundle, and from elsewhere."""
    copy = tmp_path / "copy" / "multitask"
    shutil.copytree(BUNDLES / "multitask", copy)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(scans / "plain.nii.gz", tmp_path / "elsewhere" / "plain.nii.gz")
    shutil.copytree(tmp_path / "elsewhere", copy / "mine")
    places = {
        "inside": (copy, ["configs/inference.json"], "mine", {}),
        "elsewhere": (
            tmp_path / "elsewhere",
            [str(copy / "configs" / "inference.json")],
            "plain.nii.gz",
            {"bundle_root": str(copy)},
        ),
    }
    for cwd, files, scan, further in places.values():
        options = scan_options(scan, "results", workflow_type="infer", **further)
        run_command_here(command(files, options), cwd, monkeypatch)
        assert probabilities_of(cwd / "results", PLAIN) == probabilities_of(output, PLAIN)
        for disease in DISEASES:
            np.testing.assert_array_equal(
                stored_mask(cwd / "results", PLAIN, disease), stored_mask(output, PLAIN, disease)
            )


def test_a_training_whose_data_were_prepared_elsewhere_takes_no_scans(multitask_run, scans, scan_options, tmp_path):
    """Its manifest says nothing of the preparation, so that no scan can be prepared alike."""
    options = scan_options(scans, tmp_path / "out", ckpt_path=str(multitask_run / "models" / "model.pt"))
    *_, reason = messages_of(lambda: infer(options))
    assert "preparation settings need the keys" in reason and not (tmp_path / "out").exists()
