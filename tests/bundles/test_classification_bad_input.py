"""What the classification bundle says about input that it cannot use, or only in part."""

import math
import shutil
from pathlib import Path

import pytest
from monai.bundle import run

from tests.bundles.bundle_runs import checkpoint_weights, config_files, history, messages_of, write_labels_csv
from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.data.case_manifest import SPLITS, CaseManifest
from vlm3d_ext.text.label_set import load_label_set

NAMES = load_label_set("ct_rate_18").names


@pytest.fixture(scope="module")
def cases(prepared) -> list[dict]:
    return CaseManifest(prepared / "manifest.json").cases(SPLITS)


def reason_of_training(options: dict) -> str:
    """Return the first cause of the error that train.json ends with, which must be one line."""
    *_, reason = messages_of(lambda: run(config_file=config_files("classification/train"), **options))
    assert "\n" not in reason
    assert not (Path(options["run_dir"]) / "models").exists()  # nothing half-made is left
    return reason


def reason_of_evaluation(options: dict) -> str:
    files = config_files("classification/train", "classification/evaluate")
    *_, reason = messages_of(lambda: run(config_file=files, **options))
    assert "\n" not in reason
    return reason


def reason_of_inference(options: dict) -> str:
    (config,) = config_files("classification/inference")
    *_, reason = messages_of(lambda: run(config_file=config, workflow_type="infer", **options))
    assert "\n" not in reason
    assert not list(Path(options["output_dir"]).glob("valid_*"))
    return reason


def test_misspelt_label_column(training_options, cases, tmp_path):
    table = write_labels_csv(tmp_path / "labels.csv", cases, renamed={"Cardiomegaly": "Cardiomegally"})
    reason = reason_of_training(training_options(tmp_path / "run", labels_csv=str(table)))
    assert str(table) in reason and "'Cardiomegaly'" in reason and "'Cardiomegally'" in reason


def test_missing_label_table(training_options, tmp_path):
    reason = reason_of_training(training_options(tmp_path / "run", labels_csv=str(tmp_path / "nowhere.csv")))
    assert "nowhere.csv" in reason and "no such file" in reason


def test_rows_without_a_case_and_cases_without_a_row_are_listed(training_options, cases, tmp_path, capsys):
    foreign = {**cases[0], "volume_id": "train_900_a_1"}
    table = write_labels_csv(tmp_path / "labels.csv", [*cases[1:], foreign])
    run(config_file=config_files("classification/train"), **training_options(tmp_path / "run", labels_csv=str(table)))
    text = capsys.readouterr().out
    assert f"{table}: 17 of 18 ids label 17 of 18 prepared cases" in text
    assert "rows without a prepared case: 1: train_900_a_1\n" in text
    assert f"prepared cases without a row, all their labels unknown: 1: {cases[0]['volume_id']}\n" in text


def test_label_without_any_known_value_and_validation_without_positives(training_options, cases, tmp_path, capsys):
    """What cannot be measured is undefined and said; training goes on, and nothing is calibrated to it."""
    row = NAMES.index("Pleural effusion")
    for case in cases:
        case["labels"] = [math.nan if index == row else label for index, label in enumerate(case["labels"])]
        if case in cases[8:12]:  # the validation split
            case["labels"] = [label if math.isnan(label) else 0.0 for label in case["labels"]]
    table = write_labels_csv(tmp_path / "labels.csv", cases)
    run_dir = tmp_path / "run"
    run(config_file=config_files("classification/train"), **training_options(run_dir, labels_csv=str(table)))
    text = capsys.readouterr().out
    unknown = text.split("unknown in all training cases, left out of the loss")[1].split("\n")[0]
    assert "Hiatal hernia" in unknown and "Pleural effusion" in unknown
    assert "Cardiomegaly" in text.split("no positive in validation")[1].split("\n")[0]
    assert [one["validation"]["macro_auroc"] for one in history(run_dir)] == [None, None]
    assert all(one["validation"]["loss"] > 0 for one in history(run_dir))
    weights = checkpoint_weights(run_dir / "models" / "model.pt")
    assert [NAMES[index] for index in weights["classifier.trained_findings"].nonzero()] == ["Cardiomegaly"]
    assert (weights["classifier.thresholds"] == 0.5).all() and weights["classifier.temperature"] == 1
    assert all(value.isfinite().all() for value in weights.values())


def test_missing_encoder_checkpoint(training_options, tmp_path):
    reason = reason_of_training(training_options(tmp_path / "run", encoder_ckpt=str(tmp_path / "nowhere.pt")))
    assert "nowhere.pt does not exist" in reason and "--encoder_ckpt" in reason
    assert "python -m monai.bundle run --config_file bundles/encoder/configs/train.json" in reason


def test_encoder_checkpoint_of_another_width(training_options, encoder_run, tmp_path):
    reason = reason_of_training(training_options(tmp_path / "run", hidden_size=48))
    assert str(encoder_run / "models" / "model.pt") in reason and "ThreeDVisionEncoder" in reason
    assert "(24," in reason and "(48," in reason and "--encoder_ckpt" in reason


