"""The classification bundle as its users run it."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run

from tests.bundles.bundle_runs import (
    BUNDLES,
    REPOSITORY,
    TINY_CLASSIFIER,
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
    write_labels_csv,
)
from vlm3d_ext.checkpoint_files import file_sha256
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.prediction_store import PredictionStore
from vlm3d_ext.engines.challenge_classification_score import main as score_challenge
from vlm3d_ext.lineage import read_lineage
from vlm3d_ext.networks.blocks.prompted_text_encoder import PromptedTextEncoder
from vlm3d_ext.text.label_set import load_label_set
from vlm3d_ext.transforms import LoadFeaturesd, network_image, prepared_case_transforms

# what the labels of the tiny release say something about; 16 findings have no positive there, or are unknown
TRAINABLE = ["Cardiomegaly", "Pleural effusion"]
# with every draw of guidance and intensity fixed, training on volumes sees what extracted features hold
NO_DRAWS = {"mask_guidance_probability": 1.0, "intensity_augmentation": 0.0}
TRAIN = "classification/train"


@pytest.fixture(scope="module")
def features(prepared, encoder_run) -> Path:
    """The encoder's run folder with features extracted with and without masks, where from_features.json looks."""
    options = {**TINY_NETWORK, "dataset_dir": str(prepared), "run_dir": str(encoder_run), "num_workers": 0}
    for name, use_mask in (("features", True), ("features_without_mask", False)):
        further = {"output_dir": str(encoder_run / name), "use_anatomical_mask": use_mask}
        run(config_file=config_files("encoder/inference"), workflow_type="infer", **options, **further)
    return encoder_run


def evaluate(options: dict, output_dir: Path) -> dict:
    """Run evaluate.json; returns what its JSON files say, by "guided" and "unguided"."""
    options = {**options, "output_dir": str(output_dir), "num_resamples": 5}
    run(config_file=config_files(TRAIN, "classification/evaluate"), **options)
    return {way: json.loads((output_dir / f"classification_{way}.json").read_text()) for way in ("guided", "unguided")}


def predictions(output_dir: Path, way: str) -> dict[str, list[float]]:
    """Return the columns of an evaluation's predictions."""
    with (output_dir / f"predictions_{way}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name != "volume_id"}


@pytest.fixture(scope="module")
def evaluation(training_options, classification_run, tmp_path_factory) -> tuple[Path, dict]:
    """Folder and content of the classifier's evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, evaluate(training_options(classification_run), folder)


def test_training_lowers_the_loss_and_says_where_it_came_from(classification_run, encoder_run, prepared):
    rows = history(classification_run)
    assert rows[-1]["validation"]["loss"] < rows[0]["validation"]["loss"]
    assert all(0 < row["validation"]["macro_auroc"] <= 1 for row in rows)
    lineage = read_lineage(classification_run / "models" / "model.pt")
    assert lineage["bundle"] == "classification" and lineage["phase"] == "classification"
    assert lineage["upstream"]["encoder"]["sha256"] == file_sha256(encoder_run / "models" / "model.pt")
    fingerprint = CaseManifest(prepared / "manifest.json").fingerprint
    assert lineage["manifest"]["fingerprint"] == fingerprint


def test_checkpoint_holds_encoder_and_classifier_and_no_text_encoder(classification_run, encoder_run, text_model):
    content = torch.load(classification_run / "models" / "model.pt", weights_only=True)
    assert content["labels"]["finding_names"] == list(load_label_set("ct_rate_18").names)
    weights = content["model"]
    assert {name.split(".")[0] for name in weights} == {"encoder", "classifier"}
    encoder = checkpoint_weights(encoder_run / "models" / "model.pt")
    inside = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    assert inside.keys() == encoder.keys()
    assert all(torch.equal(value, encoder[name]) for name, value in inside.items())

    words = PromptedTextEncoder(str(text_model)).tokenizer.vocab_size
    assert all(words not in value.shape for value in weights.values()) and words > 100  # no table of its tokens


def test_checkpoint_is_whitened_and_calibrated(classification_run):
    weights = checkpoint_weights(classification_run / "models" / "model.pt")
    names = load_label_set("ct_rate_18").names
    trainable = torch.tensor([name in TRAINABLE for name in names])
    assert torch.equal(weights["classifier.trained_findings"], trainable)
    thresholds = weights["classifier.thresholds"]
    assert (thresholds[trainable] != 0.5).all() and (thresholds[~trainable] == 0.5).all()
    assert weights["classifier.temperature"] != 1
    assert weights["classifier.whitening.mean"].abs().max() > 1e-3


def test_cached_text_embeddings_are_those_of_the_text_encoder(classification_run, text_model):
    parser = ConfigParser(ConfigParser.load_config_file(config_files("classification/inference")[0]))
    parser.update({**TINY_NETWORK, **TINY_CLASSIFIER})
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(checkpoint_weights(classification_run / "models" / "model.pt"))
    with torch.no_grad():
        live, _ = network.classifier.embed_own_findings(PromptedTextEncoder(str(text_model)))
    assert torch.equal(network.classifier.text_embeddings, live)


def test_the_same_config_runs_from_three_places(training_options, tmp_path, monkeypatch):
    """From the repository's root, from inside the bundle, and from elsewhere with --bundle_root; with one result."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = tmp_path / "copy" / "classification"
    bundle = BUNDLES / "classification"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("models", "output", "eval", "predictions"))
    places = {
        "root": (REPOSITORY, "bundles/classification/configs/train.json", {}),
        "inside": (copy, "configs/train.json", {}),
        "elsewhere": (elsewhere, str(bundle / "configs/train.json"), {"bundle_root": bundle}),
    }
    for name, (cwd, config, further) in places.items():
        options = training_options(tmp_path / name, epochs=1, max_cases=4, **further)
        if name == "inside":
            del options["run_dir"]
        run_command_here(command([config], options), cwd, monkeypatch)
    assert_same_weights(tmp_path / "root/models/model.pt", copy / "models/model.pt")
    assert_same_weights(tmp_path / "root/models/model.pt", tmp_path / "elsewhere/models/model.pt")


