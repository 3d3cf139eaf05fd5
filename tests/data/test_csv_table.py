import pytest

from vlm3d_ext.data.csv_table import CsvTableError, ScanTable, read_csv_table, volume_name


def table_of(tmp_path, text, required=("Name", "Value"), encoding="utf-8"):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(encoding))
    return read_csv_table(path, list(required))


def scan_table(tmp_path, text):
    def parse(number, row):
        if row["Value"] == "bad":
            raise ValueError(f"row {number} is bad")
        return row["Value"]

    return ScanTable(table_of(tmp_path, text), "Name", parse, scan_of=lambda name: name.rsplit("_", 1)[0])


@pytest.mark.parametrize(
    "text",
    ["train_1_a_1", "train_1_a_1.nii.gz", "  train_1_a_1.nii.gz ", "train/train_1/train_1_a/train_1_a_1.nii.gz\n"],
)
def test_volume_names(text):
    assert volume_name(text) == "train_1_a_1"


def test_byte_order_mark_spaces_and_quoted_lines(tmp_path):
    table = table_of(tmp_path, ' Name ,Value,More\r\n x , "a",1\r\n\r\ny,"two\nlines",2\r\n', encoding="utf-8-sig")

    assert table.columns == ("Name", "Value", "More")
    assert [number for number, _ in table.rows] == [2, 3]
    assert table.rows[1][1]["Value"] == "two\nlines"
    assert table.extra_columns(["Name", "Value"]) == ["More"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("Name,value\nx,1\n", r"'Value' \(nearest present: 'value'\)"),
        ("Name,Other\nx,1\n", r"missing column\(s\) 'Value' among 2"),
        ("Name,Value,Value\nx,1,2\n", r"\['Value'\] appear twice"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, text, message):
    with pytest.raises(CsvTableError, match=message) as caught:
        table_of(tmp_path, text)
    assert "\n" not in str(caught.value) and "table.csv" in str(caught.value)


def test_text_that_is_not_utf8(tmp_path):
    with pytest.raises(CsvTableError, match="UTF-8"):
        table_of(tmp_path, "Name,Value\nx,\xe9\n", encoding="latin-1")


def test_identical_rows_collapse_and_conflicting_rows_refuse(tmp_path):
    table = scan_table(tmp_path, "Name,Value\ns_1,1\nt_1,1\ns_1.nii.gz,1\nt_1,0\n")

    assert table.find("s_1").value == "1"
    assert table.find("s_1").notes == ("table.csv: row 2 is repeated in row(s) 4; counted once",)
    assert "rows 3 and 5" in table.find("t_1").refusal
    assert table.names == ("s_1", "t_1")


def test_a_bad_row_refuses_its_volume_only(tmp_path):
    table = scan_table(tmp_path, "Name,Value\ns_1,1\nt_1,bad\nu_1,1,surplus\n")

    assert table.find("s_1").refusal is None
    assert table.find("t_1").refusal == "row 3 is bad"
    assert table.find("u_1").refusal.endswith("row 4: 3 fields, expected 2 as in the header; correct the row.")


def test_reconstructions_share_a_row_and_must_agree(tmp_path):
    table = scan_table(tmp_path, "Name,Value\ns_1,1\nt_1,1\nt_2,0\nu,1\n")

    assert table.find("s_2").value == "1" and "row 2 of the same scan" in table.find("s_2").notes[0]
    assert "rows 3 and 4" in table.find("t_1").refusal and "rows 3 and 4" in table.find("t_2").refusal
    assert not table.find("v_1").found
