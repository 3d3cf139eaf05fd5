"""Depth policies, sampling of images and masks, and the way back to the scan's own grid."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.data.test_volume_geometry import ALL_48_ORIENTATIONS, OBLIQUE, oriented_geometry
from vlm3d_ext.data.area_averaging import overlap_weights
from vlm3d_ext.data.scan_reader import read_mask, read_scan
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import (
    resample_binary_mask,
    resample_mask,
    resample_volume,
    restore_mask,
    restore_probabilities,
    target_geometry,
    write_mask_nifti,
)

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def outer_edges_mm(geometry: VolumeGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Positions (x, y, z) of the lowest and the highest outer voxel edge of a grid without rotation."""
    first, last = geometry.positions_lps(np.array([[-0.5] * 3, np.array(geometry.shape) - 0.5]))
    return first, last


def centroid_mm(mask: np.ndarray, geometry: VolumeGeometry) -> np.ndarray:
    return geometry.positions_lps(np.argwhere(mask)).mean(axis=0)


SCAN = VolumeGeometry.from_spacing((37, 50, 61), (2.5, 0.7, 0.8), origin_lps=(-20.0, 31.0, -300.0))


def test_resample_fills_the_extent_and_pads_the_smaller_direction_evenly():
    (target,) = target_geometry(SCAN, (8, 32, 32))
    # extents: z 37 * 2.5 = 92.5, y 50 * 0.7 = 35, x 61 * 0.8 = 48.8 mm; x decides in plane
    assert target.shape == (8, 32, 32)
    assert target.spacing_mm == pytest.approx((92.5 / 8, 48.8 / 32, 48.8 / 32))
    (x0, y0, z0), (x1, y1, z1) = outer_edges_mm(target)
    (sx0, sy0, sz0), (sx1, sy1, sz1) = outer_edges_mm(SCAN)
    assert (x0, x1, z0, z1) == pytest.approx((sx0, sx1, sz0, sz1))
    assert (sy0 - y0, y1 - sy1) == pytest.approx(((48.8 - 35) / 2,) * 2)


def test_crop_keeps_spacing_and_centre():
    (target,) = target_geometry(SCAN, (5, 6, 7), "crop", spacing_mm=(3.0, 1.5, 1.25))
    assert target.spacing_mm == pytest.approx((3.0, 1.5, 1.25))
    assert np.mean(outer_edges_mm(target), axis=0) == pytest.approx(np.mean(outer_edges_mm(SCAN), axis=0))


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_windows_cover_the_scan_from_edge_to_edge(overlap):
    windows = target_geometry(SCAN, (10, 16, 16), "windows", spacing_mm=(2.0, 2.0, 2.0), overlap=overlap)
    lower = [outer_edges_mm(window)[0][2] for window in windows]
    upper = [outer_edges_mm(window)[1][2] for window in windows]
    assert (lower[0], upper[-1]) == pytest.approx((outer_edges_mm(SCAN)[0][2], outer_edges_mm(SCAN)[1][2]))
    shared = np.array(upper[:-1]) - lower[1:]
    assert (shared >= overlap * 20.0 - 1e-9).all()
    # One window fewer would have to leave more than the allowed step between neighbours.
    assert (92.5 - 20.0) / max(len(windows) - 2, 1e-9) > 20.0 * (1 - overlap)


def test_a_scan_shorter_than_one_window_gets_one_centred_window():
    (window,) = target_geometry(SCAN, (64, 16, 16), "windows", spacing_mm=(2.0, 2.0, 2.0))
    assert np.mean(outer_edges_mm(window), axis=0) == pytest.approx(np.mean(outer_edges_mm(SCAN), axis=0))


