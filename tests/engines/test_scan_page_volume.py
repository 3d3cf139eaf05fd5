import base64

import numpy as np
import pytest

from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import resample_binary_mask
from vlm3d_ext.engines.scan_page_volume import (
    BAND_LIMIT_HU,
    HU_OF_LEVEL,
    SHOWN_RANGE_HU,
    decode_bands,
    encode_mask,
    encode_volume,
    nearest_slices,
    page_grid,
    shown_mask,
    shown_volume,
)

GEOMETRY = VolumeGeometry.from_spacing((30, 50, 40), (1.0, 0.5, 0.5), (10.0, -20.0, 5.0))


def decode_mask(runs, shape):
    """Read runs another way than the page's script does."""
    lengths, shift = [0], 0
    for byte in base64.b64decode(runs):
        lengths[-1] |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            lengths.append(0)
            shift = 0
    lengths.pop()
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(shape)


def test_the_two_bands_add_up_to_any_hu_within_half_a_level():
    low, high = HU_OF_LEVEL
    hu = np.arange(-1024, 1501, dtype=float)
    levels = [np.rint(np.interp(hu, band, np.arange(256))).astype(int) for band in (low, high)]
    error = np.abs(low[levels[0]] + high[levels[1]] - BAND_LIMIT_HU - hu)
    assert error[hu <= 310].max() <= 1.62
    assert error.max() <= 7
    assert (low[0], low[255], high[0], high[255]) == (-1024, -200, -200, 1500)
    # Soft tissue, of which a narrow window makes the most, gets three HU for each level.
    assert np.diff(high)[:170] == pytest.approx(3)


def test_sheets_come_back_within_the_error_that_they_state():
    hu = np.linspace(-1200, 1700, 30 * 50 * 40).reshape(30, 50, 40).astype(np.float32)
    encoded = encode_volume(hu, 10_000_000)
    decoded = decode_bands(encoded.sheets, encoded.rows_per_slice)
    assert encoded.rows_per_slice == 56 and decoded.shape == (30, 56, 40)
    error = np.abs(decoded[:, :50] - np.clip(hu, *SHOWN_RANGE_HU))
    assert encoded.mean_error_hu == pytest.approx(error.mean(), abs=1e-3)
    assert encoded.mean_error_hu < 6 and error.max() < 40
    assert encoded.quality == 95


def test_many_slices_go_into_several_sheets_in_their_order():
    hu = np.zeros((9, 1000, 8), dtype=np.float32) + 100 * np.arange(9, dtype=np.float32)[:, None, None]
    encoded = encode_volume(hu, 10_000_000)
    assert encoded.slices_per_sheet == 4 and [len(band) for band in encoded.sheets] == [3, 3]
    decoded = decode_bands(encoded.sheets, encoded.rows_per_slice)
    np.testing.assert_allclose(decoded.mean(axis=(1, 2)), 100 * np.arange(9), atol=8)
    # Levels 66.7, 100, 133.3 and 166.7 to one place after rounding: what the first sheet of the upper band holds.
    assert encoded.means[1][0] == pytest.approx((67 + 100 + 133 + 167) / 4)


def test_quality_gives_way_until_the_sheets_fit():
    noise = np.random.default_rng(0).normal(0, 300, (20, 64, 64))
    free = encode_volume(noise, 10**9)
    tight = encode_volume(noise, free.num_bytes // 2)
    assert tight.num_bytes <= free.num_bytes // 2
    assert tight.quality < free.quality and tight.mean_error_hu > free.mean_error_hu


@pytest.mark.parametrize("fill", ["random", "full", "first", "last"])
def test_runs_are_lossless(fill):
    shape = (7, 31, 53)
    mask = np.zeros(shape, dtype=bool)
    if fill == "random":
        mask = np.random.default_rng(1).random(shape) < 0.3
    elif fill == "full":
        mask[:] = True
    else:
        mask.flat[0 if fill == "first" else -1] = True
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), shape), mask)


