import json

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.handlers import ValidationHandler
from torch import nn

from tests.handlers.tiny_trainer import make_trainer
from vlm3d_ext.handlers import LossHistory
from vlm3d_ext.metrics import MeanLoss


class _Record:
    """Keeps every iteration's loss as the trainer gives it."""

    def __init__(self):
        self.losses = []

    def attach(self, engine):
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e: self.losses.append(e.state.output["loss"].item())
        )


def _evaluator(handler, value):
    return SupervisedEvaluator(
        device="cpu",
        val_data_loader=[{"image": torch.zeros(1, 3), "label": torch.zeros(1, 1)}],
        network=nn.Linear(3, 1),
        key_val_metric={"loss": MeanLoss(lambda predictions: torch.tensor(value))},
        val_handlers=[handler],
        decollate=False,
    )


def test_a_row_per_epoch_with_the_mean_of_its_losses(tmp_path):
    record, history = _Record(), LossHistory(tmp_path / "history.json")
    make_trainer(record, history, epochs=3, decollate=False).run()
    rows = json.loads((tmp_path / "history.json").read_text())
    assert [(row["epoch"], row["iteration"]) for row in rows] == [(1, 4), (2, 8), (3, 12)]
    means = [sum(record.losses[4 * epoch : 4 * epoch + 4]) / 4 for epoch in range(3)]
    assert [row["loss"] for row in rows] == pytest.approx(means)
    assert rows[0]["learning_rates"] == [0.1] and rows[0]["losses"] == {} and rows[0]["validation"] is None


class _TwoLosses(nn.Linear):
    """Returns its losses as the encoder's pre-training does."""

    def forward(self, x):
        prediction = super().forward(x)
        return {"losses": {"a": prediction.square().mean(), "b": torch.tensor(2.0)}}


def test_the_losses_behind_the_sum(tmp_path):
    history = LossHistory(tmp_path / "history.json")
    trainer = make_trainer(history, network=_TwoLosses(3, 1), epochs=1, decollate=False)
    trainer.loss_function = lambda predictions, target: predictions["losses"]["a"] + 3 * predictions["losses"]["b"]
    trainer.run()
    row = history.rows[0]
    assert row["losses"]["b"] == pytest.approx(2.0)
    assert row["loss"] == pytest.approx(row["losses"]["a"] + 6.0, rel=1e-6)


def test_validation_belongs_to_the_epoch_it_followed(tmp_path):
    history = LossHistory(tmp_path / "history.json")
    make_trainer(ValidationHandler(2, _evaluator(history, 0.25)), history, epochs=3, decollate=False).run()
    assert [row["validation"] for row in history.rows] == [None, {"loss": 0.25}, None]


def test_an_undefined_metric_is_null_and_stops_nothing(tmp_path):
    history = LossHistory(tmp_path / "history.json")
    make_trainer(ValidationHandler(1, _evaluator(history, float("nan"))), history, epochs=2, decollate=False).run()
    rows = json.loads((tmp_path / "history.json").read_text())
    assert [row["validation"] for row in rows] == [{"loss": None}] * 2


def test_a_diverged_loss_is_null(tmp_path):
    history = LossHistory(tmp_path / "history.json")
    make_trainer(history, epochs=1, learning_rate=1e30, decollate=False).run()
    assert json.loads((tmp_path / "history.json").read_text())[0]["loss"] is None


def test_a_resumed_run_continues_the_rows(tmp_path):
    first = LossHistory(tmp_path / "history.json")
    make_trainer(first, epochs=2, decollate=False).run()
    second = LossHistory(tmp_path / "history.json")
    second.load_state_dict(first.state_dict())
    make_trainer(second, epochs=1, decollate=False).run()
    assert len(first.rows) == 2  # the rows that were handed on are copied
    assert json.loads((tmp_path / "history.json").read_text())[:2] == first.rows
    assert len(second.rows) == 3


def test_the_mean_is_over_all_ranks_and_only_the_first_writes(tmp_path, monkeypatch):
    """Another rank whose losses are all larger by 2."""
    monkeypatch.setattr("ignite.distributed.all_reduce", lambda sums: 2 * sums + torch.tensor([4 * 2.0, 0.0]))
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    record, history = _Record(), LossHistory(tmp_path / "history.json")
    make_trainer(record, history, epochs=1, decollate=False).run()
    assert history.rows[0]["loss"] == pytest.approx(sum(record.losses) / 4 + 1.0)
    assert not (tmp_path / "history.json").exists()


def test_what_is_watched_may_be_undefined_now_and_then_but_not_the_loss(tmp_path):
    """Each figure's mean is over the iterations that have it."""
    history = LossHistory(tmp_path / "history.json")
    outputs = iter(
        {"loss": torch.tensor(loss), "pred": {"losses": {name: torch.tensor(v) for name, v in watched.items()}}}
        for loss, watched in [(1.0, {"kl": 4.0, "side": float("nan")}), (3.0, {"side": 0.5}), (5.0, {"kl": 8.0})]
    )
    trainer = make_trainer(_Record(), history, epochs=1, decollate=False)
    history._begin(trainer)
    for output in outputs:
        trainer.state.output = output
        history._add(trainer)
    history._finish(trainer)
    assert history.rows[0]["loss"] == 3.0 and history.rows[0]["losses"] == {"kl": 6.0, "side": 0.5}
    history._begin(trainer)
    trainer.state.output = {
        "loss": torch.tensor(float("nan")),
        "pred": {"losses": {"side": torch.tensor(float("nan"))}},
    }
    history._add(trainer)
    history._finish(trainer)
    assert history.rows[1]["loss"] is None and history.rows[1]["losses"] == {"side": None}


def test_only_trainers_and_evaluators(tmp_path):
    with pytest.raises(TypeError, match="got Engine"):
        LossHistory(tmp_path / "history.json").attach(Engine(lambda engine, batch: None))
