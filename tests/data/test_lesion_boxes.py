from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from vlm3d_ext.data.lesion_boxes import boxes_of_mask, volume_box_mm
from vlm3d_ext.data.scan_reader import read_mask
from vlm3d_ext.data.volume_geometry import VolumeGeometry

SHAPE = (7, 9, 11)
TUMOUR = Path(__file__).parents[3] / "shared/data/ct_chest/ibsi_pat1/mask.nii.gz"


def oblique_geometry(seed, shape=SHAPE):
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * generator.uniform(0.5, 3, 3)
    affine[:3, 3] = generator.uniform(-200, 200, 3)
    return VolumeGeometry(shape, affine)


def block(*slices):
    mask = np.zeros(SHAPE, dtype=bool)
    mask[slices] = True
    return mask


def test_a_single_voxel_has_the_size_of_its_spacing():
    geometry = VolumeGeometry.from_spacing(SHAPE, (3.0, 0.7, 0.5), (10.0, -20.0, 100.0))
    (entry,) = boxes_of_mask(block(2, 3, 4), geometry)
    assert entry["bbox_mm"] == pytest.approx([10 + 3.5 * 0.5, -20 + 2.5 * 0.7, 100 + 1.5 * 3, 0.5, 0.7, 3.0])
    assert entry["centroid_mm"] == pytest.approx([12, -17.9, 106])
    assert (entry["probability"], entry["num_voxels"]) == (1.0, 1)
    assert entry["volume_ml"] == pytest.approx(3 * 0.7 * 0.5 / 1000)


@pytest.mark.parametrize("seed", range(4))
def test_storage_order_does_not_move_a_box(seed):
    """The same voxels, stored along other axes, have the same boxes in the patient."""
    generator = np.random.default_rng(seed)
    mask = generator.random(SHAPE) < 0.03
    codes = generator.permutation(3), generator.choice([-1, 1], 3)
    affine = np.zeros((4, 4))
    affine[codes[0], range(3)] = codes[1] * np.array([0.8, 0.9, 2.5])
    affine[:, 3] = [5, -7, 30, 1]
    stored = VolumeGeometry(SHAPE, affine)
    canonical = stored.canonical()
    ours = boxes_of_mask(mask, stored)
    theirs = boxes_of_mask(np.ascontiguousarray(stored.to_canonical(mask)), canonical)
    key = lambda entry: tuple(np.round(entry["bbox_mm"], 6))  # noqa: E731
    for one, other in zip(sorted(ours, key=key), sorted(theirs, key=key), strict=True):
        np.testing.assert_allclose(one["bbox_mm"], other["bbox_mm"], atol=1e-9)
        np.testing.assert_allclose(one["centroid_mm"], other["centroid_mm"], atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_an_oblique_box_holds_every_voxel_and_touches_the_outermost(seed):
    geometry = oblique_geometry(seed)
    mask = block(slice(2, 5), slice(1, 4), slice(3, 9))
    (entry,) = boxes_of_mask(mask, geometry)
    low, size = np.array(entry["bbox_mm"][:3]), np.array(entry["bbox_mm"][3:])
    offsets = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, -1).T
    edges = np.concatenate([geometry.positions_lps(np.argwhere(mask) + offset) for offset in offsets])
    np.testing.assert_allclose(edges.min(axis=0), low)
    np.testing.assert_allclose(edges.max(axis=0), low + size)
    assert entry["volume_ml"] == pytest.approx(3 * 3 * 6 * np.prod(geometry.spacing_mm) / 1000)


