import math

import pytest
import torch

from vlm3d_ext.losses import WeightedLossSum, masked_reconstruction_loss, region_share_loss, sentence_alignment_loss


def test_reconstruction_loss_by_hand():
    reconstruction = torch.tensor([[1.0, 3.0], [4, 4], [7, 9]])
    patches = torch.tensor([[0.0, 0.0], [0, 0], [7, 7]])
    hidden = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    # first sample: mean of 2 and 4; second sample hides nothing and counts as zero; third sample: 1
    assert masked_reconstruction_loss(reconstruction, patches, hidden).item() == pytest.approx(4 / 3)


def test_reconstruction_loss_of_nothing_hidden_is_zero_and_still_has_a_gradient():
    """Data-parallel training waits for the gradient of each weight, even where a rank hides nothing."""
    layer = torch.nn.Linear(5, 3)
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    loss = masked_reconstruction_loss(layer(torch.rand(2, 4, 5)[hidden]), torch.rand(2, 4, 3)[hidden], hidden)
    loss.backward()
    assert loss.item() == 0 and torch.equal(layer.weight.grad, torch.zeros(3, 5))


def test_region_share_loss_by_hand():
    logits = torch.zeros(2, 1, 1, 4, 1)
    counts = torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]).view(2, 1, 1, 4, 1)
    both = region_share_loss(logits, counts, torch.tensor([True, True]))
    assert both.item() == pytest.approx(math.log(4))
    assert region_share_loss(logits, counts, torch.tensor([True, False])).item() == pytest.approx(math.log(4) / 2)


def test_region_share_loss_asks_for_the_region_of_each_intensity_bin():
    """A quarter of the voxels is dark and of region 0, the rest bright: half of all of region 1, a quarter of 0."""
    counts = torch.tensor([[0.25, 0.25], [0.0, 0.5]]).view(1, 1, 1, 2, 2)
    probs = torch.tensor([[0.9, 0.4], [0.1, 0.6]]).view(1, 1, 1, 2, 2)
    expected = -(0.25 * math.log(0.9) + 0.25 * math.log(0.4) + 0.5 * math.log(0.6))
    loss = region_share_loss(probs.log() + 3.0, counts, torch.tensor([True]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    channels = [tensor.expand(1, 1, 2, 2, 2) for tensor in (probs.log(), counts)]
    assert region_share_loss(*channels, torch.tensor([True])).item() == pytest.approx(expected, rel=1e-5)


def test_region_share_loss_leaves_padding_out():
    logits = torch.tensor([[0.0, 0.0], [50.0, 0.0]]).view(1, 2, 1, 2, 1)
    counts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2, 1)
    real = torch.tensor([[True, False]])
    assert region_share_loss(logits, counts, torch.tensor([True]), real).item() == pytest.approx(math.log(2))


def test_alignment_loss_by_hand():
    logits = torch.tensor([[2.0, -1.0, 100.0]])
    is_true = torch.tensor([[True, False, False]])
    present = torch.tensor([[True, True, False]])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert sentence_alignment_loss(logits, is_true, present).item() == pytest.approx(expected, rel=1e-6)


def test_losses_of_halves_average_to_the_loss_of_the_whole():
    """What makes two ranks equal to one, also when the targets are unevenly spread."""
    torch.manual_seed(0)
    reconstruction, patches = torch.rand(2, 4, 5, 3)
    hidden = torch.rand(4, 5) < 0.4
    logits = torch.randn(4, 5, 2, 21, 8)
    counts = torch.rand(4, 5, 2, 21 * 8).softmax(-1).unflatten(-1, (21, 8))
    has_mask = torch.tensor([True, False, False, False])
    sentences, is_true, present = torch.randn(4, 6), torch.rand(4, 6) < 0.3, torch.rand(4, 6) < 0.5

    def losses(rows):
        return torch.stack(
            [
                masked_reconstruction_loss(
                    reconstruction[rows][hidden[rows]], patches[rows][hidden[rows]], hidden[rows]
                ),
                region_share_loss(logits[rows], counts[rows], has_mask[rows]),
                sentence_alignment_loss(sentences[rows], is_true[rows], present[rows]),
            ]
        )

    halves = (losses(slice(0, 2)) + losses(slice(2, 4))) / 2
    torch.testing.assert_close(losses(slice(0, 4)), halves)


def test_weighted_sum():
    losses = {"losses": {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor(5.0, requires_grad=True)}}
    total = WeightedLossSum({"a": 1.5, "b": 0.0})(losses)
    assert total.item() == 3.0
    total.backward()
    assert losses["losses"]["a"].grad.item() == 1.5
    assert losses["losses"]["b"].grad.item() == 0.0
    with pytest.raises(ValueError, match=r"returns the losses \['a', 'b'\], weights are given for \['a'\]"):
        WeightedLossSum({"a": 1.0})(losses)
