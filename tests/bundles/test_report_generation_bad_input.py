"""What the report generation bundle says about input that it cannot use, or only in part."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import run
from safetensors.torch import load_file, save_file

from tests.bundles.bundle_runs import TINY_REPORT_TRAINING, config_files, history, messages_of
from vlm3d_ext.data.report_store import ReportStore

TRAIN, INFERENCE = "report_generation/train", "report_generation/inference"


@pytest.fixture
def options(report_options, report_run, tmp_path):
    """Options of a short training into a folder of its own, with evidence that is there already."""
    return report_options(
        tmp_path / "run",
        **{**TINY_REPORT_TRAINING, "epochs": 1, "validation_interval": 1},
        evidence_dir=str(report_run / "evidence"),
    )


def reason_of(*names: str, workflow_type: str = "train", **options) -> str:
    """Return the first cause of the error that a run ends with, which must be one line."""
    *_, reason = messages_of(lambda: run(config_file=config_files(*names), workflow_type=workflow_type, **options))
    assert "\n" not in reason
    return reason


def changed_manifest(options: dict, folder: Path, change) -> dict:
    """Return options of the same data with a manifest that a function has changed."""
    source = Path(options["dataset_dir"])
    shutil.copytree(source, folder)
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))
    return {**options, "dataset_dir": str(folder)}


def test_a_language_model_that_is_not_there(options, monkeypatch):
    """No network: the message names the model, the page of its licence, and the tiny way out."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reason = reason_of(TRAIN, **{**options, "language_model": "meta-llama/Llama-3.1-8B-Instruct"})
    for part in ("meta-llama/Llama-3.1-8B-Instruct", "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct",
                 "data_prep.make_language_model", "--language_model"):  # fmt: skip
        assert part in reason
    assert "no/such/folder" in reason_of(TRAIN, **{**options, "language_model": "./no/such/folder"})


def test_a_missing_upstream_checkpoint_names_the_command(options):
    for name in ("encoder", "classification", "localization"):
        reason = reason_of(TRAIN, **{**options, f"{name}_ckpt": "no/such/model.pt"})
        assert "no/such/model.pt" in reason and f"--{name}_ckpt" in reason
        assert f"bundles/{name}/configs/train.json" in reason
    reason = reason_of(INFERENCE, workflow_type="infer", **{**options, "ckpt_path": "no/such/model.pt"}, output_dir="x")
    assert "bundles/report_generation/configs/train.json" in reason


def test_evidence_of_other_checkpoints_is_refused(options, encoder_run):
    reason = reason_of(TRAIN, **{**options, "encoder_ckpt": str(encoder_run / "models" / "model.pt")})
    assert "encoder" in reason and ("evidence" in reason or "different encoder" in reason)


def test_a_chain_whose_parts_do_not_belong_together_is_refused(options, encoder_run, tmp_path):
    foreign = {"encoder_ckpt": str(encoder_run / "models" / "model.pt"), "evidence_dir": str(tmp_path / "evidence")}
    assert "different encoder checkpoints" in reason_of(TRAIN, **{**options, **foreign})


