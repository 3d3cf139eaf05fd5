import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from vlm3d_ext.losses import AsymmetricLoss, WeightedBinaryCrossEntropy

NAN, INFINITY = float("nan"), float("inf")
LABELS = 5
TRAINED = [True, True, False, True, True]


def make_losses(trained_findings=None):
    weights = [0.5, 1.0, 3.0, 7.0, 20.0]
    return {
        "weighted": WeightedBinaryCrossEntropy(weights, trained_findings),
        "asymmetric": AsymmetricLoss(LABELS, trained_findings=trained_findings),
        "no margin": AsymmetricLoss(LABELS, 1.0, 2.0, 0.0, trained_findings),
        "small exponents": AsymmetricLoss(LABELS, 0.5, 0.5, 0.05, trained_findings),
    }


NAMES = list(make_losses())


def make_case(batch=6, seed=0, unknown=0.3):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, LABELS, generator=generator) * 3
    labels = torch.randint(0, 2, (batch, LABELS), generator=generator).float()
    labels[torch.rand(batch, LABELS, generator=generator) < unknown] = NAN
    return logits, labels


def gradient(loss, logits, labels):
    logits = logits.clone().requires_grad_()
    value = loss(logits, labels)
    value.backward()
    return value.detach(), logits.grad


def test_where_all_is_known_it_is_the_loss_of_torch():
    logits, labels = make_case(unknown=0)
    loss = make_losses()["weighted"]
    reference = torch.nn.BCEWithLogitsLoss(pos_weight=loss.weights)
    torch.testing.assert_close(loss(logits, labels), reference(logits, labels))
    own, theirs = gradient(loss, logits, labels)[1], gradient(reference, logits, labels)[1]
    torch.testing.assert_close(own, theirs)


def test_known_entries_count_by_sample():
    """One sample has one known label, the other two: each sample weighs the same."""
    logits = torch.tensor([[2.0, 5.0, -9.0, 1.0, 1.0], [-1.0, 0.5, 3.0, 8.0, 8.0]])
    labels = torch.tensor([[1.0, NAN, NAN, NAN, NAN], [0.0, 1.0, NAN, NAN, NAN]])
    first = 0.5 * math.log1p(math.exp(-2))
    second = (math.log1p(math.exp(-1)) + 1.0 * math.log1p(math.exp(-0.5))) / 2
    value = make_losses()["weighted"](logits, labels)
    assert value.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_asymmetric_loss_by_hand():
    """Probability 0.8: a positive costs 0.2 · -log 0.8, a negative (margin 0.05) 0.75^4 · -log 0.25."""
    loss = AsymmetricLoss(2, gamma_positive=1.0, gamma_negative=4.0, margin=0.05)
    logits = torch.full((1, 2), math.log(4))
    positive, negative = 0.2 * -math.log(0.8), 0.75**4 * -math.log(0.25)
    assert loss(logits, torch.tensor([[1.0, NAN]])).item() == pytest.approx(positive, rel=1e-6)
    assert loss(logits, torch.tensor([[NAN, 0.0]])).item() == pytest.approx(negative, rel=1e-6)
    assert loss(logits, torch.tensor([[1.0, 0.0]])).item() == pytest.approx((positive + negative) / 2, rel=1e-6)


def test_asymmetric_loss_without_asymmetry_is_cross_entropy():
    logits, labels = make_case(unknown=0)
    loss = AsymmetricLoss(LABELS, 0.0, 0.0, 0.0)
    torch.testing.assert_close(loss(logits, labels), binary_cross_entropy_with_logits(logits, labels))
    own, theirs = gradient(loss, logits, labels)[1], gradient(binary_cross_entropy_with_logits, logits, labels)[1]
    torch.testing.assert_close(own, theirs)


