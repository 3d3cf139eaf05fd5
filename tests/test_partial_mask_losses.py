"""The loss of masks that are not all known. Sizes are three odd ones; 255 is unknown."""

import math

import pytest
import torch
from monai.losses import DiceLoss
from torch.nn.functional import binary_cross_entropy_with_logits

from vlm3d_ext.data.lesion_cases import UNKNOWN
from vlm3d_ext.losses import PartialDiceCrossEntropy

SIZE = (3, 5, 7)


def make_case(batch=4, diseases=3, seed=0):
    """Random logits; disease 0 is present, 1 absent, 2 partially known; every scan has its own lesions."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, diseases, *SIZE, generator=generator) * 2
    target = (torch.rand(batch, diseases, *SIZE, generator=generator) < 0.2).to(torch.uint8)
    target[:, 1] = 0
    target[:, 2][torch.rand(batch, *SIZE, generator=generator) < 0.6] = UNKNOWN
    assert ((target == 1).flatten(2).any(2) == torch.tensor([True, False, True])).all()
    return logits, target


def gradient(loss, logits, target):
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    value.backward()
    return value.detach(), logits.grad


def test_a_present_disease_by_hand():
    """Four voxels, logit of probability 0.8 on the lesion and on one of three others, 0.5 on the rest.

    Lesion weight (3 / 1) ** 0.5. Dice: overlap 0.8, drawn 2.6, lesion 1, smoothed by 1.
    """
    high = math.log(4)
    logits = torch.tensor([high, high, 0.0, 0.0]).view(1, 1, 4, 1, 1)
    target = torch.tensor([1, 0, 0, 0], dtype=torch.uint8).view(1, 1, 4, 1, 1)
    weight = math.sqrt(3)
    entropy = (weight * -math.log(0.8) - math.log(0.2) - 2 * math.log(0.5)) / (weight + 3)
    dice = 1 - (2 * 0.8 + 1) / (2.6 + 1 + 1)
    loss = PartialDiceCrossEntropy(dice_weight=2.0, absent_weight=7.0, cross_entropy_weight=3.0, balance=0.5)
    assert loss(logits, target).item() == pytest.approx(3 * entropy + 2 * dice, rel=1e-6)
    # A fifth voxel of which nothing is known changes nothing.
    logits = torch.cat([logits, torch.full((1, 1, 1, 1, 1), 9.0)], 2)
    target = torch.cat([target, torch.full((1, 1, 1, 1, 1), UNKNOWN, dtype=torch.uint8)], 2)
    assert loss(logits, target).item() == pytest.approx(3 * entropy + 2 * dice, rel=1e-6)


def test_an_absent_disease_by_hand():
    """Probabilities 0.8, 0.5: squares add up to 0.89; half of the weight is reached at `absent_voxels` of them."""
    logits = torch.tensor([math.log(4), 0.0]).view(1, 1, 2, 1, 1)
    target = torch.zeros(1, 1, 2, 1, 1, dtype=torch.uint8)
    entropy = -(math.log(0.2) + math.log(0.5)) / 2
    for absent_voxels in (0.89, 3.0):
        loss = PartialDiceCrossEntropy(dice_weight=7.0, absent_weight=0.3, absent_voxels=absent_voxels)
        assert loss(logits, target).item() == pytest.approx(entropy + 0.3 * 0.89 / (0.89 + absent_voxels), rel=1e-6)
    drawn = torch.full((1, 1, 100, 1, 1), 30.0)
    only_dice = PartialDiceCrossEntropy(absent_weight=1.0, cross_entropy_weight=0, absent_voxels=100)
    assert only_dice(drawn, torch.zeros_like(drawn, dtype=torch.uint8)).item() == pytest.approx(0.5)


def test_scans_weigh_alike_and_so_do_known_diseases_of_a_scan():
    logits, target = make_case(2)
    target[0, 1:] = UNKNOWN
    loss = PartialDiceCrossEntropy()
    single = [[loss(logits[b : b + 1, d : d + 1], target[b : b + 1, d : d + 1]) for d in range(3)] for b in range(2)]
    expected = (single[0][0] + sum(single[1]) / 3) / 2
    torch.testing.assert_close(loss(logits, target), expected)


@pytest.mark.parametrize("smooth", [1.0, 1e-5])
def test_where_all_is_known_and_present_it_is_monais_dice_and_torchs_entropy(smooth):
    logits, target = make_case()
    logits, target = logits[:, :1], target[:, :1]
    reference = DiceLoss(sigmoid=True, smooth_nr=smooth, smooth_dr=smooth)

    def theirs(logits, target):
        return reference(logits, target) + binary_cross_entropy_with_logits(logits, target.float())

    loss = PartialDiceCrossEntropy(balance=0, smooth=smooth)
    value, pull = gradient(loss, logits, target)
    expected, expected_pull = gradient(theirs, logits, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(pull, expected_pull)


def test_balance_one_gives_lesion_and_background_the_same_weight():
    """Cross-entropy then is the mean of the mean over the lesion and the mean over the background."""
    logits, target = make_case(1, 3)
    logits, target = logits[:, :1], target[:, :1]
    lesion = target == 1
    entropy = binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    loss = PartialDiceCrossEntropy(dice_weight=0, absent_weight=0, balance=1)
    torch.testing.assert_close(loss(logits, target), (entropy[lesion].mean() + entropy[~lesion].mean()) / 2)


@pytest.mark.parametrize("planted", [1e4, -1e4, float("inf"), -float("inf"), float("nan")])
def test_logits_at_unknown_voxels_change_nothing_and_are_not_pulled(planted):
    """So a lesion that nobody marked beside a partial annotation is not punished."""
    loss = PartialDiceCrossEntropy()
    logits, target = make_case()
    target[0, 0] = UNKNOWN
    unknown = target == UNKNOWN
    value, pull = gradient(loss, logits, target)
    wrong_value, wrong_pull = gradient(loss, torch.where(unknown, torch.tensor(planted), logits), target)
    assert torch.equal(value, wrong_value) and torch.equal(pull, wrong_pull)
    assert not pull[unknown].any() and pull[~unknown].ne(0).all()


def test_an_unknown_disease_leaves_the_loss_of_the_others():
    loss = PartialDiceCrossEntropy()
    logits, target = make_case()
    target[:, 1] = UNKNOWN
    torch.testing.assert_close(loss(logits, target), loss(logits[:, [0, 2]], target[:, [0, 2]]))


def test_a_batch_of_which_nothing_is_known_is_zero_and_teaches_nothing():
    logits, target = make_case()
    value, pull = gradient(PartialDiceCrossEntropy(), logits, torch.full_like(target, UNKNOWN))
    assert value.item() == 0 and pull.isfinite().all() and not pull.any()


def test_the_losses_of_halves_average_to_that_of_the_whole():
    loss = PartialDiceCrossEntropy()
    logits, target = make_case(6)
    target[0] = UNKNOWN
    target[1, 1:] = UNKNOWN  # unevenly known
    halves = (loss(logits[:3], target[:3]) + loss(logits[3:], target[3:])) / 2
    torch.testing.assert_close(loss(logits, target), halves)


def test_gradients_are_those_of_finite_differences():
    loss = PartialDiceCrossEntropy(absent_voxels=10)
    logits, target = make_case(2)
    logits = logits.double()
    pull, step = gradient(loss, logits, target)[1], 1e-2
    for place in ((0, 0, 0, 0, 0), (1, 0, 2, 4, 6), (0, 1, 1, 1, 1), (1, 2, 0, 3, 5)):
        ends = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[place] += sign * step
            ends.append(loss(moved, target).item())
        assert pull[place].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=5e-2, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sure", [200.0, -200.0])
def test_sure_logits_keep_values_and_gradients_finite(dtype, sure):
    _, target = make_case()
    logits = torch.full(target.shape, sure, dtype=dtype)
    value, pull = gradient(PartialDiceCrossEntropy(), logits, target)
    assert value.isfinite() and value > 0.1 and pull.isfinite().all() and pull.any()


def test_other_shapes_are_refused():
    logits, target = make_case()
    with pytest.raises(ValueError, match=r"logits are \(4, 3, 3, 5, 7\), the target is \(4, 2, 3, 5, 7\)"):
        PartialDiceCrossEntropy()(logits, target[:, :2])
