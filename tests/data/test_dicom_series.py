"""DICOM folders: what makes up a series, and every kind of folder that is refused.

The small series are written here with pydicom, each with the header mistakes that occur in practice.
"""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from vlm3d_ext.data.dicom_series import dicom_series_files, read_dicom_series
from vlm3d_ext.data.scan_reader import UnusableScanError, read_mask, read_scan
from vlm3d_ext.data.volume_geometry import VolumeGeometry

pydicom = pytest.importorskip("pydicom", reason="pydicom writes the small series these tests read")

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
SERIES_UID = "1.2.826.0.1.3680043.8.498.1"
NAME, PATIENT_ID, DATE = "Doe^Jane", "MRN-4711", "20240131"
ROWS, COLUMNS = 6, 5


def stored_slice(number: int) -> np.ndarray:
    """Stored values (rows, columns) of slice `number`: air and tissue at an intercept of -1024, no two slices alike."""
    values = np.full((ROWS, COLUMNS), 24, dtype=np.uint16)
    values[2:5, 1:4] = 1064 + number
    return values


def write_slice(path: Path, number: int, height: float | None = None, **changes) -> Path:
    """Write one CT slice; `changes` are DICOM keywords, a value of None leaves the element out."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = changes.get("SOPClassUID", CT_IMAGE_STORAGE)
    dataset.file_meta.MediaStorageSOPInstanceUID = f"{SERIES_UID}.{number + 1}"
    pixels = changes.pop("pixels", stored_slice(number))
    elements = {
        "SOPClassUID": CT_IMAGE_STORAGE,
        "SOPInstanceUID": f"{SERIES_UID}.{number + 1}",
        "PatientName": NAME,
        "PatientID": PATIENT_ID,
        "StudyDate": DATE,
        "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.9",
        "SeriesInstanceUID": SERIES_UID,
        "SeriesNumber": 3,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "ImagePositionPatient": [-10.0, -20.0, -100.0 + 2.5 * number if height is None else height],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.7, 0.8],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        **changes,
    }
    for keyword, value in elements.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.PixelData = pixels.tobytes()
    path.parent.mkdir(exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, num_slices: int = 6, **changes) -> Path:
    """Write slices under names whose order is not that of their positions."""
    for number in range(num_slices):
        write_slice(folder / f"{(number * 7) % 13:02d}.dcm", number, **changes)
    return folder


def refusal(folder: Path, **options) -> str:
    with pytest.raises(UnusableScanError) as caught:
        read_scan(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{folder}: ") and message.endswith(".")
    for identifier in (NAME, "Doe", PATIENT_ID, DATE, SERIES_UID):
        assert identifier not in message.removeprefix(str(folder))
    return message


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "series"


def test_slices_are_sorted_by_position_and_rescaled(folder):
    scan = read_scan(write_series(folder))
    expected = np.stack([stored_slice(n).astype(int) - 1024 for n in range(6)])
    assert scan.hu.dtype == np.int16 and np.array_equal(scan.hu, expected)
    assert scan.geometry == VolumeGeometry.from_spacing((6, ROWS, COLUMNS), (2.5, 0.7, 0.8), (-10.0, -20.0, -100.0))
    assert scan.source_format == "dicom" and scan.notes == ()


def test_nothing_of_the_patient_is_in_the_scan(folder):
    scan = read_scan(write_series(folder))
    for identifier in (NAME, PATIENT_ID, DATE, SERIES_UID):
        assert identifier not in repr(scan)


def test_a_sagittal_series_becomes_axial(folder):
    for number in range(6):
        position = [30.0 - 2.5 * number, -20.0, 50.0]
        changes = {"ImagePositionPatient": position, "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
        write_slice(folder / f"{number}.dcm", number, **changes)
    scan = read_scan(folder)
    assert scan.source_geometry.axis_codes == "PIR"
    assert scan.geometry.axis_codes == "LPS"
    assert scan.geometry.spacing_mm == pytest.approx((0.7, 0.8, 2.5))
    # Slice 5 lies farthest to the right, so it comes first along x.
    assert scan.hu[:, :, 0].max() == 1064 + 5 - 1024


def test_an_intercept_per_slice_is_applied_per_slice(folder):
    for number in range(4):
        shifted = stored_slice(number) + np.uint16(100 * number)
        write_slice(folder / f"{number}.dcm", number, pixels=shifted, RescaleIntercept=-1024 - 100 * number)
    expected = np.stack([stored_slice(n).astype(int) - 1024 for n in range(4)])
    assert np.array_equal(read_scan(folder).hu, expected)


def test_a_slope_that_is_not_whole_is_not_cut_off(folder):
    write_series(folder, RescaleSlope=1.5)
    expected = np.stack([stored_slice(n) * 1.5 - 1024 for n in range(6)])
    assert np.array_equal(read_scan(folder).hu, expected)


def test_localizers_and_other_objects_are_left_out_with_a_note(folder):
    write_series(folder)
    write_slice(folder / "scout.dcm", 90, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesInstanceUID="1.2.3")
    (folder / "README.txt").write_text("not DICOM")
    scan = read_scan(folder)
    assert scan.hu.shape == (6, ROWS, COLUMNS)
    assert scan.notes == ("1 files without a DICOM image ignored", "1 localizer images skipped")


def test_exact_copies_are_dropped_with_a_note(folder):
    write_series(folder)
    write_slice(folder / "copy.dcm", 2)
    scan = read_scan(folder)
    assert scan.hu.shape[0] == 6 and scan.notes == ("1 duplicate slices dropped",)


def test_positions_rounded_by_the_scanner_are_even(folder):
    for number in range(8):
        write_slice(folder / f"{number}.dcm", number, height=round(0.625 * number, 1))
    assert read_scan(folder).geometry.spacing_mm[0] == pytest.approx(0.629, abs=0.001)


def test_one_of_two_series_can_be_chosen_by_number(folder):
    write_series(folder)
    for number in range(3):
        write_slice(folder / f"b{number}.dcm", number, SeriesInstanceUID="1.2.3", SeriesNumber=8, Modality="PT")
    message = refusal(folder)
    assert "holds 2 series (number 3: CT, 6 slices; number 8: PT, 3 slices)" in message
    assert read_scan(folder, series_number=3).hu.shape[0] == 6
    assert "modality is PT, expected CT" in refusal(folder, series_number=8)
    assert "one series with number 5" in refusal(folder, series_number=5)


def test_the_only_series_that_can_be_a_chest_scan_is_taken_and_the_others_named(folder):
    for number in range(16):
        write_slice(folder / f"a{number:02d}.dcm", number, height=10.0 * number)
    for number in range(3):
        write_slice(folder / f"b{number}.dcm", number, SeriesInstanceUID="1.2.3", SeriesNumber=8)
    scan = read_scan(folder)
    assert scan.hu.shape[0] == 16
    assert scan.notes == (
        "of 2 series the only one that can be a chest scan was taken, number 3: CT, 16 slices every 10 mm; left out: "
        "number 8: CT, 3 slices",
    )
    assert np.array_equal(scan.hu, read_scan(folder, series_number=3).hu)
    assert [path.name for path in dicom_series_files(folder)] == [f"a{number:02d}.dcm" for number in range(16)]


@pytest.mark.parametrize(
    ("num_slices", "step", "changes"),
    [(15, 20.0, {}), (16, 9.0, {}), (16, 10.0, {"Modality": "PT"}), (16, 10.0, {"ImagePositionPatient": None})],
)
def test_too_few_slices_too_low_a_stack_and_another_modality_are_no_choice(folder, num_slices, step, changes):
    """16 slices every 9 mm are 144 mm from outer edge to outer edge, 16 every 10 mm are 160 mm."""
    write_series(folder)
    for number in range(num_slices):
        elements = {"SeriesInstanceUID": "1.2.3", "SeriesNumber": 8, **changes}
        write_slice(folder / f"b{number:02d}.dcm", number, height=step * number, **elements)
    message = refusal(folder)
    assert "holds 2 series (number 3: CT, 6 slices; number 8: " in message and "expected one series" in message


def test_several_series_that_can_be_a_chest_scan_are_listed_with_what_tells_them_apart(folder):
    for number in range(16):
        write_slice(folder / f"a{number:02d}.dcm", number, height=10.0 * number, SliceThickness=12)
    for number in range(32):
        elements = {"SeriesInstanceUID": "1.2.3", "SeriesNumber": 8, "SliceThickness": 5}
        write_slice(folder / f"b{number:02d}.dcm", number, height=5.0 * number, **elements)
    message = refusal(folder)
    assert (
        "holds 2 series (number 3: CT, 16 slices every 10 mm, 12 mm thick; number 8: CT, 32 slices every 5 mm, 5 mm "
        "thick), expected one series; pass series_number (in a bundle --series_number)"
    ) in message
    assert read_scan(folder, series_number=8).hu.shape[0] == 32


# Folders that are refused


def test_no_images(folder):
    folder.mkdir()
    assert "no DICOM images among its 0 files" in refusal(folder)
    (folder / "a.txt").write_text("x")
    assert "no DICOM images among its 1 files" in refusal(folder)


def test_only_localizers(folder):
    assert "all 6 images are localizers" in refusal(
        write_series(folder, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    )


def test_another_modality(folder):
    assert "modality is MR, expected CT" in refusal(write_series(folder, Modality="MR"))


@pytest.mark.parametrize("missing", [[3], [2, 3, 6]])
def test_missing_slices_are_counted_and_placed(folder, missing):
    for number in set(range(10)) - set(missing):
        write_slice(folder / f"{number}.dcm", number)
    message = refusal(folder)
    assert f"{len(missing)} slices missing at " in message and "one every 2.5 mm" in message
    first = -100 + 2.5 * (missing[0] - 1)
    assert f"{first:.2f} to " in message


def test_irregular_spacing(folder):
    for number in range(6):
        write_slice(folder / f"{number}.dcm", number, height=2.5 * number + (0.9 if number == 3 else 0))
    message = refusal(folder)
    assert "irregular slice spacing, 1.6 to 3.4 mm" in message and "0.9 mm from an even grid" in message


def test_two_pictures_at_one_position(folder):
    write_series(folder)
    write_slice(folder / "other.dcm", 40, height=-95.0)
    assert "two different slices at -95.00 mm" in refusal(folder)


def test_gantry_tilt(folder):
    for number in range(6):
        position = [-10.0, -20.0 + 2.5 * number * np.tan(np.radians(15)), -100.0 + 2.5 * number]
        write_slice(folder / f"{number}.dcm", number, ImagePositionPatient=[round(p, 4) for p in position])
    message = refusal(folder)
    assert "leans 15.00 degrees" in message and "gantry tilt" in message


def test_row_and_column_that_are_not_at_right_angles(folder):
    assert "not orthogonal" in refusal(write_series(folder, ImageOrientationPatient=[1, 0, 0, 0.1, 0.995, 0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": np.zeros((7, 5), np.uint16)}, "1 of 7 x 5"),
        ({"PixelSpacing": [0.7, 0.9]}, "differ in pixel spacing by up to 0.1"),
        ({"ImageOrientationPatient": [-1, 0, 0, 0, 1, 0]}, "differ in orientation by up to 2"),
        ({"ImagePositionPatient": None}, "lacks ImagePositionPatient"),
        ({"PixelSpacing": [0.0, 0.8]}, "pixel spacing"),
    ],
)
def test_one_slice_unlike_the_others(folder, changes, message):
    write_series(folder)
    write_slice(folder / "other.dcm", 6, **changes)
    assert message in refusal(folder)


def test_a_single_slice_is_no_volume(folder):
    write_slice(folder / "a.dcm", 0)
    assert "fewer than 2 slices, 1" in refusal(folder)


def test_enhanced_multi_frame(folder):
    pixels = np.zeros((ROWS * 2, COLUMNS), np.uint16)
    write_slice(folder / "a.dcm", 0, pixels=pixels, Rows=ROWS, NumberOfFrames=2)
    assert "2 frames" in refusal(folder)


def test_forgotten_rescale_is_refused_by_the_hu_check(folder):
    message = refusal(write_series(folder, RescaleSlope=None, RescaleIntercept=None))
    assert "the 5th percentile is 24 HU" in message


@pytest.mark.parametrize("num_bytes", [420, -20])
def test_a_file_cut_short(folder, num_bytes):
    write_series(folder)
    path = folder / "07.dcm"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert "07.dcm is a CT slice that cannot be read" in refusal(folder)


def test_pixels_that_cannot_be_decoded(folder):
    write_series(folder)
    dataset = pydicom.dcmread(folder / "07.dcm")
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(64)])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.save_as(folder / "07.dcm", enforce_file_format=True)
    assert "the pixels of 07.dcm cannot be decoded" in refusal(folder)


def test_a_file_named_by_its_uid_is_named_by_its_place(folder):
    write_series(folder)
    path = (folder / "07.dcm").rename(folder / f"CT.{SERIES_UID}.99")
    path.write_bytes(path.read_bytes()[:420])
    assert "file 6 of 6 (by name) is a CT slice that cannot be read" in refusal(folder)


# Real series


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real sample scans (../shared/data) are not on this machine")
def test_dicom_and_nifti_of_one_scan_agree(tmp_path):
    folder = SHARED_DATA / "ct_chest" / "ibsi_pat1"
    with zipfile.ZipFile(next(folder.glob("*.zip"))) as archive:
        archive.extractall(tmp_path)
    dicom = read_scan(next(path for path in tmp_path.rglob("image") if path.is_dir()))
    nifti = read_scan(folder / "phantom.nii.gz")
    assert np.array_equal(dicom.hu, nifti.hu)
    assert dicom.geometry.is_close(nifti.geometry, tolerance_mm=1e-4)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real sample scans (../shared/data) are not on this machine")
def test_a_jpeg_2000_series_is_decoded_and_fits_its_segmentation():
    folder = SHARED_DATA / "ct_organs_totalsegmentator"
    series = read_dicom_series(folder / "example_ct_dicom")
    dataset = pydicom.dcmread(next((folder / "example_ct_dicom").iterdir()), stop_before_pixels=True)
    assert dataset.file_meta.TransferSyntaxUID.name.startswith("JPEG 2000")
    assert series.values.shape == (20, 512, 512) and series.geometry.spacing_mm == pytest.approx(
        (2.0, 0.9766, 0.9766), abs=1e-4
    )
    labels, geometry = read_mask(folder / "example_seg_dicom.nii.gz")
    assert series.geometry.is_close(geometry, tolerance_mm=1e-2)
    means = {organ: series.values[labels == organ].mean() for organ in (5, 10, 11) if (labels == organ).any()}
    assert means and all(40 < mean < 180 if organ == 5 else mean < -600 for organ, mean in means.items())