def test_easy_negatives_are_dropped():
    """A probability below the margin costs nothing and pulls at nothing."""
    for loss in (AsymmetricLoss(1), AsymmetricLoss(1, 0.0, 0.5), AsymmetricLoss(1, 0.0, 0.0)):
        value, pull = gradient(loss, torch.tensor([[-4.0]]), torch.zeros(1, 1))  # 0.018
        assert value.item() == pytest.approx(0, abs=1e-12) and pull.item() == 0
        assert gradient(loss, torch.tensor([[-2.0]]), torch.zeros(1, 1))[1].item() > 0  # 0.119


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("planted", [1e4, -1e4, INFINITY, -INFINITY, NAN])
def test_a_huge_wrong_logit_on_an_unknown_label_changes_nothing(name, planted):
    loss = make_losses(TRAINED)[name]
    logits, labels = make_case()
    assert labels.isnan().any() and not labels.isnan().all(1).any()
    value, pull = gradient(loss, logits, labels)
    unknown = labels.isnan() | ~torch.tensor(TRAINED)
    wrong = torch.where(unknown, torch.tensor(planted), logits)
    wrong_value, wrong_pull = gradient(loss, wrong, labels)
    assert torch.equal(wrong_value, value) and torch.equal(wrong_pull, pull)
    assert not pull[unknown].any() and pull[~unknown].ne(0).any()


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_finding_is_as_if_it_were_unknown(name):
    logits, labels = make_case(unknown=0)
    hidden = labels.clone()
    hidden[:, 2] = NAN
    masked, whole = make_losses(TRAINED)[name], make_losses()[name]
    assert torch.equal(masked(logits, labels), whole(logits, hidden))
    pull = gradient(masked, logits, labels)[1]
    assert not pull[:, 2].any() and not torch.equal(masked(logits, labels), whole(logits, labels))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_which_nothing_is_known_counts_as_zero(name):
    loss = make_losses()[name]
    logits, labels = make_case(batch=1, unknown=0)
    labels = torch.cat([labels, torch.full((1, LABELS), NAN)])
    logits = torch.cat([logits, logits])
    torch.testing.assert_close(loss(logits, labels), loss(logits[:1], labels[:1]) / 2)
    value, pull = gradient(loss, logits[1:], labels[1:])
    assert value.item() == 0 and not pull.any()


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_of_halves_average_to_that_of_the_whole(name):
    loss = make_losses(TRAINED)[name]
    logits, labels = make_case(8)
    labels[:3, 1:] = NAN  # unevenly known
    halves = (loss(logits[:4], labels[:4]) + loss(logits[4:], labels[4:])) / 2
    torch.testing.assert_close(loss(logits, labels), halves)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sure_logits_keep_values_and_gradients_finite(name, dtype):
    """Right or wrong, saturated probabilities must not stop a training."""
    loss = make_losses()[name]
    for sure in (30.0, 200.0, -30.0, -200.0):
        for label in (0.0, 1.0):
            value, pull = gradient(loss, torch.full((1, LABELS), sure, dtype=dtype), torch.full((1, LABELS), label))
            assert value.isfinite() and pull.isfinite().all()
            right = (sure > 0) == (label == 1)
            assert value.item() < 1e-6 if right else value.item() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    loss = make_losses(TRAINED)[name]
    logits, labels = make_case()
    pull, step = gradient(loss, logits, labels)[1], 1e-2
    for row, column in ((0, 0), (1, 3), (2, 4), (5, 1)):
        ends = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[row, column] += sign * step
            ends.append(loss(moved, labels).item())
        assert pull[row, column].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("weight", [0.0, -1.0, NAN, INFINITY])
def test_weights_that_are_not_positive_numbers_are_refused(weight):
    with pytest.raises(ValueError, match="positive_weights must be greater than 0 and finite, got"):
        WeightedBinaryCrossEntropy([1.0, weight])


@pytest.mark.parametrize(
    "options", [{"gamma_positive": -1}, {"gamma_negative": -0.1}, {"margin": 1.0}, {"margin": -0.1}]
)
def test_exponents_and_margins_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"gammas must be at least 0 and the margin in \[0, 1\)"):
        AsymmetricLoss(LABELS, **options)


@pytest.mark.parametrize("trained", [[False] * LABELS, [True] * 4, []])
def test_a_mask_of_trained_findings_that_does_not_fit_is_refused(trained):
    for make in (
        lambda: WeightedBinaryCrossEntropy([1.0] * LABELS, trained),
        lambda: AsymmetricLoss(LABELS, trained_findings=trained),
    ):
        with pytest.raises(ValueError, match=f"at least one of {LABELS} findings"):
            make()
