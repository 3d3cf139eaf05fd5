import numpy as np
import pytest
import torch
from monai.metrics import compute_dice

from tests.metrics.random_masks import balls, blank, box_mask
from vlm3d_ext.metrics.mask_overlap import dice_score


def test_a_hand_computed_score():
    prediction = box_mask(((0, 2), (0, 2), (0, 2)))  # 8 voxels
    truth = box_mask(((1, 3), (0, 2), (0, 3)))  # 12 voxels, 4 of them shared
    assert dice_score(prediction, truth) == dice_score(truth, prediction) == 2 * 4 / 20


def test_limits():
    mask = box_mask(((4, 5), (3, 6), (2, 3)))
    assert dice_score(mask, mask) == 1.0
    assert dice_score(mask, blank()) == dice_score(blank(), mask) == 0.0
    assert np.isnan(dice_score(blank(), blank()))


@pytest.mark.parametrize("seed", range(4))
def test_equals_monai(seed):
    prediction, truth = balls((9, 14, 17), 4, seed, (2, 5)), balls((9, 14, 17), 3, seed + 50, (2, 5))
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth)]
    assert dice_score(prediction, truth) == pytest.approx(float(compute_dice(*tensors)), abs=1e-7)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(
        TypeError, match=r"the prediction must be a bool mask, got float64; compare it with a threshold"
    ):
        dice_score(np.zeros((2, 3, 4)), np.zeros((2, 3, 4), dtype=bool))
    with pytest.raises(ValueError, match=r"got shapes \(2, 3, 4\) and \(2, 3, 5\)"):
        dice_score(blank((2, 3, 4)), blank((2, 3, 5)))
    with pytest.raises(ValueError, match=r"must be \(D, H, W\)"):
        dice_score(np.zeros((3, 4), dtype=bool), np.zeros((3, 4), dtype=bool))
