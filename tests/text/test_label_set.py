import csv
import importlib
import importlib.resources
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlm3d_ext.data.anatomical_regions import region_by_name
from vlm3d_ext.text.label_mapping import describe_mapping, map_labels, mapping_rules
from vlm3d_ext.text.label_set import LabelRule, available_label_sets, load_label_set

CT_RATE_COLUMNS = (
    "Medical material,Arterial wall calcification,Cardiomegaly,Pericardial effusion,"
    "Coronary artery wall calcification,Hiatal hernia,Lymphadenopathy,Emphysema,Atelectasis,Lung nodule,Lung opacity,"
    "Pulmonary fibrotic sequela,Pleural effusion,Mosaic attenuation pattern,Peribronchial thickening,Consolidation,"
    "Bronchiectasis,Interlobular septal thickening"
).split(",")
NAN = np.nan
REAL_LABELS = Path(__file__).parents[3] / "shared/data/ctrate/text_classifier_val_labels.head120.csv"


@pytest.mark.parametrize(("name", "length"), [("ct_rate_18", 18), ("vlm3d_18", 18), ("rad_chestct_16", 16)])
def test_every_shipped_set_is_complete(name, length):
    label_set = load_label_set(name)
    assert label_set.num_findings == length == len(set(label_set.names)) == len(set(label_set.keys))
    for finding in label_set.findings:
        assert finding.positive_prompts and finding.negative_prompts and finding.synonyms
        assert not set(finding.positive_prompts) & set(finding.negative_prompts)
        assert finding.key == finding.name.lower().replace(" ", "_").replace("-", "_")
        assert all(region_by_name(region).name == region for region in finding.regions) and finding.regions
    assert name in available_label_sets()


def test_an_installation_carries_the_sets_along():
    """setuptools takes data files from packages only, so the folder must be one."""
    package = importlib.import_module("vlm3d_ext.text.label_sets")
    assert {path.name for path in importlib.resources.files(package).iterdir()} >= {"ct_rate_18.json", "vlm3d_18.json"}
    assert package.__file__ is not None


def test_ct_rate_has_the_columns_of_its_csv_in_their_order():
    assert load_label_set("ct_rate_18").names == tuple(CT_RATE_COLUMNS)
    load_label_set("ct_rate_18").check_columns(["VolumeName", *CT_RATE_COLUMNS])


def test_rad_chestct_has_neither_mosaic_attenuation_nor_two_calcifications():
    names = load_label_set("rad_chestct_16").names
    assert "Mosaic attenuation pattern" not in names and "Medical material" in names
    assert [name for name in names if "alcification" in name] == ["Calcification"]


def test_missing_columns_are_named_with_the_nearest_present_one():
    columns = ["VolumeName", *CT_RATE_COLUMNS]
    columns[columns.index("Lung nodule")] = "lung nodules"
    columns.remove("Bronchiectasis")
    with pytest.raises(
        ValueError, match=r"'Lung nodule' \(nearest present: 'lung nodules'\), 'Bronchiectasis'"
    ) as caught:
        load_label_set("ct_rate_18").check_columns(columns)
    assert "2 of 18" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"\['Emphysema'\].*more than once"):
        load_label_set("ct_rate_18").check_columns([*CT_RATE_COLUMNS, "Emphysema"])


def test_unknown_names_and_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'ct_rate_18'"):
        load_label_set("ctrate_18")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_label_set(tmp_path / "nowhere.json")
    (tmp_path / "bad.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"bad\.json is not a label set file"):
        load_label_set(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="nearest"):
        load_label_set("ct_rate_18").finding("lung_nodul")


def test_a_set_of_ones_own_is_loaded_by_path(tmp_path):
    shipped = load_label_set("ct_rate_18")
    finding = {
        "name": "Cyst",
        "key": "cyst",
        "synonyms": [],
        "prompts": {"positive": ["A cyst."], "negative": ["No cyst."]},
    }
    finding["regions"] = ["left_upper_lobe"]
    (tmp_path / "own.json").write_text(json.dumps({"name": "own", "description": "", "findings": [finding]}))
    own = load_label_set(tmp_path / "own.json")
    assert own.names == ("Cyst",)
    assert map_labels({"Lung nodule": 1}, shipped, own) == {"Cyst": None}
    repeated = {"name": "own", "description": "", "findings": [finding, finding]}
    (tmp_path / "twice.json").write_text(json.dumps(repeated))
    with pytest.raises(ValueError, match="occur more than once"):
        load_label_set(tmp_path / "twice.json")


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


@pytest.mark.parametrize(
    "rule", [("exact", ("a",), 1, None), ("one_way", ("a",), 1, 0), ("unknown", ("a",)), ("same", ("a",), 1, 0)]
)
def test_a_rule_must_agree_with_its_kind(rule):
    with pytest.raises(ValueError):
        LabelRule(*rule)
    assert mapping_rules("ct_rate_18", "vlm3d_18")["Mass"].kind == "unknown"


def test_text_imports_neither_torch_nor_monai():
    modules = "label_set, label_mapping, hashed_ngrams, report_sections, sentence_regions"
    code = (
        f"import sys; from vlm3d_ext.text import {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'monai')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
