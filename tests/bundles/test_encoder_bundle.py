"""The encoder bundle as its users run it."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, onnx_export, run, verify_net_in_out

from tests.bundles.bundle_runs import (
    BUNDLES,
    REPOSITORY,
    TINY_NETWORK,
    TINY_TRAINING,
    assert_same_curve,
    assert_same_weights,
    command,
    config_files,
    eager_export_network,
    history,
    kill_while_training,
    messages_of,
    run_command,
    two_processes,
    write_export_configs,
)
from tests.prepared_release import SIZE, make_prepared_release
from vlm3d_ext.data.feature_store import FeatureStore, FeatureStoreError
from vlm3d_ext.lineage import LineageError, read_lineage


def _options(prepared: Path, run_dir: Path, **further) -> dict:
    return {**TINY_TRAINING, "dataset_dir": prepared, "run_dir": run_dir, **further}


def test_training_lowers_the_loss_and_says_where_it_came_from(encoder_run, prepared):
    rows = history(encoder_run)
    assert rows[-1]["validation"]["loss"] < rows[0]["validation"]["loss"]  # validation draws are the same every time
    assert set(rows[0]["losses"]) == {"reconstruction", "region_share", "report_alignment"}
    lineage = read_lineage(encoder_run / "models" / "model.pt")
    assert lineage["bundle"] == "encoder" and lineage["phase"] == "pretraining"
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert lineage["manifest"]["fingerprint"] == manifest["fingerprint"]


def test_the_same_config_runs_from_three_places(prepared, tmp_path):
    """From the repository's root, from inside the bundle, and from elsewhere with --bundle_root; with one result."""
    options = {"epochs": 1, "max_cases": 4}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = tmp_path / "copy" / "encoder"
    shutil.copytree(BUNDLES / "encoder", copy, ignore=shutil.ignore_patterns("models", "output", "eval", "features"))
    places = {
        "root": (REPOSITORY, "bundles/encoder/configs/train.json", {}),
        "inside": (copy, "configs/train.json", {}),
        "elsewhere": (elsewhere, str(BUNDLES / "encoder/configs/train.json"), {"bundle_root": BUNDLES / "encoder"}),
    }
    for name, (cwd, config, further) in places.items():
        run_dir = {} if name == "inside" else {"run_dir": tmp_path / name}
        all_options = {**TINY_TRAINING, "dataset_dir": prepared, **run_dir, **options, **further}
        run_command(command([config], all_options), cwd=cwd)
    assert_same_weights(tmp_path / "root/models/model.pt", copy / "models/model.pt")
    assert_same_weights(tmp_path / "root/models/model.pt", tmp_path / "elsewhere/models/model.pt")


def test_two_processes_equal_one(prepared, tmp_path):
    """Two gloo ranks of batch 2 follow the curve of one process with batch 4."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(config_file=config_files("encoder/train"), **_options(str(prepared), str(one)))
    files = config_files("encoder/train", "_overlays/ddp")
    run_command(command(files, _options(prepared, two, batch_size=2), launcher=two_processes(29763)))
    assert_same_curve(one, two)


def test_accumulation_keeps_the_global_batch(monkeypatch):
    parser = ConfigParser()
    parser.read_config(config_files("encoder/train"))
    steps = {}
    for world_size in (1, 2, 4):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        parser.parse(reset=True)
        steps[world_size] = parser.get_parsed_content("accumulation_steps")
    assert steps == {1: 2, 2: 1, 4: 1}  # 16 per GPU on two GPUs is the source's global batch of 32


def test_killed_run_resumes_on_the_same_curve(prepared, tmp_path):
    """SIGKILL somewhere in the middle, `--resume true`, and every number is that of a run that was left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    epochs = 25
    run(config_file=config_files("encoder/train"), **_options(str(prepared), str(whole), epochs=epochs))
    arguments = command(config_files("encoder/train"), _options(prepared, killed, epochs=epochs))
    kill_while_training(arguments, killed)
    done = len(history(killed))
    assert 0 < done < epochs, f"killed after {done} of {epochs} epochs; the test needs a slower run"
    run(config_file=config_files("encoder/train"), **_options(str(prepared), str(killed), epochs=epochs, resume=True))
    assert history(killed) == history(whole)
    assert_same_weights(whole / "models/model.pt", killed / "models/model.pt")


