import csv
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from vlm3d_ext.data.case_manifest import CaseManifest, ManifestError
from vlm3d_ext.data.csv_table import CsvTableError
from vlm3d_ext.data.label_table import read_label_csv
from vlm3d_ext.data.labelled_cases import LabelledCases
from vlm3d_ext.text.label_set import load_label_set
from vlm3d_ext.text.prompt_label_set import label_set_of_prompts

CT_RATE = load_label_set("ct_rate_18").names
NODULE, OPACITY, EFFUSION = (CT_RATE.index(name) for name in ("Lung nodule", "Lung opacity", "Pleural effusion"))
REAL = Path(__file__).parents[3] / "shared/data/ctrate"


def make_case(scan_id, labels, volume_id=None):
    volume_id = volume_id or f"{scan_id}_1"
    return {
        "volume_id": volume_id,
        "scan_id": scan_id,
        "patient_id": scan_id.rsplit("_", 1)[0],
        "image": f"volumes/{volume_id}.npz",
        "geometry": f"volumes/{volume_id}.json",
        "has_anatomical_mask": True,
        "labels": labels,
        "lesion_masks": {},
        "source": f"train_fixed/{scan_id}/{scan_id}_1.nii.gz",
    }


def row_of(**by_name):
    labels = [0] * 18
    for name, value in by_name.items():
        labels[{"nodule": NODULE, "opacity": OPACITY, "effusion": EFFUSION}[name]] = value
    return labels


@pytest.fixture
def content():
    return {
        "label_set": "ct_rate_18",
        "label_names": list(CT_RATE),
        "fingerprint": "f" * 64,
        "training": [
            make_case("train_1_a", row_of(nodule=1, opacity=1)),
            make_case("train_2_a", row_of(nodule=None)),
            make_case("train_3_a", row_of(effusion=1)),
            make_case("train_4_a", []),
        ],
        "validation": [make_case("train_5_a", row_of(nodule=1)), make_case("train_6_a", row_of())],
        "test": [make_case("valid_1_a", row_of(opacity=1))],
    }


def manifest_of(folder, content):
    (folder / "manifest.json").write_text(json.dumps(content))
    return CaseManifest(folder / "manifest.json")


def write_labels(folder, rows, columns=CT_RATE):
    path = folder / "labels.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["VolumeName", *columns], *rows])
    return str(path)


def test_the_manifests_own_labels(tmp_path, content):
    manifest = manifest_of(tmp_path, content)
    labelled = LabelledCases(manifest)
    assert labelled.label_set.name == "ct_rate_18" and labelled.names == CT_RATE and labelled.num_findings == 18
    for split in ("training", ["validation", "test"]):
        for case, original in zip(labelled.cases(split), manifest.cases(split), strict=True):
            np.testing.assert_array_equal(case.pop("labels"), original.pop("labels"))
            assert case == original
    assert [case["volume_id"] for case in labelled.cases("training", 1)] == ["train_1_a_1"]
    assert LabelledCases(tmp_path / "manifest.json").names == CT_RATE


def test_labels_as_those_of_another_set_and_of_the_union(tmp_path, content):
    manifest = manifest_of(tmp_path, content)
    source = LabelledCases(manifest, "vlm3d_18")
    first, second = (dict(zip(source.names, case["labels"], strict=True)) for case in source.cases("training", 2))
    assert (first["Lung nodule"], first["Calcification"], second["Ground-glass opacity"]) == (1, 0, 0)
    assert all(math.isnan(value) for value in (first["Ground-glass opacity"], second["Lung nodule"], first["Mass"]))
    union = LabelledCases(manifest, "ct_rate_18+vlm3d_18")
    for case, own, other in zip(
        union.cases("training"), LabelledCases(manifest).cases("training"), source.cases("training"), strict=True
    ):
        assert len(case["labels"]) == 28 and all(type(value) is float for value in case["labels"])
        np.testing.assert_array_equal(case["labels"][:18], own["labels"])
        only_source = [name for name in source.names if name not in CT_RATE]
        expected = dict(zip(source.names, other["labels"], strict=True))
        np.testing.assert_array_equal(case["labels"][18:], [expected[name] for name in only_source])


