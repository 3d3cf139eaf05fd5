import hashlib
import json
import math
from pathlib import Path

import pytest

from tests.prepared_release import make_prepared_release
from vlm3d_ext.data.case_manifest import (
    CaseManifest,
    ManifestError,
    with_and_without_mask,
    with_other_patients_evidence,
    with_report,
)


def _case(volume_id, **changes):
    return {
        "volume_id": volume_id,
        "patient_id": "_".join(volume_id.split("_")[:2]),
        "image": f"volumes/{volume_id}.npz",
        "geometry": f"volumes/{volume_id}.json",
        "has_anatomical_mask": True,
        "labels": [1, 0, None],
        "lesion_masks": {"lung_nodule": f"lesion_masks/lung_nodule/{volume_id}.nii.gz"},
        **changes,
    }


@pytest.fixture
def content():
    return {
        "label_names": ["a", "b", "c"],
        "fingerprint": "f" * 64,
        "training": [_case("train_1_a_1"), _case("train_1_b_1"), _case("train_2_a_1")],
        "validation": [_case("train_3_a_1")],
        "test": [],
    }


def _write(folder, content):
    path = folder / "manifest.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_labels_are_floats_and_unknown_is_nan(tmp_path, content):
    content["training"][1]["labels"] = []
    cases = CaseManifest(_write(tmp_path, content)).cases("training")
    assert cases[0]["labels"][:2] == [1.0, 0.0] and math.isnan(cases[0]["labels"][2])
    assert len(cases[1]["labels"]) == 3 and all(math.isnan(value) for value in cases[1]["labels"])


def test_paths_are_absolute_wherever_the_run_goes(tmp_path, content, monkeypatch):
    (tmp_path / "prepared").mkdir()
    _write(tmp_path / "prepared", content)
    monkeypatch.chdir(tmp_path)
    case = CaseManifest("prepared/manifest.json").cases("validation")[0]
    folder = (tmp_path / "prepared").resolve()
    assert case["image"] == str(folder / "volumes" / "train_3_a_1.npz")
    assert case["geometry"] == str(folder / "volumes" / "train_3_a_1.json")
    assert case["lesion_masks"] == {"lung_nodule": str(folder / "lesion_masks" / "lung_nodule" / "train_3_a_1.nii.gz")}
    assert Path(case["image"]).is_absolute()


def test_masks_on_the_scans_own_grid(tmp_path, content):
    content["training"][0]["lesion_masks_original_grid"] = {"lung_nodule": "lesion_masks_original_grid/x.nii.gz"}
    content["training"][0]["lesion_masks_partial"] = ["lung_nodule"]
    new, old = CaseManifest(_write(tmp_path, content)).cases("training", 2)
    original = str(tmp_path.resolve() / "lesion_masks_original_grid" / "x.nii.gz")
    assert new["lesion_masks_original_grid"] == {"lung_nodule": original}
    assert new["lesion_masks_partial"] == ["lung_nodule"]
    # Manifests of earlier versions have neither key.
    assert old["lesion_masks_original_grid"] == {} and old["lesion_masks_partial"] == []


def test_splits_alone_together_and_cut_short(tmp_path, content):
    manifest = CaseManifest(_write(tmp_path, content))

    def ids(*arguments):
        return [case["volume_id"] for case in manifest.cases(*arguments)]

    assert ids("validation") == ["train_3_a_1"]
    assert ids(["validation", "training"]) == ["train_3_a_1", "train_1_a_1", "train_1_b_1", "train_2_a_1"]
    assert ids("training", 2) == ["train_1_a_1", "train_1_b_1"]


def test_identity_of_the_data(tmp_path, content):
    path = _write(tmp_path, content)
    manifest = CaseManifest(path)
    assert manifest.fingerprint == "f" * 64
    assert manifest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest.label_names == ["a", "b", "c"]


def test_reads_what_the_writer_writes(tmp_path):
    manifest = CaseManifest(make_prepared_release(tmp_path, (2, 1, 1)))
    cases = manifest.cases(["training", "validation", "test"])
    assert len(cases) == 4 and all(Path(case["image"]).is_file() for case in cases)


def test_missing_file(tmp_path):
    with pytest.raises(ManifestError, match=r"nothing\.json: no such manifest\. Make it with `python -m data_prep"):
        CaseManifest(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"label_names": ["a"', "not JSON"),
        ("\udcff", "not JSON"),
        ("[1, 2]", "not an object"),
        ("3", "not an object"),
        ('{"label_names": 7}', "not an object with lists"),
    ],
)
def test_not_a_manifest(tmp_path, text, problem):
    path = tmp_path / "manifest.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ManifestError, match=problem) as error:
        CaseManifest(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["label_names", "fingerprint", "training", "test"])
