import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

from vlm3d_ext.data.challenge_classification import write_challenge_predictions
from vlm3d_ext.engines.challenge_classification_score import main
from vlm3d_ext.text.label_set import load_label_set

LABELS = load_label_set("ct_rate_18").names
REAL_LABELS = Path(__file__).parents[3] / "shared/data/ctrate/text_classifier_val_labels.head120.csv"


def write_labels(path, labels, names):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["VolumeName", *LABELS])
        writer.writerows([f"{name}.nii.gz", *row] for name, row in zip(names, labels, strict=True))
    return path


def made_up(tmp_path, num=60, seed=0):
    generator = np.random.default_rng(seed)
    labels = (generator.random((num, 18)) < np.linspace(0.15, 0.6, 18)).astype(int)
    probabilities = np.clip(0.3 * labels + generator.random(labels.shape) * 0.7, 0, 1).round(3)
    names = [f"valid_{index}_a_1" for index in range(num)]
    write_challenge_predictions(tmp_path / "p.json", names, LABELS, probabilities)
    return write_labels(tmp_path / "labels.csv", labels, names), labels, probabilities, names


def challenge_scores(labels, probabilities):
    """The challenge's figures: scikit-learn with zero_division=0 at 0.5, and the published CRG."""
    decided = (probabilities >= 0.5).astype(int)
    columns = range(18)
    tp = ((decided == 1) & (labels == 1)).sum()
    fn = ((decided == 0) & (labels == 1)).sum()
    fp = ((decided == 1) & (labels == 0)).sum()
    exams, positives = labels.size, labels.sum()
    r, u = (exams - positives) / (2 * positives), (exams - positives) / 2
    return {
        "precision": np.mean([precision_score(labels[:, c], decided[:, c], zero_division=0) for c in columns]),
        "recall": np.mean([recall_score(labels[:, c], decided[:, c], zero_division=0) for c in columns]),
        "f1": np.mean([f1_score(labels[:, c], decided[:, c], zero_division=0) for c in columns]),
        "accuracy": np.mean([accuracy_score(labels[:, c], decided[:, c]) for c in columns]),
        "auroc": np.mean([roc_auc_score(labels[:, c], probabilities[:, c]) for c in columns]),
        "crg": u / (2 * u - (r * tp - r * fn - fp)),
    }


def run(tmp_path, *more, labels="labels.csv"):
    return main(
        ["--predictions", str(tmp_path / "p.json"), "--labels", str(tmp_path / labels), "--resamples", "20", *more]
    )


def test_scores_are_the_challenges(tmp_path, capsys):
    _, labels, probabilities, _ = made_up(tmp_path)
    assert run(tmp_path, "--output", str(tmp_path / "scores.json")) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_volumes"] == 60 and len(scores["per_pathology"]) == 18
    for figure, value in challenge_scores(labels, probabilities).items():
        assert scores["macro"][figure] == pytest.approx(value, abs=1e-9), figure
        assert scores["macro"][f"{figure}_low"] < value < scores["macro"][f"{figure}_high"]
    assert scores["baselines"]["all_negative"]["crg"] == pytest.approx(1 / 3)
    assert "prevalence" not in scores["baselines"]
    printed = capsys.readouterr().out
    assert "random" in printed and "no prevalence baseline without --training-labels" in printed
    assert run(tmp_path, "--training-labels", str(tmp_path / "labels.csv")) == 0
    assert "prevalence" in capsys.readouterr().out.splitlines()[1]


def test_volumes_in_one_file_only_are_counted_listed_and_left_out(tmp_path, capsys):
    _, labels, probabilities, names = made_up(tmp_path)
    write_labels(tmp_path / "other.csv", labels[10:], [*names[10:-2], "valid_900_a_1", "valid_901_a_1"])
    assert run(tmp_path, "--output", str(tmp_path / "scores.json"), labels="other.csv") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["predicted_without_labels"] == [*names[:10], *names[-2:]]
    assert scores["labelled_without_prediction"] == ["valid_900_a_1", "valid_901_a_1"]
    assert scores["num_volumes"] == 48
    expected = challenge_scores(labels[10:-2], probabilities[10:-2])
    assert scores["macro"]["f1"] == pytest.approx(expected["f1"])
    printed = capsys.readouterr().out
    assert "note: 12 volume(s) predicted, but without a row of labels: valid_0_a_1, " in printed
    assert "note: 2 volume(s) with labels, but not predicted: valid_900_a_1, valid_901_a_1" in printed


def test_a_label_without_positives_is_undefined(tmp_path, capsys):
    _, labels, _, names = made_up(tmp_path)
    labels[:, 4] = 0
    write_labels(tmp_path / "labels.csv", labels, names)
    assert run(tmp_path, "--output", str(tmp_path / "scores.json")) == 0
    row = json.loads((tmp_path / "scores.json").read_text())["per_pathology"][4]
    assert row["f1"] is None and row["auroc"] is None and row["undefined"] == "no positives"
    assert "undefined: no positives" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("other volumes", "none of its 60 volumes (such as valid_0_a_1) has a row in"),
        ("no labels", "no such file"),
        ("not JSON", "is not JSON"),
        ("column", "'Emphysemia'"),
    ],
)
def test_what_cannot_be_scored_ends_with_2_and_one_line(tmp_path, capsys, change, message):
    path, labels, _, _ = made_up(tmp_path)
    if change == "other volumes":
        write_labels(path, labels, [f"train_{index}_a_1" for index in range(60)])
    elif change == "no labels":
        path.unlink()
    elif change == "not JSON":
        (tmp_path / "p.json").write_text("{")
    else:
        path.write_text(path.read_text().replace("Emphysema", "Emphysemia"))
    assert run(tmp_path, "--output", str(tmp_path / "scores.json")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.skipif(not REAL_LABELS.is_file(), reason="the real CT-RATE rows (../shared/data) are not on this machine")
def test_real_ct_rate_rows(tmp_path):
    """Perfect probabilities score 1; the rows are keyed by AccessionNo, as in the challenge's ground truth."""
    with open(REAL_LABELS, newline="") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([[float(row[name]) for name in LABELS] for row in rows])
    names = [row["AccessionNo"] for row in rows]
    write_challenge_predictions(tmp_path / "p.json", names, LABELS, 0.2 + 0.6 * labels)
    command = [sys.executable, "-m", "vlm3d_ext.engines.challenge_classification_score", "--resamples", "5"]
    command += ["--predictions", str(tmp_path / "p.json"), "--labels", str(REAL_LABELS)]
    command += ["--output", str(tmp_path / "scores.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_volumes"] == len(rows) == 120
    assert scores["macro"]["f1"] == scores["macro"]["crg"] == scores["macro"]["auroc"] == 1.0
    prevalence = labels.mean()
    assert scores["baselines"]["all_positive"]["accuracy"] == pytest.approx(prevalence)
    assert scores["baselines"]["all_negative"]["crg"] == pytest.approx(1 / 3)