def test_weights_and_prevalence_count_known_training_labels_only(tmp_path, content, caplog):
    content["validation"][1]["labels"] = row_of(nodule=1, effusion=1)  # must not count
    labelled = LabelledCases(manifest_of(tmp_path, content))
    weights = dict(zip(CT_RATE, labelled.positive_weights(), strict=True))
    # nodule: 1 positive, 1 negative, 2 unknown; effusion and opacity: 1 positive, 2 negatives, 1 unknown
    assert (weights["Lung nodule"], weights["Pleural effusion"], weights["Emphysema"]) == (1.0, 2.0, 1.0)
    warning = caplog.messages[-1]
    assert "Emphysema" in warning and "Lung nodule" not in warning and "Pleural effusion" not in warning
    assert labelled.positive_weights(max_weight=1.5)[EFFUSION] == 1.5
    prevalence = labelled.training_prevalence()
    assert prevalence[NODULE] == 0.5 and prevalence[EFFUSION] == pytest.approx(1 / 3) and prevalence[0] == 0
    assert math.isnan(LabelledCases(manifest_of(tmp_path, content), "vlm3d_18").training_prevalence()[-7])  # Mass
    with pytest.raises(ValueError, match=r"max_weight must be at least 1, got 0\.5"):
        labelled.positive_weights(max_weight=0.5)


def test_common_findings_weigh_less_than_one(tmp_path, content):
    for case in content["training"]:
        case["labels"] = row_of(nodule=1)
    content["training"][0]["labels"] = row_of()
    labelled = LabelledCases(manifest_of(tmp_path, content))
    assert labelled.positive_weights()[NODULE] == pytest.approx(1 / 3)
    assert labelled.positive_weights(max_weight=2)[NODULE] == 0.5


def test_regions_of_the_findings(tmp_path, content):
    regions = dict(zip(CT_RATE, LabelledCases(manifest_of(tmp_path, content)).finding_regions(), strict=True))
    assert regions["Lung nodule"] == [1, 2, 3, 4, 5] and regions["Cardiomegaly"] == [7]
    assert regions["Pleural effusion"] == [19]


def test_the_block_that_says_what_the_labels_are_worth(tmp_path, content, caplog):
    caplog.set_level(logging.INFO, "vlm3d_ext")
    labelled = LabelledCases(manifest_of(tmp_path, content), "vlm3d_18")
    assert caplog.messages == [labelled.description] and caplog.records[0].name.startswith("vlm3d_ext")
    lines = labelled.description.splitlines()
    assert lines[0].startswith(
        "labels of ct_rate_18 as vlm3d_18: 11 of 18 supported (8 exact, 1 derived: Calcification"
    )
    # training: 3 labelled cases with 11 known labels, less one unknown nodule and one opacity without glass
    assert lines[1] == "training: 4 cases, 31 of 72 labels known, 2 positive"
    assert lines[2] == "validation: 2 cases, 22 of 36 labels known, 1 positive"
    untrained, denied, unscored = (set(line.split(": ")[1].split(", ")) for line in lines[4:])
    assert "unknown in all training cases, left out of the loss" in lines[4]
    assert untrained == {
        "Mass", "Pneumonia", "Pulmonary edema", "Pneumothorax", "Mediastinal widening", "Pleural thickening", "Fracture"
    }  # fmt: skip
    assert "never positive in training" in lines[5] and "Ground-glass opacity" in denied
    assert "no positive in validation; its metrics will be undefined" in lines[6]
    assert unscored == set(labelled.names) - {"Lung nodule"}


