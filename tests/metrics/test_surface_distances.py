import time
import warnings

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from tests.metrics.random_masks import balls, blank, box_mask
from vlm3d_ext.metrics.surface_distances import hausdorff_distance_95, normalised_surface_dice, surface_distances

SPACING = (3.0, 0.7, 0.9)


def by_distance_transform(prediction, truth, spacing):
    """Distances between surfaces by SciPy alone, on the whole volume."""
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (prediction, truth)]
    to_truth, to_prediction = (ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges[::-1])
    return to_truth[edges[0]], to_prediction[edges[1]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
def test_equals_scipys_distance_transform_and_monai_on_the_whole_volume(seed, spacing):
    # Balls may be cut by the volume's edge, in one of the masks or in both.
    prediction, truth = balls((12, 23, 19), 3, seed, (2, 5)), balls((12, 23, 19), 2, seed + 100, (2, 5))
    distances = by_distance_transform(prediction, truth, spacing)
    expected = max(np.percentile(part, 95) for part in distances)
    assert hausdorff_distance_95(prediction, truth, spacing) == pytest.approx(expected, rel=1e-5)
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth)]
    monai = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=list(spacing))
    assert hausdorff_distance_95(prediction, truth, spacing) == pytest.approx(float(monai), rel=1e-5)
    for tolerance in (0.5, 2.0, 3.5):
        ours = normalised_surface_dice(prediction, truth, spacing, tolerance)
        within = [(part <= tolerance).sum() for part in distances]
        assert ours == pytest.approx(sum(within) / sum(map(len, distances)), abs=1e-9)
        monai = compute_surface_dice(*tensors, [tolerance], include_background=True, spacing=list(spacing))
        assert ours == pytest.approx(float(monai), abs=1e-6)


def test_single_voxels_are_as_far_apart_as_their_centres():
    prediction, truth = box_mask(((2, 3), (5, 6), (7, 8))), box_mask(((4, 5), (5, 6), (3, 4)))
    distance = np.hypot(2 * 3.0, 4 * 0.9)
    assert hausdorff_distance_95(prediction, truth, SPACING) == pytest.approx(distance)
    assert normalised_surface_dice(prediction, truth, SPACING, distance - 0.01) == 0.0
    assert normalised_surface_dice(prediction, truth, SPACING, distance + 0.01) == 1.0


def test_a_lesion_of_one_slice_moved_by_one_slice():
    prediction, truth = box_mask(((3, 4), (2, 8), (3, 9))), box_mask(((4, 5), (2, 8), (3, 9)))
    assert hausdorff_distance_95(prediction, truth, SPACING) == pytest.approx(3.0)
    assert normalised_surface_dice(prediction, truth, SPACING) == 0.0
    assert normalised_surface_dice(prediction, truth, SPACING, tolerance_mm=3.0) == 1.0


def test_identical_masks_and_empty_ones():
    mask = box_mask(((0, 5), (3, 9), (2, 7)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an empty mask is no reason for a warning
        assert hausdorff_distance_95(mask, mask, SPACING) == 0.0
        assert normalised_surface_dice(mask, mask, SPACING, tolerance_mm=0.0) == 1.0
        for pair in ((mask, blank()), (blank(), mask)):
            assert np.isnan(hausdorff_distance_95(*pair, SPACING))
            assert normalised_surface_dice(*pair, SPACING) == 0.0
        assert np.isnan(hausdorff_distance_95(blank(), blank(), SPACING))
        assert np.isnan(normalised_surface_dice(blank(), blank(), SPACING))
    surface = 5 * 6 * 5 - 3 * 4 * 3  # without the voxels that have all six neighbours
    alone = surface_distances(mask, blank(), SPACING)
    assert alone.from_prediction.shape == (surface,) and np.isinf(alone.from_prediction).all()
    assert alone.from_truth.shape == (0,)


def test_a_small_lesion_in_a_large_volume_takes_no_longer_than_its_box():
    shape = (150, 384, 384)
    prediction, truth = blank(shape), blank(shape)
    prediction[70:80, 200:220, 100:120] = truth[72:82, 200:220, 100:120] = True
    start = time.process_time()
    assert hausdorff_distance_95(prediction, truth, (1.5, 1.0, 1.0)) == pytest.approx(3.0)
    assert time.process_time() - start < 2.0  # of the whole volume, distance transforms alone take ten times as long


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, np.nan, 1.0)])
def test_bad_spacing_and_tolerance_are_refused(spacing):
    with pytest.raises(ValueError, match="must be three positive numbers"):
        hausdorff_distance_95(blank(), blank(), spacing)
    with pytest.raises(ValueError, match=r"tolerance_mm must be a number of mm, 0 or more, got -1"):
        normalised_surface_dice(blank(), blank(), SPACING, -1)
