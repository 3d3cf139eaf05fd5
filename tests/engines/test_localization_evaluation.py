import csv
import json
import math

import numpy as np
import pytest

from vlm3d_ext.engines.localization_case import CaseEvaluation
from vlm3d_ext.engines.localization_evaluation import evaluate_localization, format_localization
from vlm3d_ext.engines.localization_report_files import write_localization_report
from vlm3d_ext.metrics.froc import FrocCandidates
from vlm3d_ext.metrics.lesion_detection import LesionMatches

NAN = math.nan
NODULE, EFFUSION = "lung_nodule", "pleural_effusion"


def candidates(scores, is_true, best):
    return FrocCandidates(np.array(scores), np.array(is_true, dtype=bool), np.array(best))


def nodules():
    """Four patients, the last with an unknown scan, the second with two scans."""
    return [
        CaseEvaluation(
            "train_1_a_1", "train_1", NODULE, "positive", dice=0.8, surface_dice=0.9, hausdorff_95_mm=4.0,
            num_true_voxels=105, num_predicted_voxels=120,
            matches=LesionMatches((True, False), (100, 5), (True, False), (110, 10)),
            lesion_dice=(0.9, 0.0), candidates=candidates([0.9, 0.4], [True, False], [0.9, NAN]),
            ceiling_dice=0.95, ceiling_lesion_dice=(0.97, 0.5), baseline_dice=0.1,
        ),
        CaseEvaluation(
            "train_2_a_1", "train_2", NODULE, "positive", dice=0.0, surface_dice=0.0,
            num_true_voxels=2000, matches=LesionMatches((False,), (2000,), (), ()), lesion_dice=(0.0,),
            candidates=candidates([0.3], [True], [0.3]),
            ceiling_dice=0.99, ceiling_lesion_dice=(0.99,), baseline_dice=0.2,
        ),
        CaseEvaluation(
            "train_2_b_1", "train_2", NODULE, "negative", num_predicted_voxels=30,
            matches=LesionMatches((), (), (False, False, False), (10, 12, 8)),
            candidates=candidates([0.7, 0.6, 0.5], [False] * 3, []),
        ),
        CaseEvaluation(
            "train_3_a_1", "train_3", NODULE, "negative", candidates=candidates([], [], []),
        ),
        CaseEvaluation(
            "train_3_b_1", "train_3", NODULE, "partial", num_true_voxels=50,
            matches=LesionMatches((True,), (50,), (), ()),
        ),
        CaseEvaluation("train_4_a_1", "train_4", NODULE, "unknown", num_predicted_voxels=7),
    ]  # fmt: skip


def with_unknown_effusions(cases):
    return cases + [CaseEvaluation(case.volume_id, case.patient_id, EFFUSION, "unknown") for case in cases]


@pytest.fixture(scope="module")
def report():
    return evaluate_localization(with_unknown_effusions(nodules()), (NODULE, EFFUSION), (0.5, 0.25), 50, seed=1)


