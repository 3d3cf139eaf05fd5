import numpy as np
import pytest
from scipy import ndimage

from tests.metrics.random_masks import balls, blank, box_mask
from vlm3d_ext.data.connected_components import foreground_box, without_faint_lesions
from vlm3d_ext.metrics.lesion_components import label_lesions, lesions_of, size_bin


def test_lesions_that_share_a_corner_are_one():
    mask = blank()
    mask[1, 1, 1] = mask[2, 2, 2] = mask[3, 1, 3] = mask[6, 6, 6] = True
    labels, count = label_lesions(mask)
    assert count == 2 and labels.dtype == np.int32 and labels.shape == mask.shape
    assert labels[1, 1, 1] == labels[2, 2, 2] == labels[3, 1, 3] == 1 and labels[6, 6, 6] == 2
    assert np.array_equal(labels > 0, mask)


@pytest.mark.parametrize("seed", range(5))
def test_box_by_box_is_as_on_the_whole_volume(seed):
    mask = balls((11, 21, 26), 6, seed, (0.5, 3))
    labels, count = label_lesions(mask)
    expected, num = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    assert count == num and np.array_equal(labels, expected)
    for lesion in lesions_of(mask):
        inside = expected == lesion.label
        assert lesion.num_voxels == inside.sum()
        assert lesion.centroid_vox == pytest.approx(np.argwhere(inside).mean(axis=0))
        assert lesion.slices == ndimage.find_objects(inside.astype(int))[0] == foreground_box(inside)
    assert len(lesions_of(mask)) == num


def test_an_empty_mask_has_no_lesion():
    labels, count = label_lesions(blank())
    assert count == 0 and not labels.any() and lesions_of(blank()) == [] and foreground_box(blank()) is None


def test_a_flat_lesion():
    (lesion,) = lesions_of(box_mask(((8, 9), (0, 2), (10, 13))))
    assert (lesion.label, lesion.num_voxels, lesion.centroid_vox) == (1, 6, (8.0, 0.5, 11.0))
    assert lesion.slices == (slice(8, 9), slice(0, 2), slice(10, 13))


def test_a_mask_must_be_a_volume():
    with pytest.raises(ValueError, match=r"must be \(D, H, W\), got shape \(3, 4\)"):
        label_lesions(np.zeros((3, 4), dtype=bool))


@pytest.mark.parametrize(
    ("voxels", "name"),
    [(1, "small"), (9, "small"), (10, "medium"), (1000, "medium"), (1001, "large"), (10**8, "large")],
)
def test_size_bins(voxels, name):
    assert size_bin(voxels) == name


def test_a_lesion_without_voxels_has_no_bin():
    with pytest.raises(ValueError, match="at least 1 voxel, got 0"):
        size_bin(0)


def test_faint_lesions_fall_below_the_threshold_and_nothing_else_changes():
    """Two lesions, one of them up to 0.7; a touching corner belongs to its lesion; below the threshold all stays."""
    probabilities = np.zeros((3, 6, 7), dtype=np.float32)
    probabilities[0, 0, :2] = (0.4, 0.9)
    probabilities[1, 1, 2] = 0.3  # touches the first by a corner
    probabilities[2, 4, 4:6] = (0.7, 0.3)
    probabilities[2, 5, 0] = 0.2
    before = probabilities.copy()
    kept = without_faint_lesions(probabilities, 0.3, 0.8)
    expected = before.copy()
    expected[2, 4, 4:6] = 0.15
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(probabilities, before)
    # reaching it is enough; not above the threshold it has no say
    np.testing.assert_array_equal(without_faint_lesions(probabilities, 0.3, 0.7), before)
    np.testing.assert_array_equal(without_faint_lesions(probabilities, 0.3, 0.1), before)
    np.testing.assert_array_equal(without_faint_lesions(np.zeros((2, 3, 4)), 0.3, 0.8), np.zeros((2, 3, 4)))
