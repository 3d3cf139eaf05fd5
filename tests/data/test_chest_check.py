"""What tells a chest from a head and an abdomen, on shapes whose volumes are known and on real scans."""

from pathlib import Path

import numpy as np
import pytest

from vlm3d_ext.data.chest_check import chest_notes, measure_chest
from vlm3d_ext.data.scan import Scan, UnusableScanError
from vlm3d_ext.data.scan_reader import read_scan
from vlm3d_ext.data.volume_geometry import VolumeGeometry

SHARED = Path(__file__).parents[3] / "shared" / "data"


def chest(shape=(60, 50, 70), spacing=(5.0, 6.0, 6.0)):
    """A block of tissue in air, with a block of lung of 100 mm height on each side: (hu, ml of lung, ml of tissue)."""
    hu = np.full(shape, -1000, dtype=np.int16)
    hu[:, 5:45, 5:65] = 40
    hu[20:40, 10:40, 10:30] = -850
    hu[20:40, 10:40, 40:60] = -850
    voxel_ml = np.prod(spacing) / 1000
    lung = 2 * 20 * 30 * 20
    return hu, lung * voxel_ml, (60 * 40 * 60 - lung) * voxel_ml


def head(shape=(80, 100, 90), spacing_mm=(2.5, 2.5, 2.5)):
    """A skull with brain at 35 HU, sinuses of air and mastoids."""
    axes = [(np.arange(count) - (count - 1) / 2) * step for count, step in zip(shape, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    hu = np.full(shape, -1000.0)
    radius = (x / 75) ** 2 + (y / 95) ** 2 + (z / 95) ** 2
    for limit, value in ((1.0, 40), (0.93, 1000), (0.8, 35)):
        hu[radius < limit] = value
    for centre, size, value in (((18, -72, -40), 14, -1000), ((-18, -72, -40), 14, -1000), ((55, 20, -45), 12, -700)):
        hu[sum((axis - at) ** 2 for axis, at in zip((x, y, z), centre, strict=True)) < size**2] = value
    return np.rint(hu + np.random.default_rng(0).normal(0, 15, shape)).astype(np.int16)


def scan_of(hu, spacing_mm):
    geometry = VolumeGeometry.from_spacing(hu.shape, spacing_mm)
    return Scan(hu, geometry, geometry, "nifti")


def test_volumes_and_lengths_are_those_of_the_blocks():
    hu, lung_ml, body_ml = chest()
    measured = measure_chest(hu, (5.0, 6.0, 6.0))
    # The opening by a cross takes the four corners of each of the 2 x 20 rectangles, and no more.
    corners_ml = 4 * 2 * 20 * 0.18
    assert measured.lung_ml == pytest.approx(lung_ml - corners_ml)
    assert measured.lung_share == pytest.approx((lung_ml - corners_ml) / (lung_ml - corners_ml + body_ml))
    assert measured.lung_width_mm == 50 * 6 and measured.lung_height_mm == 20 * 5


def test_lungs_cut_open_by_a_crop_count_and_the_air_around_does_not():
    hu, lung_ml, _ = chest()
    cropped = measure_chest(hu[:, :, 15:], (5.0, 6.0, 6.0))
    assert cropped.lung_ml == pytest.approx(lung_ml * 35 / 40, rel=0.02)
    assert measure_chest(np.where(hu == -850, 40, hu), (5.0, 6.0, 6.0)).lung_ml == 0


def test_a_finer_grid_gives_the_same_measures():
    hu, *_ = chest()
    coarse = measure_chest(hu, (5.0, 6.0, 6.0))
    fine = measure_chest(hu.repeat(3, axis=0).repeat(2, axis=1).repeat(2, axis=2), (5 / 3, 3.0, 3.0))
    assert fine.lung_ml == pytest.approx(coarse.lung_ml, rel=0.02)
    assert fine.lung_width_mm == coarse.lung_width_mm and fine.lung_height_mm == pytest.approx(coarse.lung_height_mm)


def test_a_chest_is_passed_and_a_head_is_named():
    assert chest_notes("ct.nii.gz", scan_of(chest()[0], (5.0, 6.0, 6.0))) == ()
    (note,) = chest_notes("head.nii.gz", scan_of(head(), (2.5, 2.5, 2.5)))
    assert note.startswith("does not look like a chest CT: 0 ml of aerated lung, 0.0% of the body")


def test_thick_and_short_and_very_long_scans_are_noted_and_too_few_slices_refused():
    hu, *_ = chest()
    thick = chest_notes("x", scan_of(hu[:40:2], (10.0, 6.0, 6.0)))
    assert [note.split(":")[0] for note in thick] == ["thick slices"] and "one every 10 mm" in thick[0]
    assert chest_notes("x", scan_of(hu[:40], (5.000001, 6.0, 6.0))) == (), (
        "5 mm, as a header of single precision has it"
    )
    short = chest_notes("x", scan_of(hu[20:36], (5.0, 6.0, 6.0)))
    assert [note.split(":")[0] for note in short] == ["short coverage"] and "80 mm" in short[0]
    long = chest_notes("x", scan_of(hu.repeat(3, axis=0), (5.0, 6.0, 6.0)))
    assert [note.split(":")[0] for note in long] == ["reaches far beyond a chest"] and "900 mm" in long[0]
    with pytest.raises(UnusableScanError, match=r"^x: has 15 axial slices, expected at least 16; "):
        chest_notes("x", scan_of(hu[20:35], (5.0, 6.0, 6.0)))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared sample data are not there")
@pytest.mark.parametrize(
    ("path", "is_chest"),
    [
        ("ct_chest/nsclc_LUNG1-001/ct.nii.gz", True),
        ("ct_chest/ibsi_pat1/phantom.nii.gz", True),
        ("ct_organs_totalsegmentator/example_ct.nii.gz", False),
        ("ct_organs_totalsegmentator/example_ct_dicom", False),
    ],
)
def test_real_scans(path, is_chest):
    notes = chest_notes(path, read_scan(SHARED / path))
    assert any(note.startswith("does not look like a chest CT") for note in notes) is not is_chest
