"""The localization bundle as its users run it."""

import csv
import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run

from data_prep.prepare import main as prepare
from tests.bundles.bundle_runs import (
    BUNDLES,
    REPOSITORY,
    TINY_LOCALIZER,
    TINY_NETWORK,
    assert_same_curve,
    assert_same_weights,
    checkpoint_weights,
    command,
    config_files,
    history,
    kill_while_training,
    messages_of,
    run_command,
    run_command_here,
    two_processes,
)
from tests.data.test_volume_geometry import oriented_geometry
from tests.data_prep.tiny_release import chest_hu, write_volume
from tests.prepared_release import SIZE, make_prepared_release
from vlm3d_ext.checkpoint_files import file_sha256
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.challenge_localization import read_challenge_localization
from vlm3d_ext.data.localization_store import LocalizationStore
from vlm3d_ext.engines.challenge_localization_score import main as score_challenge
from vlm3d_ext.lineage import read_lineage
from vlm3d_ext.metrics.mask_overlap import dice_score
from vlm3d_ext.networks.blocks.prompted_text_encoder import PromptedTextEncoder
from vlm3d_ext.run_summary import summarise_run
from vlm3d_ext.text.disease_set import load_disease_set

DISEASES = load_disease_set()
# those that the tiny release has masks of
DRAWN = ["pericardial_effusion", "pleural_effusion"]
TRAIN = "localization/train"
VALIDATION_FIGURES = ["mean_dice", "loss"]


def evaluate(options: dict, output_dir: Path, *deltas: str) -> dict:
    """Run train.json with evaluate.json or other deltas; returns the localization.json that it leaves."""
    options = {**options, "output_dir": str(output_dir), "num_resamples": 100, "num_montages": 1}
    run(config_file=config_files(TRAIN, *(deltas or ("localization/evaluate",))), **options)
    return json.loads((output_dir / "localization.json").read_text())


def rows_of(content: dict) -> dict[str, dict]:
    """Return an evaluation's figures by disease."""
    return {row["disease"]: row for row in content["per_disease"]}


def draw(options: dict) -> LocalizationStore:
    """Run inference.json; returns what it left."""
    run(config_file=config_files("localization/inference"), workflow_type="infer", **options)
    return LocalizationStore(options["output_dir"])


def lesions_of(store: LocalizationStore) -> dict[str, dict]:
    """Return what is known of each volume."""
    return {volume_id: store.read(volume_id) for volume_id in store.volume_ids()}


def masks_of(store: LocalizationStore) -> dict[Path, np.ndarray]:
    """Return all masks by their path below the folder."""
    paths = sorted((store.folder / "masks").glob("*/*.nii.gz"))
    return {path.relative_to(store.folder): np.asarray(nib.load(path).dataobj) for path in paths}


