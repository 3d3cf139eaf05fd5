"""What is made of a scan's stored results: where findings are, what lies in which axes, what is said of the rest."""

import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from ignite.engine import Engine

from data_prep.scan_intake import ScanIntake
from tests.bundles.handed_in_scans import write_identified_dicom, write_turned
from tests.data.identified_series import identifiers_in
from tests.data_prep.chest_scans import GEOMETRY, PREPARATION, chest
from tests.data_prep.tiny_release import write_volume
from vlm3d_ext.data.anatomical_regions import region_by_name
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.dicom_segmentation import read_dicom_segmentation
from vlm3d_ext.data.localization_store import LocalizationStore
from vlm3d_ext.data.prediction_store import PredictionStore
from vlm3d_ext.data.prepared_case import read_sidecar
from vlm3d_ext.data.report_store import ReportStore
from vlm3d_ext.data.scan_result_store import ScanResultStore
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.engines.report_tables import report_entry
from vlm3d_ext.handlers import ScanResultWriter, scan_result_writer
from vlm3d_ext.text.disease_set import load_disease_set
from vlm3d_ext.text.finding_extractor import FindingExtractor
from vlm3d_ext.text.label_set import load_label_set

LABEL_SET, DISEASE_SET = load_label_set("ct_rate_18"), load_disease_set()
ORIGIN = {"multitask_sha256": "a" * 64}
REPORT = "Findings: A nodule <b>is</b> seen. Impression: Nodule."
PREPARED_SHAPE = tuple(PREPARATION["spatial_size"])


class Case:
    """A scan that was taken in, with stores that a test fills, and a writer over them."""

    def __init__(self, folder, scan, **options):
        intake = ScanIntake(scan, folder / "out", PREPARATION)
        self.manifest = CaseManifest(intake.run())
        (case,) = self.manifest.cases("test")
        self.output, self.volume_id, self.sidecar = folder / "out", case["volume_id"], Path(case["geometry"])
        content = read_sidecar(self.sidecar)
        self.source = VolumeGeometry.from_dict(content["source_geometry"])
        self.prepared = VolumeGeometry.from_dict(content["prepared_geometry"])
        torch.save({"lineage": {"bundle": "multitask", "version": "0.5.0"}}, folder / "model.pt")
        self.predictions = PredictionStore(self.output / "classification", ORIGIN)
        self.localizations = LocalizationStore(self.output / "localization", ORIGIN)
        self.reports = ReportStore(self.output / "report_generation", ORIGIN)
        self.scans = ScanResultStore(self.output / "scans", ORIGIN)
        self.writer = ScanResultWriter(
            self.scans, self.predictions, self.localizations, self.reports, self.manifest, LABEL_SET, DISEASE_SET,
            folder / "model.pt", **options,
        )  # fmt: skip

    def fill(self, probabilities=None, report=REPORT):
        """Fill the stores; `probabilities` are of diseases, on the scan's own grid."""
        names = LABEL_SET.names
        values = np.linspace(0.1, 0.9, len(names))
        self.predictions.write(
            self.volume_id, names, values, [0.5] * len(names), [int(v >= 0.5) for v in values], [True] * len(names)
        )
        empty = {key: np.zeros(self.source.shape, dtype=np.float32) for key in DISEASE_SET.keys}
        drawn = {**empty, **(probabilities or {})}
        self.localizations.write(self.volume_id, drawn, dict.fromkeys(drawn, 0.5), self.source)
        entry = report_entry(self.volume_id, report, FindingExtractor(LABEL_SET), "a" * 64, {"finished": True})
        self.reports.write(self.volume_id, entry)
        return self

    def write(self, regions=None):
        """Write what there is; returns the record."""
        regions = np.zeros(PREPARED_SHAPE, dtype=np.uint8) if regions is None else regions
        self.writer.write(self.volume_id, self.sidecar, regions)
        return self.scans.read(self.volume_id)


@pytest.fixture
def shown(monkeypatch):
    """Contents of the pages that were written."""
    contents, write = [], scan_result_writer.write_scan_page

    def keep(path, content):
        contents.append(content)
        write(path, content)

    monkeypatch.setattr(scan_result_writer, "write_scan_page", keep)
    return contents


@pytest.fixture
def turned(tmp_path):
    """A chest that lies obliquely and is stored posterior, inferior, right."""
    write_turned(tmp_path / "turned.nii.gz", chest(1))
    return Case(tmp_path, tmp_path / "turned.nii.gz")


