import math

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric

from vlm3d_ext.data.connected_components import without_faint_lesions
from vlm3d_ext.data.lesion_cases import UNKNOWN
from vlm3d_ext.metrics import DiceByThreshold

NAN = float("nan")
SIZE = (3, 5, 7)
CANDIDATES = (0.1, 0.3, 0.5, 0.7)


def make_scans(num=6, diseases=2, seed=0, unknown=0.0):
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(num, diseases, *SIZE, generator=generator) < 0.3).to(torch.uint8)
    noise = torch.rand(num, diseases, *SIZE, generator=generator)
    probabilities = (0.35 * target + 0.65 * noise).clamp(0, 1)
    target[torch.rand(target.shape, generator=generator) < unknown] = UNKNOWN
    return probabilities, target


def scores_of(probabilities, target, batch=2, **options):
    """By default the candidates for presence are those for extent."""
    options = {"thresholds": CANDIDATES, **options}
    options = {"presence_thresholds": options["thresholds"], **options}
    metric = DiceByThreshold(**options, output_transform=lambda output: output)
    for pair in zip(probabilities.split(batch), target.split(batch), strict=True):
        metric.update(pair)
    return metric, metric.compute()


def dice_in_a_loop(probabilities, target, threshold, presence):
    """Mean over scans that have the disease, over known voxels; (diseases,)."""
    means = []
    for disease in range(target.shape[1]):
        values = []
        for drawn, truth in zip(probabilities[:, disease], target[:, disease], strict=True):
            known = (truth != UNKNOWN).numpy()
            lesion = (truth == 1).numpy()
            kept = without_faint_lesions(np.where(known, drawn.numpy(), 0), threshold, presence) >= threshold
            if lesion.any():
                values.append(2 * (kept & lesion).sum() / (kept.sum() + lesion.sum()))
        means.append(np.mean(values) if values else NAN)
    return np.array(means)


@pytest.mark.parametrize("threshold", CANDIDATES)
def test_it_equals_monais_dice_at_every_threshold(threshold):
    probabilities, target = make_scans()
    metric, mean = scores_of(probabilities, target, thresholds=[threshold])
    reference = DiceMetric(reduction="mean_batch")
    expected = reference((probabilities >= threshold).float(), target.float()).mean(0)
    np.testing.assert_allclose(metric.dice, expected, rtol=1e-6)
    assert mean == pytest.approx(expected.mean().item(), rel=1e-6)
    np.testing.assert_allclose(metric.best_thresholds, threshold)


@pytest.mark.parametrize("unknown", [0.0, 0.4])
def test_the_best_of_several_thresholds_is_the_best_of_a_plain_loop(unknown):
    probabilities, target = make_scans(unknown=unknown)
    target[0, 0] = UNKNOWN
    target[1, 1][target[1, 1] == 1] = 0
    pairs = [(t, p) for t in CANDIDATES for p in CANDIDATES if p >= t]
    table = np.stack([dice_in_a_loop(probabilities, target, *pair) for pair in pairs])
    metric, mean = scores_of(probabilities, target)
    np.testing.assert_allclose(metric.dice, table.max(0), rtol=1e-6)
    best = np.array(pairs)[table.argmax(0)]
    np.testing.assert_allclose(metric.best_thresholds, best[:, 0])
    np.testing.assert_allclose(metric.presence_thresholds, best[:, 1])
    assert mean == pytest.approx(table.max(0).mean())
    assert table.max() - table.min() > 0.1  # the choice mattered


def test_what_lies_at_unknown_voxels_is_not_looked_at():
    probabilities, target = make_scans(unknown=0.4)
    metric, mean = scores_of(probabilities, target)
    for other in (0.0, 1.0):
        changed = torch.where(target == UNKNOWN, torch.tensor(other), probabilities)
        again, same = scores_of(changed, target)
        assert same == mean and torch.equal(again.best_thresholds, metric.best_thresholds)


@pytest.mark.parametrize("cut", CANDIDATES)
def test_a_probability_on_the_threshold_is_drawn_as_the_writer_draws_it(cut):
    """float32 of the threshold itself, and the numbers just above and just below it."""
    at = torch.tensor(cut, dtype=torch.float32)
    around = torch.stack([at, torch.nextafter(at, torch.tensor(2.0)), torch.nextafter(at, torch.tensor(-1.0))])
    target = torch.ones(1, 1, 3, 1, 1, dtype=torch.uint8)
    metric, dice = scores_of(around.view(1, 1, 3, 1, 1), target, thresholds=[cut])
    assert dice == pytest.approx(2 * 2 / (2 + 3))
    # the comparison of `vlm3d_ext.engines.localization_case`, with what the checkpoint's float32 buffer gives back
    assert (around.numpy() >= float(metric.best_thresholds[0])).tolist() == [True, True, False]


def test_a_disease_that_no_scan_has_is_undefined_and_keeps_one_half():
    probabilities, target = make_scans()
    target[:, 1] = 0
    metric, mean = scores_of(probabilities, target)
    assert math.isnan(metric.dice[1]) and metric.best_thresholds[1] == 0.5
    assert mean == pytest.approx(metric.dice[0].item())  # the mean of those that are defined
    target[:] = UNKNOWN
    metric, mean = scores_of(probabilities, target)
    assert math.isnan(mean) and metric.dice.isnan().all() and metric.best_thresholds.tolist() == [0.5, 0.5]


def test_nothing_seen_is_undefined():
    metric = DiceByThreshold(thresholds=CANDIDATES)
    assert math.isnan(metric.compute())


