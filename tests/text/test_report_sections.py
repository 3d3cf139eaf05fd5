import csv
from pathlib import Path

import pytest

from vlm3d_ext.text.report_sections import (
    ReportSections,
    parse_report,
    sections_from_columns,
    split_sentences,
    write_report,
)

REAL_REPORTS = Path(__file__).parents[3] / "shared/data/ctrate/validation_reports_drop_dup_with_volumes.head400.csv"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Findings: A nodule. Impression: Nodule.", ReportSections("A nodule.", "Nodule.")),
        (
            "FINDINGS:\nA nodule.\n\nIMPRESSIONS:\nNodule.\nRECOMMENDATIONS: CT.",
            ReportSections("A nodule.", "Nodule.", "CT."),
        ),
        ("**Findings:** A nodule.\n**Conclusion:** Nodule.", ReportSections("A nodule.", "Nodule.")),
        ("Findings: sequela bands Impression: Sequela", ReportSections("sequela bands", "Sequela")),
        ("Only text: the described findings: none.", ReportSections("Only text: the described findings: none.")),
        ("Technique: 1.5 mm. Findings: F. Findings: G.", ReportSections("F. G.", technique="1.5 mm.")),
        (
            "Clinical information: Cough. Findings: F. Impression: Not given.",
            ReportSections("F.", clinical_information="Cough."),
        ),
        ("", ReportSections()),
    ],
)
def test_parse(text, expected):
    assert parse_report(text) == expected


def test_ct_rate_columns():
    sections = sections_from_columns(" Open trachea. ", "Not given.", None, "Axial.")
    assert sections == ReportSections("Open trachea.", technique="Axial.")
    assert write_report(sections) == "Technique: Axial. Findings: Open trachea."


@pytest.mark.parametrize("separator", [" ", "\n", "\n\n"])
def test_written_reports_are_read_back(separator):
    sections = ReportSections("The findings are few. No nodule", "Normal.", "None.", "Cough", "1.5 mm")
    assert parse_report(write_report(sections, separator)) == sections


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A 1.5 mm nodule. No effusion.", ["A 1.5 mm nodule.", "No effusion."]),
        ("Nodes of 23x16.5mm. CT of 03.02.2020. Normal.", ["Nodes of 23x16.5mm.", "CT of 03.02.2020.", "Normal."]),
        ("Changes, e.g. Emphysema, are seen. No mass.", ["Changes, e.g. Emphysema, are seen.", "No mass."]),
        ("It measures 3.5. No mass.", ["It measures 3.5.", "No mass."]),
        ("A fracture of the 5. rib is seen.", ["A fracture of the 5. rib is seen."]),
        ("1. Nodule. 2. Effusion.", ["1. Nodule.", "2. Effusion."]),
        ("Nodules in both lungs.No effusion.", ["Nodules in both lungs.", "No effusion."]),
        ("Emphysema; nodule on the right; hernia", ["Emphysema", "nodule on the right", "hernia"]),
        ("When examined in the lung window; No mass.", ["When examined in the lung window; No mass."]),
        (
            "In the upper abdomen; the liver is normal; a renal cyst.",
            ["In the upper abdomen; the liver is normal", "a renal cyst."],
        ),
        ("In the left lung there is a mass; no effusion.", ["In the left lung there is a mass", "no effusion."]),
        ("A lesion (cyst?, hemangioma? Other.) is seen.", ["A lesion (cyst?, hemangioma? Other.) is seen."]),
        ("Metastasis? in both lungs. Viral? Yes.", ["Metastasis? in both lungs.", "Viral?", "Yes."]),
        (' "" Hepatomegaly."" Cyst."" ', ["Hepatomegaly.", "Cyst."]),
        (" Nodules in both lungs  Mild emphysema\nHernia", ["Nodules in both lungs", "Mild emphysema", "Hernia"]),
        ("A line\nthat was wrapped.", ["A line that was wrapped."]),
        (" . ;\n", []),
    ],
)
def test_sentences(text, expected):
    assert split_sentences(text) == expected


def test_splitting_again_changes_nothing():
    text = "Trachea is open. When examined in the lung window; A 5 mm nodule (new?) is seen; no mass. 1. Nodule."
    for sentence in split_sentences(text):
        assert split_sentences(sentence) == [sentence]


@pytest.mark.skipif(not REAL_REPORTS.is_file(), reason="the real CT-RATE reports are not beside the repository")
def test_real_reports_survive_writing_and_lose_no_word():
    with REAL_REPORTS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    unchanged, lengths = 0, []
    for row in rows:
        sections = sections_from_columns(row["Findings_EN"], row["Impressions_EN"])
        unchanged += parse_report(write_report(sections)) == sections
        sentences = split_sentences(sections.findings)
        joined = "".join(sentences)
        assert [c for c in joined if c.isalnum()] == [c for c in sections.findings if c.isalnum()]
        lengths += [len(sentence) for sentence in sentences]
    assert unchanged >= len(rows) - 1  # one of the 400 quotes another report, with that one's heading
    assert 60 < sum(lengths) / len(lengths) < 120 and sum(length > 400 for length in lengths) < 5
