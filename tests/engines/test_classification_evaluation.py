import csv
import io
import json
import math
import struct
import time

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score

from tests.engines.classified_cases import LABEL_NAMES, classified_cases
from vlm3d_ext.engines.classification_evaluation import (
    FIGURES,
    baseline_figures,
    evaluate_classification,
    format_classification,
)
from vlm3d_ext.engines.classification_report_files import write_classification_report
from vlm3d_ext.metrics import crg_score, fit_calibration, macro_auroc, per_label_auroc

UNDEFINED = {3: "no positives", 7: "no known labels", 9: "no negatives"}
NAMES = ("a", "b")


@pytest.fixture(scope="module")
def evaluated():
    logits, labels = classified_cases()
    calibration = fit_calibration(*classified_cases(seed=1))
    probabilities = calibration.probabilities(logits)
    prevalence = np.linspace(0.05, 0.5, 18)
    report = evaluate_classification(probabilities, labels, LABEL_NAMES, calibration.thresholds, prevalence)
    return report, probabilities, labels, calibration, logits


def test_rows_hold_the_figures_of_their_labels(evaluated):
    report, probabilities, labels, calibration, _ = evaluated
    for column, row in enumerate(report.per_label):
        known = ~np.isnan(labels[:, column])
        truth, scores = labels[known, column], probabilities[known, column]
        assert row["label"] == LABEL_NAMES[column] and row["threshold"] == calibration.thresholds[column]
        assert (row["positives"], row["negatives"], row["unknown"]) == (
            (truth == 1).sum(),
            (truth == 0).sum(),
            (~known).sum(),
        )
        assert row["undefined"] == UNDEFINED.get(column, "")
        if row["undefined"]:
            assert math.isnan(row["auroc"]) and math.isnan(row["auroc_low"])
            continue
        assert row["average_precision"] == pytest.approx(average_precision_score(truth, scores))
        assert row["f1"] == pytest.approx(f1_score(truth, scores >= row["threshold"]))
        for figure in ("auroc", "average_precision", "f1"):
            assert row[f"{figure}_low"] < row[figure] < row[f"{figure}_high"]


def test_means_are_over_defined_labels(evaluated):
    report, probabilities, labels, calibration, _ = evaluated
    assert report.macro["auroc"] == pytest.approx(macro_auroc(labels, probabilities))
    for figure in FIGURES:
        defined = [row[figure] for row in report.per_label if not math.isnan(row[figure])]
        assert report.macro[figure] == pytest.approx(np.mean(defined))
        if figure != "expected_calibration_error":
            assert report.macro[f"{figure}_low"] < report.macro[figure] < report.macro[f"{figure}_high"]
    assert report.macro["crg"] == pytest.approx(crg_score(labels, probabilities >= calibration.thresholds))
    assert report.macro["crg_low"] < report.macro["crg"] < report.macro["crg_high"]
    assert math.isnan(report.macro["expected_calibration_error_high"])


def test_rescaled_to_the_challenge_half_decides_as_the_thresholds_do(evaluated):
    report, probabilities, labels, _, _ = evaluated
    for figure, value in report.challenge["rescaled"].items():
        assert value == pytest.approx(report.macro[figure], abs=1e-12)
    assert report.challenge["as_given"]["crg"] == pytest.approx(crg_score(labels, probabilities >= 0.5))
    assert report.challenge["as_given"]["f1"] < report.challenge["rescaled"]["f1"]