def test_a_clean_data_set_and_empty_splits_give_no_complaint(tmp_path, content):
    content["training"] = [make_case("train_1_a", [1] * 18), make_case("train_2_a", [0] * 18)]
    content["validation"], content["test"] = [make_case("train_3_a", [1] * 18)], []
    assert LabelledCases(manifest_of(tmp_path, content)).description.splitlines()[1:] == [
        "training: 2 cases, 36 of 36 labels known, 18 positive",
        "validation: 1 cases, 18 of 18 labels known, 18 positive",
        "test: no case",
    ]


def test_a_csv_replaces_the_manifests_labels(tmp_path, content):
    content["training"].append(make_case("train_7_a", row_of(), volume_id="train_7_a_1_window_0"))
    rows = [
        ["train_1_a_1.nii.gz", *row_of(effusion=1)],
        ["train_2_a", *row_of(nodule=1)],
        ["train_7_a_1", *row_of(opacity=1)],
        ["train_99_a_1", *row_of()],
    ]
    labelled = LabelledCases(manifest_of(tmp_path, content), None, write_labels(tmp_path, rows))
    by_id = {case["volume_id"]: case["labels"] for case in labelled.cases(["training", "validation", "test"])}
    assert by_id["train_1_a_1"] == row_of(effusion=1)  # of its volume
    assert by_id["train_2_a_1"] == row_of(nodule=1)  # of its scan
    assert by_id["train_7_a_1_window_0"] == row_of(opacity=1)  # of the volume that it is a window of
    assert all(math.isnan(value) for value in by_id["train_3_a_1"])
    text = labelled.description
    assert "3 of 4 ids label 3 of 8 prepared cases" in text
    assert "rows without a prepared case: 1: train_99_a_1" in text
    assert "prepared cases without a row, all their labels unknown: 5: train_3_a_1, train_4_a_1, train_5_a_1" in text


def test_a_volumes_row_comes_before_its_scans(tmp_path, content):
    rows = [["train_1_a", *row_of()], ["train_1_a_1", *row_of(nodule=1)]]
    labelled = LabelledCases(manifest_of(tmp_path, content), None, write_labels(tmp_path, rows))
    assert labelled.cases("training")[0]["labels"][NODULE] == 1
    assert "rows without" not in labelled.description


def test_long_lists_of_ids_are_cut_short(tmp_path, content):
    rows = [["train_1_a", *row_of()], *([f"other_{number:02d}", *row_of()] for number in range(12))]
    labelled = LabelledCases(manifest_of(tmp_path, content), None, write_labels(tmp_path, rows))
    assert "rows without a prepared case: 12: other_00, " in labelled.description
    assert "other_09 and 2 more\n" in labelled.description and "other_10" not in labelled.description


def test_a_csv_of_another_set_than_the_manifests(tmp_path, content):
    names = load_label_set("vlm3d_18").names
    path = write_labels(tmp_path, [["train_1_a", *(["1"] * 18)]], names)
    labelled = LabelledCases(manifest_of(tmp_path, content), "vlm3d_18", path)
    assert labelled.cases("training")[0]["labels"] == [1.0] * 18
    assert labelled.description.startswith("labels of vlm3d_18: 18 of 18 supported")
    mapped = LabelledCases(manifest_of(tmp_path, content), None, path)
    assert mapped.description.startswith("labels of vlm3d_18 as ct_rate_18: 12 of 18 supported")
    # The manifest's own labels need not be of a known set then.
    content["label_set"] = "somebodys"
    assert LabelledCases(manifest_of(tmp_path, content), "vlm3d_18", path).num_findings == 18


