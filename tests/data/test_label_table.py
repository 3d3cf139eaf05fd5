import csv
import math
from pathlib import Path

import numpy as np
import pytest

from vlm3d_ext.data.csv_table import CsvTableError
from vlm3d_ext.data.label_table import label_set_of_columns, read_label_csv
from vlm3d_ext.text.label_set import load_label_set
from vlm3d_ext.text.prompt_label_set import label_set_of_prompts

CT_RATE = load_label_set("ct_rate_18").names
REAL = Path(__file__).parents[3] / "shared/data/ctrate"


def write_labels(folder, rows, columns=CT_RATE, id_column="VolumeName"):
    path = folder / "labels.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[id_column, *columns], *rows])
    return path


def cells(num=18, **by_index):
    return [by_index.get(f"at_{index}", "0") for index in range(num)]


@pytest.mark.parametrize("id_column", ["VolumeName", "volume_id", "scan_id", "AccessionNo"])
@pytest.mark.parametrize(("written", "name"), [("train_1_a_1.nii.gz", "train_1_a_1"), (" train_1_a ", "train_1_a")])
def test_ids_of_volumes_and_scans(tmp_path, id_column, written, name):
    table = read_label_csv(write_labels(tmp_path, [[written, *cells()]], id_column=id_column), "ct_rate_18")
    assert table.labels == {name: (0.0,) * 18} and table.remarks == ()
    assert table.label_set_of_file.name == "ct_rate_18"


def test_cells_are_one_zero_or_unknown_in_the_order_of_the_set(tmp_path):
    columns = [*reversed(CT_RATE), "Comment"]
    row = ["train_1_a_1", *cells(at_17="1", at_16="", at_15=" 1.0 ", at_14="0.0"), "text"]
    table = read_label_csv(write_labels(tmp_path, [row], columns), "ct_rate_18")
    labels = table.labels["train_1_a_1"]
    assert labels[0] == 1 and math.isnan(labels[1]) and labels[2:4] == (1.0, 0.0) and labels[4:] == (0.0,) * 14
    assert len(table.remarks) == 1 and "['Comment'] are not used" in table.remarks[0]


def test_columns_of_another_shipped_set_are_mapped(tmp_path):
    opacity, arterial = CT_RATE.index("Lung opacity"), CT_RATE.index("Arterial wall calcification")
    rows = [["a", *cells(**{f"at_{opacity}": "1", f"at_{arterial}": "1"})], ["b", *cells()]]
    table = read_label_csv(write_labels(tmp_path, rows), "vlm3d_18")
    names = load_label_set("vlm3d_18").names
    first, second = (dict(zip(names, table.labels[name], strict=True)) for name in "ab")
    assert table.label_set_of_file.name == "ct_rate_18" and "11 of 18 supported" in table.mapping
    assert math.isnan(first["Ground-glass opacity"]) and second["Ground-glass opacity"] == 0
    assert (first["Calcification"], second["Calcification"], second["Lung nodule"]) == (1, 0, 0)
    assert math.isnan(first["Mass"]) and math.isnan(second["Mass"])


def test_the_wanted_set_comes_before_another_that_fits_too(tmp_path):
    union = load_label_set("ct_rate_18+vlm3d_18").names
    path = write_labels(tmp_path, [["a", *cells(28, at_27="1")]], union)
    assert read_label_csv(path, "vlm3d_18").label_set_of_file.name == "vlm3d_18"
    whole = read_label_csv(path, "ct_rate_18+vlm3d_18")
    assert whole.label_set_of_file.name == "ct_rate_18+vlm3d_18" and whole.labels["a"] == (0.0,) * 27 + (1.0,)
    # No column is called like these, but their keys are CT-RATE's both, RAD-ChestCT's only one, the source's none.
    prompted = label_set_of_prompts({"bronchiectasis": "x", "Mosaic-attenuation pattern": "y"})
    assert label_set_of_columns(union, prompted, "x").name == "ct_rate_18"


