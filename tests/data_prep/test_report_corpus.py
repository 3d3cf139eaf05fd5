import re

import pytest

from data_prep.finding_record import CT_RATE_18
from data_prep.report_corpus import synthetic_examples, training_examples
from data_prep.synthesis_plan import SynthesisSettings, plan_data_set
from tests.prepared_release import make_prepared_release
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.text.finding_extractor import FindingExtractor
from vlm3d_ext.text.report_prompt import IMAGE_MARKER
from vlm3d_ext.text.report_sections import parse_report

DRAWN_NAMES = ("Pericardial effusion", "Pleural effusion", "Consolidation", "Lung nodule")


@pytest.fixture(scope="module")
def examples():
    return synthetic_examples(120, seed=3).whole


def named(prompt):
    line = next(line for line in prompt.split("\n") if line.startswith("Classified findings: "))
    return dict(re.findall(r"(?:^|, )([A-Z][^,(]+) \((0\.\d\d)\)", line.removeprefix("Classified findings: ")))


def lines(prompt):
    return re.findall(r"^\[FINDING\] (.+?) detected (.+)$", prompt, re.MULTILINE)


def test_prompts_say_what_is_true_of_the_report_and_leave_out_nothing_that_no_line_says(examples):
    extractor = FindingExtractor("ct_rate_18")
    label_of_line = {"Ground-glass opacity": "Lung opacity"}
    wrong = total = 0
    for example in examples:
        said = set(named(example.prompt)) | {label_of_line.get(name, name) for name, _ in lines(example.prompt)}
        if "Consolidation" in said:
            said.add("Lung opacity")
        labels = dict(zip(CT_RATE_18, extractor.labels(example.report), strict=True))
        wrong += sum((labels[name] == 1) != (name in said) for name in CT_RATE_18)
        total += len(CT_RATE_18)
    assert wrong <= 0.01 * total  # the rules that read the reports are not perfect


def test_probabilities_names_and_lines_are_drawn(examples):
    probabilities = [float(value) for example in examples for value in named(example.prompt).values()]
    assert 0.5 <= min(probabilities) < 0.55 and 0.94 < max(probabilities) <= 0.99
    effusions = [
        example for example in examples if "pleural effusion" in parse_report(example.report).impression.lower()
    ]
    with_line = [
        example for example in effusions if any(name == "Pleural effusion" for name, _ in lines(example.prompt))
    ]
    assert 0.5 < len(with_line) / len(effusions) < 0.95
    assert any("Pleural effusion" not in named(example.prompt) for example in with_line) or len(with_line) < 20
    for example in examples:
        names = [CT_RATE_18.index(name) for name in named(example.prompt)]
        assert names == sorted(names)


def test_lines_and_reports_agree_on_the_side_of_fluid(examples):
    checked = 0
    for example in examples:
        for name, place in lines(example.prompt):
            if name == "Pleural effusion":
                side = "both sides" if "bilateral" in place or "both" in place else place.split()[1]
                fluid = [s for s in example.report.split(". ") if re.search(r"pleural (effusion|fluid)", s)]
                assert any(side in sentence for sentence in fluid), example
                checked += 1
    assert checked > 5


def test_reports_have_both_sections_and_no_finding_that_a_prompt_cannot_name(examples):
    for example in examples:
        sections = parse_report(example.report)
        assert sections.findings and sections.impression
        assert example.prompt.startswith(IMAGE_MARKER) and example.prompt.count(IMAGE_MARKER) == 1
        for word in ("pneumothorax", "fracture", "pulmonary edema", "pneumonia", "mass"):
            assert word not in sections.impression.lower()


def test_easy_examples_speak_of_located_lesions_alone():
    examples = synthetic_examples(40, seed=3)
    assert 20 < len(examples.easy) <= len(examples.whole) == 40
    for example in examples.easy:
        assert lines(example.prompt) and set(named(example.prompt)) <= {*DRAWN_NAMES, "Lung opacity"}
        sections = parse_report(example.report)
        assert sections.findings and sections.impression
        assert not re.search(r"\b(?:no|not|normal|patent|open)\b", example.report, re.IGNORECASE), example.report
        assert len(sections.findings.split(". ")) <= 5


def test_the_seed_decides_and_more_reports_only_follow_their_number(examples):
    assert synthetic_examples(120, seed=3).whole == examples != synthetic_examples(120, seed=4).whole
    assert not synthetic_examples(0, seed=3).whole and len(synthetic_examples(5, seed=3).whole) == 5
    counted = []
    synthetic_examples(3, seed=3, on_report=lambda: counted.append(1))
    assert len(counted) == 3


def test_no_scan_is_one_of_a_synthetic_data_set(monkeypatch):
    drawn, placed = [], []

    def record(function, into, position):
        def recording(*arguments):
            into.append(arguments[position])
            return function(*arguments)

        return recording

    from data_prep import report_corpus

    monkeypatch.setattr(report_corpus, "draw_patient_body", record(report_corpus.draw_patient_body, drawn, 0))
    monkeypatch.setattr(report_corpus, "choose_findings", record(report_corpus.choose_findings, placed, 2))
    synthetic_examples(20, seed=0)
    plans = plan_data_set(SynthesisSettings(num_train_patients=40, num_valid_patients=20, seed=0))
    assert min(drawn) > max(plan.patient_seed for plan in plans) and min(drawn) >= 2**31
    assert {seed[1] for seed in placed}.isdisjoint(plan.scan_seed[1] for plan in plans)


def test_training_examples_are_the_distinct_labelled_reports_of_training_cases(tmp_path):
    manifest = CaseManifest(make_prepared_release(tmp_path))
    examples = training_examples(manifest, seed=0)
    reports = {
        "Findings: " + case["report"]["findings"] for case in manifest.cases("training") if case["report"] is not None
    }
    assert {example.report for example in examples} == reports and len(examples) == len(reports)
    for example in examples:
        expected = {"Pleural effusion"} if "observed on the right" in example.report else set()
        expected |= {"Cardiomegaly"} if "heart is enlarged" in example.report else set()
        assert set(named(example.prompt)) == expected
        assert expected or "Classified findings: none" in example.prompt
        assert "[FINDING]" not in example.prompt
