"""What results are shown on: the scan itself, or what was prepared of it, on the same grid."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from data_prep.scan_intake import ScanIntake
from tests.bundles.handed_in_scans import write_turned
from tests.data_prep.chest_scans import GEOMETRY, PREPARATION, SETTINGS, chest, write_dicom
from tests.data_prep.tiny_release import write_volume
from vlm3d_ext.data.prepared_case import PreparedCaseError, read_prepared_npz
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.engines.scan_picture import read_picture

BACK = "shown as prepared for the network, at its resolution and in the "


def prepared(tmp_path, scan, preparation=PREPARATION, **options):
    """Prepare one scan; returns the path of its sidecar."""
    ScanIntake(scan, tmp_path / "out", preparation, **options).run()
    (sidecar,) = (tmp_path / "out" / "prepared" / "volumes").glob("*.json")
    return sidecar


def test_a_nifti_is_shown_as_it_is(tmp_path):
    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    picture = read_picture(scan, prepared(tmp_path, scan))
    np.testing.assert_array_equal(picture.hu, chest(1))
    assert picture.geometry.is_close(GEOMETRY) and picture.notes == ()


def test_a_scan_in_other_axes_is_shown_in_canonical_ones(tmp_path):
    write_turned(tmp_path / "a.nii.gz", chest(1))
    picture = read_picture(tmp_path / "a.nii.gz", prepared(tmp_path, tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(picture.hu, chest(1))
    assert picture.geometry.axis_codes == "LPS" and picture.notes == ()
    assert not picture.geometry.is_close(GEOMETRY), "it lies obliquely"


def test_of_a_dicom_folder_the_series_is_shown_that_was_asked_for(tmp_path):
    folder = write_dicom(tmp_path / "study", chest(1), SeriesNumber=4)
    write_dicom(folder, chest(2), prefix="b", SeriesNumber=5, SeriesInstanceUID="1.2.9")
    sidecar = prepared(tmp_path, folder, series_number=5)
    picture = read_picture(folder, sidecar, series_number=5)
    np.testing.assert_array_equal(picture.hu, chest(2).clip(-1024))  # what a series can store
    assert picture.notes == ()


def test_a_series_number_is_for_dicom_alone(tmp_path):
    """A folder of both kinds is taken in with a number, which a NIfTI in it does not have."""
    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    assert read_picture(scan, prepared(tmp_path, scan), series_number=5).notes == ()


def test_a_prepared_case_is_shown_in_its_window_on_the_scans_grid(tmp_path):
    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    sidecar = prepared(tmp_path, scan)
    content = json.loads(sidecar.read_text())
    npz = tmp_path / "case.npz"
    shutil.copy(sidecar.with_suffix(".npz"), npz)
    sidecar.write_text(json.dumps({**content, "source_format": "npz"}))
    picture = read_picture(npz, sidecar)
    assert picture.notes == (f"{BACK}wide window: it came as a prepared case",)
    assert picture.hu.shape == GEOMETRY.shape and picture.geometry.is_close(GEOMETRY)
    # In the middle of the body and of a lung, where neighbours are alike; grey levels are 1 / 255 of the window.
    for place, expected in (((20, 12, 14), 40.0), ((20, 12, 20), -850.0)):
        assert chest(1)[place] == pytest.approx(expected, abs=40)
        assert picture.hu[place] == pytest.approx(expected, abs=60)


def test_of_several_windows_the_widest_is_shown(tmp_path):
    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    settings = replace(SETTINGS, windows=("soft_tissue", "lung", "bone")).to_dict()
    sidecar = prepared(tmp_path, scan, settings)
    scan.unlink()
    (note,) = read_picture(scan, sidecar).notes
    widths = dict(zip(settings["window"], (width for _, width in settings["window_centre_width_hu"]), strict=True))
    widest = max(widths, key=lambda name: widths[name])
    assert note.startswith(f"{BACK}{widest} window: the scan cannot be read any more (") and "a.nii.gz" in note


def test_grey_levels_become_the_hu_of_their_window(tmp_path):
    """Level 0 is the lower end, 255 the upper one: the lung window reaches from -1350 to 150 HU."""
    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    sidecar = prepared(tmp_path, scan, replace(SETTINGS, windows=("lung",)).to_dict())
    ((centre, width),) = replace(SETTINGS, windows=("lung",)).to_dict()["window_centre_width_hu"]
    imgs = read_prepared_npz(sidecar.with_suffix(".npz")).imgs
    assert imgs.min() > 0
    scan.unlink()
    picture = read_picture(scan, sidecar)
    # interpolation goes nowhere beyond what was there
    assert picture.hu.min() == pytest.approx(centre - width / 2 + imgs.min() / 255 * width, abs=1)
    assert picture.hu.max() <= centre - width / 2 + imgs.max() / 255 * width + 1


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_a_scan_that_has_gone_is_shown_as_it_was_prepared(tmp_path, kind):
    folder = write_dicom(tmp_path / "a", chest(1)) if kind == "dicom" else None
    scan = folder or write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    sidecar = prepared(tmp_path, scan)
    shutil.rmtree(scan) if folder else scan.unlink()
    (note,) = read_picture(scan, sidecar).notes
    assert note.startswith(f"{BACK}wide window: the scan cannot be read any more")


def test_a_scan_that_was_moved_since_does_not_lie_under_its_masks(tmp_path):
    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    sidecar = prepared(tmp_path, scan)
    affine = GEOMETRY.affine_lps.copy()
    affine[0, 3] += 30
    write_volume(scan, chest(1), VolumeGeometry(GEOMETRY.shape, affine))
    picture = read_picture(scan, sidecar)
    assert picture.notes[0].endswith("the scan lies on another grid now than when it was prepared")
    assert picture.geometry.is_close(GEOMETRY)


def test_without_scan_and_prepared_case_there_is_no_picture(tmp_path):
    scan = write_volume(tmp_path / "a.nii.gz", chest(1), GEOMETRY)
    sidecar = prepared(tmp_path, scan)
    scan.unlink()
    sidecar.with_suffix(".npz").unlink()
    with pytest.raises(PreparedCaseError, match=r"a\.npz"):
        read_picture(scan, sidecar)