def test_extent_and_presence_are_two_thresholds():
    """Lesions up to 0.9 and 0.6, both whole from 0.1 on. Of four lesion-free scans three reach 0.4, one of them 0.7."""
    probabilities = torch.zeros(6, 1, 4, 1, 1)
    probabilities[:2, 0, :2, 0, 0] = torch.tensor([[0.9, 0.2], [0.6, 0.2]])
    probabilities[2:, 0, 0, 0, 0] = torch.tensor([0.4, 0.4, 0.7, 0.0])
    target = torch.zeros(probabilities.shape, dtype=torch.uint8)
    target[:2, 0, :2] = 1
    candidates = [0.1, 0.2, 0.5, 0.8]
    # presence 0.1: Dice 1, three of four free scans drawn; 0.5: Dice 1, one of four; 0.8: Dice 0.5, none
    for cost, presence, dice in ((0.0, 0.1, 1.0), (0.1, 0.5, 1.0), (1.9, 0.5, 1.0), (2.1, 0.8, 0.5)):
        metric, mean = scores_of(probabilities, target, thresholds=candidates, false_positive_cost=cost)
        assert metric.best_thresholds.item() == pytest.approx(0.1), cost
        assert metric.presence_thresholds.item() == pytest.approx(presence), cost
        assert mean == pytest.approx(dice), cost
    # A scan of which nothing is known is not free of lesions: without the clean one, of three free ones one is drawn.
    target[5] = UNKNOWN
    metric, _ = scores_of(probabilities, target, thresholds=candidates, false_positive_cost=1.6)
    assert metric.presence_thresholds.item() == pytest.approx(0.8)


def test_presence_takes_false_lesions_from_scans_that_have_true_ones():
    """Four voxels of lesion at 0.9, 0.6, 0.6, 0.6; apart from it a speck at 0.8: extent 0.5 and presence 0.85 are "
    "right."""
    probabilities = torch.zeros(1, 1, 9, 1, 1)
    probabilities[0, 0, :, 0, 0] = torch.tensor([0.9, 0.6, 0.6, 0.6, 0.0, 0.0, 0.8, 0.0, 0.0])
    target = torch.zeros(probabilities.shape, dtype=torch.uint8)
    target[0, 0, :4] = 1
    metric, mean = scores_of(probabilities, target, thresholds=[0.5, 0.7], presence_thresholds=[0.5, 0.7, 0.85])
    assert (metric.best_thresholds.item(), metric.presence_thresholds.item()) == pytest.approx((0.5, 0.85))
    assert mean == 1
    assert scores_of(probabilities, target, thresholds=[0.5, 0.7])[1] == pytest.approx(2 * 4 / 9)


def test_presence_never_lies_below_extent():
    probabilities, target = make_scans(num=12, seed=3)
    target[6:] = 0
    for cost in (0.0, 0.3, 3.0):
        metric, _ = scores_of(probabilities, target, false_positive_cost=cost)
        assert (metric.presence_thresholds >= metric.best_thresholds).all()


def test_each_epoch_begins_anew_and_batches_do_not_matter():
    probabilities, target = make_scans()
    metric, mean = scores_of(probabilities, target, batch=1)
    assert scores_of(probabilities, target, batch=4)[1] == mean
    metric.reset()
    metric.update((probabilities[:1], target[:1]))
    assert metric.compute() == scores_of(probabilities[:1], target[:1])[1] != mean


def test_presence_must_reach_the_highest_extent():
    with pytest.raises(ValueError, match=r"presence_thresholds end at 0\.5, below the highest of thresholds, 0\.9"):
        DiceByThreshold(thresholds=[0.1, 0.9], presence_thresholds=[0.5])


@pytest.mark.parametrize("thresholds", [[], [0.0, 0.5], [0.5, 1.1], [0.5, 0.3], [0.5, 0.5]])
def test_thresholds_that_do_not_rise_within_bounds_are_refused(thresholds):
    with pytest.raises(ValueError, match=r"thresholds must rise within \(0, 1\], got"):
        DiceByThreshold(thresholds=thresholds)


def test_other_shapes_are_refused():
    probabilities, target = make_scans()
    with pytest.raises(ValueError, match=r"probabilities are \(6, 2, 3, 5, 7\), the target is \(6, 1, 3, 5, 7\)"):
        scores_of(probabilities, target[:, :1], batch=6)


def _rank(local_rank, shares):
    """What each of two processes checks; an error here ends the parent's spawn with an error."""
    probabilities, target = make_scans(5, unknown=0.2)
    target[:2, 1] = 0
    alone_of = {}
    for share, (first, second) in shares.items():
        rows = (first, second)[idist.get_rank()]
        metric = DiceByThreshold(CANDIDATES, CANDIDATES, false_positive_cost=0.2, output_transform=lambda o: o)
        for row in rows:
            metric.update((probabilities[row : row + 1], target[row : row + 1]))
        mean = metric.compute()
        alone_of[share] = (
            mean,
            metric.dice.tolist(),
            metric.best_thresholds.tolist(),
            metric.presence_thresholds.tolist(),
        )
    whole = DiceByThreshold(CANDIDATES, CANDIDATES, false_positive_cost=0.2, output_transform=lambda o: o)
    whole.update((probabilities, target))
    whole._gather = lambda: torch.stack(whole._rows)  # type: ignore[method-assign]
    expected = (
        whole.compute(),
        whole.dice.tolist(),
        whole.best_thresholds.tolist(),
        whole.presence_thresholds.tolist(),
    )
    for share, found in alone_of.items():
        np.testing.assert_allclose(np.hstack(found), np.hstack(expected), rtol=1e-12, err_msg=share)


def test_two_processes_find_what_one_finds(tmp_path):
    shares = {"uneven": ([0, 2, 4], [1, 3]), "one has none": ([], [0, 1, 2, 3, 4])}
    idist.spawn("gloo", _rank, args=(shares,), nproc_per_node=2, init_method=f"file://{tmp_path}/rendezvous")
