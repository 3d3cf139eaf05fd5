import csv
import json

import matplotlib.image
import numpy as np
import pytest

from tests.engines.reported_cases import CASE_IDS, EXTRACTOR, GENERATED, PATIENTS, REFERENCES, make_labels
from vlm3d_ext.engines.report_evaluation import evaluate_reports, format_reports, normal_report
from vlm3d_ext.engines.report_files import write_report_evaluation

TEXTS = {
    "generated": GENERATED,
    "all normal": [normal_report(EXTRACTOR.label_set)] * 4,
    "reference": REFERENCES,
}
FILES = [
    "reports.csv", "reports.json", "reports.png", "reports.txt", "reports_examples.txt", "reports_per_case.csv",
    "reports_per_label.csv",
]  # fmt: skip


def write(folder, labels=None, references=REFERENCES):
    labels = make_labels() if labels is None else labels
    evaluation = evaluate_reports(
        TEXTS, references, labels, CASE_IDS, EXTRACTOR, num_resamples=20, groups=PATIENTS
    )  # fmt: skip
    write_report_evaluation(evaluation, folder, TEXTS, references)
    return evaluation


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, write(folder)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_files_are_there(written):
    assert sorted(path.name for path in written[0].iterdir()) == FILES


def test_the_json_holds_every_figure_and_null_for_what_is_undefined(written):
    folder, evaluation = written
    content = json.loads((folder / "reports.json").read_text(), parse_constant=pytest.fail)
    assert content["num_cases"] == 4 and content["num_resamples"] == 20 and content["without_reference"] == []
    assert list(content["systems"]) == list(TEXTS)
    for system in evaluation.systems:
        figures = content["systems"][system.name]
        assert list(figures) == list(system.figures)
        for name, value in system.figures.items():
            assert figures[name] is None if np.isnan(value) else figures[name] == pytest.approx(value, abs=1e-6)
    assert content["systems"]["all normal"]["laterality"] is None
    nodule = next(row for row in content["per_label"]["generated"] if row["label"] == "Lung nodule")
    assert nodule["named"] == 2 and nodule["f1"] == pytest.approx(2 / 3, abs=1e-6)
    assert "meteor_1_5" in content["absent_metrics"]


def test_the_tables_have_a_row_for_each_system_case_and_finding(written):
    folder, evaluation = written
    systems = read_csv(folder / "reports.csv")
    assert [row["system"] for row in systems] == list(TEXTS)
    assert float(systems[0]["clinical_f1"]) == pytest.approx(7 / 12, abs=1e-6) and systems[1]["laterality"] == ""
    cases = read_csv(folder / "reports_per_case.csv")
    assert [(row["system"], row["volume_id"]) for row in cases] == [(name, case) for name in TEXTS for case in CASE_IDS]
    assert [float(row["clinical_f1"]) for row in cases[:4]] == [1, 0.5, 0, 1]
    assert float(cases[1]["rouge_l"]) == pytest.approx(evaluation.systems[0].per_case[1]["rouge_l"], abs=1e-6)
    findings = read_csv(folder / "reports_per_label.csv")
    assert [(row["system"], row["label"]) for row in findings] == [(s, name) for s in TEXTS for name in EXTRACTOR.names]
    assert {row["f1"] for row in findings if row["label"] == "Consolidation"} == {""}


def test_the_table_reads_the_same_as_from_the_figures(written):
    folder, evaluation = written
    expected = format_reports({system.name: system.figures for system in evaluation.systems})
    assert (folder / "reports.txt").read_text() == expected + "\n"


def test_the_picture_shows_something(written):
    picture = matplotlib.image.imread(written[0] / "reports.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 800
    assert 0.02 < (picture[..., :3].min(-1) < 0.9).mean() < 0.9
    # bars of the first and the third system, each in a colour of its own; those of the second have no length
    colours = {tuple(np.round(255 * pixel).astype(int)) for pixel in picture[..., :3].reshape(-1, 3)[::7]}
    assert {(31, 119, 180), (44, 160, 44)} <= colours and (255, 127, 14) not in colours


def test_examples_go_from_the_worst_to_the_best(written):
    text = (written[0] / "reports_examples.txt").read_text()
    heads = [line for line in text.splitlines() if line.startswith("===")]
    # four cases are all shown; the two that are perfect keep their order
    assert [head.split()[1].rstrip(":") for head in heads] == [CASE_IDS[index] for index in (2, 1, 0, 3)]
    assert heads[1] == "=== valid_2_a_1: clinical F1 0.50, 1 of 2 findings found, 2 named"
    for case in range(4):
        assert f"--- reference\n{REFERENCES[case]}\n--- generated\n{GENERATED[case]}\n" in text


def test_cases_of_which_nothing_is_known_are_no_examples(tmp_path):
    labels = make_labels()
    labels[2] = np.nan
    write(tmp_path / "some", labels)
    text = (tmp_path / "some" / "reports_examples.txt").read_text()
    assert CASE_IDS[2] not in text and text.count("===") == 3
    cases = read_csv(tmp_path / "some" / "reports_per_case.csv")
    assert cases[2]["clinical_f1"] == ""
    write(tmp_path / "none", np.full_like(labels, np.nan))
    assert (tmp_path / "none" / "reports_examples.txt").read_text() == ""
    content = json.loads((tmp_path / "none" / "reports.json").read_text(), parse_constant=pytest.fail)
    assert content["systems"]["generated"]["clinical_f1"] is None
    assert sorted(path.name for path in (tmp_path / "none").iterdir()) == FILES


def test_cases_without_reference_are_named(tmp_path):
    write(tmp_path, references=[*REFERENCES[:3], ""])
    content = json.loads((tmp_path / "reports.json").read_text())
    assert content["without_reference"] == [CASE_IDS[3]]
    assert read_csv(tmp_path / "reports_per_case.csv")[3]["rouge_l"] == ""


def test_the_files_are_the_same_bytes_each_time(written, tmp_path):
    write(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (written[0] / name).read_bytes(), name
