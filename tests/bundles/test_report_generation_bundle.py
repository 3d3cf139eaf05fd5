"""The report generation bundle as its users run it."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, run

from tests.bundles.bundle_runs import (
    BUNDLES,
    REPOSITORY,
    TINY_REPORT_TRAINING,
    assert_same_curve,
    assert_same_weights,
    checkpoint_weights,
    command,
    config_files,
    history,
    kill_while_training,
    run_command,
    run_command_here,
    two_processes,
)
from vlm3d_ext.checkpoint_files import file_sha256
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.report_store import ReportStore
from vlm3d_ext.lineage import main as print_lineage
from vlm3d_ext.lineage import read_lineage
from vlm3d_ext.text.language_model_record import LanguageModelRecord

TRAIN, RL = "report_generation/train", "report_generation/train_rl"
EVALUATE, INFERENCE = "report_generation/evaluate", "report_generation/inference"
SYSTEMS = ["generated", "other patients' scans", "nearest neighbour", "random report", "all normal", "reference"]


@pytest.fixture(scope="module")
def evaluation(report_options, report_run) -> dict:
    """Content of the aligned generator's evaluation."""
    run(config_file=config_files(TRAIN, EVALUATE), **report_options(report_run), num_resamples=20)
    return json.loads((report_run / "eval" / "reports.json").read_text())


@pytest.fixture(scope="module")
def rl_run(report_options, report_run) -> Path:
    """Run folder of the aligned generator after a little reinforcement learning."""
    options = {**report_options(report_run), **TINY_REPORT_TRAINING, "epochs": 2, "validation_interval": 1}
    # long enough for samples to end, and enough of them to differ
    options |= {"reward_penalties": {}, "max_report_tokens": 120, "num_samples": 8, "warmup_epochs": 0}
    run(config_file=config_files(TRAIN, RL), **options)
    return report_run


@pytest.fixture(scope="module")
def written(report_options, report_run, tmp_path_factory) -> ReportStore:
    """What inference leaves of the test split."""
    options = report_options(report_run, output_dir=str(tmp_path_factory.mktemp("reports") / "all"))
    run(config_file=config_files(INFERENCE), workflow_type="infer", **options)
    return ReportStore(options["output_dir"])


def texts_of(store: ReportStore) -> dict[str, str]:
    return {volume_id: store.read(volume_id)["report_text"] for volume_id in store.volume_ids()}


def test_training_learns_and_says_where_it_came_from(report_run, lesion_encoder_run, prepared_lesions, capsys):
    rows = history(report_run)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    validated = [row["validation"]["loss"] for row in rows if row["validation"]]
    assert min(validated) < validated[0]
    lineage = read_lineage(report_run / "models" / "model.pt")
    assert lineage["bundle"] == "report_generation" and lineage["phase"] == "align"
    fingerprint = CaseManifest(prepared_lesions / "manifest.json").fingerprint
    for name in ("encoder", "classification", "localization"):
        upstream = lineage["upstream"][name]
        assert upstream["sha256"] == file_sha256(lesion_encoder_run.parent / name / "models" / "model.pt")
        assert upstream["lineage"]["manifest"]["fingerprint"] == fingerprint
    print_lineage([str(report_run / "models" / "model.pt")])
    assert capsys.readouterr().out.count("upstream encoder") == 3


def test_checkpoint_holds_projector_and_adapters_only(report_run, language_model):
    content = torch.load(report_run / "models" / "model.pt", weights_only=True)
    names = set(content["model"])
    assert {name.split(".")[0] for name in names} == {"projector", "language_model"}
    assert all("lora_" in name for name in names if name.startswith("language_model."))
    assert any("lora_" in name for name in names)
    assert content["language_model"] == LanguageModelRecord(str(language_model), language_model).state_dict()