def test_identical_rows_collapse_and_conflicting_rows_are_refused(tmp_path):
    rows = [["a", *cells(at_2="")], ["b", *cells()], ["a.nii.gz", *cells(at_2="")], ["b", *cells()]]
    table = read_label_csv(write_labels(tmp_path, rows), "ct_rate_18")
    assert list(table.labels) == ["a", "b"]
    assert "row 2 is repeated in row(s) 4" in table.remarks[0] and "1 more ids" in table.remarks[0]
    rows[2][1] = "1"
    with pytest.raises(CsvTableError, match=r"labels\.csv: rows 2 and 4 both describe a and disagree"):
        read_label_csv(write_labels(tmp_path, rows), "ct_rate_18")


@pytest.mark.parametrize(
    ("columns", "wanted", "problem"),
    [
        (
            [*CT_RATE[:9], "lung nodules", *CT_RATE[10:]],
            "ct_rate_18",
            r"'Lung nodule' \(nearest present: 'lung nodules'",
        ),
        # One column short of CT-RATE's set, which the user meant, and many short of the set that is wanted.
        (CT_RATE[:-1], "vlm3d_18", r"for labels of 'vlm3d_18'.*'ct_rate_18': 1 of 18 are missing: 'Interlobular"),
        (["Mass"], "ct_rate_18", "1[0-9] of 1[0-9] are missing"),
    ],
)
def test_columns_that_fit_no_set(tmp_path, columns, wanted, problem):
    path = write_labels(tmp_path, [["a", *cells(len(columns))]], columns)
    with pytest.raises(CsvTableError, match=problem) as caught:
        read_label_csv(path, wanted)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([["a", *cells(at_4="2")]], "row 2: 'Coronary artery wall calcification' is '2', expected 0, 1 or empty"),
        ([["a", *cells()], ["b", *cells(at_0="nan")]], "row 3: 'Medical material' is 'nan'"),
        ([["a", *cells()], ["b", *cells()[:-1]]], "row 3: 18 fields, expected 19"),
        ([["", *cells()]], "row 2: 'VolumeName' is empty"),
        ([], "has a header and no rows"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, rows, problem):
    with pytest.raises(CsvTableError, match=problem) as caught:
        read_label_csv(write_labels(tmp_path, rows), "ct_rate_18")
    assert "labels.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_no_column_of_ids_and_no_file(tmp_path):
    path = write_labels(tmp_path, [["a", *cells()]], id_column="image")
    with pytest.raises(CsvTableError, match=r"expected one of \['VolumeName', .*'AccessionNo'\].*\['image', 'Medical"):
        read_label_csv(path, "ct_rate_18")
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        read_label_csv(tmp_path / "none.csv", "ct_rate_18")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real CT-RATE tables are not beside the repository")
def test_the_real_ct_rate_rows_load_and_what_the_mapping_does_not_know_is_nan():
    path = REAL / "text_classifier_val_labels.head120.csv"
    own, mapped = read_label_csv(path, "ct_rate_18"), read_label_csv(path, "vlm3d_18")
    assert len(own.labels) == 120 and set(own.labels) == {f"val_{number}" for number in range(1, 121)}
    values = dict(zip(CT_RATE, np.array(list(own.labels.values())).T, strict=True))
    # The release's own prevalences on its validation part, same order, to within sampling error of 120 rows.
    released = [
        0.103,
        0.285,
        0.107,
        0.074,
        0.252,
        0.137,
        0.260,
        0.197,
        0.235,
        0.448,
        0.390,
        0.273,
        0.124,
        0.083,
        0.117,
        0.191,
        0.109,
        0.082,
    ]
    assert np.abs([values[name].mean() - share for name, share in zip(CT_RATE, released, strict=True)]).max() < 0.15
    assert not any(np.isnan(column).any() for column in values.values())
    known = dict(zip(load_label_set("vlm3d_18").names, np.array(list(mapped.labels.values())).T, strict=True))
    unknown = {name for name, column in known.items() if np.isnan(column).all()}
    assert unknown == {
        "Mass", "Pneumonia", "Pulmonary edema", "Pneumothorax", "Mediastinal widening", "Pleural thickening", "Fracture"
    }  # fmt: skip
    either = np.maximum(values["Arterial wall calcification"], values["Coronary artery wall calcification"])
    np.testing.assert_array_equal(known["Calcification"], either)
    opacity = values["Lung opacity"] == 1
    assert np.isnan(known["Ground-glass opacity"][opacity]).all() and not known["Ground-glass opacity"][~opacity].any()
