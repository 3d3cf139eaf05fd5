"""Where a region lies, by hand; and what lies beside the scan."""

import numpy as np
import pytest

from tests.data.test_volume_geometry import OBLIQUE, oriented_geometry
from vlm3d_ext.data.anatomical_regions import region_by_name
from vlm3d_ext.data.region_position import position_of_regions, regions_in_scan
from vlm3d_ext.data.volume_geometry import VolumeGeometry

HEART, AORTA = region_by_name("heart").index, region_by_name("aorta").index


def test_the_place_is_the_regions_voxel_nearest_its_centre_in_millimetres():
    regions = np.zeros((4, 5, 6), dtype=np.uint8)
    # The centre is voxel (k, j, i) = (0.75, 1.75, 2.5): at 10 mm a slice the second is the nearest, at 1 mm the third.
    for voxel in ((0, 1, 2), (1, 2, 4), (0, 2, 2), (2, 2, 2)):
        regions[voxel] = HEART
    thick = VolumeGeometry.from_spacing(regions.shape, (10.0, 1.0, 1.0), (5.0, 7.0, 100.0))
    assert position_of_regions(regions, ["heart"], thick) == [5.0 + 4, 7.0 + 2, 100.0 + 10]
    fine = VolumeGeometry.from_spacing(regions.shape, (1.0, 1.0, 1.0), (5.0, 7.0, 100.0))
    assert position_of_regions(regions, ["heart"], fine) == [5.0 + 2, 7.0 + 2, 100.0 + 0]


def test_on_an_oblique_grid_the_place_is_in_the_patient():
    regions = np.zeros((4, 5, 6), dtype=np.uint8)
    regions[3, 1, 2] = AORTA
    geometry = VolumeGeometry(regions.shape, OBLIQUE)
    # by hand: origin + i * first column + j * second + k * third
    expected = OBLIQUE[:3, 3] + 2 * OBLIQUE[:3, 0] + 1 * OBLIQUE[:3, 1] + 3 * OBLIQUE[:3, 2]
    assert position_of_regions(regions, ["aorta"], geometry) == pytest.approx(expected.tolist())


def test_of_several_regions_the_largest_counts():
    regions = np.zeros((4, 5, 6), dtype=np.uint8)
    regions[0, 0, :2], regions[3, 4, 1:4] = AORTA, HEART
    geometry = VolumeGeometry.from_spacing(regions.shape, (1.0, 1.0, 1.0))
    assert position_of_regions(regions, ["aorta", "heart"], geometry) == [2.0, 4.0, 3.0]
    assert position_of_regions(regions, ["aorta"], geometry) in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0])


def test_a_hollow_region_is_met_and_not_its_hollow():
    regions = np.full((5, 5, 5), HEART, dtype=np.uint8)
    regions[1:4, 1:4, 1:4] = 0
    geometry = VolumeGeometry.from_spacing(regions.shape, (1.0, 1.0, 1.0))
    place = position_of_regions(regions, ["heart"], geometry)
    assert place is not None and regions[tuple(int(value) for value in place[::-1])] == HEART


def test_regions_that_are_not_there_have_no_place():
    geometry = VolumeGeometry.from_spacing((2, 3, 4), (1.0, 1.0, 1.0))
    regions = np.full(geometry.shape, HEART, dtype=np.uint8)
    assert position_of_regions(regions, ["aorta"], geometry) is None
    assert position_of_regions(regions, [], geometry) is None


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR"])
def test_what_reaches_beyond_the_scan_is_no_place(codes):
    """Voxels of 4 mm over a scan of 8 x 6 x 10 mm: those whose centre it holds stay, whatever its axes are called."""
    scan = oriented_geometry(codes, (4, 3, 5), (2.0, 2.0, 2.0))
    canonical = scan.canonical()
    first = canonical.positions_lps(np.array([[-0.5, -0.5, -0.5]]))[0]
    prepared = VolumeGeometry.from_spacing((3, 4, 3), (4.0, 4.0, 4.0), tuple(first - 1.0))
    regions = np.full((5, 4, 3), HEART, dtype=np.uint8)  # filled up at the end of its first axis
    found = regions_in_scan(regions, prepared, scan)
    expected = np.zeros((3, 4, 3), dtype=np.uint8)
    inside = [
        [0 <= 4 * n - 1 <= 2 * size for n in range(count)]
        for size, count in zip(canonical.shape, (3, 4, 3), strict=True)
    ]
    expected[np.ix_(*inside)] = HEART
    assert 0 < expected.astype(bool).sum() < expected.size
    np.testing.assert_array_equal(found, expected)


def test_a_grid_within_the_scan_is_kept_as_it_is():
    scan = VolumeGeometry((9, 9, 9), OBLIQUE)
    prepared = VolumeGeometry((4, 4, 4), OBLIQUE @ np.diag([2.0, 2.0, 2.0, 1.0]))
    regions = np.random.default_rng(0).integers(0, 21, (4, 4, 4)).astype(np.uint8)
    np.testing.assert_array_equal(regions_in_scan(regions, prepared, scan), regions)
    turned = VolumeGeometry((4, 4, 4), OBLIQUE @ np.diag([-2.0, 2.0, 2.0, 1.0]))  # to the other side, but its first
    expected = np.where(np.arange(4) == 0, regions, 0)
    np.testing.assert_array_equal(regions_in_scan(regions, turned, scan), expected)