@pytest.fixture(scope="module")
def evaluation(localizer_options, localization_run, tmp_path_factory) -> tuple[Path, dict]:
    """Folder and content of the localizer's evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, evaluate(localizer_options(localization_run), folder)


@pytest.fixture(scope="module")
def drawn(drawing_options, tmp_path_factory) -> LocalizationStore:
    """What inference leaves of the test split, with pictures."""
    return draw(drawing_options(tmp_path_factory.mktemp("predictions") / "all", montages=True))


def test_training_draws_better_and_says_where_it_came_from(localization_run, lesion_encoder_run, prepared_lesions):
    rows = history(localization_run)
    assert rows[-1]["validation"]["loss"] < rows[0]["validation"]["loss"]
    assert rows[-1]["validation"]["mean_dice"] > rows[0]["validation"]["mean_dice"] + 0.1
    assert set(rows[0]["losses"]) == {"masks", "denoising"}
    assert rows[-1]["losses"]["denoising"] < rows[0]["losses"]["denoising"]
    lineage = read_lineage(localization_run / "models" / "model.pt")
    assert lineage["bundle"] == "localization" and lineage["phase"] == "localization"
    assert lineage["upstream"]["encoder"]["sha256"] == file_sha256(lesion_encoder_run / "models" / "model.pt")
    fingerprint = CaseManifest(prepared_lesions / "manifest.json").fingerprint
    assert lineage["manifest"]["fingerprint"] == fingerprint
    assert lineage["upstream"]["encoder"]["lineage"]["manifest"]["fingerprint"] == fingerprint


def test_checkpoint_holds_three_stages_and_no_text_encoder(localization_run, lesion_encoder_run, disease_text_model):
    content = torch.load(localization_run / "models" / "model.pt", weights_only=True)
    assert content["diseases"]["disease_keys"] == list(DISEASES.keys)
    weights = content["model"]
    stages = {"encoder", "text_embedder", "denoising_transformer", "unet", "thresholds", "presence_thresholds"}
    assert {name.split(".")[0] for name in weights} == stages
    encoder = checkpoint_weights(lesion_encoder_run / "models" / "model.pt")
    inside = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    assert inside.keys() == encoder.keys()
    assert all(torch.equal(value, encoder[name]) for name, value in inside.items())  # it was frozen

    text_encoder = PromptedTextEncoder(str(disease_text_model))
    live = text_encoder.embed_findings(DISEASES.findings(), use_negative=False).positive
    assert torch.equal(weights["text_embedder.embeddings"], live)
    words = text_encoder.tokenizer.vocab_size
    assert all(words not in value.shape for value in weights.values()) and words > 100  # no table of its tokens


def test_thresholds_are_those_of_the_best_validation(localization_run):
    """Known where validation has lesions, 0.5 elsewhere."""
    thresholds = checkpoint_weights(localization_run / "models" / "model.pt")["thresholds"]
    for key, threshold in zip(DISEASES.keys, thresholds.tolist(), strict=True):
        assert (threshold == 0.5) is (key not in DRAWN)
        assert 0.1 <= threshold <= 0.9


def test_the_same_config_runs_from_three_places(localizer_options, tmp_path, monkeypatch):
    """From the repository's root, from inside the bundle, and from elsewhere with --bundle_root; with one result."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = tmp_path / "copy" / "localization"
    bundle = BUNDLES / "localization"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("models", "output", "eval", "predictions"))
    places = {
        "root": (REPOSITORY, "bundles/localization/configs/train.json", {}),
        "inside": (copy, "configs/train.json", {}),
        "elsewhere": (elsewhere, str(bundle / "configs/train.json"), {"bundle_root": bundle}),
    }
    for name, (cwd, config, further) in places.items():
        options = localizer_options(tmp_path / name, epochs=1, max_cases=4, **further)
        if name == "inside":
            del options["run_dir"]
        run_command_here(command([config], options), cwd, monkeypatch)
    assert_same_weights(tmp_path / "root/models/model.pt", copy / "models/model.pt")
    assert_same_weights(tmp_path / "root/models/model.pt", tmp_path / "elsewhere/models/model.pt")


