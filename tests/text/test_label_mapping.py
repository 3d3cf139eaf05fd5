import csv
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from vlm3d_ext.text.label_mapping import describe_mapping, map_labels, mapping_in_words, mapping_rules
from vlm3d_ext.text.label_set import available_label_sets, load_label_set

CT_RATE_COLUMNS = load_label_set("ct_rate_18").names
NAN = np.nan
REAL_LABELS = Path(__file__).parents[3] / "shared/data/ctrate/text_classifier_val_labels.head120.csv"
UNIONS = [
    "ct_rate_18+vlm3d_18",
    "vlm3d_18+ct_rate_18",
    "ct_rate_18+rad_chestct_16",
    "rad_chestct_16+vlm3d_18",
    "ct_rate_18+vlm3d_18+rad_chestct_16",
]
PAIRS = list(itertools.product([*available_label_sets(), *UNIONS], repeat=2))


@pytest.mark.parametrize(
    ("source", "target"), [("ct_rate_18", {"Ground-glass opacity": None}), ("vlm3d_18", {"Ground-glass opacity": 1})]
)
def test_one_set_onto_itself_changes_nothing(source, target):
    names = load_label_set(source).names
    rows = np.array([[1, 0, NAN] * 6, [NAN] * 18, [0] * 18], dtype=np.float32)
    np.testing.assert_array_equal(map_labels(rows, source, source), rows)
    assert describe_mapping(source, source) == {
        "supported": 18, "exact": 18, "derived": 0, "approximate": 0, "one_way": 0, "unknown": 0,
    }  # fmt: skip
    assert (target.keys() <= set(names)) == (source == "vlm3d_18")


@pytest.mark.parametrize(
    ("given", "finding", "expected"),
    [
        ({"Lung nodule": 1}, "Lung nodule", 1),
        ({"Lung nodule": 0}, "Lung nodule", 0),
        ({}, "Lung nodule", None),
        ({"Lung opacity": 0}, "Ground-glass opacity", 0),
        ({"Lung opacity": 1}, "Ground-glass opacity", None),
        ({"Lung opacity": None}, "Ground-glass opacity", None),
        ({"Arterial wall calcification": 1, "Coronary artery wall calcification": 0}, "Calcification", 1),
        ({"Arterial wall calcification": 0, "Coronary artery wall calcification": 1}, "Calcification", 1),
        ({"Arterial wall calcification": 0, "Coronary artery wall calcification": 0}, "Calcification", 0),
        ({"Arterial wall calcification": 1, "Coronary artery wall calcification": None}, "Calcification", 1),
        ({"Arterial wall calcification": 0, "Coronary artery wall calcification": float("nan")}, "Calcification", None),
        ({"Pulmonary fibrotic sequela": 1}, "Fibrosis", 1),
        ({name: 0 for name in CT_RATE_COLUMNS}, "Pneumothorax", None),
    ],
)
def test_ct_rate_to_the_source_documents_findings(given, finding, expected):
    mapped = map_labels(given, "ct_rate_18", "vlm3d_18")
    assert tuple(mapped) == load_label_set("vlm3d_18").names
    assert mapped[finding] is expected or (mapped[finding] == expected and type(mapped[finding]) is type(expected))


@pytest.mark.parametrize(
    ("given", "finding", "expected"),
    [
        ({"Calcification": 0}, "Coronary artery wall calcification", 0),
        ({"Calcification": 1}, "Coronary artery wall calcification", None),
        ({"Ground-glass opacity": 1}, "Lung opacity", 1),
        ({"Ground-glass opacity": 0}, "Lung opacity", None),
        ({name: 0 for name in load_label_set("vlm3d_18").names}, "Bronchiectasis", None),
    ],
)
def test_the_way_back_says_no_more_than_follows(given, finding, expected):
    assert map_labels(given, "vlm3d_18", "ct_rate_18")[finding] == expected


def test_the_counts_agree_with_the_table_of_the_data_sets():
    # 8 findings are the same; calcification derived; fibrosis approximate; ground glass only when absent; 7 are not
    # labelled at all
    assert describe_mapping("ct_rate_18", "vlm3d_18") == {
        "supported": 11, "exact": 8, "derived": 1, "approximate": 1, "one_way": 1, "unknown": 7,
    }  # fmt: skip
    described = describe_mapping("ct_rate_18", "rad_chestct_16")
    assert (described["exact"], described["derived"], described["unknown"]) == (15, 1, 0)
    described = describe_mapping("rad_chestct_16", "ct_rate_18")
    assert (described["exact"], described["one_way"], described["unknown"]) == (15, 2, 1)


def test_an_array_and_dictionaries_give_the_same():
    rng = np.random.default_rng(3)
    rows = rng.choice([0.0, 1.0, NAN], size=(5, 4, 18))
    for source, target in [("ct_rate_18", "vlm3d_18"), ("vlm3d_18", "ct_rate_18"), ("ct_rate_18", "rad_chestct_16")]:
        mapped = map_labels(rows, source, target)
        assert mapped.shape == (5, 4, load_label_set(target).num_findings) and mapped.dtype == np.float32
        for index in np.ndindex(5, 4):
            labels = dict(zip(load_label_set(source).names, rows[index].tolist(), strict=True))
            one = [NAN if value is None else value for value in map_labels(labels, source, target).values()]
            np.testing.assert_array_equal(mapped[index], one)


def test_forgetting_a_label_never_changes_an_answer_into_its_opposite():
    rng = np.random.default_rng(4)
    full = rng.integers(0, 2, size=(200, 18)).astype(float)
    partial = np.where(rng.random(full.shape) < 0.3, NAN, full)
    for source, target in [("ct_rate_18", "vlm3d_18"), ("vlm3d_18", "ct_rate_18"), ("ct_rate_18", "rad_chestct_16")]:
        with_all, with_some = map_labels(full, source, target), map_labels(partial, source, target)
        known = ~np.isnan(with_some)
        assert known.any() and np.array_equal(with_all[known], with_some[known])


