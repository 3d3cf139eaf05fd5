import json
import shutil
import subprocess
import sys

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.handlers import ValidationHandler
from torch import nn

from tests.handlers.tiny_trainer import make_trainer
from vlm3d_ext.handlers import MLflowTracker
from vlm3d_ext.lineage import Lineage
from vlm3d_ext.metrics import MeanLoss

mlflow = pytest.importorskip("mlflow", reason="tracking is an extra: pip install 'vlm3d[tracking]'")


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """MLflow takes six seconds to make a database; copying one takes none."""
    path = tmp_path_factory.mktemp("empty") / "mlruns.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def _local(monkeypatch, tmp_path, empty_database):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_database, tmp_path / "runs")


def _tracker(folder, **options):
    return MLflowTracker(f"sqlite:///{folder}/runs/mlruns.db", "tests", **options)


def _client(folder):
    return mlflow.MlflowClient(f"sqlite:///{folder}/runs/mlruns.db")


def _runs(folder):
    client = _client(folder)
    experiment = client.get_experiment_by_name("tests")
    return client.search_runs(experiment.experiment_id, order_by=["attributes.start_time ASC"])


def _evaluator(*handlers, value=0.25):
    return SupervisedEvaluator(
        device="cpu",
        val_data_loader=[{"image": torch.zeros(1, 3), "label": torch.zeros(1, 1)}],
        network=nn.Linear(3, 1),
        key_val_metric={"val_loss": MeanLoss(lambda predictions: torch.tensor(value))},
        val_handlers=list(handlers),
        decollate=False,
    )


class _FailAt:
    def __init__(self, iteration, error):
        self.iteration, self.error = iteration, error

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine):
        if engine.state.iteration == self.iteration:
            raise self.error


def _artifact(folder, run, name):
    return json.loads(open(_client(folder).download_artifacts(run.info.run_id, name, str(folder))).read())


def test_a_run_holds_parameters_curves_metrics_and_files(tmp_path):
    config = {"learning_rate": 0.1, "run_name": "x", "device": "$torch.device('cpu')", "loss": {"_target_": "a.B"}}
    lineage = Lineage("encoder", "0.1.0", "pretraining", config=config)
    (tmp_path / "figures.csv").write_text("a,b\n")
    tracker = _tracker(tmp_path, run_name="encoder", lineage=lineage, artifacts=[str(tmp_path / "figures.csv")])
    make_trainer(ValidationHandler(1, _evaluator(tracker)), tracker, epochs=2, decollate=False).run()

    (run,) = _runs(tmp_path)
    assert run.info.status == "FINISHED" and run.info.run_name.startswith("encoder-")
    assert run.data.params["learning_rate"] == "0.1" and run.data.params["lineage.bundle"] == "encoder"
    assert run.data.params["max_epochs"] == "2"
    assert "device" not in run.data.params and "loss" not in run.data.params  # expressions and parts are in config.json
    client = _client(tmp_path)
    curve = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in curve] == list(range(1, 9))
    assert curve[-1].value < curve[0].value
    validation = client.get_metric_history(run.info.run_id, "val_loss")
    assert [(point.step, point.value) for point in validation] == [(1, 0.25), (2, 0.25)]
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert names == {"config.json", "lineage.json", "figures.csv"}
    assert _artifact(tmp_path, run, "config.json") == config
    assert _artifact(tmp_path, run, "lineage.json") == lineage.state_dict()


def test_each_loss_behind_the_sum_has_a_curve(tmp_path):
    class TwoLosses(nn.Linear):
        def forward(self, x):
            return {"losses": {"a": super().forward(x).square().mean(), "b": torch.tensor(2.0)}}

    trainer = make_trainer(_tracker(tmp_path), network=TwoLosses(3, 1), epochs=1, decollate=False)
    trainer.loss_function = lambda predictions, target: sum(predictions["losses"].values())
    trainer.run()
    (run,) = _runs(tmp_path)
    assert run.data.metrics["loss_b"] == 2.0
    assert run.data.metrics["loss"] == pytest.approx(run.data.metrics["loss_a"] + 2.0)


