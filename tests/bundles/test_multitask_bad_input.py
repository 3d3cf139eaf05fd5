"""What the multitask bundle says about input that it cannot use."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from monai.bundle import run
from safetensors.torch import load_file, save_file

from tests.bundles.bundle_runs import REPOSITORY, TINY_TRAINING, command, config_files, messages_of, run_command_here

TRAIN, EVALUATE = "multitask/train", "multitask/evaluate"
PARTS = ("encoder", "classification", "localization", "report_generation")


def reason_of_training(options: dict, *overlays: str) -> str:
    """Return the first cause of the error that train.json ends with, which must be one line."""
    *_, reason = messages_of(lambda: run(config_file=config_files(TRAIN, *overlays), **options))
    assert "\n" not in reason
    assert not (Path(options["run_dir"]) / "models").exists()  # nothing half-made is left
    return reason


def reason_of_evaluation(options: dict) -> str:
    *_, reason = messages_of(lambda: run(config_file=config_files(TRAIN, EVALUATE), **options))
    assert "\n" not in reason
    return reason


@pytest.fixture
def options(multitask_options, tmp_path):
    """Options of a short training into a folder of its own."""
    return multitask_options(tmp_path / "run", epochs=1, max_cases=4)


@pytest.fixture(scope="module")
def foreign_encoder(prepared_lesions, tmp_path_factory) -> Path:
    """Checkpoint of an encoder of the same data and sizes, from another seed."""
    run_dir = tmp_path_factory.mktemp("foreign") / "encoder"
    options = {**TINY_TRAINING, "epochs": 1, "seed": 1, "dataset_dir": str(prepared_lesions), "run_dir": str(run_dir)}
    run(config_file=config_files("encoder/train"), **options)
    return run_dir / "models" / "model.pt"


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_upstream_checkpoint_names_file_command_and_parameter(options, part):
    reason = reason_of_training({**options, f"{part}_ckpt": "no/such/model.pt"})
    assert "no/such/model.pt does not exist" in reason and f"--{part}_ckpt" in reason
    assert f"python -m monai.bundle run --config_file bundles/{part}/configs/train.json" in reason


def test_an_encoder_of_another_chain_is_refused_before_any_scan_is_read(options, foreign_encoder, tmp_path):
    """By lineage; and where that is allowed, by its weights: a head on another encoder is worth nothing."""
    evidence = tmp_path / "evidence"
    options |= {"encoder_ckpt": str(foreign_encoder), "evidence_dir": str(evidence)}
    reason = reason_of_training(options)
    assert "2 different encoder checkpoints" in reason and "--allow_lineage_mismatch True" in reason
    reason = reason_of_training({**options, "allow_lineage_mismatch": True})
    assert str(foreign_encoder) in reason and "its encoder is not the one in" in reason
    assert "tensors differ" in reason and "--encoder_ckpt and --classification_ckpt" in reason
    assert not list(evidence.glob("*_a_1.*"))


def test_other_checkpoints_in_a_part_s_place(options, report_run):
    path = str(report_run / "models" / "model.pt")
    reason = reason_of_training({**options, "encoder_ckpt": path, "allow_lineage_mismatch": True})
    assert path in reason and "encoder" in reason
    lists = {"classification": "labels", "localization": "diseases", "report_generation": "language_model"}
    encoder = str(report_run.parent / "encoder" / "models" / "model.pt")
    for part, entry in lists.items():
        reason = reason_of_training({**options, f"{part}_ckpt": encoder, "allow_lineage_mismatch": True})
        assert f"{encoder}" in reason and (f"{entry!r}" in reason or "tensors differ" in reason), part
        assert f"--{part}_ckpt" in reason


@pytest.mark.parametrize(
    ("part", "sizes"),
    [
        ("encoder", {"mlp_dim": 48}),
        ("classification", {"projection_dim": 24}),
        ("localization", {"base_channels": 16}),
        ("report_generation", {"num_queries": 6}),
    ],
)
def test_parts_of_other_sizes_are_named(options, report_run, part, sizes):
    reason = reason_of_training({**options, **sizes})
    assert str(report_run.parent / part / "models" / "model.pt") in reason
    assert "do not fit" in reason and f"--{part}_ckpt" in reason


def test_another_language_model_than_that_of_the_report_generator(options, report_run, language_model, tmp_path):
    """Every shape fits; its weights are others."""
    other = shutil.copytree(language_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    reason = reason_of_training({**options, "language_model": str(other)})
    assert str(report_run / "models" / "model.pt") in reason and "--language_model" in reason


@pytest.mark.parametrize(
    ("further", "expected"),
    [
        ({"weighting": "dynamic"}, "weighting must be one of ('fixed', 'uncertainty'), got 'dynamic'"),
        ({"sampling": "balanced"}, "sampling must be one of ('available', 'task_weighted'), got 'balanced'"),
        (
            {"sampling": "task_weighted", "task_weights::localization": -1.0},
            "task_weights must be numbers from 0 on for ('classification', 'localization', 'generation')",
        ),
        ({"crop_size": [4, 10, 8]}, "crop_size must be multiples of the patch (2, 4, 4), got (4, 10, 8)"),
        ({"quantization": "int3"}, "quantization must be one of"),
    ],
)
def test_settings_that_there_are_not(options, further, expected):
    assert expected in reason_of_training({**options, **further})


def test_an_option_that_no_config_knows_is_refused_with_the_nearest(options, monkeypatch):
    arguments = command(config_files(TRAIN), {**options, "task_weight": 1})
    *_, reason = messages_of(lambda: run_command_here(arguments, REPOSITORY, monkeypatch))
    assert "task_weight" in reason and "--task_weights" in reason
    assert not Path(options["run_dir"]).exists()


def test_a_disease_set_of_another_order(options, tmp_path):
    content = json.loads((files("vlm3d_ext.text.disease_sets") / "chest_ct_5.json").read_text())
    content["diseases"].reverse()
    path = tmp_path / "set.json"
    path.write_text(json.dumps({**content, "name": "changed"}))
    reason = reason_of_training({**options, "disease_set": str(path), "evidence_dir": str(tmp_path / "evidence")})
    assert "(disease set chest_ct_5)" in reason and "--disease_set chest_ct_5" in reason


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_without_a_checkpoint(options):
    reason = reason_of_evaluation({**options, "ckpt_path": "no/such/model.pt"})
    assert "no/such/model.pt does not exist" in reason and "--ckpt_path" in reason
    assert "bundles/multitask/configs/train.json" in reason


def test_evaluation_with_a_checkpoint_of_other_labels_or_other_preparation(
    multitask_options, multitask_run, report_run, tmp_path
):
    """The same findings in another order, so shapes alone would let it pass."""
    content = torch.load(multitask_run / "models" / "model.pt", weights_only=True)
    reversed_labels = {
        name: value[::-1] if isinstance(value, list) else value for name, value in content["labels"].items()
    }
    for entry, value, parts in (
        ("labels", reversed_labels, ["label set ct_rate_18", "another order", "--label_set"]),
        ("preparation", {"settings": {"depth": 64}}, ["depth is 64 there and None here", "prepare the data alike"]),
    ):
        path = tmp_path / f"{entry}.pt"
        torch.save({**content, entry: value}, path)
        output_dir = tmp_path / entry
        options = multitask_options(multitask_run, output_dir=str(output_dir), ckpt_path=str(path), max_cases=3)
        reason = reason_of_evaluation(options)
        assert str(path) in reason and all(part in reason for part in parts), reason
        assert not list(output_dir.glob("*.json"))


def test_comparison_with_an_evaluation_of_other_scans(
    multitask_options, multitask_run, single_task_evaluations, tmp_path
):
    options = multitask_options(multitask_run, output_dir=str(tmp_path / "eval"), max_cases=3, num_montages=0)
    reason = reason_of_evaluation({**options, "num_resamples": 2, "single_task_dirs": single_task_evaluations})
    assert str(Path(single_task_evaluations["classification"]) / "classification_unguided.json") in reason
    assert "is of 6 scans, the joint evaluation of 3" in reason
    assert (tmp_path / "eval" / "reports.json").is_file() and not (tmp_path / "eval" / "comparison.json").exists()