def test_two_processes_equal_one_while_the_encoder_is_fine_tuned(training_options, encoder_run, tmp_path):
    """Two gloo ranks of batch 2 follow the curve of one process with batch 4; dropout's draws are those of a rank."""
    one, two = tmp_path / "one", tmp_path / "two"
    further = {"train_encoder": True, "dropout": 0.0}
    run(config_file=config_files(TRAIN), **training_options(one, **further))
    files = config_files(TRAIN, "_overlays/ddp")
    run_command(command(files, training_options(two, batch_size=2, **further), launcher=two_processes(29764)))
    assert_same_curve(one, two)  # 7 cases: an uneven share for two ranks
    tuned = checkpoint_weights(one / "models" / "model.pt")
    encoder = checkpoint_weights(encoder_run / "models" / "model.pt")
    assert not all(torch.equal(tuned[f"encoder.{name}"], value) for name, value in encoder.items())


def test_killed_run_resumes_on_the_same_curve(training_options, tmp_path):
    """SIGKILL somewhere in the middle, `--resume True`, and every number is that of a run that was left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    epochs = 25
    run(config_file=config_files(TRAIN), **training_options(whole, epochs=epochs))
    kill_while_training(command(config_files(TRAIN), training_options(killed, epochs=epochs)), killed)
    done = len(history(killed))
    assert 0 < done < epochs, f"killed after {done} of {epochs} epochs; the test needs a slower run"
    run(config_file=config_files(TRAIN), **training_options(killed, epochs=epochs, resume=True))
    assert history(killed) == history(whole)
    assert_same_weights(whole / "models/model.pt", killed / "models/model.pt")


def test_tracked_run_is_complete_in_mlflow(training_options, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    options = training_options(tmp_path / "classification")
    run_command_here(command(config_files(TRAIN, "_overlays/tracking"), options), REPOSITORY, monkeypatch)
    files = config_files(TRAIN, "classification/evaluate", "_overlays/tracking")
    run_command_here(command(files, {**options, "num_resamples": 5}), REPOSITORY, monkeypatch)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    runs = client.search_runs([client.get_experiment_by_name("vlm3d").experiment_id])
    by_name = {one.info.run_name.rsplit("-", 2)[0]: one for one in runs}
    assert {name: one.info.status for name, one in by_name.items()} == {
        "classification-train": "FINISHED",
        "classification-evaluate": "FINISHED",
    }
    trained, evaluated = by_name["classification-train"].data, by_name["classification-evaluate"].data
    assert trained.params["projection_dim"] == "16" and trained.params["lineage.bundle"] == "classification"
    assert any(key.startswith("lineage.upstream.encoder") for key in trained.params)
    assert {"loss_classification", "macro_auroc", "gradient_norm"} <= trained.metrics.keys()
    assert any(key.startswith("lineage.upstream.classification") for key in evaluated.params)
    assert {"macro_auroc_guided", "macro_auroc_unguided", "macro_crg_unguided"} <= evaluated.metrics.keys()
    artifacts = {item.path for item in client.list_artifacts(by_name["classification-evaluate"].info.run_id)}
    assert {"config.json", "lineage.json", "classification_guided.json", "roc_unguided.png"} <= artifacts


def test_extracted_features_are_those_on_the_fly(features, classification_run, prepared):
    """What LoadFeaturesd reads is what the classifier's own encoder makes of the volume, with and without masks."""
    manifest = CaseManifest(prepared / "manifest.json")
    parser = ConfigParser(ConfigParser.load_config_file(config_files("classification/inference")[0]))
    parser.update({**TINY_NETWORK, **TINY_CLASSIFIER})
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(checkpoint_weights(classification_run / "models" / "model.pt"))
    folders = (features / "features", features / "models" / "model.pt", manifest.fingerprint)
    load_features = LoadFeaturesd(*folders, features_without_mask_dir=features / "features_without_mask")
    (case,) = manifest.cases("validation", 1)
    found = {}
    for use_mask in (True, False):
        loaded = prepared_case_transforms(use_mask)(case)
        batch = {name: loaded[name][None] for name in ("image", "anatomical_mask", "spacing_mm")}
        batch["image"] = network_image(batch)
        with torch.no_grad():
            on_the_fly = network.features(**batch, use_anatomical_mask=loaded["use_anatomical_mask"][None])[0]
        found[use_mask] = load_features({**case, "use_anatomical_mask": use_mask})["features"]
        torch.testing.assert_close(found[use_mask], torch.as_tensor(on_the_fly), rtol=1e-5, atol=1e-5)
    assert (found[True] - found[False]).abs().max() > 1e-3


