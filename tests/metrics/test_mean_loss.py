import pytest
import torch

from vlm3d_ext.losses import WeightedLossSum
from vlm3d_ext.metrics import MeanLoss


def _output(value, other, size):
    losses = {"reconstruction": torch.tensor(value), "region_share": torch.tensor(other)}
    return {"losses": losses}, size


def test_mean_over_cases_not_over_batches():
    """Three cases of loss 1 and one of loss 5: the smaller last batch weighs less."""
    metric = MeanLoss(name="reconstruction")
    metric.update(_output(1.0, 0.0, 3))
    metric.update(_output(5.0, 0.0, 1))
    assert metric.compute() == pytest.approx(2.0)
    metric.reset()
    metric.update(_output(7.0, 0.0, 2))
    assert metric.compute() == pytest.approx(7.0)


def test_loss_function_instead_of_a_name():
    metric = MeanLoss(loss=WeightedLossSum({"reconstruction": 1.0, "region_share": 0.5}))
    metric.update(_output(1.0, 4.0, 2))
    assert metric.compute() == pytest.approx(3.0)


def test_exactly_one_of_loss_and_name():
    with pytest.raises(ValueError, match="either a loss or the name of one"):
        MeanLoss()
    with pytest.raises(ValueError, match="name='a'"):
        MeanLoss(loss=lambda predictions: torch.zeros(()), name="a")


def test_sums_of_all_ranks_are_added(monkeypatch):
    """Rank 1 has seen one case of loss 10 beside this rank's three of loss 2."""
    monkeypatch.setattr("ignite.distributed.all_reduce", lambda mine: mine + torch.tensor([10.0, 1.0]))
    metric = MeanLoss(name="reconstruction")
    metric.update(_output(2.0, 0.0, 3))
    assert metric.compute() == pytest.approx(4.0)
