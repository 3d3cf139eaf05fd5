import numpy as np
import pytest

from vlm3d_ext.metrics.lesion_components import label_lesions
from vlm3d_ext.metrics.lesion_dice import dice_by_lesion
from vlm3d_ext.metrics.mask_overlap import dice_score

SHAPE = (5, 9, 17)


def mask_of(*boxes):
    mask = np.zeros(SHAPE, dtype=bool)
    for box in boxes:
        mask[box] = True
    return mask


A = np.s_[1:3, 2:6, 2:5]  # 24 voxels
B = np.s_[1:3, 2:6, 10:13]  # 24 voxels


def test_one_lesion_and_one_component_give_their_dice():
    truth, prediction = mask_of(A), mask_of(np.s_[2:4, 2:6, 2:5])
    assert dice_by_lesion(prediction, truth) == (dice_score(prediction, truth),) == (0.5,)


def test_each_lesion_has_its_own_prediction():
    prediction = mask_of(A, np.s_[1:3, 2:6, 10:11], np.s_[4:5, 8:9, 16:17])
    # Of the second lesion 8 of 24 voxels are drawn: 2 * 8 / 32; what lies far away is nobody's.
    assert dice_by_lesion(prediction, mask_of(A, B)) == (1.0, 0.5)


def test_a_component_over_two_lesions_is_divided_in_the_middle():
    truth, bridged = mask_of(A, B), mask_of(np.s_[1:3, 2:6, 2:13])
    # Columns 5, 6 are nearer to the first, 8, 9 to the second; column 7 is as near to both and goes to one of them.
    first, second = dice_by_lesion(bridged, truth)
    assert sorted([first, second]) == pytest.approx(sorted([2 * 24 / (24 + 40), 2 * 24 / (24 + 48)]))


def test_the_nearest_is_meant_in_millimetres():
    truth = mask_of(np.s_[1, 4, 4], np.s_[1, 4, 10], np.s_[4, 4, 8])
    prediction = mask_of(np.s_[1, 4, 4:11], np.s_[2:5, 4, 8])
    # Thin slices: columns 4 to 6 are the first's, 9 and 10 the second's, 7, 8 and the rod below the third's.
    assert dice_by_lesion(prediction, truth, (0.1, 1.0, 1.0)) == pytest.approx((2 / 4, 2 / 3, 2 / 6))
    # Thick ones: the third keeps its own voxel and the one above it.
    assert dice_by_lesion(prediction, truth, (9.0, 1.0, 1.0))[2] == pytest.approx(2 / 3)


def test_a_missed_lesion_has_zero_and_no_lesion_has_nothing():
    empty = mask_of()
    assert dice_by_lesion(empty, mask_of(A, B)) == (0.0, 0.0)
    assert dice_by_lesion(mask_of(A), empty) == () == dice_by_lesion(empty, empty)
    with pytest.raises(ValueError, match="one grid"):
        dice_by_lesion(empty, empty[1:])


def test_many_lesions_are_perfect_with_themselves_and_bounded_by_what_is_hit():
    generator = np.random.default_rng(0)
    truth = generator.random((12, 20, 22)) > 0.97
    count = label_lesions(truth)[1]
    assert count > 30 and dice_by_lesion(truth, truth) == (1.0,) * count
    prediction = truth ^ (generator.random(truth.shape) > 0.99)
    values = dice_by_lesion(prediction, truth)
    sizes = np.bincount(label_lesions(truth)[0][truth])[1:]
    assert len(values) == count and all(0 <= value <= 1 for value in values)
    # What is predicted of a lesion holds at least what hits it.
    hits = np.bincount(label_lesions(truth)[0][truth & prediction], minlength=count + 1)[1:]
    assert (np.array(values) <= 2 * hits / (sizes + hits) + 1e-12).all()
