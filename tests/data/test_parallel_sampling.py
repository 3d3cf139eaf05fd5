"""Sampling between parallel grids: by hand, against ITK voxel by voxel, and against averaging axis by axis."""

import numpy as np
import pytest
import SimpleITK as sitk

from tests.data.test_volume_geometry import OBLIQUE
from vlm3d_ext.data.area_averaging import average_onto_coarser_axes
from vlm3d_ext.data.intensity_windows import apply_window
from vlm3d_ext.data.parallel_sampling import ParallelSampling
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import resample_to_grey_levels, resample_volume, target_geometry

SHAPE = (13, 30, 27)
SCAN = VolumeGeometry(SHAPE, OBLIQUE)
# Finer, equal and coarser spacings along each axis, inside the scan and beyond it; no voxel's centre lies on the scan's
# outer edge, where ITK's own rounding decides voxel by voxel.
GRIDS = [
    ((20, 40, 50), (0.6, 0.7, 0.55)),
    ((13, 40, 20), (1.0, 0.83, 1.4)),
    ((5, 12, 27), (3.1, 2.4, 1.0)),
    ((16, 14, 40), (0.77, 2.0, 0.9)),
    ((9, 32, 28), (1.7, 1.0, 0.8)),
]


def hu(dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(-1000, 1000, SHAPE).astype(dtype)


def grid(size, factors):
    spacing_mm = [factor * spacing for factor, spacing in zip(factors, SCAN.spacing_mm, strict=True)]
    return target_geometry(SCAN, size, "crop", spacing_mm)[0]


def by_itk(array, geometry, target, fill):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.affine_lps[:3, 3].tolist())
    image.SetDirection(geometry.directions.ravel().tolist())
    wanted = sitk.Image(target.shape[::-1], sitk.sitkFloat32)
    wanted.SetSpacing(target.spacing_mm[::-1])
    wanted.SetOrigin(target.affine_lps[:3, 3].tolist())
    wanted.SetDirection(target.directions.ravel().tolist())
    sampled = sitk.Resample(image, wanted, sitk.Transform(), sitk.sitkLinear, fill, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(sampled)


@pytest.mark.parametrize(("size", "factors"), GRIDS)
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_interpolation_is_that_of_itk(size, factors, dtype):
    array, target = hu(dtype), grid(size, factors)

    ours = resample_volume(array, SCAN, target, antialias=False)

    itk = by_itk(array, SCAN, target, -1024)
    # One step of float32 at 1000 HU.
    np.testing.assert_allclose(ours, itk, rtol=0, atol=6.2e-5)
    # Where rounding to float32 is a tie, ITK's noise of 1e-13 decides.
    assert (ours == itk).mean() > 0.99
    np.testing.assert_array_equal(apply_window(ours), apply_window(itk))


@pytest.mark.parametrize(("size", "factors"), GRIDS)
def test_averages_are_those_along_each_axis_in_turn(size, factors):
    array, target = hu(), grid(size, factors)

    ours = resample_volume(array, SCAN, target)

    averaged, averaged_grid = average_onto_coarser_axes(array, SCAN, target, -1024)
    expected = averaged
    if not averaged_grid.is_close(target, tolerance_mm=1e-6):
        expected = by_itk(averaged, averaged_grid, target, -1024)
    # Averages alone are the same bits; interpolated ones to within a step of float32.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1.3e-4)
    if min(factors) >= 1:
        np.testing.assert_array_equal(ours, expected)


def test_by_hand():
    geometry = VolumeGeometry.from_spacing((2, 2, 3), (1.0, 1.0, 1.0))
    array = np.array([[[0, 10, 20], [100, 110, 120]], [[200, 210, 220], [300, 310, 320]]], dtype=np.int16)
    # One voxel at z 0.25, y 0.5, x 1.5: 50 + 50 + 15; one further right, half a voxel beyond the last, repeats it.
    target = VolumeGeometry.from_spacing((1, 1, 3), (1.0, 1.0, 0.9), origin_lps=(1.5, 0.5, 0.25))
    assert resample_volume(array, geometry, target, antialias=False, fill=-1.0).tolist() == [[[115.0, 120.0, -1.0]]]


def test_the_same_grid_costs_no_arithmetic():
    array = hu()
    planes = list(ParallelSampling(SCAN, SCAN).planes(array))
    assert all(np.shares_memory(plane, array) for plane in planes)
    np.testing.assert_array_equal(np.stack(planes), array)


def test_a_mirrored_scan_gives_the_mirrored_result():
    array = hu()
    geometry = VolumeGeometry.from_spacing(SHAPE, (1.0, 1.0, 1.0))
    for size, spacing in (((20, 41, 36), (0.7, 0.9, 0.8)), ((6, 41, 9), (2.0, 0.9, 3.0))):
        (target,) = target_geometry(geometry, size, "crop", spacing)
        straight = resample_volume(array, geometry, target)
        mirrored = resample_volume(np.ascontiguousarray(array[::-1, ::-1, ::-1]), geometry, target)
        np.testing.assert_allclose(mirrored[::-1, ::-1, ::-1], straight, atol=1e-3)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("size", "factors"), GRIDS)