def test_baselines_by_hand():
    """Label a: 3 of 4 positive, label b: 1 of 4."""
    labels = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    baselines = baseline_figures(labels, np.array([0.6, 0.2]))
    assert list(baselines) == ["random", "all_negative", "all_positive", "prevalence"]
    for name, figures in baselines.items():
        if name != "random":
            assert figures["auroc"] == 0.5 and figures["average_precision"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    negative, positive, prevalence = (baselines[name] for name in ("all_negative", "all_positive", "prevalence"))
    assert (negative["f1"], negative["accuracy"], negative["crg"]) == (0.0, 0.5, 1 / 3)
    assert positive["f1"] == pytest.approx((6 / 7 + 2 / 5) / 2) and positive["crg"] == 1 / 3
    # above the mean prevalence of 0.4 lies only label a: t = 3/4, f = 1/4
    assert prevalence["crg"] == pytest.approx(1 / (3 - 2 * 0.5)) and prevalence["f1"] == pytest.approx(6 / 14)
    assert prevalence["brier"] == pytest.approx(((3 * 0.4**2 + 0.6**2) / 4 + (0.8**2 + 3 * 0.2**2) / 4) / 2)
    assert list(baseline_figures(labels)) == ["random", "all_negative", "all_positive"]


def test_random_baseline_is_near_chance_and_seeded():
    labels = (np.random.default_rng(0).random((1000, 6)) < 0.3).astype(float)
    figures = baseline_figures(labels, seed=4)["random"]
    assert figures["auroc"] == pytest.approx(0.5, abs=0.01) and figures["recall"] == pytest.approx(0.5, abs=0.01)
    assert figures["crg"] == pytest.approx(1 / 3, abs=0.005)
    assert figures == baseline_figures(labels, seed=4)["random"] != baseline_figures(labels, seed=5)["random"]


def test_a_label_unknown_in_training_gets_the_average_prevalence():
    labels = np.array([[1.0, 0.0], [0.0, 1.0]])
    known = baseline_figures(labels, np.array([0.4, 0.4]))["prevalence"]
    assert baseline_figures(labels, np.array([0.4, np.nan]))["prevalence"] == known
    assert baseline_figures(labels, np.array([np.nan, np.nan]))["prevalence"]["brier"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"training_prevalence must be \(2,\) in \[0, 1\], got \[1.4, 0.1\]"):
        baseline_figures(labels, np.array([1.4, 0.1]))


def test_unknown_labels_change_no_figure(evaluated):
    report, probabilities, labels, calibration, _ = evaluated
    planted = np.where(np.isnan(labels), 1e9, probabilities)
    again = evaluate_classification(planted, labels, LABEL_NAMES, calibration.thresholds, np.linspace(0.05, 0.5, 18))
    assert str(again) == str(report)  # as text, because NaN is not equal to itself


def test_nothing_known_is_undefined_and_not_a_crash():
    report = evaluate_classification(np.full((3, 2), 0.5), np.full((3, 2), np.nan), NAMES, np.full(2, 0.5), None)
    assert all(math.isnan(value) for value in report.macro.values())
    assert [row["undefined"] for row in report.per_label] == ["no known labels"] * 2
    assert "undefined: no known labels" in format_classification(report)


def test_patients_are_resampled_whole():
    """Sixfold cases do not narrow the interval when their patient is drawn."""
    logits, labels = classified_cases(60)
    probabilities, rows = expit(logits), np.repeat(np.arange(60), 6)
    thresholds = np.full(18, 0.5)

    def interval(taken, groups):
        report = evaluate_classification(
            probabilities[taken], labels[taken], LABEL_NAMES, thresholds, None, groups=groups
        )
        return report.macro["auroc_low"], report.macro["auroc_high"]

    single = interval(np.arange(60), None)
    assert interval(rows, [f"patient_{row:02d}" for row in rows]) == pytest.approx(single)
    low, high = interval(rows, None)
    assert high - low < 0.6 * (single[1] - single[0])


def test_evaluation_of_a_whole_split_takes_seconds():
    logits, labels = classified_cases(1500)
    started = time.perf_counter()
    evaluate_classification(expit(logits), labels, LABEL_NAMES, np.full(18, 0.5), None, num_resamples=200)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("probabilities", "names", "thresholds", "message"),
    [
        (np.zeros((0, 2)), NAMES, [0.5, 0.5], "no case to evaluate"),
        (np.zeros((4, 2)), ("a",), [0.5, 0.5], r"2 labels need as many names and thresholds, got 1 and \(2,\)"),
        (np.full((4, 2), 7.0), NAMES, [0.5, 0.5], "got 7.0 for case 0, label 0"),
        (np.zeros((4, 2)), NAMES, [0.5, 1.0], "thresholds must lie between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(probabilities, names, thresholds, message):
    with pytest.raises(ValueError, match=message):
        evaluate_classification(probabilities, np.zeros(probabilities.shape), names, np.array(thresholds), None)


def test_text_shows_baselines_beside_and_undefined_labels_in_words(evaluated):
    report = evaluated[0]
    text = format_classification(report)
    assert max(len(line) for line in text.splitlines()) <= 130
    header, auroc = text.splitlines()[1:3]
    assert header.split()[:7] == ["classifier", "random", "all", "negative", "all", "positive", "prevalence"]
    assert auroc.split()[:2] == ["AUROC", f"{report.macro['auroc']:.3f}"]
    line = next(line for line in text.splitlines() if line.startswith("Pericardial effusion"))
    assert line.endswith("undefined: no positives") and " 0.000" not in line
    challenge = next(line for line in text.splitlines() if line.startswith("as given"))
    assert challenge.split()[-1] == f"{report.challenge['as_given']['crg']:.3f}"


def test_files(evaluated, tmp_path):
    report, probabilities, labels, calibration, logits = evaluated
    ids = [f"valid_{index}_a_1" for index in range(len(labels))]
    paths = write_classification_report(
        report, tmp_path / "new", ids, probabilities, labels, "guided", uncalibrated_probabilities=expit(logits)
    )
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "new").iterdir())
    assert [path.name for path in paths] == [
        "classification_guided.json", "classification_guided.csv", "classification_baselines_guided.csv",
        "predictions_guided.csv", "roc_guided.png", "precision_recall_guided.png", "reliability_guided.png",
    ]  # fmt: skip
    content = json.loads(paths[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["macro"]["auroc"] == pytest.approx(report.macro["auroc"], abs=1e-6)
    assert content["per_label"][3]["auroc"] is None and content["per_label"][3]["undefined"] == "no positives"
    assert content["per_label"][0]["threshold"] == calibration.thresholds[0]
    rows = list(csv.DictReader(io.StringIO(paths[1].read_text())))
    assert [row["label"] for row in rows] == list(LABEL_NAMES)
    assert rows[3]["f1"] == "" and rows[3]["undefined"] == "no positives" and float(rows[0]["f1"]) > 0
    baselines = list(csv.DictReader(io.StringIO(paths[2].read_text())))
    assert [row["predictor"] for row in baselines] == [
        "classifier", "random", "all_negative", "all_positive", "prevalence"
    ]  # fmt: skip
    assert float(baselines[1]["auroc"]) == pytest.approx(report.baselines["random"]["auroc"], abs=1e-6)
    predictions = list(csv.DictReader(io.StringIO(paths[3].read_text())))
    assert [row["volume_id"] for row in predictions] == ids
    read = np.array([[float(row[name]) for name in LABEL_NAMES] for row in predictions])
    np.testing.assert_array_equal(per_label_auroc(labels, read), per_label_auroc(labels, probabilities))
    for path in paths[4:]:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert 400 < width < 2000 and 400 < height < 1500


def test_writing_again_gives_the_same_bytes(evaluated, tmp_path):
    report, probabilities, labels, _, _ = evaluated
    ids = [str(index) for index in range(len(labels))]
    written = [
        [path.read_bytes() for path in write_classification_report(report, tmp_path / name, ids, probabilities, labels)]
        for name in ("a", "b")
    ]
    assert written[0] == written[1]


def test_files_that_cannot_be_right_are_not_begun(evaluated, tmp_path):
    report, probabilities, labels, _, _ = evaluated
    with pytest.raises(ValueError, match="suffix must be letters"):
        write_classification_report(report, tmp_path / "x", [""] * 300, probabilities, labels, suffix="../up")
    with pytest.raises(ValueError, match="the same cases, got 2"):
        write_classification_report(report, tmp_path / "x", ["a", "b"], probabilities, labels)
    assert not (tmp_path / "x").exists()