def test_two_processes_equal_one_while_the_encoder_is_fine_tuned(localizer_options, lesion_encoder_run, tmp_path):
    """Two gloo ranks of batch 2 follow the curve of one process with batch 4, normalization and thresholds included.

    Without the noise of stage 2, whose draws are those of a rank.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    further = {"train_encoder": True, "max_noise": 0.0, "samples_per_disease": 3}  # 8 samples: two whole steps
    run(config_file=config_files(TRAIN), **localizer_options(one, **further))
    files = config_files(TRAIN, "_overlays/ddp")
    run_command(command(files, localizer_options(two, batch_size=2, **further), launcher=two_processes(29771)))
    assert_same_curve(one, two, validation=VALIDATION_FIGURES)
    tuned, shared = (checkpoint_weights(folder / "models" / "model.pt") for folder in (one, two))
    encoder = checkpoint_weights(lesion_encoder_run / "models" / "model.pt")
    assert not all(torch.equal(tuned[f"encoder.{name}"], value) for name, value in encoder.items())
    assert torch.equal(tuned["thresholds"], shared["thresholds"])


def test_killed_run_resumes_on_the_same_curve(localizer_options, tmp_path):
    """SIGKILL somewhere in the middle, `--resume True`, and every number is that of a run that was left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    epochs = 20
    run(config_file=config_files(TRAIN), **localizer_options(whole, epochs=epochs))
    kill_while_training(command(config_files(TRAIN), localizer_options(killed, epochs=epochs)), killed)
    done = len(history(killed))
    assert 0 < done < epochs, f"killed after {done} of {epochs} epochs; the test needs a slower run"
    run(config_file=config_files(TRAIN), **localizer_options(killed, epochs=epochs, resume=True))
    assert history(killed) == history(whole)
    assert_same_weights(whole / "models/model.pt", killed / "models/model.pt")


