import json
import logging
from collections import Counter

import pytest

from tests.data.lesion_manifest import lesion_case, write_lesion_manifest
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.joint_cases import JointCases
from vlm3d_ext.data.labelled_cases import LabelledCases
from vlm3d_ext.data.lesion_cases import LesionCases
from vlm3d_ext.text.disease_set import load_disease_set

PERICARDIAL, PLEURAL, CONSOLIDATION, GROUND_GLASS, NODULE = load_disease_set().keys
REPORT = {"findings": "A nodule.", "impression": ""}
ONLY = {"classification": 0.0, "localization": 0.0, "generation": 0.0}


def case(name, masks=(), positives=(), report=False, **more):
    made = lesion_case(name, masks, dict.fromkeys(positives, 1), **more)
    return {**made, "report": REPORT if report else {"findings": "", "impression": ""}}


def joint(folder, *cases, fingerprint="tiny"):
    path = write_lesion_manifest(folder, training=cases)
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": fingerprint}))
    manifest = CaseManifest(path)
    return JointCases(LabelledCases(manifest, "ct_rate_18"), LesionCases(manifest))


def ids(cases):
    return [case["volume_id"] for case in cases]


def weighted(cases, seed=0, max_cases=None, **weights):
    return cases.sampled("training", "task_weighted", {**ONLY, **weights}, seed, max_cases)


def test_cases_have_the_labels_of_both_sets(tmp_path):
    cases = joint(tmp_path, case("a", [NODULE], ["Emphysema"]), case("b", positives=["Pleural effusion"]))
    first, second = cases.cases("training")
    names = cases.labelled_cases.names
    assert [name for name, label in zip(names, first["labels"], strict=True) if label == 1] == ["Emphysema"]
    assert first["disease_labels"][4] == 1 and first["disease_labels"][1] == 0  # a mask, and a label
    assert second["disease_labels"][1] == 1 and second["labels"][names.index("Pleural effusion")] == 1
    assert ids(cases.cases("training", 1)) == ["a"]


def test_labels_and_lesions_of_two_data_sets_are_refused(tmp_path):
    one, other = joint(tmp_path / "a", case("a")), joint(tmp_path / "b", case("a"), fingerprint="other")
    with pytest.raises(ValueError, match=r"labels are of .*a.manifest\.json, lesions of .*b.manifest\.json"):
        JointCases(one.labelled_cases, other.lesion_cases)


def test_available_takes_every_case_once_and_crops_at_its_rarest_lesion(tmp_path):
    cases = joint(
        tmp_path,
        case("n1", [NODULE]),
        case("n2", [NODULE]),
        case("both", [NODULE, PLEURAL]),
        case("empty", [NODULE, CONSOLIDATION], empty=[CONSOLIDATION]),
        case("none", positives=["Lung nodule"]),
    )
    sampled = cases.sampled()
    assert ids(sampled) == ["n1", "n2", "both", "empty", "none"]
    assert [one["crop_disease"] for one in sampled] == [NODULE, NODULE, PLEURAL, NODULE, None]
    assert ids(cases.sampled(max_cases=2)) == ["n1", "n2"]


def test_draws_are_shared_out_between_the_tasks(tmp_path):
    """Weights of 1, 1 and 2 over eight cases: two draws of the finding, two of the lesion, four of the reports."""
    cases = joint(
        tmp_path,
        case("label", positives=["Emphysema"]),
        case("mask", [NODULE]),
        case("report", report=True),
        *[case(f"x{number}") for number in range(5)],
    )
    drawn = weighted(cases, classification=1.0, localization=1.0, generation=2.0)
    assert Counter(ids(drawn)) == {"label": 2, "mask": 2, "report": 4}
    assert {one["volume_id"]: one["crop_disease"] for one in drawn} == {"label": None, "mask": NODULE, "report": None}
    # weights count by their proportion alone, and shares that do not come out even are rounded to the whole
    assert Counter(ids(weighted(cases, classification=3.0, localization=3.0, generation=3.0))) == {
        "label": 3, "mask": 2, "report": 3
    }  # fmt: skip
    assert ids(weighted(cases, generation=0.1)) == ["report"] * 8