def test_resuming_on_other_data_is_refused(encoder_run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    make_prepared_release(other, seed=5)
    copy = tmp_path / "run"
    shutil.copytree(encoder_run, copy)
    with pytest.raises(RuntimeError) as error:
        run(config_file=config_files("encoder/train"), **_options(str(other), str(copy), epochs=3, resume=True))
    assert "fingerprint" in str(error.value.__cause__)


def test_tracked_run_is_complete_in_mlflow(prepared, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    run_dir = tmp_path / "encoder"
    files = config_files("encoder/train", "_overlays/tracking")
    run_command(command(files, _options(prepared, run_dir)))
    files = config_files("encoder/train", "encoder/evaluate", "_overlays/tracking")
    run_command(command(files, _options(prepared, run_dir, num_resamples=5)))

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    runs = client.search_runs([client.get_experiment_by_name("vlm3d").experiment_id], order_by=["start_time"])
    runs = sorted(runs, key=lambda one: one.info.start_time)
    assert [one.info.status for one in runs] == ["FINISHED", "FINISHED"]
    training, evaluation = runs
    assert training.info.run_name.startswith("encoder-train-")
    assert training.data.params["hidden_size"] == "24" and training.data.params["epochs"] == "2"
    assert training.data.params["lineage.bundle"] == "encoder"
    curve = client.get_metric_history(training.info.run_id, "loss")
    assert len(curve) >= 4  # 2 epochs of 2 iterations, and the validation's
    assert {"loss_reconstruction", "region_share", "gradient_norm"} <= training.data.metrics.keys()
    artifacts = {item.path for item in client.list_artifacts(training.info.run_id)}
    assert {"config.json", "lineage.json", "history.json"} <= artifacts
    assert any(key.startswith("lineage.upstream.encoder") for key in evaluation.data.params)
    assert "effective_rank_trained" in evaluation.data.metrics
    assert {"representation.csv", "representation.png"} <= {
        i.path for i in client.list_artifacts(evaluation.info.run_id)
    }


def test_evaluation_compares_with_baselines(encoder_run, prepared, tmp_path):
    options = _options(str(prepared), str(encoder_run), output_dir=str(tmp_path), num_resamples=5)
    run(config_file=config_files("encoder/train", "encoder/evaluate"), **options)
    figures = json.loads((tmp_path / "representation.json").read_text())["figures"]
    for way in ("unguided", "guided"):
        assert 0 <= figures[f"linear_probe_macro_auroc_trained_{way}"] <= 1
    assert figures["reconstruction_error_trained"] != figures["reconstruction_error_untrained"]
    assert figures["reconstruction_error_training_mean"] > 0
    assert figures["linear_probe_macro_auroc_histogram"] > 0.5


def test_inference_writes_features_and_continues(encoder_run, prepared, tmp_path):
    (config,) = config_files("encoder/inference")
    options = {
        **TINY_NETWORK,
        "dataset_dir": str(prepared),
        "run_dir": str(encoder_run),
        "output_dir": str(tmp_path / "features"),
        "num_workers": 0,
    }
    run(config_file=config, workflow_type="infer", **options)
    store = FeatureStore(tmp_path / "features")
    features = store.read("train_1_a_1")
    assert features["global_features"].shape == (24,) and features["region_features"].shape == (20, 24)
    assert np.isnan(features["labels"][5]) and set(np.unique(features["labels"][:5])) <= {0.0, 1.0}
    files = sorted(store.folder.glob("*.npz"))
    assert len(files) == 18

    before = files[0].read_bytes()
    changed = {path: path.stat().st_mtime_ns for path in files[1:]}
    files[0].unlink()
    run(config_file=config, workflow_type="infer", **options)
    assert files[0].read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in files[1:]} == changed
    run(config_file=config, workflow_type="infer", **options)  # nothing left to do

    with pytest.raises(RuntimeError) as error:
        run(config_file=config, workflow_type="infer", **options, use_anatomical_mask=False)
    assert isinstance(error.value.__cause__, FeatureStoreError)
    assert "use_anatomical_mask" in str(error.value.__cause__)


def test_missing_and_unfitting_checkpoints_say_what_to_do(encoder_run, prepared, tmp_path):
    (config,) = config_files("encoder/inference")
    options = {**TINY_NETWORK, "dataset_dir": str(prepared), "num_workers": 0, "output_dir": str(tmp_path / "features")}

    def message_of(**further) -> str:
        return " | ".join(messages_of(lambda: run(config_file=config, workflow_type="infer", **{**options, **further})))

    assert "nowhere" in message_of(run_dir=str(tmp_path / "nowhere"))
    unfitting = message_of(run_dir=str(encoder_run), hidden_size=48, output_dir=str(tmp_path / "other"))
    assert "model.pt" in unfitting and "24" in unfitting and "48" in unfitting


def test_evaluating_on_other_data_is_refused_unless_allowed(encoder_run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    make_prepared_release(other, seed=5)
    options = _options(str(other), str(encoder_run), output_dir=str(tmp_path / "eval"), num_resamples=2)
    files = config_files("encoder/train", "encoder/evaluate")
    with pytest.raises(RuntimeError) as error:
        run(config_file=files, **options)
    assert isinstance(error.value.__cause__, LineageError)
    run(config_file=files, **options, allow_lineage_mismatch=True)


@pytest.fixture(scope="module")
def export_configs(tmp_path_factory):
    return write_export_configs(tmp_path_factory.mktemp("export"), "encoder", TINY_NETWORK, SIZE)


@pytest.fixture(scope="module")
def eager(encoder_run, export_configs):
    return eager_export_network(export_configs, encoder_run / "models/model.pt")


def _export_arguments(encoder_run, export_configs, filepath):
    return {
        "net_id": "export_network",
        "filepath": str(filepath),
        "ckpt_file": str(encoder_run / "models/model.pt"),
        "meta_file": str(export_configs / "metadata.json"),
        "config_file": str(export_configs / "inference.json"),
        "key_in_ckpt": "model",
        "input_shape": [2, 1, *SIZE],
    }


def test_verify_net_in_out(export_configs):
    verify_net_in_out(
        net_id="export_network",
        meta_file=str(export_configs / "metadata.json"),
        config_file=str(export_configs / "inference.json"),
        device="cpu",
    )


def test_metadata_of_another_network_are_refused(export_configs, tmp_path):
    metadata = json.loads((export_configs / "metadata.json").read_text())
    metadata["network_data_format"]["outputs"]["pred"]["num_channels"] = 22
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    arguments = {"net_id": "export_network", "config_file": str(export_configs / "inference.json"), "device": "cpu"}
    with pytest.raises(ValueError, match="`21` doesn't match: `22`"):
        verify_net_in_out(meta_file=str(tmp_path / "metadata.json"), **arguments)


def test_torchscript_export_agrees(encoder_run, export_configs, eager, example, tmp_path):
    ckpt_export(**_export_arguments(encoder_run, export_configs, tmp_path / "model.ts"), use_trace=True)
    script = torch.jit.load(tmp_path / "model.ts")
    with torch.no_grad():
        torch.testing.assert_close(script(example), eager(example), rtol=1e-4, atol=1e-5)


def test_onnx_export_agrees(encoder_run, export_configs, eager, example, tmp_path):
    onnx_export(**_export_arguments(encoder_run, export_configs, tmp_path / "model.onnx"), use_trace=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (result,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(result, eager(example).numpy(), rtol=1e-3, atol=1e-4)


def test_torch_export_agrees(encoder_run, export_configs, eager, example, tmp_path):
    from vlm3d_ext.engines.torch_export import main

    filepath = tmp_path / "encoder.pt2"
    shape = ",".join(map(str, example.shape))
    main(["--config_file", str(export_configs / "inference.json"), "--ckpt_file", str(encoder_run / "models/model.pt"),
          "--input_shape", shape, "--filepath", str(filepath)])  # fmt: skip
    extra = {"config.json": ""}
    program = torch.export.load(filepath, extra_files=extra)
    assert json.loads(extra["config.json"])["hidden_size"] == 24
    with torch.no_grad():
        for batch in (example[:1], example, example.repeat(2, 1, 1, 1, 1)):
            torch.testing.assert_close(program.module()(batch), eager(batch), rtol=1e-4, atol=1e-5)
