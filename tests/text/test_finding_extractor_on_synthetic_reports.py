"""The extractor on reports whose findings are known because a phantom was drawn from them."""

import time

import numpy as np
import pytest

from data_prep.finding_record import DRAWN_LESIONS, FINDING_PREVALENCE, ct_rate_labels, vlm3d_labels
from data_prep.phantom_body import draw_patient_body
from data_prep.phantom_findings import choose_findings
from data_prep.phantom_reports import write_report
from vlm3d_ext.text.finding_extractor import FindingExtractor
from vlm3d_ext.text.report_sections import sections_from_columns
from vlm3d_ext.text.report_sections import write_report as join_sections


@pytest.fixture(scope="module")
def synthetic():
    """(report, findings) of 200 phantoms, which are not painted."""
    cases = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        body = draw_patient_body(seed)
        keys = [key for key, share in FINDING_PREVALENCE.items() if rng.random() < share]
        findings = choose_findings(body, keys, seed)
        parts = write_report(findings, body, seed)
        sections = sections_from_columns(parts.findings, parts.impression, parts.clinical_information, parts.technique)
        cases.append((join_sections(sections), findings))
    return cases


@pytest.mark.parametrize(("label_set", "true_labels"), [("ct_rate_18", ct_rate_labels), ("vlm3d_18", vlm3d_labels)])
def test_synthetic_reports_are_read_without_an_error(synthetic, label_set, true_labels):
    extractor = FindingExtractor(label_set)
    positives = np.zeros(18)
    for report, findings in synthetic:
        labels = dict(zip(extractor.names, extractor.labels(report), strict=True))
        assert labels == true_labels(findings), report
        positives += extractor.labels(report)
    assert positives.min() >= 3


def test_sides_of_drawn_lesions_in_synthetic_reports(synthetic):
    extractor = FindingExtractor("ct_rate_18+vlm3d_18")
    right = []
    for report, findings in synthetic:
        sides = extractor.sides(report)
        for finding in findings:
            if finding.key in DRAWN_LESIONS and finding.side and sides[finding.key]:
                both = finding.side == "bilateral"
                right.append(sides[finding.key] == ({"left", "right"} if both else {finding.side}))
    # a bilateral edema beside a one-sided ground-glass opacity is both by the text and one side by the record
    assert len(right) > 150 and np.mean(right) >= 0.98


def test_it_is_quick_enough_for_a_reward(synthetic):
    extractor = FindingExtractor("ct_rate_18")
    reports = [report for report, _ in synthetic]
    extractor.labels(reports[0])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for report in reports:
            extractor.labels(report)
        seconds.append(time.process_time() - start)
    num_words = sum(len(report.split()) for report in reports)
    # 1 ms on one slow core; the bound leaves room for a busy machine
    assert min(seconds) / num_words * 200 < 0.004