def test_figures_by_hand(report):
    expected = {
        "positive_scans": 2, "negative_scans": 2, "partial_scans": 1, "unknown_scans": 1,
        "lesions": 4, "dice": 0.4, "surface_dice": 0.45, "hausdorff_95_mm": 4.0, "hausdorff_95_undefined": 1,
        "sensitivity": 2 / 4, "precision": 1 / 5,
        "lesions_small": 1, "lesion_dice_small": 0.0, "sensitivity_small": 0.0, "ceiling_small": 0.5,
        "precision_small": 0.0,
        "lesions_medium": 2, "lesion_dice_medium": 0.9, "sensitivity_medium": 1.0, "ceiling_medium": 0.97,
        "precision_medium": 1 / 4,
        "lesions_large": 1, "lesion_dice_large": 0.0, "sensitivity_large": 0.0, "ceiling_large": 0.99,
        "precision_large": NAN,
        "false_positives_per_negative_scan": 1.5, "negative_scans_with_false_positives": 0.5,
        # Four scans: up to score 0.4 there are four false positives, 1 a scan; 0.3 finds the second of three lesions.
        "froc_0.5": 1 / 3, "froc_1": 2 / 3, "froc_2": 2 / 3, "froc_4": 2 / 3,
        "ceiling_dice": 0.97, "baseline_dice": 0.15, "threshold": 0.5,
    }  # fmt: skip
    row = report.per_disease[0]
    assert {name: row[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert set(row) - set(expected) == {"disease", "dice_low", "dice_high"}


def test_a_disease_of_which_nothing_is_known_is_undefined_and_out_of_the_mean(report):
    row = report.per_disease[1]
    undefined = ("dice", "dice_low", "sensitivity", "precision", "froc_1", "ceiling_dice", "hausdorff_95_mm")
    assert all(math.isnan(row[name]) for name in undefined) and row["unknown_scans"] == 6
    assert report.mean["dice"] == pytest.approx(0.4) and report.mean["sensitivity"] == 0.5
    assert report.curves[EFFUSION] is None


def test_intervals_resample_patients():
    rows = [0.0] * 10 + [1.0] * 10

    def interval(patient_of):
        cases = [
            CaseEvaluation(f"v{number}", patient_of(number), NODULE, "positive", dice=dice)
            for number, dice in enumerate(rows)
        ]
        row = evaluate_localization(cases, (NODULE,), (0.5,), 400, seed=0).per_disease[0]
        return row["dice_high"] - row["dice_low"]

    # Two patients of ten scans each: a resample has one, the other, or both, so the interval is everything.
    assert interval(lambda number: str(number // 10)) == 1.0
    assert interval(str) == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(20), rel=0.2)


def test_what_does_not_belong_together_is_refused():
    cases = nodules()
    with pytest.raises(ValueError, match="no scan to evaluate"):
        evaluate_localization([], (NODULE,), (0.5,))
    with pytest.raises(ValueError, match="each of 6 scans needs each of 2 diseases once, got 6"):
        evaluate_localization(cases, (NODULE, EFFUSION), (0.5, 0.5))
    with pytest.raises(ValueError, match="each of 6 scans needs each of 1 diseases once, got 7"):
        evaluate_localization([*cases, cases[0]], (NODULE,), (0.5,))
    with pytest.raises(ValueError, match="2 diseases need as many thresholds, got 1"):
        evaluate_localization(cases, (NODULE, EFFUSION), (0.5,))


def test_the_table_is_readable(report):
    text = format_localization(report)
    assert max(len(line) for line in text.splitlines()) <= 120
    lines = [line.split() for line in text.splitlines()]
    drawing = next(line for line in lines if line[:1] == [NODULE])
    assert drawing[1:3] == ["2/2/1/1", "0.400"] and "nan" not in text
    assert [line[0] for line in lines if line].count(EFFUSION) == 3


def test_files(report, tmp_path):
    cases = with_unknown_effusions(nodules())
    paths = write_localization_report(report, cases, tmp_path)
    assert [path.name for path in paths] == [
        "localization.json",
        "localization.csv",
        "cases.csv",
        "froc.png",
        "dice_by_size.png",
    ]
    content = json.loads(paths[0].read_text())
    assert content["per_disease"][1]["dice"] is None and content["mean"]["dice"] == pytest.approx(0.4)
    assert content["num_scans"] == 6 and content["diseases"] == [NODULE, EFFUSION]
    with open(paths[2], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and rows[0]["dice"] == "0.8" and rows[1]["hausdorff_95_mm"] == ""
    assert [row["false_positives"] for row in rows[:6]] == ["1", "0", "3", "0", "", ""]
    assert [row["found_lesions"] for row in rows[:6]] == ["1", "0", "0", "0", "1", ""]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[3:])
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_localization_report(report, cases, tmp_path)] == before