def test_runs_are_written_as_documented():
    mask = np.zeros(300, dtype=bool)
    mask[130:133] = True
    # 130 outside = 2 + 1 * 128, 3 inside, 167 outside = 39 + 1 * 128.
    assert list(base64.b64decode(encode_mask(mask))) == [0x82, 1, 3, 0x80 | 39, 1]
    assert list(base64.b64decode(encode_mask(~mask))) == [0, 0x82, 1, 3, 0x80 | 39, 1]


def test_a_small_scan_keeps_its_grid_and_a_large_one_its_extent():
    assert page_grid(GEOMETRY, 256, 160) is GEOMETRY
    large = VolumeGeometry.from_spacing((300, 512, 400), (1.0, 0.7, 0.7))
    grid = page_grid(large, 256, 160)
    assert grid.shape == (160, 256, 200)
    assert grid.extent_mm == pytest.approx(large.extent_mm)
    assert page_grid(VolumeGeometry.from_spacing((300, 250, 250), (1.0, 0.7, 0.7)), 256, 160).shape == (160, 250, 250)
    with pytest.raises(ValueError, match="at least 1 pixel and 1 slice, got 0 and 5"):
        page_grid(large, 0, 5)


def test_a_coarser_voxel_is_the_mean_of_what_it_covers():
    hu = np.random.default_rng(2).integers(-900, 200, GEOMETRY.shape).astype(np.int16)
    grid = page_grid(GEOMETRY, 25, 15)
    assert grid.shape == (15, 25, 20)
    means = hu.reshape(15, 2, 25, 2, 20, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(shown_volume(hu, GEOMETRY, grid), means, atol=0.01)
    clipped = shown_volume(np.where(hu > 0, 3000, -3000).astype(np.int16), GEOMETRY, GEOMETRY)
    assert (clipped.min(), clipped.max()) == SHOWN_RANGE_HU


@pytest.mark.parametrize("limits", [(25, 15), (19, 30), (50, 7)])
def test_a_mask_cut_to_its_surroundings_is_resampled_as_a_whole_one(limits):
    grid = page_grid(GEOMETRY, *limits)
    mask = np.zeros(GEOMETRY.shape, dtype=bool)
    mask[3:9, 10:31, 0:7] = True
    mask[20, 45, 30] = True  # so small that it reaches one half nowhere
    mask &= np.random.default_rng(3).random(mask.shape) < 0.8
    shown = shown_mask(mask, GEOMETRY, grid)
    np.testing.assert_array_equal(shown, resample_binary_mask(mask, GEOMETRY, grid).astype(bool))
    assert not shown_mask(np.zeros_like(mask), GEOMETRY, grid).any()


def test_positions_become_the_nearest_slices():
    # x = 10 + 0.5 i, y = -20 + 0.5 j, z = 5 + k
    assert nearest_slices((10 + 0.5 * 7, -20 + 0.5 * 33, 5 + 12), GEOMETRY, GEOMETRY) == (12, 33, 7)
    assert nearest_slices((10.24, -19.76, 5.49), GEOMETRY, GEOMETRY) == (0, 0, 0)
    # The scan's outermost edges still belong to it: half a voxel beyond the centres.
    assert nearest_slices((10 - 0.25, -20 + 24.75, 34.5), GEOMETRY, GEOMETRY) == (29, 49, 0)
    # Twice as coarse: centres lie at index 0.5, 2.5, ...
    assert nearest_slices((10 + 0.5 * 7, -20 + 0.5 * 33, 5 + 12), GEOMETRY, page_grid(GEOMETRY, 25, 15)) == (6, 16, 3)


@pytest.mark.parametrize("position", [(9.7, 0, 10), (10, -20, 34.6), (10, 5.1, 10)])
def test_a_position_outside_the_scan_is_refused(position):
    with pytest.raises(ValueError, match="lies outside the scan: as index"):
        nearest_slices(position, GEOMETRY, GEOMETRY)


@pytest.mark.parametrize("position", [(1.0, 2.0), (1.0, float("nan"), 2.0)])
def test_what_is_no_position_is_refused(position):
    with pytest.raises(ValueError, match=r"a position is \(x, y, z\) in mm"):
        nearest_slices(position, GEOMETRY, GEOMETRY)
