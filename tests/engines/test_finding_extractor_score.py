import csv
import re

import numpy as np
import pytest

from vlm3d_ext.engines.finding_extractor_score import main, positive_f1, score_finding_extractor
from vlm3d_ext.text.finding_extractor import FindingExtractor
from vlm3d_ext.text.label_set import load_label_set

NAMES = load_label_set("ct_rate_18").names
REPORTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("a", "Pleural effusion on the left.", {"Pleural effusion": "1"}),
    ("b", "No pleural effusion. Emphysema in both lungs.", {"Pleural effusion": "1", "Emphysema": "1"}),
    ("c", "Small pleural effusion.", {}),
    ("d", "Heart size is normal.", {"Emphysema": "1", "Cardiomegaly": ""}),
    ("e", "Pleural effusion.", {"Pleural effusion": ""}),
)


def write(path, reports=REPORTS, columns=("AccessionNo", "report_text", *NAMES)):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for case, text, labels in reports:
            row = dict.fromkeys(NAMES, "0") | labels | {"AccessionNo": case, "report_text": text}
            writer.writerow({name: row[name] for name in columns})
    return path


def test_figures_by_hand(tmp_path):
    scores = score_finding_extractor(write(tmp_path / "r.csv"), FindingExtractor())
    effusion, emphysema = NAMES.index("Pleural effusion"), NAMES.index("Emphysema")
    # reported for a, c and (unknown) e; true for a and b
    assert scores.positives[effusion] == 2
    assert scores.precision[effusion] == scores.recall[effusion] == scores.f1[effusion] == 0.5
    assert scores.precision[emphysema] == 1 and scores.recall[emphysema] == 0.5
    assert scores.f1[emphysema] == pytest.approx(2 / 3)
    assert scores.macro_f1 == pytest.approx((1 / 2 + 2 / 3) / 2)
    # everything reported of the four known effusions: precision 1/2, recall 1; of the five emphysemas: 2/5
    assert scores.all_positive_f1[effusion] == pytest.approx(2 / 3)
    assert scores.all_positive_f1[emphysema] == pytest.approx(4 / 7)
    assert np.isnan(scores.f1[NAMES.index("Cardiomegaly")])


def test_each_error_names_its_sentence(tmp_path, capsys):
    assert main(["--reports", str(write(tmp_path / "r.csv")), "--errors", str(tmp_path / "e.csv")]) == 0
    with open(tmp_path / "e.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["case", "label", "error", "sentence"],
            ["b", "Pleural effusion", "false negative", "absent: No pleural effusion."],
            ["c", "Pleural effusion", "false positive", "Small pleural effusion."],
            ["d", "Emphysema", "false negative", "no mention"],
        ]
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("Pleural effusion")]
    assert row.split() == ["Pleural", "effusion", "2", "0.500", "0.500", "0.500", "0.667"]
    assert "macro-F1 over 2 findings: 0.583 (all positive 0.619, all negative 0.000)" in printed
    assert "c: Pleural effusion: false positive: Small pleural effusion." in printed


@pytest.mark.parametrize(("rows", "num_reports"), [("odd", 3), ("even", 2), ("all", 5)])
def test_halves(tmp_path, rows, num_reports):
    scores = score_finding_extractor(write(tmp_path / "r.csv"), FindingExtractor(), rows)
    assert scores.num_reports == num_reports
    assert {error.case for error in scores.errors} <= {"odd": {"a", "c", "e"}, "even": {"b", "d"}}.get(
        rows, set("abcde")
    )


def test_doubt_can_be_left_out(tmp_path, capsys):
    path = str(write(tmp_path / "r.csv", [("a", "Pleural effusion cannot be excluded.", {"Pleural effusion": "1"})]))
    assert main(["--reports", path]) == 0
    assert "macro-F1 over 1 findings: 1.000" in capsys.readouterr().out
    assert main(["--reports", path, "--uncertain-is-absent"]) == 0
    assert "uncertain: Pleural effusion cannot be excluded." in capsys.readouterr().out


def test_f1_is_undefined_without_positives_and_zero_without_hits():
    f1 = positive_f1(np.array([3, 0, 0]), np.array([4, 2, 0]), np.array([5, 0, 7]))
    np.testing.assert_allclose(f1, [6 / 9, np.nan, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00,"), "UTF-8"),
        (lambda path: write(path, columns=("AccessionNo", *NAMES)), "'report_text'"),
        (lambda path: write(path, columns=("report_text", *NAMES)), "no column with ids"),
        (lambda path: write(path, columns=("AccessionNo", "report_text", *NAMES[1:])), "Medical material"),
        (lambda path: write(path, [("a", "x", {"Emphysema": "2"})]), "row 2.*'Emphysema' is '2'"),
        (lambda path: write(path, []), "none to score"),
        (lambda path: path.write_text(path.read_text() + "z,too short\n"), "2 fields, expected 20"),
    ],
)
def test_bad_tables_end_with_one_clear_error(tmp_path, capsys, change, message):
    path = write(tmp_path / "r.csv")
    change(path)
    assert main(["--reports", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert re.search(message, captured.err)


def test_unknown_label_set(tmp_path, capsys):
    assert main(["--reports", str(write(tmp_path / "r.csv")), "--label-set", "ct_rate_19"]) == 2
    assert "ct_rate_18" in capsys.readouterr().err