def test_simpleitk_agrees_on_where_the_corners_are():
    geometry = oblique_geometry(9)
    image = sitk.GetImageFromArray(block(slice(2, 5), slice(1, 4), slice(3, 9)).astype(np.uint8))
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.affine_lps[:3, 3])
    image.SetDirection(geometry.directions.ravel())
    edges = [(i, j, k) for i in (2.5, 8.5) for j in (0.5, 3.5) for k in (1.5, 4.5)]
    points = np.array([image.TransformContinuousIndexToPhysicalPoint(edge) for edge in edges])
    (entry,) = boxes_of_mask(sitk.GetArrayFromImage(image), geometry)
    np.testing.assert_allclose(entry["bbox_mm"], [*points.min(axis=0), *np.ptp(points, axis=0)], atol=1e-4)


def test_the_most_probable_comes_first_then_the_largest():
    mask = block(0, 0, slice(0, 2)) | block(3, 3, slice(3, 6)) | block(6, 8, 10)
    probabilities = np.full(SHAPE, 0.99, dtype=np.float32)  # what lies outside of the lesions has no say
    probabilities[mask] = 0.25
    probabilities[3, 3, 4] = 0.5
    entries = boxes_of_mask(mask, VolumeGeometry.from_spacing(SHAPE, (1, 1, 1)), probabilities)
    assert [(entry["probability"], entry["num_voxels"]) for entry in entries] == [(0.5, 3), (0.25, 2), (0.25, 1)]
    entries = boxes_of_mask(mask, VolumeGeometry.from_spacing(SHAPE, (1, 1, 1)))
    assert [(entry["probability"], entry["num_voxels"]) for entry in entries] == [(1.0, 3), (1.0, 2), (1.0, 1)]


def test_the_volumes_box_is_that_of_a_full_mask():
    for geometry in (VolumeGeometry.from_spacing(SHAPE, (2, 1, 0.5), (1, 2, 3)), oblique_geometry(3)):
        (entry,) = boxes_of_mask(np.ones(SHAPE, dtype=bool), geometry)
        assert volume_box_mm(geometry) == entry["bbox_mm"]
    assert volume_box_mm(VolumeGeometry.from_spacing(SHAPE, (2, 1, 0.5), (1, 2, 3))) == [0.75, 1.5, 2, 5.5, 9, 14]


def test_an_empty_mask_has_no_box_and_another_grid_is_refused():
    geometry = VolumeGeometry.from_spacing(SHAPE, (1, 1, 1))
    assert boxes_of_mask(np.zeros(SHAPE, dtype=np.uint8), geometry, np.zeros(SHAPE)) == []
    with pytest.raises(
        ValueError, match=r"the mask must be on the geometry's grid \(7, 9, 11\), got shape \(7, 9, 12\)"
    ):
        boxes_of_mask(np.zeros((7, 9, 12), dtype=bool), geometry)
    with pytest.raises(ValueError, match="the probabilities must be on"):
        boxes_of_mask(np.zeros(SHAPE, dtype=bool), geometry, np.zeros((1, 9, 11)))


@pytest.mark.skipif(not TUMOUR.is_file(), reason="the real tumour (../shared/data) is not on this machine")
def test_simpleitk_measures_a_real_tumour_alike():
    mask, geometry = read_mask(TUMOUR)
    (entry,) = boxes_of_mask(mask, geometry)
    image = sitk.ReadImage(str(TUMOUR), sitk.sitkUInt8)
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.Execute(image)
    assert entry["num_voxels"] == statistics.GetNumberOfPixels(1)
    assert entry["volume_ml"] == pytest.approx(statistics.GetPhysicalSize(1) / 1000, rel=1e-5)
    np.testing.assert_allclose(entry["centroid_mm"], statistics.GetCentroid(1), atol=1e-2)
    i, j, k, di, dj, dk = statistics.GetBoundingBox(1)
    ends = [(i - 0.5, j - 0.5, k - 0.5), (i + di - 0.5, j + dj - 0.5, k + dk - 0.5)]
    points = np.array([image.TransformContinuousIndexToPhysicalPoint(end) for end in ends])
    np.testing.assert_allclose(entry["bbox_mm"], [*points.min(axis=0), *np.ptp(points, axis=0)], atol=1e-2)