def test_another_language_model_than_that_of_the_checkpoint(options, report_run, tmp_path, language_model):
    """Every shape fits; its weights are others."""
    other = shutil.copytree(language_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    inference = {**options, "ckpt_dir": str(report_run / "models"), "output_dir": str(tmp_path / "reports")}
    for name in TINY_REPORT_TRAINING:
        inference.pop(name, None)
    reason = reason_of(INFERENCE, workflow_type="infer", **{**inference, "language_model": str(other)})
    assert str(report_run / "models" / "model.pt") in reason and "--language_model" in reason
    assert not list((tmp_path / "reports").glob("valid*"))


def test_a_prompt_that_does_not_fit_loses_lesions_and_then_is_refused(options):
    reason = reason_of(TRAIN, **{**options, "max_prompt_tokens": 20})
    assert "without any lesion" in reason and "max_prompt_tokens" in reason


def test_reports_that_are_too_long_are_cut_and_said(options, capsys):
    run(config_file=config_files(TRAIN), **{**options, "max_report_tokens": 8})
    assert "more than max_report_tokens = 8 tokens are cut" in capsys.readouterr().out
    assert history(Path(options["run_dir"]))[0]["loss"] > 0


def test_cases_without_a_report_are_left_out_and_none_at_all_is_refused(options, tmp_path):
    def remove(content):
        for case in content["training"]:
            case["report"] = {"findings": "", "impression": ""}

    reason = reason_of(TRAIN, **changed_manifest(options, tmp_path / "data", remove))
    assert "none of the 8 cases has a report" in reason and "data_prep.write_reports" in reason


def test_a_report_without_sections_is_learnt_as_it_is(options, tmp_path):
    def flatten(content):
        for case in content["training"]:
            case["report"] = {"findings": "free text, no heading, no point", "impression": ""}

    run(config_file=config_files(TRAIN), **changed_manifest(options, tmp_path / "data", flatten))
    assert history(tmp_path / "run")[0]["loss"] > 0


def test_an_empty_text_is_a_report_too(options, report_run, tmp_path, monkeypatch):
    """A model that ends at once leaves an empty report, not an error."""
    from vlm3d_ext.networks.nets.image_prefix_language_model import GeneratedTexts, ImagePrefixLanguageModel

    def end_at_once(self, prompts, **settings):
        count = prompts.mask.shape[0]
        ids = torch.full((count, 1), self.tokenizer.eos_token_id)
        return GeneratedTexts(ids, ids > -1, torch.ones(count, dtype=torch.bool), [""] * count)

    monkeypatch.setattr(ImagePrefixLanguageModel, "generate", end_at_once)
    inference = {**options, "ckpt_dir": str(report_run / "models"), "output_dir": str(tmp_path / "reports")}
    for name in TINY_REPORT_TRAINING:
        inference.pop(name, None)
    run(config_file=config_files(INFERENCE), workflow_type="infer", **inference)
    store = ReportStore(tmp_path / "reports")
    report = store.read(store.volume_ids()[0])
    assert report["report_text"] == "" and report["findings_list"] == [] and report["report_length"] == 0


def test_running_out_of_memory_names_what_uses_less(options, monkeypatch):
    from vlm3d_ext.networks.nets import ReportTraining

    def run_out(self, *arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ReportTraining, "forward", run_out)
    with pytest.raises(Exception) as raised:
        run(config_file=config_files(TRAIN), **options)
    error = raised.value
    while error.__cause__ is not None:
        error = error.__cause__
    (note,) = error.__notes__
    for knob in ("--batch_size", "--max_report_tokens", "--gradient_checkpointing"):
        assert knob in note


def test_rewards_that_are_not_numbers_or_all_equal_move_nothing(options, report_run, monkeypatch, capsys):
    from vlm3d_ext.metrics.report_rewards import ReportReward

    true_call = ReportReward.__call__

    def without_a_number(self, reports, finished, references, labels):
        judged = true_call(self, reports, finished, references, labels)
        judged.total[:] = 0.5
        judged.total[0] = float("nan")
        return judged

    monkeypatch.setattr(ReportReward, "__call__", without_a_number)
    run_dir = Path(options["run_dir"])
    rl = {**options, "align_ckpt": str(report_run / "models" / "model.pt")}
    run(config_file=config_files(TRAIN, "report_generation/train_rl"), **rl)
    assert "have no reward and are left out" in capsys.readouterr().out
    (row,) = json.loads((run_dir / "output_rl" / "history.json").read_text())
    assert row["losses"]["without_lesson"] == 1
    before, after = (
        torch.load(path, weights_only=True)["model"]
        for path in (report_run / "models" / "model.pt", run_dir / "models_rl" / "model.pt")
    )
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_unknown_precision_is_named(options):
    assert "quantization must be one of" in reason_of(TRAIN, **{**options, "quantization": "int3"})
