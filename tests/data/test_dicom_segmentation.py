"""Segmentations: what refers to what, what comes back, and what must not be in the file."""

import datetime
import shutil
import warnings
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest

from tests.data.identified_series import (
    FRAME_OF_REFERENCE,
    IDENTIFIERS,
    ORIENTATIONS,
    SERIES,
    SHAPE,
    STUDY,
    identifiers_in,
    slice_uid,
    validation_errors,
    write_series,
    write_slice,
)
from vlm3d_ext.data.dicom_segmentation import read_dicom_segmentation, write_dicom_segmentation
from vlm3d_ext.data.dicom_series import dicom_series_files, read_dicom_series
from vlm3d_ext.data.scan import UnusableScanError
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.text.disease_set import load_disease_set

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CREATED = datetime.datetime(2031, 5, 6, 7, 8, 9)
NAMES = {disease.key: disease.name for disease in load_disease_set().diseases}


def make_masks(shape=SHAPE):
    """Two that overlap and have no symmetry, and one without a voxel."""
    nodule, effusion = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    nodule[1, 2, 3] = nodule[4, 5, 1:4] = True
    effusion[3:6, 4:, :2] = True
    return {"lung_nodule": nodule, "pleural_effusion": effusion, "consolidation": np.zeros(shape, dtype=bool)}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "series"


def write(path: Path, folder: Path, masks=None, **options):
    series = read_dicom_series(folder)
    arguments: dict[str, Any] = {
        "names": NAMES,
        "geometry": series.geometry,
        "algorithm_version": "0.9.1",
        "created": CREATED,
    }
    arguments |= options
    files = arguments.pop("series_files", series.files)
    return write_dicom_segmentation(path, files, make_masks() if masks is None else masks, **arguments)


