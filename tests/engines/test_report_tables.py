import csv
import json

import pytest

from tests.engines.reported_cases import CASE_IDS, EXTRACTOR, GENERATED, REFERENCES
from vlm3d_ext.data.report_store import ReportStore
from vlm3d_ext.data.result_store import ResultStoreError
from vlm3d_ext.engines.report_tables import NOT_FOR_CLINICAL_USE, report_entry, write_report_tables

SHA256 = "0123456789abcdef" * 4


def make_store(folder):
    store = ReportStore(folder, {"fingerprint": "f"})
    for number, (volume_id, text) in reversed(list(enumerate(zip(CASE_IDS, GENERATED, strict=True)))):
        store.write(volume_id, report_entry(volume_id, text, EXTRACTOR, SHA256, {"finished": number != 2}))
    return store


def test_an_entry_says_what_the_text_says():
    entry = report_entry("valid_1_a_1", REFERENCES[0], EXTRACTOR, SHA256, {"finished": True, "num_tokens": 40})
    assert entry["report_id"] == "valid_1_a_1-0123456789ab" and entry["volume_id"] == "valid_1_a_1"
    assert entry["report_text"] == REFERENCES[0] and entry["report_length"] == len(REFERENCES[0].split())
    assert entry["diseases_mentioned"] == ["Lung nodule", "Pleural effusion"]
    assert entry["findings_list"][0] == {
        "key": "lung_nodule",
        "status": "present",
        "sides": ["right"],
        "regions": ["right_upper_lobe"],
        "sizes_mm": [7.0],
        "sentence": "There is a 7 mm nodule in the right upper lobe.",
    }
    assert entry["sections"] == {
        "findings": "There is a 7 mm nodule in the right upper lobe. Small left pleural effusion.",
        "impression": "Lung nodule.",
        "recommendations": "",
    }
    assert entry["metadata"] == {"finished": True, "num_tokens": 40, "notice": NOT_FOR_CLINICAL_USE}
    assert json.loads(json.dumps(entry)) == entry


def test_what_is_denied_is_listed_but_not_as_a_disease():
    entry = report_entry("valid_2_b_1", REFERENCES[2], EXTRACTOR, SHA256, {})
    assert entry["diseases_mentioned"] == []
    listed = {finding["key"]: finding["status"] for finding in entry["findings_list"]}
    assert listed == {"pleural_effusion": "absent", "cardiomegaly": "absent"}


def test_an_empty_text_is_an_entry_too(tmp_path):
    entry = report_entry("valid_1_a_1", "", EXTRACTOR, SHA256, {})
    assert entry["findings_list"] == entry["diseases_mentioned"] == [] and entry["report_length"] == 0
    ReportStore(tmp_path, {}).write("valid_1_a_1", entry)


def test_tables_hold_all_reports_of_a_store(tmp_path):
    store = make_store(tmp_path)
    write_report_tables(store)
    with open(tmp_path / "tables" / "reports.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["VolumeName"] for row in rows] == CASE_IDS
    assert rows[1] == {
        "VolumeName": "valid_2_a_1",
        "Findings_EN": "Right pleural effusion. Emphysema in both lungs.",
        "Impressions_EN": "Pleural effusion.",
        "diseases_mentioned": "Emphysema; Pleural effusion",
        "finished": "True",
    }
    assert [row["finished"] for row in rows] == ["True", "True", "False", "True"]
    challenge = json.loads((tmp_path / "tables" / "challenge_reports.json").read_text(encoding="utf-8"))
    assert challenge["generated_reports"] == [
        {"input_image_name": f"{volume_id}.nii.gz", "report": text}
        for volume_id, text in zip(CASE_IDS, GENERATED, strict=True)
    ]


def test_nothing_is_written_of_an_empty_or_a_damaged_store(tmp_path):
    write_report_tables(ReportStore(tmp_path / "empty", {}))
    assert not (tmp_path / "empty" / "tables").exists()
    store = make_store(tmp_path / "damaged")
    store.path(CASE_IDS[1]).write_text("{")
    with pytest.raises(ResultStoreError, match=r"valid_2_a_1\.json: no readable report"):
        write_report_tables(store)
    assert not (tmp_path / "damaged" / "tables").exists()
