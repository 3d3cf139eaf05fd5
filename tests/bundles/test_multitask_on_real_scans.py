"""Real scans through the joint network's inference: NIfTI and DICOM, with and without the UIDs that references need.

Needs the sample data in ../shared/data, skipped where they are not there.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from tests.bundles.bundle_runs import SHARED_DATA
from tests.bundles.handed_in_scans import (
    DISEASES,
    KINDS,
    NEVER_DRAWN,
    infer,
    mask_image,
    page_text,
    records_of,
    stored_mask,
)
from tests.data.identified_series import FRAME_OF_REFERENCE, SERIES, STUDY, identifiers_in, validation_errors
from tests.engines.test_scan_page_in_browser import browser, find, open_page, settle, sliders  # noqa: F401
from vlm3d_ext.data.dicom_segmentation import read_dicom_segmentation
from vlm3d_ext.data.dicom_series import read_dicom_series
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.text.disease_set import load_disease_set

CHESTS = SHARED_DATA / "ct_chest"
ABDOMEN = SHARED_DATA / "ct_organs_totalsegmentator" / "example_ct_dicom"
NIFTI = {"lung1": CHESTS / "nsclc_LUNG1-001" / "ct.nii.gz", "phantom": CHESTS / "ibsi_pat1" / "phantom.nii.gz"}
SERIES_FILES = CHESTS / "ibsi_pat1" / "tutorial_radiomics_chest_ct_data.zip"
NAMES = dict(zip(DISEASES, load_disease_set().names, strict=True))

pytestmark = pytest.mark.skipif(not CHESTS.is_dir(), reason="the sample scans in ../shared/data are not there")


def write_uids(folder: Path, target: Path) -> Path:
    """Copy a series with UIDs of its own, and a patient's name, where they were emptied."""
    target.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        dataset = pydicom.dcmread(path)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = (
            STUDY, SERIES, FRAME_OF_REFERENCE
        )  # fmt: skip
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{SERIES}.{100 + number}"
        dataset.PatientName, dataset.PatientID = "Müller^Jane", "MRN-4711"
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.save_as(target / f"jane_{number:03d}.dcm")
    return target


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Folder with the scans, as NIfTI and as DICOM."""
    folder = tmp_path_factory.mktemp("real") / "scans"
    folder.mkdir()
    for name, path in NIFTI.items():
        (folder / f"{name}.nii.gz").symlink_to(path)
    with zipfile.ZipFile(SERIES_FILES) as archive:
        archive.extractall(folder.parent / "raw")
    write_uids(folder.parent / "raw" / "chest_ct" / "image", folder / "series")
    if ABDOMEN.is_dir():
        shutil.copytree(ABDOMEN, folder / "abdomen")
    return folder


@pytest.fixture(scope="module")
def output(scans, scan_options) -> Path:
    """Folder of the results."""
    infer(scan_options(scans, scans.parent / "results", dicom_sr=True))
    return scans.parent / "results"


def test_every_scan_has_everything(output):
    records = records_of(output)
    assert set(records) >= {*NIFTI, "series"}
    for record in records.values():
        assert set(record["files"]) >= KINDS and all((output / name).is_file() for name in record["files"].values())
    for volume_id in records:
        assert (output / "pages" / f"{volume_id}.html").stat().st_size < 8_000_000
        assert f"<title>{volume_id}" in page_text(output, volume_id)


@pytest.mark.parametrize("volume_id", NIFTI)
def test_masks_lie_on_the_files_own_grid(output, volume_id):
    source = nib.load(NIFTI[volume_id])
    for disease in DISEASES:
        image = mask_image(output, volume_id, disease)
        assert image.shape == source.shape[:3]
        np.testing.assert_allclose(image.affine, source.affine, atol=1e-3)
        assert set(np.unique(np.asarray(image.dataobj))) <= {0, 1}
    assert any(np.asarray(mask_image(output, volume_id, disease).dataobj).any() for disease in DISEASES)


def test_what_is_drawn_in_a_series_is_drawn_in_its_nifti(output):
    """The phantom was converted from the series, cropped or flipped as its makers chose; places in the patient stay."""
    dicom, nifti = (
        json.loads((output / "classification" / f"{name}.json").read_text())["findings"]
        for name in ("series", "phantom")
    )
    assert {n: f["probability"] for n, f in dicom.items()} == pytest.approx(
        {n: f["probability"] for n, f in nifti.items()}, abs=0.02
    )
    for disease in DISEASES:
        images = [mask_image(output, name, disease) for name in ("series", "phantom")]
        grids = [VolumeGeometry.from_ras(image.shape[::-1], image.affine) for image in images]
        one, other = (
            grid.to_canonical(np.asarray(image.dataobj).T > 0) for grid, image in zip(grids, images, strict=True)
        )
        assert grids[0].canonical().is_close(grids[1].canonical(), tolerance_mm=0.05)
        assert 2 * (one & other).sum() >= 0.97 * (one.sum() + other.sum())


def test_the_series_segmentation_holds_the_masks_beside_the_right_slices(output, scans):
    path = output / "dicom_seg" / "series.dcm"
    masks = {NAMES[key]: stored_mask(output, "series", key) for key in DISEASES if key != NEVER_DRAWN}
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    read = read_dicom_segmentation(path)
    assert read.keys() == masks.keys() and len(masks) > 0
    for name, mask in masks.items():
        np.testing.assert_array_equal(read[name], mask)
    series = read_dicom_series(scans / "series")
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in series.files]
    dataset = pydicom.dcmread(path)
    listed = dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert [item.ReferencedSOPInstanceUID for item in listed] == [header.SOPInstanceUID for header in headers]
    position = {str(header.SOPInstanceUID): header.ImagePositionPatient for header in headers}
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        referred = str(groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        found = [float(value) for value in groups.PlanePositionSequence[0].ImagePositionPatient]
        assert found == pytest.approx([float(value) for value in position[referred]], abs=1e-3)
    for kind in ("dicom_seg", "dicom_sr"):
        assert identifiers_in((output / kind / "series.dcm").read_bytes()) == []


@pytest.mark.parametrize("kind", ["dicom_seg", "dicom_sr"])
def test_dicom_objects_of_a_real_series_are_valid(output, kind):
    assert validation_errors(output / kind / "series.dcm") == []


@pytest.mark.skipif(not ABDOMEN.is_dir(), reason="TotalSegmentator's example series is not there")
def test_an_anonymised_abdomen_is_done_and_its_oddities_are_said(output):
    record = records_of(output)["abdomen"]
    assert set(record["files"]) == KINDS
    assert any("does not look like a chest CT" in note for note in record["notes"])
    assert any(note.startswith("no DICOM objects: ") and "InstanceUID" in note for note in record["notes"])
    assert "does not look like a chest CT" in page_text(output, "abdomen")
    geometry = read_dicom_series(ABDOMEN).geometry
    image = mask_image(output, "abdomen", "lung_nodule")
    assert image.shape == geometry.shape[::-1]
    np.testing.assert_allclose(image.affine, geometry.affine_ras, atol=1e-3)


def test_a_page_opens_in_a_browser_and_shows_where_findings_are(output, browser):  # noqa: F811
    path = output / "pages" / "lung1.html"
    open_page(browser, path)
    before = sliders(browser)
    places = [
        tuple(map(int, re.findall(r"\d+", slices))) for slices in re.findall(r'data-slices="(.*?)"', path.read_text())
    ]
    assert len(set(places)) > 2
    for number in (places.index(next(place for place in places if place != before)), len(places) - 1):
        browser.execute_script("document.querySelectorAll('[data-slices]')[arguments[0]].click()", number)
        settle(browser)
        assert sliders(browser) == places[number]
    assert browser.get_log("browser") == []
    assert "lung1" in browser.title and find(browser, "#readout").is_displayed()