def test_tracked_run_is_complete_in_mlflow(localizer_options, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    options = localizer_options(tmp_path / "localization")
    run_command_here(command(config_files(TRAIN, "_overlays/tracking"), options), REPOSITORY, monkeypatch)
    files = config_files(TRAIN, "localization/evaluate", "_overlays/tracking")
    run_command_here(command(files, {**options, "num_resamples": 5}), REPOSITORY, monkeypatch)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    runs = client.search_runs([client.get_experiment_by_name("vlm3d").experiment_id])
    by_name = {one.info.run_name.rsplit("-", 2)[0]: one for one in runs}
    assert {name: one.info.status for name, one in by_name.items()} == {
        "localization-train": "FINISHED",
        "localization-evaluate": "FINISHED",
    }
    trained, evaluated = by_name["localization-train"].data, by_name["localization-evaluate"].data
    assert trained.params["base_channels"] == "8" and trained.params["lineage.bundle"] == "localization"
    assert any(key.startswith("lineage.upstream.encoder") for key in trained.params)
    assert {"loss_masks", "loss_denoising", "mean_dice", "gradient_norm"} <= trained.metrics.keys()
    assert any(key.startswith("lineage.upstream.localization") for key in evaluated.params)
    assert {"mean_dice", *(f"dice_{key}" for key in DRAWN)} <= evaluated.metrics.keys()
    assert "dice_lung_nodule" not in evaluated.metrics  # undefined, so not a number
    artifacts = {item.path for item in client.list_artifacts(by_name["localization-evaluate"].info.run_id)}
    assert {"config.json", "lineage.json", "localization.json", "froc.png"} <= artifacts
    assert any(name.startswith("best_1_") for name in artifacts)


def test_demo_overlays_fit_the_encoder_s(disease_text_model, tmp_path):
    """Encoder and localizer with the sizes of the demo meet in the checkpoint."""
    make_prepared_release(tmp_path / "prepared", num_windows=2, with_lesions=True)
    shared = {"demo_dir": str(tmp_path), "epochs": 1, "max_cases": 4}
    run(config_file=config_files("encoder/train", "_overlays/demo"), **shared)
    # those of the demo are drawn and described at the demo's sizes, which takes a minute
    further = {"text_model": str(disease_text_model), "text_hidden_size": 16, "crop_size": [8, 16, 16]}
    further["validation_interval"] = 1
    files = config_files(TRAIN, "_overlays/demo", "localization/demo", "_overlays/tracking")
    run(config_file=files, **shared, **further)
    (row,) = history(tmp_path / "localization")
    assert row["loss"] > 0 and row["validation"]["mean_dice"] > 0
    weights = checkpoint_weights(tmp_path / "localization" / "models" / "model.pt")
    assert weights["text_embedder.projection.weight"].shape == (96, 16)


def test_evaluation_says_what_is_known(evaluation):
    folder, content = evaluation
    rows = rows_of(content)
    assert content["num_scans"] == 6 and list(rows) == list(DISEASES.keys)
    # cases 13 to 18: 13, 15 and 17 have a bright base; 14, 15 and 18 a bright middle, annotated in part in 14
    states = ("positive_scans", "negative_scans", "partial_scans", "unknown_scans")
    assert [rows["pleural_effusion"][state] for state in states] == [3, 3, 0, 0]
    assert [rows["pericardial_effusion"][state] for state in states] == [2, 3, 1, 0]
    assert [rows["consolidation"][state] for state in states] == [0, 6, 0, 0]
    assert [rows["lung_nodule"][state] for state in states] == [0, 0, 0, 6]
    for name in DRAWN:
        row = rows[name]
        assert row["dice_low"] <= row["dice"] <= row["dice_high"]
        assert row["ceiling_dice"] == 1.0  # pixels of 1 mm inside voxels of 2 mm lose nothing
        assert 0 < row["baseline_dice"] <= 1 and row["lesions"] == 3
    for name in ("consolidation", "lung_nodule"):
        row = rows[name]
        assert row["dice"] is row["dice_low"] is row["sensitivity"] is row["froc_1"] is row["baseline_dice"] is None
    assert rows["consolidation"]["false_positives_per_negative_scan"] >= 0
    assert rows["lung_nodule"]["false_positives_per_negative_scan"] is None
    assert content["mean"]["dice"] == pytest.approx(np.mean([rows[name]["dice"] for name in DRAWN]), abs=1e-6)
    assert rows["pleural_effusion"]["dice"] > 0.5
    with (folder / "cases.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6 * 5
    names = ["localization.csv", "froc.png", "dice_by_size.png"]
    assert all((folder / name).stat().st_size for name in names)
    pictures = {path.name.split("_1_")[0] for path in (folder / "montages").glob("*.png")}
    assert {"best", "worst"} <= pictures


def test_summary_shows_the_evaluation(evaluation, tmp_path):
    folder, content = evaluation
    shutil.copytree(folder, tmp_path / "localization" / "eval")
    table = summarise_run(tmp_path).split("localization on the 6 scans")[1]
    for row in content["per_disease"]:
        (line,) = [line for line in table.splitlines() if line.startswith(row["disease"])][:1]
        figures = [row["dice"], row["baseline_dice"], row["ceiling_dice"], row["froc_1"]]
        shown = ["-" if value is None else f"{value:.3f}" for value in figures]
        cells = re.sub(r"\[.*\]", "", line).split()[1:]
        assert [cells[index] for index in (1, 2, 4, 8)] == shown and cells[0] == str(row["positive_scans"])


def test_drawn_masks_score_what_the_evaluation_says(evaluation, drawn, prepared_lesions):
    """The same Dice twice: of the evaluator, and of the files that inference leaves against those of the manifest."""
    rows = rows_of(evaluation[1])
    cases = CaseManifest(prepared_lesions / "manifest.json").cases("test")
    for name in DRAWN:
        scores = []
        for case in cases:
            path = case["lesion_masks_original_grid"].get(name)
            if path is None or name in case["lesion_masks_partial"]:
                continue
            truth, mask = nib.load(path), nib.load(drawn.mask_path(name, case["volume_id"]))
            np.testing.assert_allclose(mask.affine, truth.affine, atol=1e-5)
            scores.append(dice_score(np.asarray(mask.dataobj) > 0, np.asarray(truth.dataobj) > 0))
        assert rows[name]["dice"] == pytest.approx(np.mean(scores), abs=1e-6)


def test_inference_writes_lesions_and_continues(drawn, drawing_options, localization_run, tmp_path):
    folder = tmp_path / "predictions"
    shutil.copytree(drawn.folder, folder)
    store = LocalizationStore(folder)
    assert store.volume_ids() == [f"valid_{number}_a_1" for number in range(13, 19)]
    assert len(masks_of(store)) == 6 * 5 and len(list((folder / "montages").glob("*.png"))) == 6
    thresholds = checkpoint_weights(localization_run / "models" / "model.pt")["thresholds"].tolist()
    for volume_id, diseases in lesions_of(store).items():
        assert list(diseases) == list(DISEASES.keys)
        for threshold, (name, found) in zip(thresholds, diseases.items(), strict=True):
            assert found["threshold"] == pytest.approx(threshold)
            voxels = int(np.count_nonzero(nib.load(store.mask_path(name, volume_id)).dataobj))
            assert found["num_voxels"] == voxels == sum(lesion["num_voxels"] for lesion in found["lesions"])
            assert found["volume_ml"] == pytest.approx(voxels * 5 / 1000)  # 1 x 1 x 5 mm
            assert all(threshold <= lesion["probability"] <= 1 for lesion in found["lesions"])
    with (folder / "tables" / "lesions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    lesions = [lesion for one in lesions_of(store).values() for found in one.values() for lesion in found["lesions"]]
    assert [float(row["probability"]) for row in table] == [lesion["probability"] for lesion in lesions]
    assert len(lesions) > 2

    missing = store.path("valid_15_a_1")
    before = missing.read_bytes()
    others = {path: path.stat().st_mtime_ns for path in folder.rglob("*_1.*") if "valid_15" not in path.name}
    missing.unlink()
    draw(drawing_options(folder, montages=True))
    assert missing.read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in others} == others and len(others) == 5 * 7
    drawn_at = store.mask_path("pleural_effusion", "valid_15_a_1").stat().st_mtime_ns
    draw(drawing_options(folder))  # nothing left to do
    assert store.mask_path("pleural_effusion", "valid_15_a_1").stat().st_mtime_ns == drawn_at

    other = {"ckpt_path": str(localization_run / "models" / "last.pt")}
    *_, reason = messages_of(lambda: draw(drawing_options(folder, **other)))
    assert "localization_sha256" in reason and str(folder) in reason and "--output_dir" in reason


def test_challenge_file_is_read_back_by_the_scorer(drawn, prepared_lesions, tmp_path):
    path = drawn.folder / "tables" / "challenge_localization.json"
    boxes = read_challenge_localization(path, DISEASES)
    for volume_id, diseases in lesions_of(drawn).items():
        for name, found in diseases.items():
            assert len(boxes.volumes[volume_id][name].bbox_mm) == len(found["lesions"])
    scans = [case["volume_id"] for case in CaseManifest(prepared_lesions / "manifest.json").cases("test")]
    (tmp_path / "scans.txt").write_text("\n".join(scans) + "\n")
    arguments = ["--predictions", path, "--masks", prepared_lesions / "lesion_masks_original_grid"]
    arguments += ["--scans", tmp_path / "scans.txt", "--output", tmp_path / "scores.json"]
    assert score_challenge([str(argument) for argument in arguments]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_volumes"] == 6 and scores["scored_without_prediction"] == []
    effusion = scores["per_disease"]["pleural_effusion"]
    assert effusion["num_lesions"] == 3 and effusion["num_matched"] > 0
    assert effusion["mean_iou"] > 0.1 and effusion["centroid_distance_mm"] < 20
    assert scores["per_disease"]["lung_nodule"]["mean_iou"] is None


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """Prepared folder of two raw scans stored in two orientations, and their files."""
    folder = tmp_path_factory.mktemp("scans")
    files = {}
    for codes, slice_mm in (("RAS", 5.0), ("LPS", 10.0)):
        geometry = oriented_geometry(codes, (24, 20, 12), (4.0, 4.0, slice_mm))
        hu = geometry.from_canonical(chest_hu(1, geometry.canonical()))
        files[codes.lower()] = write_volume(folder / "raw" / f"{codes.lower()}.nii.gz", hu, geometry)
    arguments = ["--source", folder / "raw", "--output", folder / "prepared", "--workers", "0"]
    arguments += ["--spatial-size", *SIZE]
    assert prepare([str(argument) for argument in arguments]) == 0
    return folder / "prepared", files


def test_masks_lie_on_the_scan_as_it_is_stored(scans, drawing_options, tmp_path):
    """Scans of a plain folder, also with slices of 10 mm."""
    prepared, files = scans
    (split,) = {split for split, cases in json.loads((prepared / "manifest.json").read_text()).items()
                if split in ("training", "validation", "test") and cases}  # fmt: skip
    store = draw(drawing_options(tmp_path / "predictions", dataset_dir=str(prepared), split=split))
    assert store.volume_ids() == sorted(files)
    for volume_id, path in files.items():
        scan = nib.load(path)
        for name in DISEASES.keys:
            mask = nib.load(store.mask_path(name, volume_id))
            assert mask.shape == scan.shape and set(np.unique(mask.dataobj)) <= {0, 1}
            np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)
            assert nib.aff2axcodes(mask.affine) == nib.aff2axcodes(scan.affine)


def test_windows_and_passes_of_one_checkpoint(drawn, drawing_options, tmp_path):
    """Windows as large as the scan change nothing; smaller ones and one pass per disease draw other masks of it."""
    whole = lesions_of(draw(drawing_options(tmp_path / "whole", window_size=[8, 32, 32])))
    assert whole == lesions_of(drawn)
    for name, further in {"windows": {"window_size": [4, 8, 8]}, "passes": {"passes": "per_disease"}}.items():
        options = drawing_options(tmp_path / name, max_cases=2, **further)
        store = draw(options)
        assert store.volume_ids() == ["valid_13_a_1", "valid_14_a_1"] and len(masks_of(store)) == 10
        assert lesions_of(store)["valid_13_a_1"] != whole["valid_13_a_1"]
    *_, reason = messages_of(lambda: draw(drawing_options(tmp_path / "passes")))
    assert "passes" in reason and str(tmp_path / "passes") in reason


def test_segresnet_is_trained_and_measured_on_the_same_cases(localizer_options, evaluation, tmp_path):
    """Without encoder checkpoint and without text encoder."""
    run_dir = tmp_path / "localization_segresnet"
    options = localizer_options(run_dir, segresnet_filters=8, crop_size=[8, 16, 16])
    options |= {"encoder_ckpt": "no/such/model.pt", "text_model": "no/such/folder"}
    run(config_file=config_files(TRAIN, "localization/segresnet"), **options)
    rows = history(run_dir)
    assert rows[-1]["losses"]["masks"] < rows[0]["losses"]["masks"] and rows[-1]["losses"]["denoising"] == 0
    lineage = read_lineage(run_dir / "models" / "model.pt")
    assert lineage["upstream"] == {} and lineage["phase"] == "localization-segresnet"
    kept = {name.split(".")[0] for name in checkpoint_weights(run_dir / "models/model.pt")}
    assert kept == {"network", "thresholds", "presence_thresholds"}

    orders = [("localization/evaluate", "localization/segresnet"), ("localization/segresnet", "localization/evaluate")]
    contents = [evaluate(options, tmp_path / str(number), *order) for number, order in enumerate(orders)]
    assert contents[0] == contents[1]
    own, other = rows_of(contents[0]), rows_of(evaluation[1])
    for name in DRAWN:
        for figure in ("positive_scans", "lesions", "ceiling_dice", "baseline_dice"):
            assert own[name][figure] == other[name][figure], figure
        assert 0 <= own[name]["dice"] <= 1


def test_configs_of_train_and_inference_build_the_same_network(localization_run):
    parser = ConfigParser(ConfigParser.load_config_file(config_files("localization/inference")[0]))
    parser.update({**TINY_NETWORK, **TINY_LOCALIZER})
    parser.get_parsed_content("network_def").load_state_dict(
        checkpoint_weights(localization_run / "models" / "model.pt")
    )