def test_an_error_in_the_trainer_ends_the_run_failed_and_is_raised(tmp_path):
    trainer = make_trainer(_tracker(tmp_path), _FailAt(3, RuntimeError("out of memory")), decollate=False)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.run()
    (run,) = _runs(tmp_path)
    assert run.info.status == "FAILED" and run.info.end_time is not None


def test_an_error_in_the_validation_ends_the_run_failed(tmp_path):
    tracker = _tracker(tmp_path)
    evaluator = _evaluator(tracker, _FailAt(1, ValueError("broken case")))
    with pytest.raises(ValueError, match="broken case"):
        make_trainer(ValidationHandler(1, evaluator), tracker, decollate=False).run()
    assert [run.info.status for run in _runs(tmp_path)] == ["FAILED"]


def test_evaluation_alone_is_a_finished_run(tmp_path):
    _evaluator(_tracker(tmp_path, run_name="evaluate")).run()
    (run,) = _runs(tmp_path)
    assert run.info.status == "FINISHED" and run.data.metrics["val_loss"] == 0.25


def test_validation_does_not_end_the_training_run(tmp_path):
    tracker = _tracker(tmp_path)
    status = []

    class Look:
        def attach(self, engine):
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: status.append(_runs(tmp_path)[0].info.status))

    make_trainer(ValidationHandler(1, _evaluator(tracker)), tracker, Look(), epochs=2, decollate=False).run()
    assert status == ["RUNNING", "RUNNING"]


def test_two_runs_are_two_runs(tmp_path):
    """Also of one name, and after one that was stopped."""
    with pytest.raises(KeyboardInterrupt):
        make_trainer(_tracker(tmp_path), _FailAt(1, KeyboardInterrupt()), epochs=1, decollate=False).run()
    for _ in range(2):
        make_trainer(_tracker(tmp_path), epochs=1, decollate=False).run()
    runs = _runs(tmp_path)
    assert [run.info.status for run in runs] == ["KILLED", "FINISHED", "FINISHED"]
    assert len({run.info.run_name for run in runs}) == 3


def test_running_an_engine_again_is_another_run(tmp_path):
    evaluator = _evaluator(_tracker(tmp_path))
    evaluator.run()
    evaluator.run()
    assert [run.info.status for run in _runs(tmp_path)] == ["FINISHED", "FINISHED"]


def test_a_chain_of_large_configs_fits(tmp_path):
    """MLflow takes 100 parameters in one request; the upstream's config is in lineage.json only."""
    upstream = Lineage("encoder", "0.1.0", "pretraining", config={f"knob_{n}": n for n in range(300)})
    torch.save({"model": {}, "lineage": upstream.state_dict()}, tmp_path / "model.pt")
    config = {f"option_{n}": n for n in range(250)}
    lineage = Lineage("classification", "0.1.0", "training", upstream={"encoder": tmp_path / "model.pt"}, config=config)
    make_trainer(_tracker(tmp_path, lineage=lineage), epochs=1, decollate=False).run()
    (run,) = _runs(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["option_249"] == "249"
    assert run.data.params["lineage.upstream.encoder.lineage.bundle"] == "encoder"
    assert not any("knob_" in name for name in run.data.params)
    stored = _artifact(tmp_path, run, "lineage.json")
    assert stored["upstream"]["encoder"]["lineage"]["config"]["knob_299"] == 299


def test_other_ranks_track_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    make_trainer(_tracker(tmp_path), epochs=1, decollate=False).run()
    assert _client(tmp_path).get_experiment_by_name("tests") is None


def test_a_process_that_ends_in_the_middle_leaves_a_killed_run(tmp_path):
    program = f"""
from ignite.engine import Events
from tests.handlers.tiny_trainer import make_trainer
from vlm3d_ext.handlers import MLflowTracker

class Interrupt:
    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
    def __call__(self, engine):
        engine.interrupt()  # leaves the run without its end

tracker = MLflowTracker("sqlite:///{tmp_path}/runs/mlruns.db", "tests")
make_trainer(tracker, Interrupt(), decollate=False).run()
"""
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert [run.info.status for run in _runs(tmp_path)] == ["KILLED"]