def test_missing_classification_checkpoint(training_options, inference_options, tmp_path):
    missing = {"ckpt_path": str(tmp_path / "nowhere.pt")}
    for reason in (
        reason_of_inference(inference_options(tmp_path / "predictions", **missing)),
        reason_of_evaluation(training_options(tmp_path / "run", **missing)),
    ):
        assert "nowhere.pt does not exist" in reason and "--ckpt_path" in reason
        assert "bundles/classification/configs/train.json" in reason
    assert not (tmp_path / "predictions").exists()


def test_classification_checkpoint_of_another_label_set(
    training_options, inference_options, classification_run, tmp_path
):
    """Both sets have 18 findings, so shapes alone would let it pass."""
    further = {"label_set": "vlm3d_18"}
    for reason in (
        reason_of_inference(inference_options(tmp_path / "predictions", **further)),
        reason_of_evaluation(training_options(classification_run, output_dir=str(tmp_path / "eval"), **further)),
    ):
        assert str(classification_run / "models" / "model.pt") in reason
        assert "label set ct_rate_18 (18 findings), this run of vlm3d_18 (18)" in reason
        assert "only the checkpoint has Medical material" in reason and "--label_set ct_rate_18" in reason
    assert not (tmp_path / "eval").exists()


def test_classification_checkpoint_of_another_width(inference_options, classification_run, tmp_path):
    reason = reason_of_inference(inference_options(tmp_path / "predictions", projection_dim=32))
    assert str(classification_run / "models" / "model.pt") in reason and "VolumeClassifier" in reason
    assert "16" in reason and "32" in reason and "--ckpt_path" in reason


def test_encoder_checkpoint_in_place_of_a_classification_checkpoint(inference_options, encoder_run, tmp_path):
    path = str(encoder_run / "models" / "model.pt")
    reason = reason_of_inference(inference_options(tmp_path / "predictions", ckpt_path=path))
    assert path in reason and "'labels'" in reason and "--ckpt_path" in reason


def test_text_model_without_tokenizer(training_options, text_model, tmp_path):
    folder = tmp_path / "text_model"
    shutil.copytree(text_model, folder, ignore=shutil.ignore_patterns("tokenizer*", "vocab.txt"))
    reason = reason_of_training(training_options(tmp_path / "run", text_model=str(folder)))
    assert str(folder) in reason and "no tokenizer" in reason and "--text_model" in reason


def test_missing_text_model(training_options, tmp_path):
    folder = tmp_path / "nowhere"
    reason = reason_of_training(training_options(tmp_path / "run", text_model=str(folder)))
    assert str(folder) in reason and "does not exist" in reason and "--text_model" in reason


def test_text_model_of_another_width(training_options, tmp_path):
    folder = make_tiny_text_model(tmp_path / "text_model", hidden_size=32)
    reason = reason_of_training(training_options(tmp_path / "run", text_model=str(folder)))
    assert str(folder) in reason and "32" in reason and "16" in reason and "--text_hidden_size 32" in reason


def test_text_model_too_short_for_the_prompts_of_the_label_set(training_options, tmp_path):
    folder = make_tiny_text_model(tmp_path / "text_model", max_positions=8)
    reason = reason_of_training(training_options(tmp_path / "run", text_model=str(folder)))
    assert "8 positions less 2 soft tokens" in reason and "shorten the prompt" in reason


def test_prompt_longer_than_the_text_encoder_takes(inference_options, text_model, tmp_path):
    prompts = {"Cavitation": "A cavity " + "with a thick wall " * 20}
    options = inference_options(tmp_path / "predictions", prompts=prompts, text_model=str(text_model))
    reason = reason_of_inference(options)
    assert "'Cavitation'" in reason and "48 positions less 2 soft tokens" in reason and "shorten the prompt" in reason


def test_prompt_without_a_text_encoder_or_with_another(inference_options, tmp_path):
    prompts = {"Cavitation": "A cavity is seen."}
    reason = reason_of_inference(inference_options(tmp_path / "missing", prompts=prompts))
    assert "no/such/folder" in reason and "--text_model" in reason
    other = make_tiny_text_model(tmp_path / "text_model", seed=1)
    reason = reason_of_inference(inference_options(tmp_path / "other", prompts=prompts, text_model=str(other)))
    assert str(other) in reason and "not the one that the classifier was trained with" in reason


def test_prompt_that_is_a_finding_of_the_label_set(inference_options, text_model, tmp_path):
    prompts = {"Lung nodule": "A nodule is seen."}
    options = inference_options(tmp_path / "predictions", prompts=prompts, text_model=str(text_model))
    reason = reason_of_inference(options)
    assert "Lung nodule is a finding of ct_rate_18 already" in reason


def test_damaged_classification_checkpoint(inference_options, classification_run, tmp_path):
    content = (classification_run / "models" / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(content[: len(content) // 2])
    options = inference_options(tmp_path / "predictions", ckpt_path=str(tmp_path / "model.pt"))
    *messages, _ = messages_of(
        lambda: run(config_file=config_files("classification/inference"), workflow_type="infer", **options)
    )
    assert any(f"{tmp_path / 'model.pt'} is no" in message and "checkpoint" in message for message in messages)