def test_training_on_features_equals_training_on_volumes(features, training_options, inference_options, tmp_path):
    """In one process, and in two; what it leaves scores volumes."""
    folders = {"encoder_dir": str(features), "dropout": 0.0, **NO_DRAWS}
    # each with its mask and without it: as many for one rank as for the other
    folders["validate::dataset::data::cases"] = "$@labelled_cases.cases('validation', 2)"
    volumes, alone, pair = tmp_path / "volumes", tmp_path / "alone", tmp_path / "pair"
    run(config_file=config_files(TRAIN), **training_options(volumes, **folders))
    files = config_files(TRAIN, "classification/from_features")
    run(config_file=files, **training_options(alone, **folders))
    assert_same_curve(volumes, alone)
    files += config_files("_overlays/ddp")
    run_command(command(files, training_options(pair, batch_size=2, **folders), launcher=two_processes(29765)))
    assert_same_curve(alone, pair)

    stores = []
    for run_dir in (volumes, alone):
        options = inference_options(run_dir / "predictions", run_dir=str(run_dir))
        run(config_file=config_files("classification/inference"), workflow_type="infer", **options)
        stores.append(PredictionStore(run_dir / "predictions"))
    for volume_id in stores[0].volume_ids():
        one, other = (store.read(volume_id) for store in stores)
        for name in one:
            assert other[name]["probability"] == pytest.approx(one[name]["probability"], abs=1e-3), name


def test_features_of_another_encoder_are_refused(features, training_options, tmp_path):
    content = torch.load(features / "models" / "model.pt", weights_only=True)
    content["model"] = {name: value * 1.01 for name, value in content["model"].items()}
    torch.save(content, tmp_path / "other.pt")
    options = training_options(tmp_path / "run", encoder_dir=str(features), encoder_ckpt=str(tmp_path / "other.pt"))
    *_, reason = messages_of(lambda: run(config_file=config_files(TRAIN, "classification/from_features"), **options))
    assert str(tmp_path / "other.pt") in reason and str(features / "features") in reason
    assert "another encoder" in reason and "inference.json" in reason and "\n" not in reason