def test_base_language_model_is_unchanged_by_training(report_run, language_model):
    """Its files are what the checkpoint says it began from, and the adapters have moved."""
    record = torch.load(report_run / "models" / "model.pt", weights_only=True)["language_model"]
    assert record["weights_sha256"] == LanguageModelRecord("again", language_model).weights_sha256
    adapters = {k: v for k, v in checkpoint_weights(report_run / "models" / "model.pt").items() if "lora_B" in k}
    assert all(value.abs().max() > 0 for value in adapters.values())  # they begin at zero


def test_a_fresh_process_writes_the_same_reports(written, report_options, report_run, tmp_path):
    options = report_options(report_run, output_dir=str(tmp_path / "again"), workflow_type="infer", batch_size=2)
    run_command(command(config_files(INFERENCE), options))
    assert texts_of(ReportStore(tmp_path / "again")) == texts_of(written)


def test_each_report_is_json_text_and_tables(written):
    volume_ids = written.volume_ids()
    assert len(volume_ids) == 6
    report = written.read(volume_ids[0])
    assert report["volume_id"] == volume_ids[0] and report["report_id"].startswith(volume_ids[0])
    assert written.text_path(volume_ids[0]).read_text().strip() == report["report_text"]
    assert report["report_length"] == len(report["report_text"].split())
    assert set(report["sections"]) == {"findings", "impression", "recommendations"}
    assert "not for clinical use" in report["metadata"]["notice"]
    assert report["metadata"]["prompt"].startswith("<image>")
    challenge = json.loads((written.folder / "tables" / "challenge_reports.json").read_text())
    assert challenge["type"] == "Report generation" and len(challenge["generated_reports"]) == 6
    assert challenge["generated_reports"][0] == {
        "input_image_name": f"{volume_ids[0]}.nii.gz", "report": report["report_text"]
    }  # fmt: skip