def places(content):
    return {entry["name"]: (entry["position_of"], entry["position_mm"]) for entry in content.findings}


def two_effusions(case):
    """Of pleural effusion a small probable lesion and a large faint one; returns the large one's voxels (k, j, i)."""
    probabilities = np.zeros(case.source.shape, dtype=np.float32)
    probabilities[2, 3, 4] = 0.99
    large = (slice(10, 14), slice(20, 22), slice(7, 10))
    probabilities[large] = 0.6
    return {"pleural_effusion": probabilities}, large


def test_a_finding_points_to_its_largest_lesion(turned, shown):
    drawn, _ = two_effusions(turned)
    turned.fill(drawn).write()
    # by hand: the middle of the block in the file's own (k, j, i), through the file's own affine
    i, j, k = 8.0, 20.5, 11.5
    affine = turned.source.affine_lps
    expected = affine[:3, 3] + i * affine[:3, 0] + j * affine[:3, 1] + k * affine[:3, 2]
    assert turned.source.axis_codes == "PIR" and np.count_nonzero(affine[:3, :3]) == 8, "no axis is the patient's"
    kind, position = places(shown[0])["Pleural effusion"]
    assert kind == "lesion" and position == pytest.approx(expected.tolist(), abs=1e-3)
    assert shown[0].lesions["pleural_effusion"][0]["num_voxels"] == 1, "the table lists the most probable first"


def test_a_finding_without_a_lesion_points_into_its_region(turned, shown):
    """Regions are the network's, on the prepared grid; what fills up a batch beyond it is none."""
    regions = np.zeros((PREPARED_SHAPE[0] + 2, PREPARED_SHAPE[1], PREPARED_SHAPE[2] + 3), dtype=np.uint8)
    heart = region_by_name("heart").index
    regions[5, 6, 9] = heart
    regions[-2:] = heart
    turned.fill().write(regions)
    expected = turned.prepared.positions_lps(np.array([[5, 6, 9]]))[0]
    assert turned.prepared.axis_codes == "LPS" and not np.allclose(turned.prepared.directions, np.eye(3), atol=0.05)
    found = places(shown[0])
    kind, position = found["Cardiomegaly"]
    assert kind == "region" and position == pytest.approx(expected.tolist())
    # a drawn disease without any lesion, like a finding that is never drawn
    regions_of = {finding.name: finding.regions for finding in LABEL_SET.findings}
    for name, (kind, _) in found.items():
        assert kind == ("region" if "heart" in regions_of[name] else None), name


def test_each_finding_knows_its_disease(turned, shown):
    turned.fill().write()
    diseases = {entry["name"]: entry["disease"] for entry in shown[0].findings if entry["disease"]}
    drawn = {disease.name: disease.key for disease in DISEASE_SET.diseases}
    assert diseases == {name: key for name, key in drawn.items() if name in LABEL_SET.names} and len(diseases) >= 4


def test_the_page_shows_scan_and_masks_in_the_patients_axes(turned, shown):
    drawn, large = two_effusions(turned)
    turned.fill(drawn).write()
    content = shown[0]
    np.testing.assert_array_equal(content.hu, chest(1))
    assert content.geometry.axis_codes == "LPS"
    voxels = np.argwhere(content.masks["pleural_effusion"])
    positions = content.geometry.positions_lps(voxels)
    stored = np.zeros(turned.source.shape, dtype=bool)
    stored[large] = stored[2, 3, 4] = True
    expected = turned.source.positions_lps(np.argwhere(stored))
    np.testing.assert_allclose(
        positions[np.lexsort(positions.T.round(2))], expected[np.lexsort(expected.T.round(2))], atol=1e-3
    )
    page = (turned.output / "pages" / "turned.html").read_text()
    assert "<b>is</b>" not in page and "&lt;b&gt;is&lt;/b&gt;" in page


def test_the_record_says_what_the_scan_was(turned):
    record = turned.fill().write()
    sidecar = json.loads(turned.sidecar.read_text())
    assert record["volume_id"] == "turned" and record["source"] == "turned.nii.gz"
    for key in ("source_format", "input_digest", "content_sha256"):
        assert record[key] == sidecar[key]
    assert all((turned.output / name).is_file() for name in record["files"].values())
    assert turned.scans.pending(turned.manifest.cases("test")) == []


