import pytest

from data_prep.ct_rate_layout import find_ct_rate_root, read_ct_rate
from data_prep.raw_case import LayoutError
from tests.data_prep.tiny_release import LABEL_NAMES, TinyRelease, write_csv
from vlm3d_ext.text.label_set import load_label_set

CT_RATE_18 = load_label_set("ct_rate_18")


def cases_of(root, **options):
    return {case.volume_id: case for case in read_ct_rate(root, label_set=CT_RATE_18, **options).cases}


@pytest.fixture
def release(tmp_path):
    release = TinyRelease(tmp_path)
    release.add("train_1_a_1", positive=("Lung nodule",))
    release.add("train_1_a_2", positive=("Lung nodule",))
    release.add("train_2_a_1")
    release.add("valid_1_a_1", positive=("Cardiomegaly",))
    return release


def test_names_splits_labels_and_reports(release):
    dataset = read_ct_rate(release.write_tables(), label_set=CT_RATE_18)
    cases = {case.volume_id: case for case in dataset.cases}

    assert dataset.release == "v2" and list(cases) == ["train_1_a_1", "train_1_a_2", "train_2_a_1", "valid_1_a_1"]
    case = cases["train_1_a_2"]
    assert (case.scan_id, case.patient_id, case.split) == ("train_1_a", "train_1", "training")
    assert case.source == "train_fixed/train_1/train_1_a/train_1_a_2.nii.gz"
    assert [name for name, value in zip(LABEL_NAMES, case.labels, strict=True) if value] == ["Lung nodule"]
    assert cases["valid_1_a_1"].split == "test"
    assert cases["train_2_a_1"].report == {"findings": "Text of train_2_a.", "impression": ""}
    assert case.stored_values is None and case.spacing_mm is None
    assert not any(case.refusal or case.exclusion for case in cases.values())
    assert dataset.remarks == () and dataset.rows_without_file == () and dataset.files_without_row == ()


def test_reports_of_reconstructions_that_disagree_refuse_the_scan(release):
    release.reports["train"][1][3] = "Another text."

    cases = cases_of(release.write_tables())

    assert "rows 2 and 3" in cases["train_1_a_1"].refusal and cases["train_2_a_1"].refusal is None


@pytest.mark.parametrize("inside", [".", "dataset"])
def test_root_is_found(tmp_path, inside):
    (tmp_path / inside / "train_fixed").mkdir(parents=True)

    assert find_ct_rate_root(tmp_path) == tmp_path / inside


def test_a_folder_called_train_is_not_yet_ct_rate(tmp_path):
    (tmp_path / "train").mkdir()
    assert find_ct_rate_root(tmp_path) is None
    (tmp_path / "metadata").mkdir()
    assert find_ct_rate_root(tmp_path) == tmp_path


def test_names_without_extension_spaces_and_empty_labels(release):
    for row in release.labels["train"]:
        row[0] = f"  {row[0].removesuffix('.nii.gz')} "
    release.labels["train"][2][1:3] = ["", " 1.0 "]
    release.reports["train"].clear()

    case = cases_of(release.write_tables())["train_2_a_1"]

    assert case.labels[:3] == (None, 1, 0)
    assert case.report is None


def test_rows_without_file_and_files_without_row(release):
    release.labels["train"].append(["train_9_a_1.nii.gz", *["0"] * 18])
    release.add("train_3_a_1", rows=False)

    dataset = read_ct_rate(release.write_tables(), label_set=CT_RATE_18)

    assert dataset.rows_without_file == ("train_9_a_1",)
    assert dataset.files_without_row == ("train_3_a_1",)
    case = next(case for case in dataset.cases if case.volume_id == "train_3_a_1")
    assert case.labels == (None,) * 18 and case.refusal is None


@pytest.mark.parametrize("value", ["2", "0.5", "nan", "yes", "-1"])
def test_a_label_that_is_no_label_refuses_its_volume(release, value):
    release.labels["train"][2][6] = value

    cases = cases_of(release.write_tables())

    for word in ("row 4", repr(LABEL_NAMES[5]), repr(value), "train_predicted_labels.csv"):
        assert word in cases["train_2_a_1"].refusal
    assert cases["valid_1_a_1"].refusal is None


def test_missing_duplicate_and_extra_columns(release):
    root = release.write_tables()
    path = root / "multi_abnormality_labels" / "train_predicted_labels.csv"

    write_csv(path, ["VolumeName", "Lung nodules", *LABEL_NAMES[1:]], [])
    with pytest.raises(LayoutError, match="'Medical material'"):
        read_ct_rate(root, label_set=CT_RATE_18)
    write_csv(path, ["VolumeName", *LABEL_NAMES, LABEL_NAMES[0]], [])
    with pytest.raises(LayoutError, match="appear twice"):
        read_ct_rate(root, label_set=CT_RATE_18)
    write_csv(path, ["VolumeName", *LABEL_NAMES, "Comment"], [])
    assert "['Comment']" in read_ct_rate(root, label_set=CT_RATE_18).remarks[0]


