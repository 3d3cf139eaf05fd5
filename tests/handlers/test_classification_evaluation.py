import csv
import json
import math

import numpy as np
import pytest
import torch

from tests.handlers.tiny_classifier import NAMES, make_cases, make_classifier, make_evaluator
from vlm3d_ext.engines.classification_evaluation import evaluate_classification
from vlm3d_ext.handlers import ClassificationEvaluation

FILES = ("classification.json", "classification.csv", "classification_baselines.csv", "predictions.csv")
FILES_AS_TEXT = [name.split(".") for name in FILES]  # the last holds the predictions themselves
FIGURES = ("roc.png", "precision_recall.png", "reliability.png")
PREVALENCE = np.linspace(0.05, 0.6, 18)


def files_of(way):
    return {name.replace(".", f"_{way}.") for name in (*FILES, *FIGURES)}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Return the classifier, the cases of which every other is guided, the evaluator after its run, and the folder."""
    folder = tmp_path_factory.mktemp("evaluation")
    classifier, cases = make_classifier(), make_cases(40)
    classifier.thresholds.copy_(torch.linspace(0.3, 0.7, 18))
    handler = ClassificationEvaluation(classifier, cases, PREVALENCE, folder, num_resamples=10, seed=3)
    evaluator = make_evaluator(classifier, cases, handler)
    evaluator.run()
    return classifier, cases, evaluator, folder


def test_both_ways_have_their_files(evaluated):
    *_, folder = evaluated
    assert {path.name for path in folder.iterdir()} == files_of("guided") | files_of("unguided")


@pytest.mark.parametrize(("way", "first"), [("unguided", 0), ("guided", 1)])
def test_figures_are_those_of_the_cases_of_that_way(evaluated, way, first):
    classifier, cases, evaluator, folder = evaluated
    chosen = cases[first::2]
    with torch.no_grad():
        output = classifier(torch.stack([case["features"] for case in chosen]))
    report = evaluate_classification(
        output["probabilities"].double().numpy(),
        torch.stack([case["labels"] for case in chosen]).double().numpy(),
        NAMES,
        classifier.thresholds.numpy(),
        PREVALENCE,
        10,
        3,
        groups=[case["patient_id"] for case in chosen],
    )
    written = json.loads((folder / f"classification_{way}.json").read_text())
    assert written["num_cases"] == 20
    for figure in ("auroc", "f1", "crg", "brier", "auroc_low"):
        assert written["macro"][figure] == pytest.approx(report.macro[figure], rel=1e-4)
    for figure in ("auroc", "f1", "crg", "brier"):
        assert evaluator.state.metrics[f"macro_{figure}_{way}"] == pytest.approx(report.macro[figure], rel=1e-4)
    with open(folder / f"predictions_{way}.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == [case["volume_id"] for case in chosen]
    values = np.array([row[1:] for row in rows[1:]], dtype=float)
    np.testing.assert_allclose(values, output["probabilities"], atol=1e-5)


def test_a_finding_without_a_positive_is_undefined(evaluated):
    *_, evaluator, folder = evaluated
    last = json.loads((folder / "classification_guided.json").read_text())["per_label"][-1]
    assert last["label"] == NAMES[-1] and last["undefined"] == "no positives" and last["positives"] == 0
    assert last["auroc"] is None and last["average_precision"] is None and last["negatives"] > 0
    assert all(math.isfinite(value) for value in evaluator.state.metrics.values())


def run(folder, cases, **options):
    classifier = make_classifier()
    handler = ClassificationEvaluation(classifier, cases, PREVALENCE, folder, num_resamples=4)
    evaluator = make_evaluator(classifier, cases, handler, **options)
    evaluator.run()
    return evaluator


def test_without_masks_there_is_one_way(tmp_path, caplog):
    with caplog.at_level("INFO"):
        evaluator = run(tmp_path, make_cases(12, guided=False))
    assert {path.name for path in tmp_path.iterdir()} == files_of("unguided")
    assert "No case was evaluated guided." in caplog.text
    assert not [name for name in evaluator.state.metrics if name.endswith("_guided")]


def test_nothing_known_is_undefined_and_no_crash(tmp_path):
    cases = make_cases(12, guided=False)
    for case in cases:
        case["labels"] = torch.full((18,), float("nan"))
    evaluator = run(tmp_path, cases)
    assert evaluator.state.metrics == {}
    written = json.loads((tmp_path / "classification_unguided.json").read_text())
    assert written["macro"]["auroc"] is None and written["macro"]["crg"] is None
    assert {row["undefined"] for row in written["per_label"]} == {"no known labels"}


def test_huge_wrong_predictions_on_unknown_labels_change_no_figure(tmp_path):
    """Nor does it matter that the handler has seen a run before."""
    classifier, cases = make_classifier(), make_cases(20, guided=False)
    cases[4]["labels"] = torch.full((18,), float("nan"))
    handler = ClassificationEvaluation(classifier, cases, PREVALENCE, tmp_path, num_resamples=4)
    evaluator = make_evaluator(classifier, cases, handler)
    written = []
    for factor in (1, -1e3):
        cases[4]["features"] = cases[4]["features"] * factor
        evaluator.run()
        written.append([(tmp_path / f"{name}_unguided.{kind}").read_text() for name, kind in FILES_AS_TEXT])
    assert written[0][:-1] == written[1][:-1]
    assert written[0][-1] != written[1][-1]  # else nothing was planted


def test_a_share_of_the_cases_is_not_reported_as_the_whole(tmp_path, monkeypatch):
    classifier, cases = make_classifier(), make_cases(4)
    handler = ClassificationEvaluation(classifier, cases, PREVALENCE, tmp_path)
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="evaluation runs in one process, got 2"):
        make_evaluator(classifier, cases, handler)
