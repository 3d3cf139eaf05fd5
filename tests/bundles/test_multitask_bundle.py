"""The multitask bundle as its users train and evaluate it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import run

from tests.bundles.bundle_runs import (
    BUNDLES,
    REPOSITORY,
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

TRAIN, EVALUATE = "multitask/train", "multitask/evaluate"
PARTS = ("encoder", "classification", "localization", "report_generation")
STILL = dict.fromkeys(("learning_rate", "vision_learning_rate", "adapter_learning_rate"), 0.0)
# what differs between ranks, or between a batch and its accumulation: draws that are not those of a sample
NO_DRAWS = {"max_noise": 0.0, "dropout": 0.0}
# a short evaluation
QUICK = {"num_resamples": 5, "num_montages": 0}
# what training measures on the way, whatever the learning rate
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
MEASURED = (*STATISTICS, "temperature", "offsets", "thresholds")
# which no single-task bundle has: the weights of both heads for findings that both see
FUSION = {"fusion", "is_fused"}


def train(options: dict, *overlays: str) -> list[dict]:
    """Train; returns the history."""
    run(config_file=config_files(TRAIN, *overlays), **options)
    return history(Path(options["run_dir"]))


def upstream_weights(runs: Path) -> dict[str, torch.Tensor]:
    """Return the joint network's weights as the four bundles' checkpoints in a folder of runs have them."""
    weights = {}
    for part in PARTS:
        state = checkpoint_weights(runs / part / "models" / "model.pt")
        # the encoder of the heads is the encoder's own, as the tests of the initialization check
        own = {name: value for name, value in state.items() if part == "encoder" or not name.startswith("encoder.")}
        weights |= {f"{part}.{name}": value for name, value in own.items()}
    return weights


def moved(run_dir: Path, runs: Path) -> set[str]:
    """Return which weights are others than upstream, statistics and calibration aside."""
    now, before = checkpoint_weights(run_dir / "models" / "last.pt"), upstream_weights(runs)
    assert now.keys() == before.keys() | FUSION
    learnt = [name for name in before if not name.endswith(MEASURED)]
    return {name for name in learnt if not torch.equal(now[name], before[name])}


def parts_of(names: set[str]) -> set[str]:
    """Return the parts of the network, the report generator split in two."""
    return {".".join(name.split(".")[: 2 if name.startswith("report_generation") else 1]) for name in names}


def optimizer_steps(run_dir: Path) -> set[int]:
    """Return how often the optimizer moved the weights it moved."""
    state = torch.load(run_dir / "models" / "last.pt", weights_only=True)["optimizer"]["state"]
    return {int(of["step"]) for of in state.values()}


def copied_data(prepared: Path, folder: Path, change) -> str:
    """Copy a prepared data set; its manifest's training and validation cases are changed by a function of the case and
    its number. Fingerprint and volumes stay, so that checkpoints and evidence still belong to it."""
    shutil.copytree(prepared, folder)
    content = json.loads((folder / "manifest.json").read_text())
    for split in ("training", "validation"):
        for number, case in enumerate(content[split]):
            change(case, number)
    (folder / "manifest.json").write_text(json.dumps(content))
    return str(folder)


def without_lesion_masks(case: dict) -> None:
    case["lesion_masks"], case["lesion_masks_original_grid"], case["lesion_masks_partial"] = {}, {}, []


@pytest.fixture(scope="module")
def runs(report_run) -> Path:
    """Folder with the run folders of the four bundles that joint training begins from."""
    return report_run.parent


@pytest.fixture(scope="module")
def still_run(multitask_options, tmp_path_factory) -> Path:
    """Run folder of a joint training that learns nothing."""
    run_dir = tmp_path_factory.mktemp("still") / "multitask"
    train(multitask_options(run_dir, epochs=1, **STILL))
    return run_dir


@pytest.fixture(scope="module")
def learnt_weighting_run(multitask_options, tmp_path_factory) -> Path:
    """Run folder of a joint training with learnt task weights on draws shared out between the tasks."""
    run_dir = tmp_path_factory.mktemp("learnt") / "multitask"
    train(multitask_options(run_dir, **learnt_weighting()))
    return run_dir


def learnt_weighting() -> dict:
    return {"weighting": "uncertainty", "sampling": "task_weighted", "max_cases": 4, "epochs": 6}


@pytest.fixture(scope="module")
def evaluated_as_upstream(still_run, runs, multitask_options, single_task_evaluations) -> Path:
    """Folder of the evaluation of a joint network that has the four bundles' weights, beside the bundles' own.

    What joint training measures anew is put back: statistics, which are of crops of its own, thresholds, and the
    weights of findings that both heads see.
    """
    content = torch.load(still_run / "models" / "model.pt", weights_only=True)
    upstream = upstream_weights(runs)
    for name, value in content["model"].items():
        if name.endswith(MEASURED):
            value.copy_(upstream[name])
        elif name in FUSION:
            value.zero_()
    path = still_run / "models" / "as_upstream.pt"
    torch.save(content, path)
    options = multitask_options(still_run, ckpt_path=str(path), **QUICK)
    run(config_file=config_files(TRAIN, EVALUATE), **options, single_task_dirs=single_task_evaluations)
    return still_run / "eval"


# --- where training begins, and what it does --------------------------------------------------------------------------


def test_training_begins_exactly_where_the_four_bundles_ended(still_run, runs):
    assert moved(still_run, runs) == set()
    content = torch.load(still_run / "models" / "model.pt", weights_only=True)
    for part, entry in (("classification", "labels"), ("localization", "diseases"), (PARTS[3], "language_model")):
        upstream = torch.load(runs / part / "models" / "model.pt", weights_only=True)
        assert content[entry] == upstream[entry]
    assert content["log_variances"] == {}


def test_what_the_classifier_was_calibrated_to_is_found_again(still_run, runs):
    """Joint validation looks at the same cases in the same two ways; findings that both heads see are weighed anew."""
    now, before = checkpoint_weights(still_run / "models" / "model.pt"), upstream_weights(runs)
    for name in ("temperature", "offsets"):
        name = f"classification.classifier.{name}"
        torch.testing.assert_close(now[name], before[name], rtol=1e-4, atol=1e-4)
    alone, name = ~now["is_fused"], "classification.classifier.thresholds"
    assert alone.any() and not alone.all()
    torch.testing.assert_close(now[name][alone], before[name][alone], rtol=1e-4, atol=1e-4)


def test_training_moves_every_part_and_is_logged_by_task(multitask_run, runs):
    rows = history(multitask_run)
    assert all(set(row["losses"]) == {"classification", "masks", "denoising", "report", "region_share"} for row in rows)
    assert all(set(row["validation"]) == {"loss", "macro_auroc", "mean_dice"} for row in rows)
    weights = {"classification": 1.0, "masks": 2.0, "denoising": 0.2, "report": 1.5, "region_share": 0.5}
    for row in rows:
        assert row["loss"] == pytest.approx(sum(weights[name] * loss for name, loss in row["losses"].items()), rel=1e-5)
    names = moved(multitask_run, runs)
    assert parts_of(names) == {*PARTS[:3], "report_generation.projector", "report_generation.language_model"}
    assert not any(name.endswith("mask_token") for name in names)  # pre-training's alone


def test_lineage_leads_through_four_checkpoints_to_the_manifest(multitask_run, runs, prepared_lesions, capsys):
    path = multitask_run / "models" / "model.pt"
    lineage = read_lineage(path)
    assert lineage["bundle"] == "multitask" and lineage["phase"] == "joint"
    fingerprint = CaseManifest(prepared_lesions / "manifest.json").fingerprint
    assert lineage["manifest"]["fingerprint"] == fingerprint and set(lineage["upstream"]) == set(PARTS)
    for part, upstream in lineage["upstream"].items():
        assert upstream["sha256"] == file_sha256(runs / part / "models" / "model.pt")
        assert upstream["lineage"]["bundle"] == part
        assert upstream["lineage"]["manifest"]["fingerprint"] == fingerprint
    assert print_lineage([str(path)]) == 0
    printed = capsys.readouterr().out
    # its own, the classifier's, the localizer's, the generator's, and those of the generator's two
    assert printed.count("upstream encoder") == 6 and printed.count("upstream report_generation") == 1
    assert printed.count(str(prepared_lesions / "manifest.json")) >= 5


def test_each_group_of_weights_has_its_own_rate_which_is_warmed_up(multitask_options, runs, tmp_path):
    """Groups are the encoder, the adapters, the learnt task weights, and the rest."""
    rates = {"vision_learning_rate": 2e-3, "adapter_learning_rate": 0.0, "weighting_learning_rate": 4e-3}
    more = {"learning_rate": 1e-3, "weighting": "uncertainty", "max_cases": 4, "epochs": 2, "warmup_epochs": 2}
    first, second = train(multitask_options(tmp_path, **rates, **more))
    full = [2e-3, 0.0, 4e-3, 1e-3]
    assert first["learning_rates"] == pytest.approx([rate / 2 for rate in full])  # in the middle of warming up
    assert second["learning_rates"] == pytest.approx(full)
    assert parts_of(moved(tmp_path, runs)) == {*PARTS[:3], "report_generation.projector"}


def test_accumulated_batches_make_as_many_steps(multitask_options, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for run_dir, batch_size in ((one, 1), (two, 2)):
        train(multitask_options(run_dir, batch_size=batch_size, global_batch_size=2, max_cases=4, epochs=1))
    assert history(one)[0]["iteration"] == 4 and history(two)[0]["iteration"] == 2
    assert optimizer_steps(one) == optimizer_steps(two) == {2}


def test_frozen_parts_stay_bit_equal(multitask_options, runs, tmp_path):
    frozen = {"train_encoder": False, "train_adapters": False}
    train(multitask_options(tmp_path, **frozen, max_cases=4, epochs=1, warmup_epochs=0))
    assert parts_of(moved(tmp_path, runs)) == {"classification", "localization", "report_generation.projector"}


def test_gradient_checkpointing_changes_nothing(multitask_options, tmp_path):
    plain, checkpointed = tmp_path / "plain", tmp_path / "checkpointed"
    train(multitask_options(plain, max_cases=4))
    less_memory = {"activation_checkpointing": "selective", "gradient_checkpointing": True}
    train(multitask_options(checkpointed, max_cases=4, **less_memory))
    assert_same_curve(plain, checkpointed)


def test_learnt_task_weights_are_kept_and_move(learnt_weighting_run):
    for name in ("model.pt", "last.pt"):
        learnt = torch.load(learnt_weighting_run / "models" / name, weights_only=True)["log_variances"]
        assert set(learnt) == {"classification", "masks", "report"}
        assert all(value != 0 and value.isfinite() for value in learnt.values())
    # where a loss is above 1, its weight exp(-s) falls
    last = history(learnt_weighting_run)[-1]
    assert learnt["report"] > 0 and last["losses"]["report"] > 1


def test_all_tasks_are_learnt(learnt_weighting_run):
    first, *_, last = history(learnt_weighting_run)
    for name in ("masks", "denoising", "report", "region_share"):
        assert last["losses"][name] < first["losses"][name], name
    assert last["validation"]["mean_dice"] > first["validation"]["mean_dice"] + 0.03
    assert last["validation"]["macro_auroc"] >= first["validation"]["macro_auroc"]


# --- data of which some parts are missing -----------------------------------------------------------------------------


def test_cases_without_reports_masks_or_labels_are_trained_on(multitask_options, prepared_lesions, tmp_path):
    def change(case, number):
        if number in (0, 3):
            case["report"] = None
        if number in (1, 3):
            without_lesion_masks(case)
        if number in (2, 3):  # and number 3 has nothing at all
            case["labels"] = []

    data = copied_data(prepared_lesions, tmp_path / "data", change)
    for name, batch_size in (("batches", 2), ("alone", 1)):
        options = multitask_options(tmp_path / name, dataset_dir=data, batch_size=batch_size, epochs=1)
        (row,) = train({**options, "global_batch_size": batch_size})
        assert all(loss > 0 for loss in row["losses"].values()) and row["validation"]["loss"] > 0
        weights = checkpoint_weights(tmp_path / name / "models" / "model.pt")
        assert all(value.isfinite().all() for value in weights.values())


def test_without_any_report_the_writing_part_stays_as_it_is(multitask_options, runs, prepared_lesions, tmp_path):
    data = copied_data(prepared_lesions, tmp_path / "data", lambda case, number: case.update(report=None))
    options = multitask_options(tmp_path / "run", dataset_dir=data, max_cases=4, epochs=1, weight_decay=0.0)
    (row,) = train({**options, "sampling": "task_weighted", "warmup_epochs": 0})
    assert row["losses"]["report"] == 0 and row["losses"]["masks"] > 0
    assert parts_of(moved(tmp_path / "run", runs)) == set(PARTS[:3])


# --- where and how it is run ------------------------------------------------------------------------------------------


def test_the_same_config_runs_from_three_places(multitask_options, tmp_path, monkeypatch):
    """From the repository's root, from inside the bundle, and from elsewhere with --bundle_root; with one result."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = tmp_path / "copy" / "multitask"
    bundle = BUNDLES / "multitask"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("models", "output", "eval", "inference"))
    places = {
        "root": (REPOSITORY, "bundles/multitask/configs/train.json", {}),
        "inside": (copy, "configs/train.json", {}),
        "elsewhere": (elsewhere, str(bundle / "configs/train.json"), {"bundle_root": bundle}),
    }
    for name, (cwd, config, further) in places.items():
        options = multitask_options(tmp_path / name, epochs=1, max_cases=4, **further)
        if name == "inside":
            del options["run_dir"]
        run_command_here(command([config], options), cwd, monkeypatch)
    assert_same_weights(tmp_path / "root/models/model.pt", copy / "models/model.pt")
    assert_same_weights(tmp_path / "root/models/model.pt", tmp_path / "elsewhere/models/model.pt")


