"""Structured reports: what the tree says, what it refers to, and what must not be in the file."""

import datetime
from pathlib import Path

import highdicom as hd
import pydicom
import pytest

from tests.data.identified_series import (
    IDENTIFIERS,
    SERIES,
    SHAPE,
    STUDY,
    identifiers_in,
    slice_uid,
    validation_errors,
    write_series,
)
from vlm3d_ext.data.dicom_report import NOT_FOR_CLINICAL_USE, write_dicom_report
from vlm3d_ext.data.dicom_series import dicom_series_files
from vlm3d_ext.data.scan import UnusableScanError

CREATED = datetime.datetime(2031, 5, 6, 7, 8, 9)
SECTIONS = {
    "findings": "A nodule of 6 × 5 mm in the right upper lobe.\nNo pleural effusion.",
    "impression": "Nodule; cannot exclude “early” malignancy.",
    "recommendations": "CT in 12 months.",
}
REPORT = {"report_id": "x", "sections": SECTIONS}
FINDINGS = {
    "Lung nodule": {"probability": 0.8125, "threshold": 0.4, "prediction": 1, "trained": True},
    "Mass": {"probability": 0.125, "threshold": 0.5, "prediction": 0, "trained": False},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_series(tmp_path / "series", "oblique")


def write(path: Path, folder: Path, report=REPORT, findings=None, version="0.9.1", copy=False, created=CREATED):
    files = dicom_series_files(folder)
    return write_dicom_report(
        path, files, report, findings, algorithm_version=version, copy_patient_module=copy, created=created
    )


def chapters_of(dataset):
    """Code and texts of each chapter, in order."""
    containers = [item for item in dataset.ContentSequence if item.ValueType == "CONTAINER"]
    return [
        (
            container.ConceptNameCodeSequence[0].CodeValue,
            [(item.ConceptNameCodeSequence[0].CodeValue, item.TextValue) for item in container.ContentSequence],
        )
        for container in containers
    ]


def test_the_sections_are_texts_below_their_headings(tmp_path, folder):
    assert write(tmp_path / "sr.dcm", folder, findings=FINDINGS) == tmp_path / "sr.dcm"
    dataset = pydicom.dcmread(tmp_path / "sr.dcm")
    assert chapters_of(dataset) == [
        ("121070", [("121071", SECTIONS["findings"])]),
        ("121072", [("121073", SECTIONS["impression"])]),
        ("121074", [("121075", SECTIONS["recommendations"])]),
        (
            "121111",
            [
                ("121071", "Lung nodule: predicted (probability 0.812, threshold 0.400)"),
                (
                    "121071",
                    "Mass: not predicted (probability 0.125, threshold 0.500; "
                    "scored by its prompt alone, never trained)",
                ),
            ],
        ),
    ]
    assert dataset.ConceptNameCodeSequence[0].CodeValue == "24627-2"
    assert dataset.ContentTemplateSequence[0].TemplateIdentifier == "2000"


def test_it_says_that_a_device_wrote_it_and_nobody_verified_it(tmp_path, folder):
    write(tmp_path / "sr.dcm", folder)
    dataset = pydicom.dcmread(tmp_path / "sr.dcm")
    assert (dataset.CompletionFlag, dataset.VerificationFlag) == ("PARTIAL", "UNVERIFIED")
    assert dataset.PreliminaryFlag == "PRELIMINARY" and "VerifyingObserverSequence" not in dataset
    by_code = {item.ConceptNameCodeSequence[0].CodeValue: item for item in dataset.ContentSequence}
    assert by_code["121049"].ConceptCodeSequence[0].CodeValue == "en"
    assert by_code["121005"].ConceptCodeSequence[0].CodeMeaning == "Device"
    assert by_code["121013"].TextValue == "VLM3D" and by_code["121015"].TextValue == "VLM3D 0.9.1"
    assert by_code["121106"].TextValue == NOT_FOR_CLINICAL_USE and "not for clinical use" in NOT_FOR_CLINICAL_USE
    assert dataset.SoftwareVersions == "0.9.1"


def test_the_slices_of_the_series_are_its_evidence(tmp_path, folder):
    write(tmp_path / "sr.dcm", folder)
    document = hd.sr.srread(tmp_path / "sr.dcm")
    assert [(str(study), str(series), str(uid)) for study, series, uid, _ in document.get_evidence()] == [
        (STUDY, SERIES, slice_uid(k)) for k in range(SHAPE[0])
    ]
    assert document.StudyInstanceUID == STUDY and document.SeriesInstanceUID != SERIES


def test_empty_sections_are_left_out(tmp_path, folder):
    write(tmp_path / "sr.dcm", folder, {"sections": {"findings": "", "impression": "No\x0bnodule.\x00 ", "other": "x"}})
    dataset = pydicom.dcmread(tmp_path / "sr.dcm")
    assert chapters_of(dataset) == [("121072", [("121073", "No nodule.")])]


@pytest.mark.parametrize("report", [{"sections": {"findings": " \n"}}, {"sections": {}}])
def test_a_report_without_a_text_is_refused(tmp_path, folder, report):
    with pytest.raises(ValueError, match="has no text in findings, impression, recommendations"):
        write(tmp_path / "sr.dcm", folder, report)
    assert not (tmp_path / "sr.dcm").exists()


def test_what_is_no_report_or_no_finding_is_refused(tmp_path, folder):
    path = tmp_path / "sr.dcm"
    with pytest.raises(ValueError, match=r"has the keys \['report_text'\], expected 'sections'"):
        write(path, folder, {"report_text": "x"})
    with pytest.raises(ValueError, match="'Mass' has no threshold"):
        write(path, folder, findings={"Mass": {"probability": 0.5, "prediction": 1}})
    with pytest.raises(ValueError, match=r"'Mass' has probability 1\.5"):
        write(path, folder, findings={"Mass": {"probability": 1.5, "threshold": 0.5, "prediction": 1}})
    with pytest.raises(ValueError, match="algorithm_version"):
        write(path, folder, version="")
    with pytest.raises(UnusableScanError, match="no slices given"):
        write_dicom_report(path, [], REPORT, algorithm_version="1")
    assert not path.exists()


def test_no_identifier_is_in_the_file(tmp_path, folder):
    write(tmp_path / "sr.dcm", folder, findings=FINDINGS)
    assert identifiers_in((tmp_path / "sr.dcm").read_bytes()) == []
    dataset = pydicom.dcmread(tmp_path / "sr.dcm")
    assert not dataset.PatientSex and not dataset.PatientName and dataset.PatientID == ""


def test_patient_and_study_are_copied_where_that_is_asked_for(tmp_path, folder):
    write(tmp_path / "sr.dcm", folder, copy=True)
    dataset = pydicom.dcmread(tmp_path / "sr.dcm")
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyDate"):
        assert str(dataset[keyword].value) == IDENTIFIERS[keyword]
    assert "InstitutionName" not in dataset and "OperatorsName" not in dataset


def test_writing_again_gives_the_same_document(tmp_path, folder):
    for name in ("a", "b"):
        write(tmp_path / name, folder)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write(tmp_path / "later", folder, created=CREATED + datetime.timedelta(days=1))
    write(tmp_path / "version", folder, version="0.9.2")
    write(tmp_path / "text", folder, {"sections": {"findings": "Other."}})
    write(tmp_path / "findings", folder, findings=FINDINGS)
    uid = {path.name: pydicom.dcmread(path).SOPInstanceUID for path in tmp_path.iterdir() if path.is_file()}
    assert uid["later"] == uid["a"] and len({uid[name] for name in ("a", "version", "text", "findings")}) == 4
    assert pydicom.dcmread(tmp_path / "later").ContentDate == "20310507"


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("findings", [None, FINDINGS])
def test_a_validator_of_the_standard_finds_no_error(tmp_path, folder, copy, findings):
    write(tmp_path / "sr.dcm", folder, findings=findings, copy=copy)
    assert validation_errors(tmp_path / "sr.dcm") == []