def test_inference_goes_on_where_it_was_killed(report_options, report_run, written, tmp_path):
    options = report_options(report_run, output_dir=str(tmp_path / "killed"), workflow_type="infer", batch_size=1)
    arguments = command(config_files(INFERENCE), options)
    process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("valid*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = ReportStore(tmp_path / "killed")
    done = {volume_id: store.path(volume_id).stat().st_mtime_ns for volume_id in store.volume_ids()}
    assert done
    run(config_file=config_files(INFERENCE), **options)
    assert texts_of(store) == texts_of(written)
    assert all(store.path(volume_id).stat().st_mtime_ns == changed for volume_id, changed in done.items())


def test_evaluation_stands_beside_baselines_and_the_control(evaluation, report_run):
    assert list(evaluation["systems"]) == SYSTEMS
    reference = evaluation["systems"]["reference"]
    assert reference["bleu_4_corpus"] == pytest.approx(1.0)
    # the tiny release labels pericardial effusions of which its reports say nothing
    assert reference["clinical_f1"] > evaluation["systems"]["all normal"]["clinical_f1"] == 0
    assert evaluation["num_cases"] == 5 and len(evaluation["per_label"]["generated"]) == 18  # one case has no report
    folder = report_run / "eval"
    for name in ("reports.csv", "reports_per_case.csv", "reports_per_label.csv", "reports.png", "reports_examples.txt"):
        assert (folder / name).stat().st_size > 0
    control = ReportStore(folder / "reports_of_other_scans")
    patient = {volume_id: volume_id.split("_")[1] for volume_id in control.volume_ids()}
    for volume_id in control.volume_ids():
        evidence_of = control.read(volume_id)["metadata"]["evidence_of"]
        assert patient[volume_id] != evidence_of.split("_")[1]


def test_evaluation_writes_only_what_is_missing(evaluation, report_options, report_run):
    folder = report_run / "eval"
    store = ReportStore(folder / "reports")
    first, *others = store.volume_ids()
    text, before = store.read(first)["report_text"], {v: store.path(v).stat().st_mtime_ns for v in others}
    store.path(first).unlink()
    run(config_file=config_files(TRAIN, EVALUATE), **report_options(report_run), num_resamples=20)
    assert store.read(first)["report_text"] == text
    assert {v: store.path(v).stat().st_mtime_ns for v in others} == before
    (folder / "reports.json").unlink()
    run(config_file=config_files(TRAIN, EVALUATE), **report_options(report_run), num_resamples=20)  # nothing pending
    assert json.loads((folder / "reports.json").read_text()) == evaluation


def test_reinforcement_learning_is_logged_and_its_checkpoint_is_used_like_the_other(
    rl_run, report_options, language_model, tmp_path
):
    rows = json.loads((rl_run / "output_rl" / "history.json").read_text())
    logged = {"reward", "reward_spread", "clinical", "clinical_spread", "format", "num_words", "num_positives"}
    assert len(rows) == 2 and set(rows[-1]["losses"]) >= logged | {"distinct_share", "without_lesson", "finished"}
    assert set(rows[-1]["validation"]) >= {"clinical_f1", "reward", "num_words", "num_positives"}
    lineage = read_lineage(rl_run / "models_rl" / "model.pt")
    assert lineage["phase"] == "rl"
    assert lineage["upstream"]["align"]["sha256"] == file_sha256(rl_run / "models" / "model.pt")
    before, after = (checkpoint_weights(rl_run / name / "model.pt") for name in ("models", "models_rl"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("projector."))
    assert all(not torch.equal(after[name], value) for name, value in before.items() if "lora_B" in name)
    options = report_options(rl_run, ckpt_dir=str(rl_run / "models_rl"), output_dir=str(tmp_path))
    run(config_file=config_files(TRAIN, EVALUATE), **options, num_resamples=2, max_cases=3)
    assert (tmp_path / "reports.json").is_file()


def test_the_same_config_runs_from_three_places(report_options, tmp_path, monkeypatch):
    """From the repository's root, from inside the bundle, and from elsewhere with --bundle_root; with one result."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = tmp_path / "copy" / "report_generation"
    shutil.copytree(BUNDLES / "report_generation", copy)
    places = {
        "root": (REPOSITORY, config_files(TRAIN), {}),
        "inside": (copy, ["configs/train.json"], {}),
        "elsewhere": (elsewhere, [str(copy / "configs" / "train.json")], {"bundle_root": str(copy)}),
    }
    for name, (cwd, files, further) in places.items():
        options = {**report_options(tmp_path / name), **TINY_REPORT_TRAINING, **further, "epochs": 1}
        options["validation_interval"] = 1
        run_command_here(command(files, options), cwd, monkeypatch)
    for name in ("inside", "elsewhere"):
        assert_same_weights(tmp_path / "root" / "models" / "model.pt", tmp_path / name / "models" / "model.pt")


def test_two_processes_compute_what_one_does(report_options, tmp_path):
    # four cases make whole batches both ways
    training = {**TINY_REPORT_TRAINING, "epochs": 4, "validation_interval": 1, "global_batch_size": 4, "max_cases": 4}
    evidence = {"evidence_dir": str(tmp_path / "evidence")}
    two = report_options(tmp_path / "two", **{**training, "batch_size": 2, **evidence})
    run_command(command([*config_files(TRAIN), *config_files("_overlays/ddp")], two, launcher=two_processes(29551)))
    run(
        config_file=config_files(TRAIN), **report_options(tmp_path / "one", **{**training, "batch_size": 4, **evidence})
    )
    assert_same_curve(tmp_path / "one", tmp_path / "two")


def test_a_killed_training_goes_on_as_if_nothing_had_happened(report_options, report_run, tmp_path):
    training = {**TINY_REPORT_TRAINING, "epochs": 8, "validation_interval": 2}
    evidence = {"evidence_dir": str(report_run / "evidence")}
    killed = report_options(tmp_path / "killed", **training, **evidence)
    kill_while_training(command(config_files(TRAIN), killed), tmp_path / "killed")
    assert (tmp_path / "killed" / "models" / "last.pt").is_file()
    run(config_file=config_files(TRAIN), **killed, resume=True)
    run(config_file=config_files(TRAIN), **report_options(tmp_path / "whole", **training, **evidence))
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert_same_weights(tmp_path / "killed" / "models" / "model.pt", tmp_path / "whole" / "models" / "model.pt")


def test_resumed_reinforcement_learning_keeps_its_reference(report_options, report_run, tmp_path):
    """The divergence is from the aligned model, also in a run that goes on from a checkpoint of its own."""
    options = {**report_options(report_run), **TINY_REPORT_TRAINING, "validation_interval": 1, "kl_weight": 0.5}
    # long enough for samples to end, which unfinished ones do not earn, and enough of them to differ
    options |= {"reward_penalties": {}, "max_report_tokens": 120, "num_samples": 8}
    folders = {
        name: {"ckpt_dir": str(tmp_path / name), "output_dir": str(tmp_path / name)} for name in ("two", "whole")
    }
    run(config_file=config_files(TRAIN, RL), **{**options, **folders["whole"], "epochs": 2, "warmup_epochs": 0})
    run(config_file=config_files(TRAIN, RL), **{**options, **folders["two"], "epochs": 1, "warmup_epochs": 0})
    rl = {**options, **folders["two"], "epochs": 2, "resume": True, "warmup_epochs": 0}
    run(config_file=config_files(TRAIN, RL), **rl)
    whole, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "two"))
    assert two[0]["losses"] == whole[0]["losses"] and len(two) == 2
    # what the second epoch samples, and how far it is from the reference, follows from the first epoch's step
    assert two[1]["losses"] == whole[1]["losses"] and two[1]["losses"]["kl"] > 1e-6


def test_four_bit_weights_train_and_write(report_options, report_run, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = report_options(tmp_path, evidence_dir=str(report_run / "evidence"))
    options = {**options, **TINY_REPORT_TRAINING, "epochs": 1, "validation_interval": 1}
    four_bit = [str(BUNDLES / "report_generation" / "configs" / "llm" / "four_bit.json")]
    run(config_file=[*config_files(TRAIN), *four_bit], **options)
    assert (tmp_path / "models" / "model.pt").is_file()
    inference = {**report_options(tmp_path, evidence_dir=str(report_run / "evidence")), "max_cases": 2}
    run(config_file=[*config_files(INFERENCE), *four_bit], workflow_type="infer", **inference)
    assert len(ReportStore(tmp_path / "reports").volume_ids()) == 2


@pytest.mark.parametrize("name", ["llama_3_1_70b", "gemma_2_27b", "llama_3_1_8b"])
def test_language_models_are_chosen_by_small_files(name):
    """Each file names the model whose architecture is counted under the same name."""
    from vlm3d_ext.engines.language_model_requirements import load_architecture

    path = BUNDLES / "report_generation" / "configs" / "llm" / f"{name}.json"
    content = ConfigParser.load_config_file(str(path))
    assert content["language_model"] == load_architecture(name)[0]
    assert content["lora_rank"] == (32 if name == "llama_3_1_8b" else 64) and content["lora_alpha"] == 128


def test_tracked_training_and_evaluation_end_well(report_options, report_run, tmp_path):
    from mlflow.tracking import MlflowClient

    options = report_options(tmp_path / "report_generation", evidence_dir=str(report_run / "evidence"))
    tracking = config_files("_overlays/tracking")
    training = {**options, **TINY_REPORT_TRAINING, "epochs": 1, "validation_interval": 1}
    run(config_file=[*config_files(TRAIN), *tracking], **training)
    run(config_file=[*config_files(TRAIN, EVALUATE), *tracking], **options, num_resamples=2)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "vlm3d"]
    runs = {r.info.run_name.rsplit("-", 2)[0]: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"report_generation-align", "report_generation-evaluate"}
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    assert "clinical_f1_other_patients_scans" in runs["report_generation-evaluate"].data.metrics