def test_as_many_windows_as_fit_exactly_are_not_one_too_many():
    geometry = VolumeGeometry.from_spacing((30, 8, 8), (0.1, 1.0, 1.0))
    assert len(target_geometry(geometry, (10, 8, 8), "windows", spacing_mm=(0.1, 1.0, 1.0), overlap=0.0)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 32), "resample"), "spatial_size"),
        (((8, 32, 0), "resample"), "spatial_size"),
        (((8, 32, 32), "squeeze"), "'squeeze'"),
        (((8, 32, 32), "resample", (1, 1, 1)), "derives its spacing"),
        (((8, 32, 32), "crop"), "needs spacing_mm"),
        (((8, 32, 32), "crop", (1, 1, -1)), "three positive"),
        (((8, 32, 32), "windows", (1, 1, 1), 1.0), "overlap"),
    ],
)
def test_impossible_policies_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        target_geometry(SCAN, *arguments)


def test_overlap_weights_by_hand():
    # target voxels [0.5, 2.0) and [2.0, 3.5) over source voxels [0,1) [1,2) [2,3): the last is covered to two thirds
    np.testing.assert_allclose(overlap_weights(3, 2, 0.5, 1.5), [[1 / 3, 2 / 3, 0], [0, 0, 2 / 3]])


def test_averaging_by_a_whole_factor_is_the_block_mean():
    array = np.random.default_rng(3).integers(-1000, 1000, (8, 6, 9)).astype(np.int16)
    geometry = VolumeGeometry((8, 6, 9), np.diag([1.0, 1.0, 1.0, 1.0]))
    (target,) = target_geometry(geometry, (4, 2, 3), "crop", spacing_mm=(2.0, 3.0, 3.0))
    blocks = array.reshape(4, 2, 2, 3, 3, 3).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(resample_volume(array, geometry, target), blocks, atol=1e-3)


@pytest.mark.parametrize("antialias", [True, False])
def test_the_scans_own_grid_gives_the_scan(antialias):
    geometry = VolumeGeometry((5, 6, 7), OBLIQUE)
    for dtype in (np.int16, np.float32):
        array = np.random.default_rng(4).integers(-1000, 1000, (5, 6, 7)).astype(dtype)
        out = resample_volume(array, geometry, geometry, antialias=antialias)
        assert out.dtype == np.float32 and not np.shares_memory(out, array)
        np.testing.assert_allclose(out, array, atol=1e-2)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(5, 12, 12), (29, 17, 23), (90, 80, 80)])
def test_a_field_linear_in_position_stays_the_same_field(size, antialias):
    geometry = VolumeGeometry((37, 50, 61), OBLIQUE)
    indices = np.indices(geometry.shape).reshape(3, -1).T
    slope = np.array([2.0, -3.0, 1.5])
    field = (geometry.positions_lps(indices) @ slope).reshape(geometry.shape).astype(np.float32)
    (target,) = target_geometry(
        geometry, size, "crop", spacing_mm=[0.6 * e / n for e, n in zip(geometry.extent_mm, size, strict=True)]
    )
    expected = (target.positions_lps(np.indices(size).reshape(3, -1).T) @ slope).reshape(size)
    out = resample_volume(field, geometry, target, antialias=antialias)
    # An average over whole source voxels is centred to within half of one; interpolation is exact.
    tolerance = 0.5 * np.abs(slope).sum() * max(geometry.spacing_mm) / 2 if antialias else 1e-2
    assert np.abs(out - expected).max() < tolerance
    assert np.abs((out - expected).mean()) < 1e-2


def test_outside_the_scan_is_fill():
    array = np.full((4, 4, 4), 100, dtype=np.int16)
    geometry = VolumeGeometry((4, 4, 4), np.eye(4))
    for spacing in ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)):
        (target,) = target_geometry(geometry, (8, 8, 8), "crop", spacing_mm=spacing)
        out = resample_volume(array, geometry, target)
        assert sorted(np.unique(out)) == [-1024.0, 100.0]
        assert (out == 100).sum() == 64 / np.prod(spacing)


def test_interpolated_values_are_not_cut_off_towards_zero():
    array = np.array([-1, 0], dtype=np.int16).repeat(4).reshape(2, 2, 2)
    geometry = VolumeGeometry((2, 2, 2), np.eye(4))
    (target,) = target_geometry(geometry, (1, 2, 2), "crop", spacing_mm=(1.0, 1.0, 1.0))
    np.testing.assert_allclose(resample_volume(array, geometry, target, antialias=False), -0.5)