def test_no_chest_list_excludes(release):
    root = release.write_tables()
    (root / "metadata" / "no_chest_valid.txt").write_text("valid/valid_1/valid_1_a/valid_1_a_1.nii.gz\n")

    cases = cases_of(root)

    assert "no_chest_valid.txt" in cases["valid_1_a_1"].exclusion and cases["train_2_a_1"].exclusion is None


def test_first_reconstruction_skips_what_cannot_be_used(tmp_path):
    release = TinyRelease(tmp_path)
    for number in (10, 9, 2):
        release.add(f"train_1_a_{number}", rows=False)
    root = release.write_tables()
    (root / "metadata" / "no_chest_train.txt").write_text("train_1_a_2\n")

    cases = cases_of(root, reconstructions="first")

    assert [name for name, case in cases.items() if not case.exclusion] == ["train_1_a_9"]
    assert "train_1_a_9" in cases["train_1_a_10"].exclusion


def test_a_patient_in_both_splits_is_refused(release):
    release.add("valid_2_a_1", rows=False).rename(release.root / "valid_fixed" / "train_2_b_1.nii.gz")

    cases = cases_of(release.write_tables())

    assert "train and in the valid" in cases["train_2_a_1"].refusal
    assert "train and in the valid" in cases["train_2_b_1"].refusal
    assert cases["valid_1_a_1"].refusal is None


def test_one_volume_in_two_files_and_a_foreign_name(release):
    root = release.write_tables()
    volume = release.path_of("train_2_a_1")
    (volume.parent / "train_2_a_1.nii").write_bytes(b"")
    (volume.parent / "notes.nii.gz").write_bytes(b"")

    cases = cases_of(root)

    assert "train_2_a_1.nii and" in cases["train_2_a_1"].refusal
    assert "<split>_<patient>" in cases["notes"].refusal


def test_v1_takes_hu_and_spacing_from_the_metadata(tmp_path):
    release = TinyRelease(tmp_path, "v1")
    for name in ("train_1_a_1", "train_2_a_1", "train_3_a_1", "train_4_a_1"):
        release.add(name)
    rows = release.metadata["train"]
    rows[0][1:5] = ["1", "-8192", "[0.7, 0.8]", "1.5"]
    rows[1][4] = ""
    rows[2][3] = "0.7"
    del rows[3]

    cases = cases_of(release.write_tables())

    assert cases["train_1_a_1"].stored_values == (1.0, -8192.0)
    assert cases["train_1_a_1"].spacing_mm == (1.5, 0.8, 0.7)
    assert "row 3: ZSpacing is ''" in cases["train_2_a_1"].refusal
    assert "row 4: XYSpacing is '0.7'" in cases["train_3_a_1"].refusal
    assert "no row in metadata/train_metadata.csv" in cases["train_4_a_1"].refusal


def test_v1_without_metadata_and_an_absent_release(tmp_path):
    release = TinyRelease(tmp_path, "v1")
    release.add("train_1_a_1")
    root = release.write_tables()

    with pytest.raises(LayoutError, match="train_fixed"):
        read_ct_rate(root, label_set=CT_RATE_18, release="v2")
    (root / "metadata" / "train_metadata.csv").unlink()
    with pytest.raises(LayoutError, match=r"train_metadata\.csv: not found"):
        read_ct_rate(root, label_set=CT_RATE_18)


def test_v2_is_preferred_where_both_are_there(release):
    (release.root / "train").mkdir()

    assert read_ct_rate(release.write_tables(), label_set=CT_RATE_18).release == "v2"
    assert read_ct_rate(release.root, label_set=CT_RATE_18, release="v1").cases == ()


def test_another_label_set_is_mapped_or_read_from_its_own_table(release):
    label_set = load_label_set("vlm3d_18")
    root = release.write_tables()

    dataset = read_ct_rate(root, label_set=label_set)
    known = dict(zip(label_set.names, dataset.cases[2].labels, strict=True))
    # CT-RATE says nothing of fractures; no lung opacity means no ground-glass opacity.
    assert known["Fracture"] is None and known["Ground-glass opacity"] == 0 and known["Lung nodule"] == 0
    assert any("as vlm3d_18: 11 of 18 supported" in remark for remark in dataset.remarks)

    own = root / "multi_abnormality_labels_vlm3d_18" / "train_labels.csv"
    write_csv(own, ["VolumeName", *label_set.names], [["train_2_a_1", *["1"] * 18]])
    cases = {case.volume_id: case for case in read_ct_rate(root, label_set=label_set).cases}
    assert cases["train_2_a_1"].labels == (1,) * 18