def test_what_cannot_be_labelled_is_refused(tmp_path, content):
    path = write_labels(tmp_path, [["scan_1", *row_of()], ["scan_2", *row_of()]])
    with pytest.raises(
        ValueError, match=r"none of its 2 ids \(such as 'scan_1'\) is a volume or scan of .*'train_1_a_1'"
    ):
        LabelledCases(manifest_of(tmp_path, content), None, path)
    cavitation = label_set_of_prompts({"Cavitation": "A cavity."})
    with pytest.raises(ValueError, match="none of the 1 findings of prompts follows from its labels of ct_rate_18"):
        LabelledCases(manifest_of(tmp_path, content), cavitation)
    misspelt = write_labels(tmp_path, [["train_1_a", *row_of()]], ["medical materials", *CT_RATE[1:]])
    with pytest.raises(CsvTableError, match=r"'Medical material' \(nearest present: 'medical materials'\)"):
        LabelledCases(manifest_of(tmp_path, content), "vlm3d_18", misspelt)


def test_manifests_whose_labels_are_of_no_known_set(tmp_path, content):
    content["label_set"] = "somebodys"
    with pytest.raises(ManifestError, match="labels are of 'somebodys', which cannot be loaded"):
        LabelledCases(manifest_of(tmp_path, content))
    content["label_set"], content["label_names"] = "ct_rate_18", [*CT_RATE[:-1], "Mass"]
    with pytest.raises(ManifestError, match=r"\['Interlobular septal thickening', 'Mass'\]"):
        LabelledCases(manifest_of(tmp_path, content))


def test_a_set_of_ones_own_is_recognised_by_the_manifests_name(tmp_path, content):
    finding = {"name": "Cyst", "key": "cyst", "synonyms": [], "prompts": {"positive": ["A cyst."], "negative": []}}
    own = {"name": "own", "description": "", "findings": [finding | {"regions": []}]}
    (tmp_path / "own.json").write_text(json.dumps(own))
    for split in ("training", "validation", "test"):
        for case in content[split]:
            case["labels"] = [1]
    content |= {"label_set": "own", "label_names": ["Cyst"]}
    labelled = LabelledCases(manifest_of(tmp_path, content), tmp_path / "own.json")
    assert labelled.cases("test")[0]["labels"] == [1.0] and labelled.finding_regions() == [[]]


def test_only_findings_with_both_answers_can_be_trained(tmp_path, content):
    labelled = LabelledCases(manifest_of(tmp_path, content))
    trainable = [name for name, both in zip(labelled.names, labelled.trainable_findings(), strict=True) if both]
    assert trainable == ["Lung nodule", "Lung opacity", "Pleural effusion"]
    content["training"] = [make_case("train_4_a", [])]
    with pytest.raises(ManifestError, match=r"manifest.json: no finding of ct_rate_18 has both .* --labels_csv"):
        LabelledCases(manifest_of(tmp_path, content)).trainable_findings()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real CT-RATE tables are not beside the repository")
def test_real_ct_rate_rows_label_the_scans_that_they_are_of(tmp_path, content):
    table = read_label_csv(REAL / "text_classifier_val_labels.head120.csv", "ct_rate_18")
    with open(REAL / "map_val_classifier.csv", newline="", encoding="utf-8") as file:
        scan_of = {row["AccessionNo"]: row["NameinCTRATE"] for row in csv.DictReader(file)}
    rows = [
        [scan_of[name], *("" if math.isnan(value) else int(value) for value in labels)]
        for name, labels in table.labels.items()
        if scan_of[name].startswith("train_")
    ]
    half = [row[0] for row in rows[::2]]
    content |= {"training": [make_case(scan, []) for scan in half], "validation": [make_case("train_1_z", [])]}
    labelled = LabelledCases(manifest_of(tmp_path, content), "ct_rate_18", write_labels(tmp_path, rows))
    assert len(rows) > 50
    for case, row in zip(labelled.cases("training"), rows[::2], strict=True):
        assert case["labels"] == row[1:]
    assert f"rows without a prepared case: {len(rows) - len(half)}:" in labelled.description
    assert "prepared cases without a row, all their labels unknown: 2: train_1_z_1, valid_1_a_1" in labelled.description
