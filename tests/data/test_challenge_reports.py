import json

import pytest

from vlm3d_ext.data.challenge_reports import write_challenge_reports

VOLUMES = ["valid_1_a_1", "valid_2_a_1"]
REPORTS = ["Findings: Küçük nodül. Impression: Nodule.", "Findings: None. Impression: Normal."]


def test_the_file_is_the_challenges_word_for_word(tmp_path):
    path = tmp_path / "tables" / "challenge_reports.json"
    write_challenge_reports(path, VOLUMES, REPORTS)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "name": "Generated reports",
        "type": "Report generation",
        "generated_reports": [
            {"input_image_name": "valid_1_a_1.nii.gz", "report": "Findings: Küçük nodül. Impression: Nodule."},
            {"input_image_name": "valid_2_a_1.nii.gz", "report": "Findings: None. Impression: Normal."},
        ],
        "version": {"major": 1, "minor": 0},
    }


def test_another_extension(tmp_path):
    write_challenge_reports(tmp_path / "x.json", VOLUMES, REPORTS, extension=".mha")
    names = [entry["input_image_name"] for entry in json.loads((tmp_path / "x.json").read_text())["generated_reports"]]
    assert names == ["valid_1_a_1.mha", "valid_2_a_1.mha"]


@pytest.mark.parametrize(
    ("volumes", "reports", "problem"),
    [
        (VOLUMES, REPORTS[:1], r"x\.json: 2 volumes have 1 reports, expected one for each"),
        ([*VOLUMES, "valid_1_a_1"], [*REPORTS, "again"], r"x\.json: .* but \['valid_1_a_1'\] are there twice"),
    ],
)
def test_nothing_is_written_of_what_does_not_fit(tmp_path, volumes, reports, problem):
    with pytest.raises(ValueError, match=problem):
        write_challenge_reports(tmp_path / "x.json", volumes, reports)
    assert not list(tmp_path.iterdir())
