"""Clinical figures counted by hand on four cases, and the systems that a generator is compared with."""

import math

import numpy as np
import pytest

from tests.engines.reported_cases import CASE_IDS, EXTRACTOR, GENERATED, PATIENTS, REFERENCES, make_labels
from vlm3d_ext.engines.report_evaluation import (
    CLINICAL_FIGURES,
    evaluate_reports,
    format_reports,
    nearest_reports,
    normal_report,
    random_reports,
)
from vlm3d_ext.metrics.text_scores import score_texts
from vlm3d_ext.text.finding_extractor import FindingExtractor
from vlm3d_ext.text.label_set import load_label_set


def evaluate(systems=None, references=REFERENCES, labels=None, **settings):
    labels = make_labels() if labels is None else labels
    systems = systems or {"generated": GENERATED}
    settings = {"num_resamples": 20, "groups": PATIENTS, **settings}
    return evaluate_reports(systems, references, labels, CASE_IDS, EXTRACTOR, **settings)


def column(key):
    return EXTRACTOR.keys.index(key)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_clinical_figures_by_hand():
    figures = evaluate().system("generated").figures
    assert figures["clinical_f1"] == pytest.approx((2 / 3 + 1 + 0 + 2 / 3) / 4)
    assert figures["clinical_precision"] == pytest.approx((1 / 2 + 1 + 0 + 1 / 2) / 4)
    assert figures["clinical_recall"] == pytest.approx((1 + 1 + 0 + 1) / 4)
    # 4 of 5 positives are named, and 2 of the other 4 * 18 - 5 entries
    assert figures["crg"] == pytest.approx(1 / (3 - 2 * (4 / 5 - 2 / 67)))
    assert figures["laterality"] == 2 / 4
    assert figures["num_positives"] == 6 / 4 and figures["distinct_share"] == 1
    assert figures["num_words"] == pytest.approx(sum(len(text.split()) for text in GENERATED) / 4)


def test_rows_of_findings_and_cases_by_hand():
    system = evaluate().system("generated")
    rows = {row["label"]: row for row in system.per_label}
    assert list(rows) == list(EXTRACTOR.names)
    nodule = {"label": "Lung nodule", "positives": 1, "named": 2, "precision": 0.5, "recall": 1.0}
    sides = {"sides_right": 0, "sides_judged": 1}  # the wrong side of the first case
    assert rows["Lung nodule"] == {**nodule, **sides, "f1": pytest.approx(2 / 3)}
    assert sum(row["sides_right"] for row in rows.values()) == 2
    assert sum(row["sides_judged"] for row in rows.values()) == 4
    assert rows["Cardiomegaly"]["named"] == 0 and rows["Cardiomegaly"]["f1"] == 0
    assert math.isnan(rows["Consolidation"]["f1"])  # nobody has it

    def column_of(name):
        return [row[name] for row in system.per_case]

    assert column_of("volume_id") == CASE_IDS
    assert column_of("clinical_f1") == [1, pytest.approx(1 / 2), 0, 1]
    assert column_of("true_findings") == [2, 2, 0, 1]
    assert column_of("named_findings") == [2, 2, 1, 1]
    assert column_of("found_findings") == [2, 1, 0, 1]
    assert column_of("sides_right") == [1, 0, 0, 1] and column_of("sides_judged") == [2, 1, 0, 1]
    assert column_of("num_words") == [len(text.split()) for text in GENERATED]


def test_text_metrics_are_those_of_the_texts():
    system, scores = evaluate().system("generated"), score_texts(GENERATED, REFERENCES, CASE_IDS)
    assert {name: system.figures[name] for name in scores.mean} == pytest.approx(scores.mean)
    assert [row["rouge_l"] for row in system.per_case] == pytest.approx(list(scores.per_case["rouge_l"]))
    assert system.absent == scores.absent


def test_the_reference_is_as_good_as_it_gets():
    training = ["Findings: Consolidation in the right lung. Impression: Pneumonia."]
    texts = {
        "generated": GENERATED,
        "random": random_reports(4, training),
        "normal": [normal_report(EXTRACTOR.label_set)] * 4,
        "reference": REFERENCES,
    }
    evaluation = evaluate(texts)
    assert [system.name for system in evaluation.systems] == list(texts)
    best = evaluation.system("reference").figures
    assert {best[name] for name in CLINICAL_FIGURES} == {1.0}
    assert best["bleu_4_corpus"] == pytest.approx(1) and best["rouge_l"] == pytest.approx(1)
    for system in evaluation.systems[:-1]:
        for name in ("clinical_f1", "crg", "rouge_l"):
            assert system.figures[name] < best[name]
    blind = evaluation.system("normal").figures
    assert blind["clinical_f1"] == blind["num_positives"] == 0 and blind["crg"] == pytest.approx(1 / 3)
    assert math.isnan(blind["laterality"]) and math.isnan(blind["laterality_low"])
    assert blind["distinct_share"] == 1 / 4


def test_unknown_labels_are_left_out():
    labels = make_labels()
    labels[2, column("lung_nodule")] = np.nan  # where a nodule was named
    labels[0, column("pleural_effusion")] = np.nan  # where an effusion was named, its side right
    system = evaluate(labels=labels).system("generated")
    assert system.figures["clinical_f1"] == pytest.approx((1 + 1 + 0 + 2 / 3) / 4)
    assert system.figures["crg"] == pytest.approx(1 / (3 - 2 * (3 / 4 - 1 / 66)))
    assert system.figures["laterality"] == pytest.approx(1 / 3)
    assert [row["clinical_f1"] for row in system.per_case] == [1, pytest.approx(1 / 2), 1, 1]
    assert [row["named_findings"] for row in system.per_case] == [1, 2, 0, 1]