def test_a_small_nodule_between_the_new_slices_is_seen_only_with_antialiasing():
    geometry = VolumeGeometry.from_spacing((60, 16, 16), (1.0, 1.0, 1.0))
    (target,) = target_geometry(geometry, (12, 16, 16))
    array = np.full(geometry.shape, -850, dtype=np.int16)
    array[29:31, 7:10, 7:10] = 0  # new slices are centred on old slices 27 and 32
    assert resample_volume(array, geometry, target, antialias=False).max() == -850
    assert resample_volume(array, geometry, target, antialias=True).max() == pytest.approx(-850 + 850 / 5, abs=1)


def test_antialiasing_needs_parallel_axes():
    array = np.zeros((3, 4, 5), dtype=np.int16)
    rotated = VolumeGeometry((3, 4, 5), OBLIQUE)
    with pytest.raises(ValueError, match="axes point elsewhere"):
        resample_volume(array, VolumeGeometry((3, 4, 5), np.eye(4)), rotated)
    with pytest.raises(ValueError, match="'cubic'"):
        resample_volume(array, rotated, rotated, order="cubic")
    with pytest.raises(ValueError, match="its grid has"):
        resample_volume(array[1:], rotated, rotated)


def test_labels_stay_labels():
    labels = np.random.default_rng(5).choice([0, 3, 17], (6, 7, 8)).astype(np.uint8)
    geometry = VolumeGeometry((6, 7, 8), OBLIQUE)
    (target,) = target_geometry(geometry, (5, 9, 11))
    out = resample_mask(labels, geometry, target)
    assert out.dtype == np.uint8 and set(np.unique(out)) <= {0, 3, 17}
    assert np.array_equal(resample_mask(labels, geometry, geometry), labels)


def test_a_binary_mask_keeps_its_volume_and_place():
    geometry = VolumeGeometry.from_spacing((40, 60, 60), (1.0, 1.0, 1.0))
    z, y, x = np.indices(geometry.shape)
    ball = ((z - 18) ** 2 + (y - 33) ** 2 + (x - 25) ** 2) <= 12**2
    for size in ((10, 30, 30), (64, 90, 90)):
        (target,) = target_geometry(geometry, size)
        out = resample_binary_mask(ball, geometry, target)
        assert np.linalg.norm(centroid_mm(out, target) - (25, 33, 18)) < 0.05 * max(target.spacing_mm[0], 1.0)
        assert out.sum() * np.prod(target.spacing_mm) == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.03)


def test_a_lesion_below_half_a_voxel_keeps_its_core_only_if_asked():
    geometry = VolumeGeometry.from_spacing((50, 20, 20), (1.0, 1.0, 1.0))
    (target,) = target_geometry(geometry, (10, 20, 20))
    mask = np.zeros(geometry.shape, dtype=np.uint8)
    mask[21:23, 5:8, 5:8] = 1  # 2 of the 5 slices of new slice 4
    mask[35:45, 10:16, 10:16] = 1  # new slices 7 and 8, whole
    kept = resample_binary_mask(mask, geometry, target)
    assert np.array_equal(np.argwhere(kept[:6])[:, 0], [4] * 9) and kept[4, 5:8, 5:8].all()
    assert kept[7:9, 10:16, 10:16].all() and kept.sum() == 9 + 72
    assert resample_binary_mask(mask, geometry, target, keep_small=False).sum() == 72


def test_masks_of_other_values_are_refused():
    geometry = VolumeGeometry((2, 2, 2), np.eye(4))
    with pytest.raises(ValueError, match="from 0 to 2"):
        resample_binary_mask(np.arange(8).reshape(2, 2, 2) % 3, geometry, geometry)
    with pytest.raises(ValueError, match="float32"):
        resample_mask(np.zeros((2, 2, 2), dtype=np.float32), geometry, geometry)
    assert resample_binary_mask(np.zeros((2, 2, 2), dtype=bool), geometry, geometry).sum() == 0