def test_evaluation_is_written_beside_baselines(evaluation):
    folder, content = evaluation
    for way in ("guided", "unguided"):
        macro, baselines = content[way]["macro"], content[way]["baselines"]
        assert 0 < macro["auroc"] <= 1
        assert set(baselines) == {"random", "all_negative", "all_positive", "prevalence"}
        assert baselines["all_negative"]["recall"] == 0 and baselines["all_positive"]["recall"] == 1
        assert baselines["all_negative"]["crg"] == pytest.approx(1 / 3, abs=1e-6)
        by_label = {row["label"]: row for row in content[way]["per_label"]}
        assert {name for name, row in by_label.items() if row["auroc"] is not None} == set(TRAINABLE)
        assert macro["auroc"] == pytest.approx(np.mean([by_label[name]["auroc"] for name in TRAINABLE]), abs=1e-6)
        assert by_label["Hiatal hernia"]["undefined"] == "no known labels"
        assert by_label["Emphysema"]["undefined"] == "no positives"
        names = [f"classification_{way}.csv", f"classification_baselines_{way}.csv", f"predictions_{way}.csv"]
        names += [f"{figure}_{way}.png" for figure in ("roc", "precision_recall", "reliability")]
        assert all((folder / name).stat().st_size for name in names)
        with (folder / f"classification_baselines_{way}.csv").open(newline="") as file:
            assert [row["predictor"] for row in csv.DictReader(file)] == ["classifier", *baselines]
    # every case is seen without its mask; the tiny release has five test cases with one
    assert content["unguided"]["num_cases"] == 6 and content["guided"]["num_cases"] == 5


def test_another_label_set_is_scored(evaluation, training_options, classification_run, tmp_path, capsys):
    """Findings of the training by what they learnt, others by their prompts; what no label says is undefined."""
    options = training_options(classification_run, scored_label_set="vlm3d_18")
    content = evaluate(options, tmp_path)
    text = capsys.readouterr().out
    assert "labels of ct_rate_18 as vlm3d_18: 11 of 18 supported" in text
    assert "never trained" in text and "Pneumothorax" in text.split("never trained")[1]
    folder, own = evaluation
    for way in ("guided", "unguided"):
        before, after = predictions(folder, way), predictions(tmp_path, way)
        assert tuple(after) == load_label_set("vlm3d_18").names
        for name in TRAINABLE:
            assert after[name] == pytest.approx(before[name], abs=1e-6)
        assert np.ptp(after["Pneumothorax"]) > 0  # a score of its own for each scan
        rows = {row["label"]: row for row in content[way]["per_label"]}
        assert rows["Pneumothorax"]["undefined"] == "no known labels" and rows["Pneumothorax"]["auroc"] is None
        assert content[way]["macro"]["auroc"] == own[way]["macro"]["auroc"]  # the same two findings are defined


def test_union_of_label_sets_is_trained_and_scored_on_either(training_options, tmp_path):
    run_dir = tmp_path / "union"
    options = training_options(run_dir, label_set="ct_rate_18+vlm3d_18")
    run(config_file=config_files(TRAIN), **options)
    union = load_label_set("ct_rate_18+vlm3d_18")
    trained = checkpoint_weights(run_dir / "models" / "model.pt")["classifier.trained_findings"]
    assert [name for name, one in zip(union.names, trained, strict=True) if one] == TRAINABLE
    options["text_model"] = "no/such/folder"  # a union knows the findings of both, so no prompt is embedded
    scores = {}
    for name in ("ct_rate_18", "vlm3d_18"):
        scores[name] = evaluate({**options, "scored_label_set": name}, tmp_path / name)["unguided"]
        assert tuple(scores[name]["label_names"]) == load_label_set(name).names
    one, other = (predictions(tmp_path / name, "unguided") for name in ("ct_rate_18", "vlm3d_18"))
    for name in {*one} & {*other}:
        assert one[name] == pytest.approx(other[name], abs=1e-6), name
    assert scores["ct_rate_18"]["macro"]["auroc"] == scores["vlm3d_18"]["macro"]["auroc"]


def test_what_labels_support_is_said_and_the_rest_takes_no_part_in_training(training_options, tmp_path, capsys):
    """Without weight decay, the soft prompts of findings that cannot be trained stay as they began."""
    soft_prompts = {}
    for epochs in (1, 2):
        options = training_options(tmp_path / str(epochs), label_set="vlm3d_18", weight_decay=0.0, epochs=epochs)
        run(config_file=config_files(TRAIN), **options)
        last = checkpoint_weights(tmp_path / str(epochs) / "models" / "last.pt")
        soft_prompts[epochs] = last["classifier.soft_prompts"]
    text = capsys.readouterr().out
    assert "labels of ct_rate_18 as vlm3d_18: 11 of 18 supported (8 exact, 1 derived: Calcification" in text
    assert "7 unknown: Pneumothorax, Pneumonia, Pulmonary edema, Mass, Mediastinal widening" in text
    changed = (soft_prompts[1] != soft_prompts[2]).flatten(1).any(1).tolist()
    names = load_label_set("vlm3d_18").names
    assert {name for name, one in zip(names, changed, strict=True) if one} == set(TRAINABLE)


