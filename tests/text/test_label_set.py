import importlib
import importlib.resources
import json
import subprocess
import sys

import pytest

from vlm3d_ext.data.anatomical_regions import region_by_name
from vlm3d_ext.text.label_mapping import map_labels
from vlm3d_ext.text.label_set import LabelRule, available_label_sets, load_label_set

CT_RATE_COLUMNS = (
    "Medical material,Arterial wall calcification,Cardiomegaly,Pericardial effusion,"
    "Coronary artery wall calcification,Hiatal hernia,Lymphadenopathy,Emphysema,Atelectasis,Lung nodule,Lung opacity,"
    "Pulmonary fibrotic sequela,Pleural effusion,Mosaic attenuation pattern,Peribronchial thickening,Consolidation,"
    "Bronchiectasis,Interlobular septal thickening"
).split(",")


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


def test_a_union_has_each_finding_once_in_the_order_of_the_sets():
    ct_rate, source = load_label_set("ct_rate_18"), load_label_set("vlm3d_18")
    union = load_label_set("ct_rate_18+vlm3d_18")
    shared = set(ct_rate.keys) & set(source.keys)
    assert len(shared) == 8 and union.num_findings == 18 + 18 - 8
    assert union.name == "ct_rate_18+vlm3d_18"
    assert union.names[:18] == ct_rate.names
    assert union.names[18:] == tuple(finding.name for finding in source.findings if finding.key not in shared)
    assert load_label_set("vlm3d_18 + ct_rate_18").names[:18] == source.names


def test_a_finding_of_several_sets_is_prompted_as_in_the_first_and_has_the_synonyms_of_all(tmp_path):
    nodule = {"name": "Nodule", "key": "lung_nodule", "synonyms": ["coin lesion", "nodule"]}
    nodule |= {"prompts": {"positive": ["A coin lesion."], "negative": []}, "regions": []}
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"name": "own", "description": "", "findings": [nodule]}))
    shipped = load_label_set("ct_rate_18").finding("lung_nodule")
    union = load_label_set(f"ct_rate_18+{path}")
    finding = union.finding("lung_nodule")
    assert union.num_findings == 18 and union.name == "ct_rate_18+own"
    assert (finding.name, finding.positive_prompts, finding.regions) == (
        shipped.name,
        shipped.positive_prompts,
        shipped.regions,
    )
    assert finding.synonyms[: len(shipped.synonyms)] == shipped.synonyms
    assert {"coin lesion", "nodule"} <= set(finding.synonyms) and len(set(finding.synonyms)) == len(finding.synonyms)
    assert load_label_set(f"{path}+ct_rate_18").finding("lung_nodule").positive_prompts == ("A coin lesion.",)


def test_a_file_whose_path_has_a_plus_is_no_union(tmp_path):
    finding = {"name": "Cyst", "key": "cyst", "synonyms": [], "prompts": {"positive": ["A cyst."], "negative": []}}
    path = tmp_path / "lung+pleura.json"
    path.write_text(json.dumps({"name": "own", "description": "", "findings": [finding | {"regions": []}]}))
    assert load_label_set(path).names == ("Cyst",)


def test_sets_that_cannot_be_united(tmp_path):
    finding = {"name": "Emphysema", "key": "bullae", "synonyms": [], "prompts": {"positive": ["x"], "negative": []}}
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"name": "own", "description": "", "findings": [finding | {"regions": []}]}))
    for text, problem in [
        ("ct_rate_18+ct_rate_18", r"\['ct_rate_18'\] more than once"),
        ("ct_rate_18+", "one of the places is empty"),
        ("ct_rate_18+vlm3d_81", "Did you mean 'vlm3d_18'"),
        (f"ct_rate_18+{path}", r"\['Emphysema'\] to findings of different keys"),
    ]:
        with pytest.raises(ValueError, match=problem) as caught:
            load_label_set(text)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_label_set(f"ct_rate_18+{tmp_path / 'nowhere.json'}")


@pytest.mark.parametrize(
    "rule", [("exact", ("a",), 1, None), ("one_way", ("a",), 1, 0), ("unknown", ("a",)), ("same", ("a",), 1, 0)]
)
def test_a_rule_must_agree_with_its_kind(rule):
    with pytest.raises(ValueError):
        LabelRule(*rule)


def test_text_imports_neither_torch_nor_monai():
    modules = "label_set, label_mapping, prompt_label_set, hashed_ngrams, report_sections, sentence_regions"
    code = (
        f"import sys; from vlm3d_ext.text import {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'monai')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