def asymmetric_mask(shape: tuple[int, int, int]) -> np.ndarray:
    """A box off the centre with an arm on one side: no flip or permutation leaves it in place."""
    d, h, w = shape
    mask = np.zeros(shape, dtype=np.uint8)
    mask[d // 4 : d // 2, h // 3 : h // 3 + h // 4, w // 2 : w - w // 8] = 1
    mask[d // 2 : d - 2, h // 3 : h // 3 + 2, w // 2 : w // 2 + 2] = 1
    return mask


def check_round_trip(source: VolumeGeometry, size: tuple[int, int, int], mask: np.ndarray | None = None) -> None:
    (prepared,) = target_geometry(source.canonical(), size)
    mask = asymmetric_mask(size) if mask is None else mask
    # Only what lies on the scan can come back; padding beside it cannot.
    drawn = resample_mask(np.ones(source.canonical().shape, np.uint8), source.canonical(), prepared) * mask
    restored = restore_mask(drawn, prepared, source)
    assert restored.shape == source.shape and restored.dtype == np.uint8 and restored.flags.c_contiguous
    offset = centroid_mm(drawn, prepared) - centroid_mm(restored, source)
    coarser_mm = np.maximum(prepared.spacing_mm, source.canonical().spacing_mm)[::-1]
    assert (np.abs(prepared.directions.T @ offset) <= 0.5 * coarser_mm).all(), f"{offset} mm at {coarser_mm} mm"
    volumes_mm3 = [m.sum() * np.prod(g.spacing_mm) for m, g in ((drawn, prepared), (restored, source))]
    assert volumes_mm3[1] == pytest.approx(volumes_mm3[0], rel=0.25)


@pytest.mark.parametrize("codes", ALL_48_ORIENTATIONS)
def test_a_mask_goes_back_whatever_the_orientation(codes):
    spacing = [{"R": 0.9, "L": 0.9, "A": 0.8, "P": 0.8}.get(code, 2.5) for code in codes]
    lengths = [{"R": 44, "L": 44, "A": 50, "P": 50}.get(code, 31) for code in codes]
    check_round_trip(oriented_geometry(codes, tuple(lengths), tuple(spacing)), (16, 32, 32))


@pytest.mark.parametrize("size", [(9, 20, 20), (16, 32, 32), (48, 64, 64)])
def test_a_mask_goes_back_onto_an_oblique_scan(size):
    check_round_trip(VolumeGeometry((31, 50, 44), OBLIQUE), size)
    check_round_trip(VolumeGeometry((31, 50, 44), OBLIQUE @ np.diag([-1.0, 1.0, -1.0, 1.0])), size)


def test_a_sphere_goes_back_within_half_a_voxel():
    source = oriented_geometry("RAS", (60, 55, 40), (0.9, 0.8, 2.5))
    size = (24, 48, 48)
    z, y, x = np.indices(size)
    check_round_trip(source, size, ((z - 9) ** 2 * 4 + (y - 30) ** 2 + (x - 19) ** 2 <= 10**2).astype(np.uint8))


def test_a_label_map_goes_back_with_its_labels():
    source = oriented_geometry("PIR", (20, 24, 28), (1.0, 1.1, 1.2))
    (prepared,) = target_geometry(source.canonical(), (16, 16, 16))
    labels = (np.arange(16)[:, None, None] // 4 + np.zeros((16, 16, 16))).astype(np.uint8) + 1
    restored = restore_mask(labels, prepared, source, labels=True)
    heights = source.positions_lps(np.argwhere(restored == 4))[:, 2]
    assert set(np.unique(restored)) == {1, 2, 3, 4}
    assert heights.min() > source.positions_lps(np.argwhere(restored == 1))[:, 2].max()


def blurred_spots(shape, seed=3):
    """Probabilities with a background below the floor, two spots, one of them at the border, and a single voxel."""
    generator = np.random.default_rng(seed)
    probabilities = generator.uniform(0, 0.019, shape)
    for centre, width in (((0.0, shape[1] * 0.4, shape[2] - 1.0), 2.5), ((shape[0] * 0.6, shape[1] * 0.6, 9.0), 1.5)):
        squares = sum((n - c) ** 2 for n, c in zip(np.indices(shape), centre, strict=True))
        probabilities = np.maximum(probabilities, 0.95 * np.exp(-squares / (2 * width**2)))
    probabilities[shape[0] // 2, 5, 5] = 1.0
    return probabilities


def fully_restored(probabilities, prepared, source, antialias):
    """Restore without looking for lesions first."""
    values = resample_volume(
        probabilities.astype(np.float32), prepared, source.canonical(), fill=0.0, antialias=antialias
    )
    return source.from_canonical(values)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAR", "PIL"])
@pytest.mark.parametrize("size", [(7, 20, 22), (16, 32, 32), (60, 90, 80)], ids=["coarse", "like", "fine"])
def test_restored_probabilities_are_those_of_the_whole_computation(codes, size):
    spacing = [{"R": 0.9, "L": 0.9, "A": 0.8, "P": 0.8}.get(code, 2.5) for code in codes]
    lengths = [{"R": 44, "L": 44, "A": 50, "P": 50}.get(code, 31) for code in codes]
    source = oriented_geometry(codes, tuple(lengths), tuple(spacing))
    (prepared,) = target_geometry(source.canonical(), size)
    probabilities = blurred_spots(size)
    restored = restore_probabilities(probabilities, prepared, source)
    whole = fully_restored(probabilities, prepared, source, antialias=True)
    assert restored.shape == source.shape and restored.dtype == np.float32 and restored.flags.c_contiguous
    above = whole > 0.02
    assert 10 < above.sum() < 0.5 * above.size
    np.testing.assert_allclose(restored[above], whole[above], atol=2e-6)
    assert restored[~above].max() <= 0.02 + 1e-6 and (restored == 0).any()


def test_restored_probabilities_on_axes_that_are_not_parallel():
    source = VolumeGeometry((31, 50, 44), OBLIQUE)
    corners = source.positions_lps(np.array([[0, 0, 0], [30, 49, 43]]))
    prepared = VolumeGeometry.from_spacing((30, 40, 40), (3.0, 2.0, 2.0), tuple(corners.min(axis=0) - 5.0))
    probabilities = blurred_spots(prepared.shape)
    restored = restore_probabilities(probabilities, prepared, source)
    whole = fully_restored(probabilities, prepared, source, antialias=False)
    above = whole > 0.02
    assert above.sum() > 10
    np.testing.assert_allclose(restored[above], whole[above], atol=2e-6)


@pytest.mark.parametrize("size", [(9, 20, 20), (16, 32, 32), (48, 96, 96)])
def test_a_mask_as_probabilities_goes_back_as_the_mask(size):
    source = oriented_geometry("RAS", (60, 55, 40), (0.9, 0.8, 2.5))
    (prepared,) = target_geometry(source.canonical(), size)
    mask = (blurred_spots(size) > 0.3).astype(np.uint8)
    as_mask = restore_mask(mask, prepared, source).astype(bool)
    as_probabilities = restore_probabilities(mask.astype(np.float32), prepared, source) >= 0.5
    # The mask keeps small parts that reach one half nowhere, and its half is one step of 20 000 lower.
    assert (as_mask ^ as_probabilities).sum() <= 0.02 * as_mask.sum()


def test_probabilities_beyond_the_scan_or_of_nothing_are_zero():
    source = VolumeGeometry.from_spacing((5, 6, 7), (1.0, 1.0, 1.0))
    far = VolumeGeometry.from_spacing((5, 6, 7), (1.0, 1.0, 1.0), (100.0, 0.0, 0.0))
    assert not restore_probabilities(np.ones(far.shape, np.float32), far, source).any()
    assert not restore_probabilities(np.full(source.shape, 0.01), source, source).any()
    np.testing.assert_array_equal(restore_probabilities(np.ones(source.shape, np.float16), source, source), 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((5, 6, 7), np.uint8), "got uint8; a mask is for restore_mask"),
        (np.full((5, 6, 7), np.nan), "values from nan to nan"),
        (np.linspace(-2, 3, 210).reshape(5, 6, 7), "values from -2 to 3; apply the sigmoid"),
        (np.ones((5, 6, 8)), r"shape \(5, 6, 8\), but its grid has \(5, 6, 7\)"),
    ],
)
def test_what_is_no_probability_map_is_refused(values, message):
    geometry = VolumeGeometry.from_spacing((5, 6, 7), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=message):
        restore_probabilities(values, geometry, geometry)


def test_the_written_mask_has_the_scans_affine_and_the_same_bytes_twice(tmp_path):
    affine = oriented_geometry("LAS").affine_ras.astype(np.float32).astype(np.float64)
    scan = nib.Nifti1Image(np.zeros((5, 7, 11), np.int16), affine)
    nib.save(scan, tmp_path / "scan.nii.gz")
    geometry = VolumeGeometry.from_ras((11, 7, 5), nib.load(tmp_path / "scan.nii.gz").affine)
    mask = np.zeros((11, 7, 5), dtype=bool)
    mask[1, 2, 3] = True
    write_mask_nifti(tmp_path / "a.nii.gz", mask, geometry)
    write_mask_nifti(tmp_path / "b.nii.gz", mask, geometry)
    written = nib.load(tmp_path / "a.nii.gz")
    assert np.array_equal(written.affine, scan.affine)
    np.testing.assert_allclose(written.get_qform(), scan.affine, atol=1e-5)
    assert written.get_data_dtype() == np.uint8 and np.argwhere(written.dataobj).tolist() == [[3, 2, 1]]
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes())[344:347] == b"n+1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz", "scan.nii.gz"]