def test_what_is_no_label_is_refused():
    with pytest.raises(ValueError, match=r"\(\.\.\., 18\), got \(2, 17\)"):
        map_labels(np.zeros((2, 17)), "ct_rate_18", "vlm3d_18")
    with pytest.raises(ValueError, match=r"must be 1, 0 or NaN \(unknown\), got \[-1\.0\]"):
        map_labels(np.full((2, 18), -1), "ct_rate_18", "vlm3d_18")
    with pytest.raises(ValueError, match="not findings"):
        map_labels({"Pneumothorax": 1}, "ct_rate_18", "vlm3d_18")
    with pytest.raises(ValueError, match="'Emphysema' must be 1, 0 or None"):
        map_labels({"Emphysema": "yes"}, "ct_rate_18", "vlm3d_18")


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_each_rule_gives_what_it_says_on_every_combination_of_its_sources(source, target):
    source_names = load_label_set(source).names
    for name, rule in mapping_rules(source, target).items():
        for values in itertools.product([1, 0, None], repeat=len(rule.sources)):
            # Everything the rule does not name is denied: it must not matter.
            labels = dict.fromkeys(source_names, 0) | dict(zip(rule.sources, values, strict=True))
            got = map_labels(labels, source, target)[name]
            if 1 in values:
                assert got == rule.when_any_positive
            elif values and None not in values:
                assert got == rule.when_all_negative
            else:
                assert got is None


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_unknown_is_never_negative(source, target):
    num_findings = load_label_set(source).num_findings
    assert np.isnan(map_labels(np.full((3, num_findings), NAN), source, target)).all()
    unsupported = [rule.kind == "unknown" for rule in mapping_rules(source, target).values()]
    assert np.isnan(map_labels(np.zeros((1, num_findings)), source, target)[0, unsupported]).all()
    assert describe_mapping(source, target)["unknown"] == sum(unsupported)


@pytest.mark.parametrize(("part", "union"), [(part, union) for union in UNIONS for part in union.split("+")])
def test_to_a_union_and_back_gives_the_original(part, union):
    rows = np.random.default_rng(5).choice([0.0, 1.0, NAN], size=(40, load_label_set(part).num_findings))
    np.testing.assert_array_equal(map_labels(map_labels(rows, part, union), union, part), rows.astype(np.float32))


@pytest.mark.parametrize("union", UNIONS)
def test_a_union_says_of_each_of_its_findings_what_the_set_that_has_it_would_say(union):
    for source, own in itertools.permutations(union.split("+"), 2):
        rows = np.random.default_rng(6).choice([0.0, 1.0, NAN], size=(40, load_label_set(source).num_findings))
        whole, part = map_labels(rows, source, union), map_labels(rows, source, own)
        others = [load_label_set(name) for name in union.split("+") if name != own]
        for column, finding in enumerate(load_label_set(own).findings):
            if not any(finding.key in other.keys for other in others):
                np.testing.assert_array_equal(
                    whole[:, load_label_set(union).names.index(finding.name)], part[:, column]
                )


def test_rules_between_a_union_and_its_sets():
    rules = mapping_rules("ct_rate_18", "ct_rate_18+vlm3d_18")
    assert [rules[name].kind for name in CT_RATE_COLUMNS] == ["exact"] * 18
    assert rules["Calcification"].sources == ("Arterial wall calcification", "Coronary artery wall calcification")
    assert (rules["Ground-glass opacity"].kind, rules["Mass"].kind) == ("one_way", "unknown")
    # The source's Calcification is near RAD-ChestCT's, the two arteries together are it.
    assert mapping_rules("ct_rate_18+vlm3d_18", "rad_chestct_16")["Calcification"].kind == "derived"
    assert mapping_rules("rad_chestct_16", "ct_rate_18+vlm3d_18")["Calcification"].kind == "approximate"


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("ct_rate_18", "ct_rate_18", "labels of ct_rate_18: 18 of 18 supported (18 exact)"),
        (
            "ct_rate_18",
            "vlm3d_18",
            "labels of ct_rate_18 as vlm3d_18: 11 of 18 supported (8 exact, 1 derived: Calcification, 1 approximate: "
            "Fibrosis, 1 one-way: Ground-glass opacity), 7 unknown: Pneumothorax, Pneumonia, Pulmonary edema, Mass, "
            "Mediastinal widening, Pleural thickening, Fracture",
        ),
    ],
)
def test_a_mapping_in_words(source, target, words):
    assert mapping_in_words(source, target) == words


@pytest.mark.skipif(not REAL_LABELS.is_file(), reason="the real CT-RATE labels are not beside the repository")
def test_real_labels_fit_and_no_report_of_ground_glass_is_called_free_of_it():
    with REAL_LABELS.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    label_set = load_label_set("ct_rate_18")
    label_set.check_columns(reader.fieldnames or [])
    with pytest.raises(ValueError, match="10 of 18 are missing"):
        load_label_set("vlm3d_18").check_columns(reader.fieldnames or [])
    labels = np.array([[float(row[name]) for name in label_set.names] for row in rows])
    opacity = map_labels(labels, "ct_rate_18", "vlm3d_18")[
        :, load_label_set("vlm3d_18").keys.index("ground_glass_opacity")
    ]
    mentioned = np.array([bool(re.search("ground[- ]glass", row["report_text"].lower())) for row in rows])
    assert mentioned.sum() > 20 and np.isnan(opacity[mentioned]).all()
    assert (opacity == 0).sum() > 20 and not (opacity == 1).any()