def test_rare_findings_and_diseases_come_up_as_often_as_common_ones(tmp_path):
    common = [case(f"c{number}", [NODULE], ["Emphysema"]) for number in range(10)]
    rare = [case(f"r{number}", [PLEURAL], ["Hiatal hernia"]) for number in range(2)]
    cases = joint(tmp_path, *common, *rare)
    for task in ("classification", "localization"):
        drawn = weighted(cases, **{task: 1.0})
        kinds = Counter(name[0] for name in ids(drawn))
        assert len(drawn) == 12 and kinds == {"c": 6, "r": 6}
        counts = Counter(ids(drawn))
        assert counts["r0"] == counts["r1"] == 3  # they take turns
        assert max(count for name, count in counts.items() if name[0] == "c") == 1
    crops = Counter(one["crop_disease"] for one in weighted(cases, localization=1.0))
    assert crops == {NODULE: 6, PLEURAL: 6}


def test_a_case_of_two_diseases_is_cropped_at_the_one_it_was_drawn_for(tmp_path):
    cases = joint(tmp_path, case("both", [NODULE, PLEURAL]), *[case(f"x{number}") for number in range(3)])
    drawn = weighted(cases, localization=1.0)
    assert ids(drawn) == ["both"] * 4
    assert Counter(one["crop_disease"] for one in drawn) == {PLEURAL: 2, NODULE: 2}


def test_all_have_their_turn_before_any_has_another(tmp_path):
    cases = joint(tmp_path, *[case(f"r{number}", report=True) for number in range(3)], *map(case, "xyz"), case("w"))
    drawn = ids(weighted(cases, generation=1.0))
    assert set(drawn[:3]) == set(drawn[3:6]) == {"r0", "r1", "r2"} and len(drawn) == 7


def test_the_order_is_that_of_the_seed(tmp_path):
    cases = joint(tmp_path, *[case(f"r{number}", report=True) for number in range(12)])
    first, again, other = (ids(weighted(cases, seed, generation=1.0)) for seed in (0, 0, 1))
    assert first == again != other and sorted(first) == sorted(other)
    assert len(weighted(cases, max_cases=5, generation=1.0)) == 5


def test_a_task_without_cases_gives_its_share_away(tmp_path, caplog):
    cases = joint(tmp_path / "some", case("report", report=True), case("mask", [NODULE]), *map(case, "xy"))
    drawn = weighted(cases, classification=5.0, localization=1.0, generation=1.0)
    assert Counter(ids(drawn)) == {"report": 2, "mask": 2}
    empty = joint(tmp_path / "none", *map(case, "xyz"))
    with caplog.at_level(logging.WARNING):
        assert ids(weighted(empty, classification=1.0, generation=1.0)) == ["x", "y", "z"]
    assert "every case is taken once" in caplog.text


def test_a_report_of_an_impression_alone_counts_and_none_does_not(tmp_path):
    impression = {**case("i"), "report": {"findings": "", "impression": "Normal."}}
    absent, null = {**case("a")}, {**case("n"), "report": None}
    del absent["report"]
    assert ids(weighted(joint(tmp_path, impression, absent, null), generation=1.0)) == ["i"] * 3


@pytest.mark.parametrize(
    "weights",
    [
        {"classification": 1.0, "localization": 1.0},
        {**ONLY, "generation": 1.0, "reports": 1.0},
        {**ONLY, "generation": -1.0, "classification": 2.0},
        ONLY,
        {**ONLY, "generation": float("nan")},
    ],
)
def test_weights_that_are_none_are_refused(tmp_path, weights):
    cases = joint(tmp_path, case("a", report=True))
    with pytest.raises(ValueError, match="task_weights must be numbers from 0 on for"):
        cases.sampled("training", "task_weighted", weights)


def test_equal_weights_and_wrong_names(tmp_path):
    cases = joint(tmp_path, case("r", report=True), case("m", [NODULE]), case("l", positives=["Emphysema"]))
    assert Counter(ids(cases.sampled("training", "task_weighted"))) == {"r": 1, "m": 1, "l": 1}
    with pytest.raises(ValueError, match=r"sampling must be one of \('available', 'task_weighted'\), got 'balanced'"):
        cases.sampled("training", "balanced")