def frames_of(dataset):
    """(segment number, referred instances, position, pixels) of each frame."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    for frame, groups in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        segment = groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
        images = [one for derivation in groups.DerivationImageSequence for one in derivation.SourceImageSequence]
        referred = [str(image.ReferencedSOPInstanceUID) for image in images]
        position = [float(value) for value in groups.PlanePositionSequence[0].ImagePositionPatient]
        yield segment[0].ReferencedSegmentNumber, referred, position, frame


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_each_frame_refers_to_the_slice_that_it_was_drawn_on(tmp_path, folder, orientation):
    series = read_dicom_series(write_series(folder, orientation))
    masks = make_masks()

    assert write(tmp_path / "seg.dcm", folder) == tmp_path / "seg.dcm"

    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    headers = {str(header.SOPInstanceUID): header for header in map(pydicom.dcmread, series.files)}
    keys = ["lung_nodule", "pleural_effusion"]
    assert [item.SegmentLabel for item in dataset.SegmentSequence] == [NAMES[key] for key in keys]
    seen = []
    for number, referred, position, frame in frames_of(dataset):
        (uid,) = referred
        k = next(k for k in range(SHAPE[0]) if slice_uid(k) == uid)
        assert np.array_equal(frame.astype(bool), masks[keys[number - 1]][k])
        assert position == [float(value) for value in headers[uid].ImagePositionPatient]
        seen.append((keys[number - 1], k))
    assert sorted(seen) == [("lung_nodule", 1), ("lung_nodule", 4), *[("pleural_effusion", k) for k in (3, 4, 5)]]
    shared = dataset.SharedFunctionalGroupsSequence[0]
    header = next(iter(headers.values()))
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == header.ImageOrientationPatient
    measures = shared.PixelMeasuresSequence[0]
    assert measures.PixelSpacing == header.PixelSpacing and measures.SliceThickness == 3
    assert measures.SpacingBetweenSlices == pytest.approx(2.5)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_another_reader_finds_the_voxels_where_they_lie_in_the_patient(tmp_path, folder, orientation):
    geometry = read_dicom_series(write_series(folder, orientation)).geometry
    write(tmp_path / "seg.dcm", folder)

    segmentation = hd.seg.segread(tmp_path / "seg.dcm")

    for number, key in enumerate(("lung_nodule", "pleural_effusion"), start=1):
        volume = segmentation.get_volume(segment_numbers=[number], allow_missing_positions=True)
        found = np.argwhere(volume.array[..., 0])
        positions = volume.map_indices_to_reference(found)
        expected = geometry.positions_lps(np.argwhere(make_masks()[key]))
        assert np.allclose(np.sort(positions, axis=0), np.sort(expected, axis=0), atol=1e-4)
        assert len(found) == make_masks()[key].sum()
        assert volume.spacing == pytest.approx(geometry.spacing_mm, abs=1e-4)


def test_masks_come_back_as_they_were(tmp_path, folder):
    write_series(folder, "oblique")
    write(tmp_path / "seg.dcm", folder)

    masks = read_dicom_segmentation(tmp_path / "seg.dcm")

    assert list(masks) == ["Lung nodule", "Pleural effusion"], "a disease without a voxel has no segment"
    assert np.array_equal(masks["Lung nodule"], make_masks()["lung_nodule"])
    assert np.array_equal(masks["Pleural effusion"], make_masks()["pleural_effusion"])


def test_a_single_segment_in_a_single_slice_comes_back(tmp_path, folder):
    write_series(folder)
    mask = np.zeros(SHAPE, dtype=bool)
    mask[6, 0, 5] = True
    write(tmp_path / "seg.dcm", folder, {"consolidation": mask})
    (found,) = read_dicom_segmentation(tmp_path / "seg.dcm").values()
    assert np.array_equal(found, mask)


def test_copies_localizers_and_other_files_are_not_referred_to(tmp_path, folder):
    write_series(folder)
    write_slice(folder / "aa_copy.dcm", 4, SOPInstanceUID="1.2.3.400")
    localizer = {
        "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"],
        "SeriesInstanceUID": "1.2.3",
        "SOPInstanceUID": "1.2.3.9",
    }
    write_slice(folder / "scout.dcm", 50, **localizer)
    (folder / "README.txt").write_text("not DICOM")

    write(tmp_path / "seg.dcm", folder)

    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    (series,) = dataset.ReferencedSeriesSequence
    listed = [str(item.ReferencedSOPInstanceUID) for item in series.ReferencedInstanceSequence]
    # Of a slice and its copy the first by name stays.
    expected = [slice_uid(k) if k != 4 else "1.2.3.400" for k in range(SHAPE[0])]
    assert listed == expected and series.SeriesInstanceUID == SERIES
    assert {uid for _, referred, _, _ in frames_of(dataset) for uid in referred} == {expected[k] for k in (1, 3, 4, 5)}
    assert dicom_series_files(folder) == read_dicom_series(folder).files
    assert [path.name for path in dicom_series_files(folder)][4] == "aa_copy.dcm"


def test_files_are_in_the_order_of_the_voxels(folder):
    series = read_dicom_series(write_series(folder, "sagittal"))
    for k, path in enumerate(series.files):
        assert int(pydicom.dcmread(path).pixel_array[0, 0]) - 1024 == series.values[k, 0, 0] == k - 1000
    assert "jane" not in repr(series)


def test_study_series_and_frame_of_reference_are_those_of_the_scan(tmp_path, folder):
    write_series(folder)
    write(tmp_path / "seg.dcm", folder)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert dataset.StudyInstanceUID == STUDY and dataset.FrameOfReferenceUID == FRAME_OF_REFERENCE
    assert dataset.SeriesInstanceUID != SERIES and dataset.Modality == "SEG"
    assert dataset.SegmentationType == "BINARY" and dataset.SegmentsOverlap == "YES"


def test_no_identifier_is_in_the_file(tmp_path, folder):
    write_series(folder)
    assert identifiers_in((folder / "jane_00.dcm").read_bytes()), "the series must hold what is looked for"
    write(tmp_path / "seg.dcm", folder)
    assert identifiers_in((tmp_path / "seg.dcm").read_bytes()) == []
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert not dataset.PatientSex and not dataset.PatientName and dataset.PatientID == ""


def test_patient_and_study_are_copied_where_that_is_asked_for(tmp_path, folder):
    write_series(folder)
    write(tmp_path / "seg.dcm", folder, copy_patient_module=True)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    copied = (
        *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
        *("StudyTime", "ReferringPhysicianName", "IssuerOfPatientID", "PatientAge", "StudyDescription"),
    )
    for keyword in copied:
        assert str(dataset[keyword].value) == IDENTIFIERS[keyword]
    for keyword in ("InstitutionName", "OperatorsName", "PatientComments", "OtherPatientIDs"):
        assert keyword not in dataset


@pytest.mark.parametrize("copy", [False, True])
def test_odd_values_of_a_patient_reach_no_warning_and_no_log(tmp_path, folder, caplog, copy):
    write_series(folder, PatientName="Odd=Name=With=Parts", PatientBirthDate="soon", PatientSex="Jane")
    caplog.set_level("DEBUG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        series = read_dicom_series(folder)
        write(tmp_path / "seg.dcm", folder, copy_patient_module=copy, series_files=series.files)
    texts = [caplog.text, *(str(warning.message) for warning in caught)]
    assert not any(word in text for text in texts for word in ("Odd", "soon", "Jane"))


def test_algorithm_and_codes_are_named(tmp_path, folder):
    write_series(folder)
    voxel = np.zeros(SHAPE, dtype=bool)
    voxel[2, 2, 2] = True
    names = {**NAMES, "hilar_calcification_of_a_kind": "Hilar calcification"}
    write(tmp_path / "seg.dcm", folder, dict.fromkeys(names, voxel), names=names)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    found = {}
    for item in dataset.SegmentSequence:
        category, kind = item.SegmentedPropertyCategoryCodeSequence[0], item.SegmentedPropertyTypeCodeSequence[0]
        assert (category.CodeValue, category.CodingSchemeDesignator) == ("49755003", "SCT")
        found[item.SegmentLabel] = (kind.get("CodeValue") or kind.LongCodeValue, kind.CodingSchemeDesignator)
        assert item.SegmentAlgorithmType == "AUTOMATIC" and item.SegmentAlgorithmName == "VLM3D"
        assert item.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "0.9.1"
    assert found == {
        "Pericardial effusion": ("373945007", "SCT"),
        "Pleural effusion": ("60046008", "SCT"),
        "Consolidation": ("95436008", "SCT"),
        "Ground-glass opacity": ("112120", "DCM"),
        "Lung nodule": ("27925004", "SCT"),
        "Hilar calcification": ("hilar_calcification_of_a_kind", "99VLM3D"),
    }
    assert dataset.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99VLM3D"
    assert dataset.SoftwareVersions == "0.9.1"


def test_codes_that_the_standard_lists_have_its_meaning():
    from pydicom.sr.codedict import codes

    from vlm3d_ext.data.dicom_finding_codes import ABNORMAL_STRUCTURE, finding_code

    standard = {
        "pericardial_effusion": (codes.SCT.PericardialEffusion, codes.SCT.PericardialCavity),
        "pleural_effusion": (codes.SCT.PleuralEffusion, codes.SCT.Pleura),
        "ground_glass_opacity": (codes.DCM.GroundGlassOpacity, codes.SCT.Lung),
        "lung_nodule": (codes.SCT.Nodule, codes.SCT.Lung),
    }
    for key, (kind, region) in standard.items():
        code = finding_code(key, NAMES[key])
        assert (code.property_type, code.region) == (kind, region)
        assert code.property_type.meaning == kind.meaning
    assert ABNORMAL_STRUCTURE == codes.SCT.MorphologicallyAbnormalStructure
    assert not any(finding_code(key, name).is_private for key, name in NAMES.items())


def test_writing_again_gives_the_same_object(tmp_path, folder):
    write_series(folder)
    for name in ("a", "b"):
        write(tmp_path / name, folder)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write(tmp_path / "later", folder, created=CREATED + datetime.timedelta(days=1))
    write(tmp_path / "other version", folder, algorithm_version="0.9.2")
    masks = make_masks()
    masks["lung_nodule"][0, 0, 0] = True
    write(tmp_path / "other masks", folder, masks)
    uid = {path.name: pydicom.dcmread(path).SOPInstanceUID for path in tmp_path.iterdir() if path.is_file()}
    assert uid["later"] == uid["a"] and len({uid["a"], uid["other version"], uid["other masks"]}) == 3
    dataset = pydicom.dcmread(tmp_path / "later")
    assert dataset.ContentDate == dataset.InstanceCreationDate == "20310507"


def test_nothing_drawn_is_no_file(tmp_path, folder):
    write_series(folder)
    path = tmp_path / "seg.dcm"
    write(path, folder)
    assert write(path, folder, {"lung_nodule": np.zeros(SHAPE, dtype=bool)}) is None
    assert not path.exists(), "a file of earlier masks would be taken for these"
    assert write(path, folder, {}) is None


def test_a_failure_leaves_what_was_there(tmp_path, folder, monkeypatch):
    write_series(folder)
    path = tmp_path / "seg.dcm"
    path.write_bytes(b"before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(path, folder)
    assert path.read_bytes() == b"before" and [one.name for one in tmp_path.iterdir() if one.is_file()] == ["seg.dcm"]


def test_masks_that_do_not_fit_are_refused(tmp_path, folder):
    write_series(folder)
    path = tmp_path / "seg.dcm"
    with pytest.raises(ValueError, match=r"'consolidation' is bool of shape \(6, 8, 7\), expected bool of shape"):
        write(path, folder, {"consolidation": np.zeros((6, 8, 7), dtype=bool)})
    with pytest.raises(ValueError, match="is uint8 of shape"):
        write(path, folder, {"consolidation": np.zeros(SHAPE, dtype=np.uint8)})
    with pytest.raises(ValueError, match="'mass' has a mask but no name"):
        write(path, folder, {"mass": np.ones(SHAPE, dtype=bool)})
    with pytest.raises(ValueError, match="two masks are called 'Mass'"):
        write(path, folder, dict.fromkeys("ab", np.ones(SHAPE, dtype=bool)), names={"a": "Mass", "b": "Mass"})
    for text in ("", "x" * 65, "a\\b", "a\nb"):
        with pytest.raises(ValueError, match=r"algorithm_version is .* expected 1 to 64 printable characters"):
            write(path, folder, algorithm_version=text)
    assert not path.exists()


def test_files_that_do_not_lie_on_the_grid_are_refused(tmp_path, folder):
    series = read_dicom_series(write_series(folder))
    path = tmp_path / "seg.dcm"
    with pytest.raises(UnusableScanError, match="slices lie up to 15 mm from the masks' grid"):
        write(path, folder, series_files=series.files[::-1])
    with pytest.raises(UnusableScanError, match="the series has 6 slices of 8 x 6, but the masks' grid is 7 x 8 x 6"):
        write(path, folder, series_files=series.files[1:])
    affine = series.geometry.affine_lps.copy()
    affine[:, [0, 1]] = affine[:, [1, 0]]
    with pytest.raises(UnusableScanError, match="their axes differ by 1,"):
        write(path, folder, geometry=VolumeGeometry(SHAPE, affine))
    with pytest.raises(UnusableScanError, match="no slices given"):
        write(path, folder, series_files=[])
    assert not path.exists()


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_series_that_cannot_be_referred_to_is_refused(tmp_path, folder, keyword, value):
    write_series(folder, **{keyword: value})
    with pytest.raises(UnusableScanError, match=f"slice 1 of 7 has no {keyword}, expected all UIDs") as caught:
        write(tmp_path / "seg.dcm", folder)
    assert identifiers_in(str(caught.value).removeprefix(str(tmp_path)).encode()) == []


def test_the_instance_is_taken_from_the_file_header_where_the_other_was_emptied(tmp_path, folder):
    write_series(folder, SOPInstanceUID="")
    write(tmp_path / "seg.dcm", folder)
    listed = pydicom.dcmread(tmp_path / "seg.dcm").ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert [item.ReferencedSOPInstanceUID for item in listed] == [slice_uid(k) for k in range(SHAPE[0])]


def test_slices_that_cannot_be_told_apart_are_refused(tmp_path, folder):
    write_series(folder, SOPInstanceUID="1.2.3")
    with pytest.raises(UnusableScanError, match="the 7 slices have 1 SOP instance UIDs"):
        write(tmp_path / "seg.dcm", folder)


def test_slices_of_two_series_are_refused(tmp_path, folder):
    series = read_dicom_series(write_series(folder))
    write_slice(series.files[2], 2, SeriesInstanceUID="1.2.3.4")
    with pytest.raises(UnusableScanError, match="the 7 slices have 2 values of SeriesInstanceUID"):
        write_dicom_segmentation(
            tmp_path / "seg.dcm", series.files, make_masks(), NAMES, series.geometry, algorithm_version="1"
        )


def test_a_slice_that_is_no_dicom_file_is_named_by_its_place(tmp_path, folder):
    series = read_dicom_series(write_series(folder))
    series.files[3].write_text("gone")
    with pytest.raises(UnusableScanError, match="slice 4 of 7 cannot be read") as caught:
        write_dicom_segmentation(
            tmp_path / "seg.dcm", series.files, make_masks(), NAMES, series.geometry, algorithm_version="1"
        )
    assert "jane" not in str(caught.value)


def test_other_files_are_not_read_as_segmentations(tmp_path, folder):
    write_series(folder)
    with pytest.raises(ValueError, match="is no binary DICOM segmentation"):
        read_dicom_segmentation(folder / "jane_00.dcm")
    (tmp_path / "x").write_text("x")
    with pytest.raises(ValueError, match="is no DICOM file"):
        read_dicom_segmentation(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        read_dicom_segmentation(tmp_path / "y")


def test_a_series_with_rounded_headers_is_written(tmp_path, folder):
    write_series(folder, SliceThickness=None)
    for number, path in enumerate(read_dicom_series(folder).files):
        write_slice(path, number, ImageOrientationPatient=[1, 1e-6 * number, 0, 0, 1, 0], SliceThickness=None)
    write(tmp_path / "seg.dcm", folder)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == pytest.approx(2.5)
    assert validation_errors(tmp_path / "seg.dcm") == []


@pytest.mark.parametrize("orientation", ["axial", "oblique"])
@pytest.mark.parametrize("copy", [False, True])
def test_a_validator_of_the_standard_finds_no_error(tmp_path, folder, orientation, copy):
    write_series(folder, orientation)
    write(tmp_path / "seg.dcm", folder, copy_patient_module=copy)
    assert validation_errors(tmp_path / "seg.dcm") == []


# A real series


@pytest.fixture
def real_folder(tmp_path) -> Path:
    source = SHARED_DATA / "ct_organs_totalsegmentator" / "example_ct_dicom"
    if not source.is_dir():
        pytest.skip("the real sample scans (../shared/data) are not on this machine")
    return Path(shutil.copytree(source, tmp_path / "real"))


def test_a_real_series_without_its_uids_is_refused(tmp_path, real_folder):
    series = read_dicom_series(real_folder)
    masks = {"consolidation": np.zeros(series.geometry.shape, dtype=bool)}
    with pytest.raises(UnusableScanError, match="slice 1 of 20 has no StudyInstanceUID, SeriesInstanceUID, expected"):
        write(tmp_path / "seg.dcm", real_folder, masks)


def test_a_real_series_is_referred_to(tmp_path, real_folder):
    positions = {}
    for path in real_folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = STUDY, SERIES
        dataset.save_as(path)
        positions[str(dataset.file_meta.MediaStorageSOPInstanceUID)] = list(dataset.ImagePositionPatient)
    series = read_dicom_series(real_folder)
    lung = (series.values < -700) & (np.arange(20)[:, None, None] % 3 == 0)
    path = tmp_path / "seg.dcm"
    assert write(path, real_folder, {"consolidation": lung, "lung_nodule": lung[::-1]}) == path

    masks = read_dicom_segmentation(path)
    assert np.array_equal(masks["Consolidation"], lung) and np.array_equal(masks["Lung nodule"], lung[::-1])
    for _, (uid,), position, _ in frames_of(pydicom.dcmread(path)):
        assert position == positions[uid]
    content = path.read_bytes()
    for text in (b"Petersgraben", b"Basel", b"PETCT2", b"Biograph", b"20221208", b"NPONKINF", b"30543134", b"FDG_TK"):
        assert text not in content
    assert validation_errors(path) == []
