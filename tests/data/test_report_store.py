import json

import pytest

from vlm3d_ext.data.report_store import ReportStore
from vlm3d_ext.data.result_store import ResultStoreError

ORIGIN = {"report_generation_sha256": "a" * 64, "fingerprint": "f", "generation": {"do_sample": False}}
VOLUME = "valid_1_a_1"


def make_report(volume_id=VOLUME, text="Findings: Küçük nodule. Impression: Nodule."):
    return {
        "report_id": f"{volume_id}-aaaaaaaaaaaa",
        "volume_id": volume_id,
        "report_text": text,
        "findings_list": [{"key": "lung_nodule", "status": "present", "sizes_mm": [7.0]}],
        "diseases_mentioned": ["Lung nodule"],
        "report_length": len(text.split()),
        "sections": {"findings": "Küçük nodule.", "impression": "Nodule.", "recommendations": ""},
        "metadata": {"finished": True},
    }


def test_reports_come_back_as_json_and_as_text(tmp_path):
    store = ReportStore(tmp_path, ORIGIN)
    for volume_id in ("valid_2_a_1", VOLUME):
        store.write(volume_id, make_report(volume_id))
    again = ReportStore(tmp_path)
    assert again.origin == ORIGIN
    assert again.volume_ids() == [VOLUME, "valid_2_a_1"]
    assert again.read(VOLUME) == make_report()
    assert again.text_path(VOLUME).read_text(encoding="utf-8") == "Findings: Küçük nodule. Impression: Nodule.\n"
    # tables of a run are in a folder below and are no volumes
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "challenge_reports.json").write_text("{}")
    assert again.volume_ids() == [VOLUME, "valid_2_a_1"]


def test_the_json_is_written_last(tmp_path, monkeypatch):
    store = ReportStore(tmp_path, ORIGIN)
    case = {"volume_id": VOLUME}
    store.write(VOLUME, make_report())
    assert store.pending([case]) == []
    store.path(VOLUME).unlink()  # what is there when a run is stopped before the last file
    assert store.text_path(VOLUME).is_file()
    assert store.pending([case]) == [case] and store.volume_ids() == []

    store.write(VOLUME, make_report())
    seen = []

    def disk_full(*_):
        seen.append(store.text_path(VOLUME).read_text())
        raise OSError("disk full")

    monkeypatch.setattr("vlm3d_ext.data.report_store.write_json", disk_full)
    with pytest.raises(OSError, match="disk full"):
        store.write(VOLUME, make_report(text="Findings: Another."))
    assert seen == ["Findings: Another.\n"]
    # the old JSON would say of the new text what it does not say
    assert store.pending([case]) == [case]


@pytest.mark.parametrize("change", [{"metadata": None}, {"extra": 1}])
def test_a_report_has_its_entries_and_no_others(tmp_path, change):
    store = ReportStore(tmp_path, ORIGIN)
    store.write(VOLUME, make_report())
    report = {**make_report(), **change}
    if "metadata" in change:
        del report["metadata"]
    with pytest.raises(ValueError, match=r"valid_1_a_1\.json: a report has the entries .*'metadata'\), got \["):
        store.write(VOLUME, report)
    assert store.read(VOLUME) == make_report()  # what was there is left alone


def test_reports_of_another_origin_are_refused(tmp_path):
    ReportStore(tmp_path, ORIGIN)
    other = {**ORIGIN, "generation": {"do_sample": True}}
    with pytest.raises(ResultStoreError, match=r"report_generation\.json: the reports there .* another generation;"):
        ReportStore(tmp_path, other)
    with pytest.raises(ResultStoreError, match=r"make reports first with the report_generation bundle's inference"):
        ReportStore(tmp_path / "absent")


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "3", json.dumps({"report_text": "Findings: x."})])
def test_missing_and_damaged_reports_are_named(tmp_path, content):
    store = ReportStore(tmp_path, ORIGIN)
    if content is not None:
        store.path(VOLUME).write_text(content)
    with pytest.raises(
        ResultStoreError, match=r"valid_1_a_1\.json: no readable report \(.*\); delete it and run again"
    ):
        store.read(VOLUME)