def test_a_series_gets_its_masks_in_its_own_order(tmp_path):
    """Slices from the head down, columns towards the right: k grows along the normal, wherever that points."""
    orientation = [-1, 0, 0, 0, 1, 0]
    write_identified_dicom(tmp_path / "s", chest(1), ImageOrientationPatient=orientation)
    case = Case(tmp_path, tmp_path / "s", dicom_sr=True)
    assert case.source.axis_codes == "RPI"
    drawn, large = two_effusions(case)
    record = case.fill(drawn).write()
    assert {"dicom_seg", "dicom_sr"} < set(record["files"]) and record["notes"] == []
    (mask,) = read_dicom_segmentation(case.output / record["files"]["dicom_seg"]).values()
    np.testing.assert_array_equal(mask, drawn["pleural_effusion"] >= 0.5)
    dataset = pydicom.dcmread(case.output / record["files"]["dicom_seg"])
    frames = dataset.PerFrameFunctionalGroupsSequence
    heights = [float(groups.PlanePositionSequence[0].ImagePositionPatient[2]) for groups in frames]
    # k = 2 and 10 to 13 from the highest slice (295 mm) down
    assert sorted(heights, reverse=True) == [295 - 5 * k for k in (2, 10, 11, 12, 13)]
    assert large[0] == slice(10, 14)


def test_what_there_is_no_dicom_object_of_is_noted(tmp_path):
    write_identified_dicom(tmp_path / "s", chest(1))
    case = Case(tmp_path, tmp_path / "s", dicom_sr=True)
    record = case.fill(report="").write()
    assert record["notes"] == ["no DICOM SEG: nothing was drawn", "no DICOM SR: the report has no section"]
    assert "dicom_seg" not in record["files"] and not list(case.output.glob("dicom_s*/*.dcm"))
    page = (case.output / "pages" / "s.html").read_text()
    assert "nothing was drawn" in page


@pytest.mark.parametrize("missing", ["StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"])
def test_a_series_that_cannot_be_referred_to_has_everything_else(tmp_path, missing):
    write_identified_dicom(tmp_path / "s", chest(1), **{missing: None})
    case = Case(tmp_path, tmp_path / "s", dicom_sr=True)
    drawn, _ = two_effusions(case)
    record = case.fill(drawn).write()
    (note,) = record["notes"]
    assert note.startswith("no DICOM objects: ") and f"has no {missing}, expected all UIDs" in note
    assert identifiers_in(json.dumps(record).encode()) == []
    assert not list(case.output.glob("dicom_s*/*.dcm"))
    assert all((case.output / name).is_file() for name in record["files"].values())
    assert f"has no {missing}" in (case.output / "pages" / "s.html").read_text()


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_a_scan_that_goes_while_it_is_worked_on_stops_nothing(tmp_path, shown, kind):
    scan = tmp_path / "scans" / "s"
    if kind == "dicom":
        write_identified_dicom(scan, chest(1))
    else:
        scan = write_volume(tmp_path / "scans" / "s.nii.gz", chest(1), GEOMETRY)
    case = Case(tmp_path, scan).fill()
    shutil.rmtree(tmp_path / "scans")
    record = case.write()
    assert any("the scan cannot be read any more" in note for note in shown[0].notes)
    assert [note.split(":")[0] for note in record["notes"]] == (["no DICOM objects"] if kind == "dicom" else [])


def test_what_was_is_forgotten_before_anything_is_replaced(turned):
    """A run that is killed between two files must not leave a record that speaks for both."""
    record = turned.fill().write()
    for kind in ("dicom_seg", "dicom_sr"):  # of an earlier scan of that name, which was DICOM
        (turned.output / kind).mkdir()
        (turned.output / kind / "turned.dcm").write_bytes(b"old")
    seen = {}

    def network(engine, batch):
        left = [*turned.output.glob("dicom_s*/*"), *turned.output.glob("pages/*"), turned.scans.path("turned")]
        seen["while working"] = [path.name for path in left if path.exists()]
        regions = torch.zeros(1, *PREPARED_SHAPE, dtype=torch.uint8)
        return {"pred": {"evidence": {"regions": regions}}}

    engine = Engine(network)
    turned.writer.attach(engine)
    engine.run([{"volume_id": ["turned"], "geometry": [str(turned.sidecar)]}])
    assert seen == {"while working": []}
    assert turned.scans.read("turned") == record and not list(turned.output.glob("dicom_s*/*"))
    assert (turned.output / record["files"]["page"]).is_file()