def test_two_processes_compute_what_one_does(multitask_options, tmp_path):
    """Two gloo ranks of batch 2 follow the curve of one process with batch 4, the normalization's statistics included,
    on cases of which some lack a report, a mask or a label."""
    one, two = tmp_path / "one", tmp_path / "two"
    further = {**NO_DRAWS, "global_batch_size": 4}
    files = config_files(TRAIN, "_overlays/ddp")
    run_command(command(files, multitask_options(two, batch_size=2, **further), launcher=two_processes(29781)))
    train(multitask_options(one, batch_size=4, **further))
    assert_same_curve(one, two)
    alone, shared = (checkpoint_weights(run_dir / "models" / "model.pt") for run_dir in (one, two))
    for name, value in alone.items():
        if name.endswith((*MEASURED, *FUSION)):
            torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_a_killed_training_goes_on_as_if_nothing_had_happened(multitask_options, learnt_weighting_run, tmp_path):
    """SIGKILL somewhere in the middle, `--resume True`, and every number is that of a run that was left alone."""
    options = multitask_options(tmp_path, **learnt_weighting())
    kill_while_training(command(config_files(TRAIN), options), tmp_path)
    done = len(history(tmp_path))
    assert 0 < done < options["epochs"], f"killed after {done} epochs; the test needs a slower run"
    train({**options, "resume": True})
    assert history(tmp_path) == history(learnt_weighting_run)
    for name in ("model.pt", "last.pt"):
        assert_same_weights(tmp_path / "models" / name, learnt_weighting_run / "models" / name)
    resumed, whole = (
        torch.load(run_dir / "models" / "last.pt", weights_only=True) for run_dir in (tmp_path, learnt_weighting_run)
    )
    assert resumed["log_variances"] == whole["log_variances"] and resumed["lr_scheduler"] == whole["lr_scheduler"]
    for weight, moments in whole["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(resumed["optimizer"]["state"][weight][name], value)


def test_tracked_run_is_complete_in_mlflow(multitask_options, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    options = multitask_options(tmp_path / "multitask", epochs=1, max_cases=4)
    run_command_here(command(config_files(TRAIN, "_overlays/tracking"), options), REPOSITORY, monkeypatch)
    files = config_files(TRAIN, EVALUATE, "_overlays/tracking")
    nowhere = {"single_task_dirs": {name: str(tmp_path / "nowhere") for name in PARTS[1:]}}
    run_command_here(command(files, {**options, **QUICK, "max_cases": 3, **nowhere}), REPOSITORY, monkeypatch)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "vlm3d"]
    runs = {one.info.run_name.rsplit("-", 2)[0]: one for one in client.search_runs([experiment.experiment_id])}
    statuses = {name: one.info.status for name, one in runs.items()}
    assert statuses == {"multitask-joint": "FINISHED", "multitask-evaluate": "FINISHED"}
    trained, evaluated = runs["multitask-joint"].data, runs["multitask-evaluate"].data
    for part in PARTS:
        assert any(key.startswith(f"lineage.upstream.{part}") for key in trained.params)
    assert any(key.startswith("lineage.upstream.multitask") for key in evaluated.params)
    assert {"loss_report", "loss_masks", "loss_region_share", "macro_auroc", "mean_dice"} <= trained.metrics.keys()
    assert {"macro_auroc_unguided", "mean_dice", "clinical_f1"} <= evaluated.metrics.keys()
    artifacts = {item.path for item in client.list_artifacts(runs["multitask-joint"].info.run_id)}
    assert {"config.json", "lineage.json", "history.json"} <= artifacts
    artifacts = {item.path for item in client.list_artifacts(runs["multitask-evaluate"].info.run_id)}
    assert {"config.json", "lineage.json", "classification_unguided.json", "localization.json"} <= artifacts
    assert {"reports.json", "comparison.json", "comparison.txt"} <= artifacts

    # no single-task evaluation was there: that was said, and nothing stands in its columns
    comparison = json.loads((tmp_path / "multitask" / "eval" / "comparison.json").read_text())
    assert {row["single"] for row in comparison} == {None} and {row["verdict"] for row in comparison} == {""}
    assert {row["task"] for row in comparison} == set(PARTS[1:])
    assert all(row["num_cases"] <= 3 for row in comparison)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_the_bundles_own_weights_score_what_the_bundles_score(evaluated_as_upstream):
    """Every figure, of all three tasks: one network answers as three did."""
    comparison = json.loads((evaluated_as_upstream / "comparison.json").read_text())
    assert {row["task"] for row in comparison} == set(PARTS[1:])
    compared = [row for row in comparison if row["single"] is not None]
    for row in compared:
        assert row["joint"] == pytest.approx(row["single"], abs=1e-6), row["figure"]
        assert row["verdict"] in ("equal", "better", "worse")  # a coarse interval may leave its own figure out
    figures = [row["figure"] for row in compared]
    assert len(figures) == len(set(figures))
    assert {"AUROC, unguided", "AUROC, guided", "Dice, mean", "clinical F1"} <= set(figures)
    assert len([row for row in compared if row["joint"] > 0]) > 8  # not all of them by being nothing


def test_masks_thresholds_and_reports_are_the_bundles_too(evaluated_as_upstream, single_task_evaluations):
    ours = json.loads((evaluated_as_upstream / "localization.json").read_text())
    theirs = json.loads((Path(single_task_evaluations["localization"]) / "localization.json").read_text())
    for own, other in zip(ours["per_disease"], theirs["per_disease"], strict=True):
        assert own["disease"] == other["disease"] and own["threshold"] == other["threshold"]
        for name in ("dice", "surface_dice", "froc_1", "baseline_dice", "ceiling_dice"):
            assert own[name] == (other[name] if other[name] is None else pytest.approx(other[name], abs=1e-6)), name
    joint = ReportStore(evaluated_as_upstream / "reports")
    alone = ReportStore(Path(single_task_evaluations["report_generation"]) / "reports")
    assert len(alone.volume_ids()) == 5 and len(joint.volume_ids()) == 6  # one test case has no report
    for volume_id in alone.volume_ids():
        assert joint.read(volume_id)["report_text"] == alone.read(volume_id)["report_text"]


def test_evaluation_leaves_a_table_to_read(evaluated_as_upstream):
    names = ["classification_unguided", "classification_guided", "localization", "reports"]
    assert all((evaluated_as_upstream / f"{name}.json").stat().st_size for name in names)
    table = (evaluated_as_upstream / "comparison.txt").read_text()
    for row in json.loads((evaluated_as_upstream / "comparison.json").read_text()):
        if row["joint"] is None:
            continue
        (line,) = [
            line for line in table.splitlines() if line.startswith(f"{row['task']}: {row['figure'].replace('_', ' ')} ")
        ]
        shown = [f"{row[name]:.3f}" for name in ("single", "joint")]
        assert all(f" {figure} " in line for figure in shown) and row["baseline_name"] in line