def test_grey_levels_are_those_of_the_windowed_volume(size, factors, antialias):
    array, target = hu(), grid(size, factors)
    windows = ("soft_tissue", "lung", (-100.0, 30.0))

    levels = resample_to_grey_levels(array, SCAN, target, windows, antialias=antialias)

    values = resample_volume(array, SCAN, target, antialias=antialias)
    np.testing.assert_array_equal(levels, np.stack([apply_window(values, window) for window in windows]))


def test_a_turned_grid_is_left_to_itk():
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    turned = VolumeGeometry(SHAPE, turn @ OBLIQUE)
    assert not ParallelSampling.fits(SCAN, turned) and ParallelSampling.fits(SCAN, SCAN)
    with pytest.raises(ValueError, match="parallel"):
        ParallelSampling(SCAN, turned)
    array = hu()
    np.testing.assert_array_equal(
        resample_volume(array, SCAN, turned, antialias=False), by_itk(array, SCAN, turned, -1024)
    )
    levels = resample_to_grey_levels(array, SCAN, turned, ["lung"], antialias=False)
    np.testing.assert_array_equal(levels[0], apply_window(by_itk(array, SCAN, turned, -1024), "lung"))
    with pytest.raises(ValueError, match="reorient the scan"):
        resample_to_grey_levels(array, SCAN, turned, ["lung"])
    mirrored = VolumeGeometry(SHAPE, OBLIQUE @ np.diag([-1.0, 1.0, 1.0, 1.0]))
    assert not ParallelSampling.fits(SCAN, mirrored)


def test_a_grid_beside_the_scan_is_fill():
    away = VolumeGeometry((3, 4, 5), SCAN.affine_lps + np.pad([[500.0]] * 3, ((0, 1), (3, 0))))
    for antialias in (True, False):
        assert (resample_volume(hu(), SCAN, away, fill=-7, antialias=antialias) == -7).all()


def test_one_slice_has_no_neighbour():
    geometry = VolumeGeometry.from_spacing((1, 2, 2), (1.0, 1.0, 1.0))
    array = np.array([[[1, 2], [3, 4]]], dtype=np.int16)
    target = VolumeGeometry.from_spacing((2, 2, 2), (0.5, 1.0, 1.0), origin_lps=(0.0, 0.0, -0.25))
    np.testing.assert_array_equal(resample_volume(array, geometry, target, antialias=False), array.repeat(2, axis=0))


def test_windows_go_into_a_given_array():
    out = np.zeros((3, 4), dtype=np.uint8)
    values = np.linspace(-200, 300, 12, dtype=np.float32).reshape(3, 4)
    assert apply_window(values, out=out) is out
    np.testing.assert_array_equal(out, apply_window(values))
    with pytest.raises(ValueError, match="out must be uint8"):
        apply_window(values, out=out[:2])
