"""Reports say what the picture shows, and exclude only what it does not show."""

import re

import pytest

from data_prep.finding_record import FINDING_PREVALENCE, Finding
from data_prep.phantom_body import draw_patient_body
from data_prep.phantom_findings import choose_findings
from data_prep.phantom_reports import NOT_GIVEN, write_report
from data_prep.report_sentences import ABSENT, IMPRESSION, NORMAL, ORDER, PRESENT

BODY = draw_patient_body(5)
NEGATION = re.compile(r"\b(no|not|without|normal|within)\b", re.IGNORECASE)
# A word that names the finding, in whatever template.
WORDS = {
    "medical_material": "pacemaker|pacing|port|sternotomy",
    "arterial_wall_calcification": "aort",
    "cardiomegaly": "heart|cardiomegaly",
    "pericardial_effusion": "pericardial",
    "coronary_artery_wall_calcification": "coronary",
    "hiatal_hernia": "hiatal hernia",
    "lymphadenopathy": "lymph",
    "emphysema": "emphysema",
    "atelectasis": "atelecta",
    "lung_nodule": "nodul",
    "ground_glass_opacity": "ground-glass",
    "pulmonary_fibrotic_sequela": "fibro",
    "pleural_effusion": "pleural (effusion|fluid)",
    "mosaic_attenuation_pattern": "mosaic",
    "peribronchial_thickening": "bronchial",
    "consolidation": "consolidation",
    "bronchiectasis": "bronchiectasis",
    "interlobular_septal_thickening": "septa",
    "pneumothorax": "pneumothorax",
    "mass": "mass",
    "pneumonia": "pneumoni",
    "pulmonary_edema": "pulmonary edema",
    "pleural_thickening": "pleura",
    "fracture": "fracture",
    "mediastinal_widening": "widen",
}


def _findings(*keys, seed=1):
    return choose_findings(BODY, keys, seed)


def _sentences(text):
    assert text.endswith(".")
    return text[:-1].split(". ")


@pytest.mark.parametrize("key", FINDING_PREVALENCE)
@pytest.mark.parametrize("seed", range(6))
def test_a_finding_is_stated_and_not_negated(key, seed):
    findings = _findings(key, seed=seed)
    report = write_report(findings, BODY, seed)
    about = [s for s in _sentences(report.findings) if re.search(WORDS[key], s, re.IGNORECASE)]
    stated = [s for s in about if not NEGATION.search(s)]
    assert stated, report.findings
    side = findings[0].side
    if side in ("left", "right"):
        opposite = {"left": "right", "right": "left"}[side]
        assert not any(re.search(rf"\b{opposite} (lung|upper|middle|lower|side)", s) for s in stated)
        if findings[0].key != "medical_material":
            assert any(side in s for s in stated)


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_chest_gets_no_positive_statement(seed):
    report = write_report((), BODY, seed)
    allowed = {sentence.lower() for sentences in (*ABSENT.values(), *NORMAL.values()) for sentence in sentences}
    assert {sentence.lower() for sentence in _sentences(report.findings)} <= allowed
    assert report.impression in (NOT_GIVEN, *(f"{text}." for text in IMPRESSION[""]))


def test_what_a_finding_brings_along_is_not_excluded():
    for seed in range(30):
        text = write_report(_findings("pulmonary_edema"), BODY, seed).findings
        excluded = (*ABSENT["ground_glass_opacity"], *ABSENT["interlobular_septal_thickening"])
        assert not any(s.lower() in text.lower() for s in excluded)


def test_absent_findings_are_excluded_in_most_reports():
    texts = [write_report((), BODY, seed).findings for seed in range(40)]
    for key in FINDING_PREVALENCE:
        share = sum(any(s.lower() in text.lower() for s in ABSENT[key]) for text in texts) / len(texts)
        assert 0.4 < share < 0.95, key


@pytest.mark.parametrize("key", FINDING_PREVALENCE)
def test_every_template_can_be_filled_and_is_one_sentence(key):
    patterns = set()
    for seed in range(25):
        findings = _findings(key, seed=seed)
        patterns.add(findings[0].pattern)
        for wording in range(4):
            report = write_report(findings, BODY, [seed, wording])
            for text in (report.findings, report.impression, report.technique, report.clinical_information):
                assert not re.search(r"[{}]|  |None|\.\.|\bby {2}", text), text
                assert all(s[0].isupper() or s[0].isdigit() for s in _sentences(text))
    kinds = {kind.split(" ", 1)[-1] for kind in PRESENT[key] if kind}
    assert key in ("medical_material",) or not kinds or kinds <= patterns, "a template that no finding asks for"


def test_sizes_are_those_of_the_finding():
    geometry = {"centres": [[60, 0, 0]], "radii": [6.6], "lobes": [1]}
    nodule = Finding("lung_nodule", "left", ("left_upper_lobe",), 13.2, pattern="solid", geometry=geometry)
    for seed in range(8):
        text = write_report([nodule], BODY, seed).findings
        assert re.search(r"13 mm[^.]*left upper lobe|left upper lobe[^.]*13 mm", text), text


def test_wording_follows_the_seed():
    findings = _findings("atelectasis", "emphysema")
    assert write_report(findings, BODY, 3) == write_report(findings, BODY, 3)
    assert len({write_report(findings, BODY, seed).findings for seed in range(20)}) > 15


def test_some_sections_are_not_given():
    reports = [write_report(_findings("fracture"), BODY, seed) for seed in range(60)]
    for section, least, most in (("clinical_information", 0.15, 0.6), ("impression", 0.01, 0.3)):
        share = sum(getattr(report, section) == NOT_GIVEN for report in reports) / len(reports)
        assert least < share < most
    assert all(report.findings != NOT_GIVEN for report in reports)


def test_the_order_names_every_finding_once():
    assert len(ORDER) == len(set(ORDER))
    assert set(FINDING_PREVALENCE) <= set(ORDER) and set(ORDER) - set(FINDING_PREVALENCE) <= set(NORMAL)
    assert set(PRESENT) == set(ABSENT) == set(FINDING_PREVALENCE)