def test_missing_key(tmp_path, content, key):
    del content[key]
    with pytest.raises(ManifestError, match=f"needs the key '{key}'"):
        CaseManifest(_write(tmp_path, content))


def test_missing_key_of_a_case(tmp_path, content):
    del content["training"][2]["geometry"]
    with pytest.raises(ManifestError, match="training case 2 has no 'geometry'"):
        CaseManifest(_write(tmp_path, content))


def test_wrong_number_of_labels(tmp_path, content):
    content["validation"][0]["labels"] = [1, 0]
    with pytest.raises(ManifestError, match="volume train_3_a_1 has 2 labels, expected 3 or none"):
        CaseManifest(_write(tmp_path, content))


def test_a_volume_listed_twice(tmp_path, content):
    content["training"].append(_case("train_2_a_1"))
    with pytest.raises(ManifestError, match="volume train_2_a_1 is listed twice"):
        CaseManifest(_write(tmp_path, content))


def test_a_patient_in_two_splits(tmp_path, content):
    content["test"].append(_case("train_1_c_1"))
    with pytest.raises(ManifestError, match="patient train_1 is in training and in test"):
        CaseManifest(_write(tmp_path, content))


def test_unknown_and_empty_splits(tmp_path, content):
    manifest = CaseManifest(_write(tmp_path, content))
    with pytest.raises(ManifestError, match=r"no split 'valid'; the splits are \['training', 'validation', 'test'\]"):
        manifest.cases(["training", "valid"])
    with pytest.raises(ManifestError, match=r"no case in test \(the manifest has .*'training': 3"):
        manifest.cases("test")


def test_cases_without_and_with_their_masks():
    cases = [{"volume_id": name, "has_anatomical_mask": name != "b"} for name in "abc"]
    both = with_and_without_mask(cases)
    assert [(case["volume_id"], case["use_anatomical_mask"]) for case in both] == [
        ("a", False), ("b", False), ("c", False), ("a", True), ("c", True)
    ]  # fmt: skip
    assert "use_anatomical_mask" not in cases[0]


def test_cases_with_a_report():
    reports = {
        "a": {"findings": "Nodule.", "impression": "Nodule."},
        "b": {"findings": "", "impression": "Normal."},
        "c": {"findings": "Nodule.", "impression": None},
        "d": {"findings": "", "impression": ""},
        "e": None,
    }
    cases = [{"volume_id": name, "report": report} for name, report in reports.items()]
    cases.append({"volume_id": "f"})
    assert with_report(cases) == cases[:3]
    with pytest.raises(
        ManifestError, match=r"none of the 3 cases has a report; .* `python -m data_prep.write_reports`"
    ):
        with_report(cases[3:])


def _cases_of_patients(counts):
    """Return cases: patient number -> how many volumes."""
    return [
        {"volume_id": f"valid_{patient}_a_{number}", "patient_id": f"valid_{patient}", "labels": [patient]}
        for patient, count in enumerate(counts)
        for number in range(count)
    ]


@pytest.mark.parametrize("counts", [(1, 1), (1, 1, 1, 1, 1, 1, 1), (2, 3, 1, 2, 4, 1), (5, 1)])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_every_case_is_shown_another_patient(counts, seed):
    cases = _cases_of_patients(counts)
    control = with_other_patients_evidence(cases, seed)
    patient_of = {case["volume_id"]: case["patient_id"] for case in cases}
    assert sorted(case["volume_id"] for case in control) == sorted(patient_of)
    for case in control:
        assert patient_of[case["evidence_of"]] != case["patient_id"]
        assert {key: value for key, value in case.items() if key != "evidence_of"} in cases
    assert all("evidence_of" not in case for case in cases)


def test_each_volume_serves_once_or_nearly_so():
    single = with_other_patients_evidence(_cases_of_patients([1] * 50))
    assert len({case["evidence_of"] for case in single}) == 50
    # CT-RATE has about two volumes of each patient; one serves twice where two of a patient follow each other
    double = with_other_patients_evidence(_cases_of_patients([2] * 50))
    times = [[case["evidence_of"] for case in double].count(case["volume_id"]) for case in double]
    assert max(times) <= 2 and times.count(1) >= 90


def test_the_control_depends_on_the_seed_and_not_on_the_order_of_the_cases():
    def pairs(cases, seed):
        return {(case["volume_id"], case["evidence_of"]) for case in with_other_patients_evidence(cases, seed)}

    cases = _cases_of_patients([1] * 12)
    assert pairs(cases, 0) == pairs(cases[::-1], 0)
    assert pairs(cases, 0) != pairs(cases, 1)


def test_one_patient_has_no_other():
    with pytest.raises(ManifestError, match="needs scans of at least two patients; evaluate more cases"):
        with_other_patients_evidence(_cases_of_patients([3]))
