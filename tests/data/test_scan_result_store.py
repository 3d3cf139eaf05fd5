"""Which scans are done, and when they are not any more."""

import json

import pytest

from vlm3d_ext.data.atomic_files import write_json
from vlm3d_ext.data.report_store import ReportStore
from vlm3d_ext.data.result_store import ResultStoreError
from vlm3d_ext.data.scan_result_store import ScanResultStore

ORIGIN = {"multitask_sha256": "a" * 64, "dtype": "float32"}
RECORD = {"source": "a.nii.gz", "source_format": "nifti", "input_digest": "d1", "content_sha256": "c", "files": {}}


def case(folder, volume_id, source_format="nifti", input_digest="d1"):
    """A case of a manifest, with its sidecar."""
    path = folder / f"{volume_id}.json"
    write_json(path, {"source_format": source_format, "input_digest": input_digest, "content_sha256": "c"})
    return {"volume_id": volume_id, "geometry": str(path)}


def test_what_is_written_is_read(tmp_path):
    store = ScanResultStore(tmp_path / "scans", ORIGIN, {"dicom_sr": True})
    store.write("b", RECORD)
    store.write("a", RECORD)
    assert store.read("a") == {"volume_id": "a", **RECORD, "dicom_options": {"dicom_sr": True}}
    assert store.volume_ids() == ["a", "b"]
    assert json.loads((tmp_path / "scans" / "multitask.json").read_text()) == ORIGIN


def test_done_is_a_scan_of_the_same_files(tmp_path):
    """Not of the same voxels: a corrected header moves a scan, and leaves its voxels as they are."""
    store = ScanResultStore(tmp_path / "scans", ORIGIN)
    for volume_id in ("same", "changed", "unreferenced"):
        store.write(volume_id, RECORD)
    cases = [case(tmp_path, "same"), case(tmp_path, "changed", input_digest="d2"), case(tmp_path, "new")]
    assert [one["volume_id"] for one in store.pending(cases)] == ["changed", "new"]
    store.forget("same")
    assert [one["volume_id"] for one in store.pending(cases)] == ["same", "changed", "new"]
    store.forget("same")  # as it was
    assert store.volume_ids() == ["changed", "unreferenced"]


def test_other_dicom_options_concern_dicom_series_alone(tmp_path):
    first = ScanResultStore(tmp_path / "scans", ORIGIN, {"dicom_sr": False})
    for volume_id, source_format in (("n", "nifti"), ("d", "dicom"), ("p", "npz")):
        first.write(volume_id, {**RECORD, "source_format": source_format})
    cases = [case(tmp_path, "n"), case(tmp_path, "d", "dicom"), case(tmp_path, "p", "npz")]
    assert first.pending(cases) == []
    second = ScanResultStore(tmp_path / "scans", ORIGIN, {"dicom_sr": True})
    assert second.pending(cases) == [cases[1]]


def test_results_of_another_checkpoint_are_refused(tmp_path):
    ScanResultStore(tmp_path / "scans", ORIGIN)
    with pytest.raises(ResultStoreError, match=r"made with another multitask_sha256; choose another --output_dir"):
        ScanResultStore(tmp_path / "scans", {**ORIGIN, "multitask_sha256": "b" * 64})
    assert ScanResultStore(tmp_path / "scans").origin == ORIGIN


@pytest.mark.parametrize("content", ["", "[1, 2", "3"])
def test_a_damaged_record_is_named(tmp_path, content):
    store = ScanResultStore(tmp_path / "scans", ORIGIN)
    store.path("a").write_text(content)
    with pytest.raises(ResultStoreError, match=r"a\.json: no readable result .*; delete it and run again\."):
        store.pending([case(tmp_path, "a")])


def test_half_written_files_are_removed_where_results_are_and_nowhere_else(tmp_path):
    store = ScanResultStore(tmp_path / "scans", ORIGIN)
    reports = ReportStore(tmp_path / "report_generation", {})
    removed = ["scans", "pages", "dicom_seg", "dicom_sr", "report_generation", "report_generation/tables"]
    kept = [tmp_path / ".mine.partial", tmp_path / "other" / ".a.json.x.partial", tmp_path / "pages" / "a.partial"]
    for path in [*(tmp_path / name / ".a.json.k2.partial" for name in removed), *kept]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    store.remove_leftovers(reports)
    assert sorted(tmp_path.rglob("*.partial")) == sorted(kept)
    assert ReportStore(tmp_path / "report_generation").origin == {}
