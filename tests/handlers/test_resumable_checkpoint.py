import json
import os

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.handlers import LrScheduleHandler, ValidationHandler
from monai.optimizers import WarmupCosineSchedule
from torch import nn

from tests.handlers.tiny_trainer import make_trainer
from vlm3d_ext.checkpoint_files import CheckpointError
from vlm3d_ext.handlers import IterationSeed, LossHistory, ResumableCheckpoint
from vlm3d_ext.lineage import Lineage, LineageError
from vlm3d_ext.metrics import MeanLoss

EPOCHS = 5


class _Interruption(Exception):
    pass


class _InterruptAt:
    """Ends the run in the middle of an epoch, as a power cut would."""

    def __init__(self, epoch):
        self.epoch = epoch

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine):
        if engine.state.epoch == self.epoch and engine.state.iteration % 4 == 2:
            raise _Interruption


def _prepare(batch, device, non_blocking, **kwargs):
    return batch["image"].to(device), batch["label"].to(device)


def _run(folder, resume=False, interrupt_at=None, epochs=EPOCHS, lineage=None):
    """Train a network with dropout, Adam, a schedule and validation; returns the network and the checkpoint handler."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    schedule = WarmupCosineSchedule(optimizer, warmup_steps=3, t_total=4 * EPOCHS)
    history = LossHistory(folder / "history.json")
    checkpoint = ResumableCheckpoint(
        folder / "models",
        {"model": network},
        {"optimizer": optimizer, "lr_scheduler": schedule, "history": history},
        metric_name="loss",
        lower_is_better=True,
        lineage=lineage,
        resume=resume,
    )
    generator = torch.Generator().manual_seed(2)
    batches = [{"image": torch.randn(2, 3, generator=generator), "label": torch.randn(2, 1, generator=generator)}]

    def mean_squared(predictions):
        return (predictions - batches[0]["label"]).square().mean()

    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=batches,
        network=network,
        key_val_metric={"loss": MeanLoss(mean_squared)},
        val_handlers=[history, checkpoint],
        decollate=False,
    )
    interruption = [] if interrupt_at is None else [_InterruptAt(interrupt_at)]
    trainer = make_trainer(
        IterationSeed(0),
        LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
        *interruption,
        ValidationHandler(2, evaluator),
        history,
        checkpoint,
        network=network,
        epochs=epochs,
        decollate=False,
    )
    trainer.optimizer = optimizer
    if interrupt_at is None:
        trainer.run()
    else:
        with pytest.raises(_Interruption):
            trainer.run()
    return network, checkpoint


def _same_states(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("interrupt_at", [2, 3, 5])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path, interrupt_at):
    whole, whole_checkpoint = _run(tmp_path / "whole")
    broken, _ = _run(tmp_path / "broken", interrupt_at=interrupt_at)
    assert not _same_states(whole.state_dict(), broken.state_dict())
    resumed, resumed_checkpoint = _run(tmp_path / "broken", resume=True)
    assert _same_states(whole.state_dict(), resumed.state_dict())
    rows = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "broken")]
    assert rows[0] == rows[1] and [row["epoch"] for row in rows[0]] == [1, 2, 3, 4, 5]
    assert [row["validation"] is not None for row in rows[0]] == [False, True, False, True, False]
    assert (whole_checkpoint.best_metric, whole_checkpoint.best_epoch) == (
        resumed_checkpoint.best_metric,
        resumed_checkpoint.best_epoch,
    )
    stored = [torch.load(tmp_path / name / "models" / "model.pt", weights_only=True) for name in ("whole", "broken")]
    assert stored[0]["best_epoch"] == stored[1]["best_epoch"]
    assert _same_states(stored[0]["model"], stored[1]["model"])


def test_without_the_optimizers_state_the_curve_would_be_another(tmp_path):
    """That the comparison above can fail at all."""
    whole, _ = _run(tmp_path / "whole")
    _run(tmp_path / "broken", interrupt_at=3)
    path = tmp_path / "broken" / "models" / "last.pt"
    content = torch.load(path, weights_only=True)
    for state in content["optimizer"]["state"].values():
        state["exp_avg"].zero_()
    torch.save(content, path)
    resumed, _ = _run(tmp_path / "broken", resume=True)
    assert not _same_states(whole.state_dict(), resumed.state_dict())


def test_resuming_a_run_that_has_ended_changes_nothing(tmp_path):
    whole, _ = _run(tmp_path)
    again, _ = _run(tmp_path, resume=True)
    assert _same_states(whole.state_dict(), again.state_dict())


def _evaluate(handler, value, epoch=1, name="loss"):
    """Run a real evaluator whose only metric has the given value."""
    metric = MeanLoss(lambda predictions: torch.tensor(value))
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=[{"image": torch.zeros(1, 3), "label": torch.zeros(1, 1)}],
        network=nn.Linear(3, 1),
        key_val_metric={name: metric},
        val_handlers=[handler],
        decollate=False,
    )
    evaluator.run(epoch)


def _model(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def _set(network, value):
    with torch.no_grad():
        network.weight.fill_(value)


def test_the_best_metric_survives_and_a_worse_model_replaces_nothing(tmp_path):
    network = nn.Linear(3, 1)
    first = ResumableCheckpoint(tmp_path, {"model": network}, metric_name="loss", lower_is_better=True)
    _set(network, 1.0)
    _evaluate(first, 0.5, epoch=1)
    make_trainer(first, network=network, epochs=1, learning_rate=0.0).run()

    second = ResumableCheckpoint(tmp_path, {"model": network}, metric_name="loss", lower_is_better=True, resume=True)
    make_trainer(second, network=network, epochs=2, learning_rate=0.0).run()
    assert (second.best_metric, second.best_epoch) == (0.5, 1)
    _set(network, 2.0)
    _evaluate(second, 0.6, epoch=2)
    assert _model(tmp_path)["model"]["weight"][0, 0] == 1.0
    _evaluate(second, 0.4, epoch=3)
    stored = _model(tmp_path)
    assert stored["model"]["weight"][0, 0] == 2.0 and stored["best_epoch"] == 3
    assert stored["best_metric"] == pytest.approx(0.4)


@pytest.mark.parametrize(("lower_is_better", "kept"), [(True, 2), (False, 1)])
def test_sense_of_the_metric(tmp_path, lower_is_better, kept):
    network = nn.Linear(3, 1)
    handler = ResumableCheckpoint(tmp_path, {"model": network}, metric_name="loss", lower_is_better=lower_is_better)
    for epoch, value in ((1, 0.7), (2, 0.3), (3, 0.3), (4, 0.5)):
        _set(network, float(epoch))
        _evaluate(handler, value, epoch)
    assert _model(tmp_path)["best_epoch"] == kept == _model(tmp_path)["model"]["weight"][0, 0]


def test_nan_is_never_the_best_but_better_than_nothing(tmp_path):
    handler = ResumableCheckpoint(tmp_path, {"model": nn.Linear(3, 1)}, metric_name="loss", lower_is_better=True)
    _evaluate(handler, float("nan"), 1)
    assert handler.best_metric is None and _model(tmp_path)["best_epoch"] is None
    _evaluate(handler, 0.5, 2)
    _evaluate(handler, float("nan"), 3)
    assert _model(tmp_path)["best_epoch"] == 2


def test_without_a_metric_the_newest_model_is_kept(tmp_path):
    network = nn.Linear(3, 1)
    handler = ResumableCheckpoint(tmp_path, {"model": network})
    for epoch in (1, 2):
        _set(network, float(epoch))
        _evaluate(handler, 0.1, epoch)
    assert _model(tmp_path)["model"]["weight"][0, 0] == 2.0


def test_a_metric_that_the_evaluator_lacks(tmp_path):
    handler = ResumableCheckpoint(tmp_path, {"model": nn.Linear(3, 1)}, metric_name="auroc")
    with pytest.raises(ValueError, match=r"no metric 'auroc'; it has \['loss'\]"):
        _evaluate(handler, 0.5)


def test_a_failure_while_saving_leaves_the_old_file_whole(tmp_path, monkeypatch):
    network = nn.Linear(3, 1)
    handler = ResumableCheckpoint(tmp_path, {"model": network})
    make_trainer(handler, network=network, epochs=1).run()
    before = (tmp_path / "last.pt").read_bytes()

    def full_disk(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm3d_ext.handlers.resumable_checkpoint.torch.save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_trainer(handler, network=network, epochs=1).run()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_nothing_to_resume_from(tmp_path):
    handler = ResumableCheckpoint(tmp_path, {"model": nn.Linear(3, 1)}, resume=True)
    with pytest.raises(FileNotFoundError, match=r"last\.pt: nothing to resume from\. Start without --resume"):
        make_trainer(handler).run()


@pytest.mark.parametrize("keep", [0, 100, -200])
def test_a_damaged_file_is_named_in_one_line(tmp_path, keep):
    network = nn.Linear(3, 1)
    make_trainer(ResumableCheckpoint(tmp_path, {"model": network}), network=network, epochs=1).run()
    path = tmp_path / "last.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"last\.pt.*Start without --resume") as error:
        make_trainer(ResumableCheckpoint(tmp_path, {"model": network}, resume=True), network=network).run()
    assert "\n" not in str(error.value)


def test_a_file_of_a_run_that_kept_other_objects(tmp_path):
    network = nn.Linear(3, 1)
    make_trainer(ResumableCheckpoint(tmp_path, {"model": network}), network=network, epochs=1).run()
    history = LossHistory(tmp_path / "history.json")
    handler = ResumableCheckpoint(tmp_path, {"model": network}, {"history": history}, resume=True)
    with pytest.raises(CheckpointError, match="has no entry 'history', so it is of another run"):
        make_trainer(handler, network=network).run()


def test_a_run_on_other_data_is_refused(tmp_path):
    lineages = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"fingerprint": name}))
        lineages.append(Lineage("encoder", "0.1.0", "pretraining", manifest=tmp_path / f"{name}.json"))
    _run(tmp_path / "run", epochs=1, lineage=lineages[0])
    assert torch.load(tmp_path / "run" / "models" / "last.pt", weights_only=True)["lineage"]["bundle"] == "encoder"
    with pytest.raises(LineageError, match="data fingerprint is one, this run's is two"):
        _run(tmp_path / "run", resume=True, lineage=lineages[1])


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    handler = ResumableCheckpoint(tmp_path, {"model": nn.Linear(3, 1)}, metric_name="loss")
    make_trainer(handler, epochs=1).run()
    _evaluate(handler, 0.5)
    assert os.listdir(tmp_path) == []
    assert handler.best_metric == 0.5  # it decides as rank 0 does


def test_interval_between_two_files(tmp_path):
    network = nn.Linear(3, 1)
    handler = ResumableCheckpoint(tmp_path, {"model": network}, save_interval=2)
    saved = []
    trainer = make_trainer(handler, network=network, epochs=5)
    original = handler._write
    handler._write = lambda name, further: (saved.append(trainer.state.epoch), original(name, further))
    trainer.run()
    assert saved == [2, 4, 5]


def test_only_trainers_and_evaluators(tmp_path):
    with pytest.raises(TypeError, match="got Engine"):
        ResumableCheckpoint(tmp_path, {}).attach(Engine(lambda engine, batch: None))