def test_inference_writes_findings_and_continues(inference_options, tmp_path):
    (config,) = config_files("classification/inference")
    folder = tmp_path / "predictions"
    options = {"workflow_type": "infer", "config_file": config, **inference_options(folder)}
    run(**options)
    store = PredictionStore(folder)
    volume_ids = [f"valid_{number}_a_1" for number in range(13, 19)]
    assert store.volume_ids() == volume_ids
    findings = store.read("valid_13_a_1")
    assert tuple(findings) == load_label_set("ct_rate_18").names
    assert {name for name, row in findings.items() if row["trained"]} == set(TRAINABLE)
    for row in findings.values():
        assert 0 <= row["probability"] <= 1 and row["prediction"] == (row["probability"] >= row["threshold"])
    with (folder / "tables" / "probabilities.csv").open(newline="") as file:
        table = {row["VolumeName"]: row for row in csv.DictReader(file)}
    assert list(table) == volume_ids
    assert float(table["valid_13_a_1"]["Cardiomegaly"]) == findings["Cardiomegaly"]["probability"]

    missing = store.path("valid_15_a_1")
    before = missing.read_bytes()
    others = {path: path.stat().st_mtime_ns for path in folder.glob("valid_*.json") if path != missing}
    missing.unlink()
    run(**options)
    assert missing.read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in others} == others and len(others) == 5
    run(**options)  # nothing left to do
    *_, reason = messages_of(lambda: run(**options, use_anatomical_mask=False))
    assert "use_anatomical_mask" in reason and str(folder) in reason and "--output_dir" in reason


def test_challenge_file_scores_what_the_evaluation_does(inference_options, evaluation, prepared, tmp_path):
    """The same figures twice: from the evaluator, and from the challenge's file against a CSV of labels."""
    folder = tmp_path / "predictions"
    options = inference_options(folder, use_anatomical_mask=False)
    run(config_file=config_files("classification/inference"), workflow_type="infer", **options)
    write_labels_csv(tmp_path / "labels.csv", CaseManifest(prepared / "manifest.json").cases("test"))
    arguments = ["--predictions", folder / "tables/challenge_classification.json", "--labels", tmp_path / "labels.csv"]
    arguments += ["--resamples", "5", "--output", tmp_path / "scores.json"]
    assert score_challenge([str(argument) for argument in arguments]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    content = evaluation[1]["unguided"]
    assert scores["num_volumes"] == content["num_cases"] == 6
    for figure in ("auroc", "f1", "precision", "recall", "accuracy", "crg"):
        assert scores["macro"][figure] == pytest.approx(content["challenge"]["rescaled"][figure], abs=1e-6)


def test_prompts_score_findings_that_were_never_trained(inference_options, text_model, tmp_path, monkeypatch):
    """By the command line, with the text encoder; the label set's own findings stay what they are without it."""
    prompts = "{'Cavitation':'Pneumothorax.','Cyst':{'positive':'Emphysema.','regions':['left_upper_lobe']}}"
    arguments = {"workflow_type": "infer", **inference_options(tmp_path / "prompted", max_cases=2), "prompts": prompts}
    arguments["text_model"] = str(text_model)
    run_command_here(command(config_files("classification/inference"), arguments), REPOSITORY, monkeypatch)
    options = inference_options(tmp_path / "own", max_cases=2)
    run(config_file=config_files("classification/inference"), workflow_type="infer", **options)
    for volume_id in PredictionStore(tmp_path / "own").volume_ids():
        own = PredictionStore(tmp_path / "own").read(volume_id)
        prompted = PredictionStore(tmp_path / "prompted").read(volume_id)
        assert list(prompted) == [*own, "Cavitation", "Cyst"]
        assert {name: prompted[name] for name in own} == own
        for name in ("Cavitation", "Cyst"):
            assert prompted[name]["trained"] is False and prompted[name]["threshold"] == 0.5
            assert 0 < prompted[name]["probability"] < 1
        assert prompted["Cavitation"]["probability"] != prompted["Cyst"]["probability"]