def test_masks_that_cannot_be_written_are_refused(tmp_path):
    geometry = VolumeGeometry((2, 2, 2), np.eye(4))
    with pytest.raises(ValueError, match=r"\.nii\.gz"):
        write_mask_nifti(tmp_path / "mask.nii", np.zeros((2, 2, 2), np.uint8), geometry)
    with pytest.raises(ValueError, match="float32"):
        write_mask_nifti(tmp_path / "mask.nii.gz", np.zeros((2, 2, 2), np.float32), geometry)
    with pytest.raises(ValueError, match="its grid has"):
        write_mask_nifti(tmp_path / "mask.nii.gz", np.zeros((2, 2, 3), np.uint8), geometry)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real sample scans (../shared/data) are not on this machine")
@pytest.mark.parametrize(
    ("scan_name", "mask_name", "label"),
    [
        ("ct_chest/nsclc_LUNG1-001/ct.nii.gz", "ct_chest/nsclc_LUNG1-001/seg.nii.gz", 4),
        ("ct_chest/ibsi_pat1/phantom.nii.gz", "ct_chest/ibsi_pat1/mask.nii.gz", 1),
        ("ct_organs_totalsegmentator/example_ct_sm.nii.gz", "ct_organs_totalsegmentator/example_seg.nii.gz", 5),
    ],
)
def test_a_real_lesion_goes_to_the_prepared_grid_and_back(tmp_path, scan_name, mask_name, label):
    scan = read_scan(SHARED_DATA / scan_name)
    labels, geometry = read_mask(SHARED_DATA / mask_name)
    assert geometry.is_close(scan.geometry)
    (prepared,) = target_geometry(scan.geometry, (64, 256, 256))
    drawn = resample_binary_mask(labels == label, scan.geometry, prepared)
    write_mask_nifti(tmp_path / "m.nii.gz", restore_mask(drawn, prepared, scan.source_geometry), scan.source_geometry)
    original, written = nib.load(SHARED_DATA / mask_name), nib.load(tmp_path / "m.nii.gz")
    assert np.array_equal(written.affine, nib.load(SHARED_DATA / scan_name).affine)
    before, after = np.asarray(original.dataobj) == label, np.asarray(written.dataobj) == 1
    assert 2 * (before & after).sum() / (before.sum() + after.sum()) > 0.95
    offset_vox = np.argwhere(before).mean(axis=0) - np.argwhere(after).mean(axis=0)
    # Slices of 4.5 mm cannot follow an outline that jumps from one 3 mm slice to the next, hence not closer.
    assert np.abs(offset_vox).max() < 0.5