def test_a_case_of_which_nothing_is_known_has_no_score_of_its_own():
    labels = make_labels()
    labels[1] = np.nan
    row = evaluate(labels=labels).system("generated").per_case[1]
    assert math.isnan(row["clinical_f1"]) and row["true_findings"] == row["named_findings"] == 0


def test_a_case_without_reference_is_left_out_of_texts_and_sides_only():
    references = [*REFERENCES[:3], ""]
    evaluation, whole = evaluate(references=references), evaluate()
    system = evaluation.system("generated")
    assert evaluation.left_out == (CASE_IDS[3],) and evaluation.num_cases == 4 and whole.left_out == ()
    for name in ("clinical_f1", "clinical_precision", "clinical_recall", "crg"):
        assert system.figures[name] == whole.system("generated").figures[name]
    assert system.figures["laterality"] == pytest.approx(1 / 3)
    scores = score_texts(GENERATED[:3], REFERENCES[:3], CASE_IDS[:3])
    assert system.figures["rouge_l"] == pytest.approx(scores.mean["rouge_l"])
    assert [math.isnan(row["rouge_l"]) for row in system.per_case] == [False] * 3 + [True]
    assert system.per_case[3]["sides_judged"] == 0 and system.per_case[3]["clinical_f1"] == 1


def test_intervals_are_of_patients():
    figures = evaluate(num_resamples=300).system("generated").figures
    for name in CLINICAL_FIGURES:
        assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]
        assert figures[f"{name}_low"] < figures[f"{name}_high"]
    # with one patient every resample is the whole
    figures = evaluate(groups=["valid_1"] * 4).system("generated").figures
    for name in CLINICAL_FIGURES:
        assert figures[f"{name}_low"] == pytest.approx(figures[name]) == figures[f"{name}_high"]


def test_intervals_are_drawn_by_the_seed():
    def ends(seed):
        figures = evaluate(seed=seed, num_resamples=5).system("generated").figures
        return [figures[f"{name}_{end}"] for name in CLINICAL_FIGURES for end in ("low", "high")]

    assert ends(1) == ends(1) != ends(2)


def test_numbers_that_differ():
    with pytest.raises(ValueError, match="short: 3 reports for 4 cases; expected one for each"):
        evaluate({"generated": GENERATED, "short": GENERATED[:3]})
    with pytest.raises(ValueError, match="all 4 reference texts are empty"):
        evaluate(references=[""] * 4)
    with pytest.raises(KeyError, match="absent"):
        evaluate().system("absent")


# --- systems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ct_rate_18", "vlm3d_18"])
def test_a_normal_report_denies_every_finding(name):
    label_set = load_label_set(name)
    report = normal_report(label_set)
    for finding in label_set.findings:
        assert finding.negative_prompts[0] in report
    extractor = FindingExtractor(label_set)
    assert not extractor.labels(report).any()
    mentions = extractor.mentions(report)
    assert {mention.status for mention in mentions} == {"absent"}
    # "calcification" alone, of no named organ, is nothing the extractor looks for
    assert set(extractor.keys) - {mention.key for mention in mentions} <= {"calcification"}


def test_random_reports_are_drawn_from_training_by_the_seed():
    training = [f"report {number}" for number in range(50)]
    drawn = random_reports(30, training, seed=1)
    assert len(drawn) == 30 and set(drawn) <= set(training) and len(set(drawn)) > 10
    assert drawn == random_reports(30, training, seed=1) != random_reports(30, training, seed=2)
    with pytest.raises(ValueError, match="no training report to draw from"):
        random_reports(3, [])


def test_the_nearest_report_is_by_the_angle_around_the_training_mean():
    training = np.array([[10.0, 0.0], [0.0, 10.0], [8.0, 8.0]])  # mean (6, 6)
    # seen from the origin (5, 4.5) is nearest to (8, 8); seen from the mean it lies the other way
    features = np.array([[5.0, 4.5], [4.5, 5.0], [7.0, 7.0], [60.0, 0.0]])
    assert nearest_reports(features, training, ["a", "b", "c"]) == ["a", "b", "c", "a"]


def test_a_training_case_is_nearest_to_itself():
    features = np.random.default_rng(0).normal(5, 1, size=(20, 6))
    reports = [str(number) for number in range(20)]
    assert nearest_reports(features, features, reports) == reports


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_system_and_a_dash_for_what_is_undefined():
    systems = {
        "generated": {"clinical_f1": 0.5833, "clinical_f1_low": 0.25, "clinical_f1_high": 1.0, "laterality": math.nan,
                      "num_words": 17.25, "cider": 1.5},
        "all normal": {"clinical_f1": None, "laterality": 0.0, "num_words": 30.0},
    }  # fmt: skip
    header, first, second = format_reports(systems).splitlines()
    assert header.split() == [
        "clinical", "F1", "laterality", "CIDEr-D", "words", "95", "%", "interval", "of", "clinical", "F1"
    ]  # fmt: skip
    assert first.split() == ["generated", "0.583", "-", "1.500", "17.2", "[0.250,", "1.000]"]
    assert second.split() == ["all", "normal", "-", "0.000", "-", "30.0", "[-,", "-]"]
    # numbers end under their titles
    assert first.index("0.583") + 5 == header.index("clinical F1") + len("clinical F1")


def test_the_table_of_an_evaluation():
    evaluation = evaluate({"generated": GENERATED, "reference": REFERENCES})
    table = format_reports({system.name: system.figures for system in evaluation.systems})
    lines = table.splitlines()
    assert lines[1].startswith("generated ") and " 0.583 " in lines[1]
    assert lines[2].startswith("reference ") and lines[2].split()[1:6] == ["1.000"] * 5
    assert ("METEOR*" in lines[0]) == lines[-1].startswith("METEOR*: exact and stem matches only")
