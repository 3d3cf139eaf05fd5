"""A DICOM series with an identifier in every place where scanners and archives put one."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest

SHAPE = (7, 8, 6)
SPACING_MM = (2.5, 0.7, 0.8)
STUDY, SERIES, FRAME_OF_REFERENCE = "1.2.826.0.1.3680043.8.498.77.1", "1.2.826.0.1.3680043.8.498.77.2", "1.2.840.99.5"
CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"

IDENTIFIERS = {
    "PatientName": "Müller^Jane",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19610203",
    "PatientSex": "F",
    "AccessionNumber": "ACC-0815",
    "StudyID": "STUDY-31",
    "StudyDate": "20190731",
    "StudyTime": "131742",
    "ReferringPhysicianName": "Referrer^Rita",
    "IssuerOfPatientID": "Issuing Office",
    "PatientAge": "058Y",
    "StudyDescription": "Thorax Frau M.",
    "OtherPatientIDs": "SSN-999",
    "PatientAddress": "Elm Street 13",
    "PatientComments": "daughter of the mayor",
    "InstitutionName": "Hospital of Nowhere",
    "InstitutionAddress": "Nowhere Road 5",
    "StationName": "STATION7",
    "OperatorsName": "Operator^Olga",
    "PerformingPhysicianName": "Performer^Paul",
    "RequestingPhysician": "Requester^Rolf",
    "DeviceSerialNumber": "SN-60064",
    "Manufacturer": "Maker of Scanners",
    "ManufacturerModelName": "Scanner 9",
    "SoftwareVersions": "SYNGO-X",
    "SeriesDescription": "Chest of Jane",
    "ProtocolName": "Private Protocol",
    "SeriesDate": "20190732",
    "AcquisitionDate": "20190733",
    "AcquisitionTime": "131743",
    "ContentDate": "20190734",
    "InstanceCreationDate": "20190735",
    "ImageComments": "see also her sister",
    "PositionReferenceIndicator": "her sternum",
}

# Columns of rows and columns of pixels, in LPS; the third axis is their cross product.
_TILT = np.radians(12)
ORIENTATIONS = {
    "axial": [1, 0, 0, 0, 1, 0],
    "axial, feet last": [1, 0, 0, 0, -1, 0],
    "sagittal": [0, 1, 0, 0, 0, -1],
    "oblique": [np.cos(_TILT), np.sin(_TILT), 0, -np.sin(_TILT) * 0.8, np.cos(_TILT) * 0.8, 0.6],
}


def slice_uid(number: int) -> str:
    return f"{SERIES}.{100 + number}"


def write_slice(path: Path, number: int, orientation="axial", **changes) -> Path:
    """Write slice `number` along the normal; `changes` are DICOM keywords, a value of None leaves the element out."""
    cosines = np.array(ORIENTATIONS[orientation], dtype=float)
    normal = np.cross(cosines[:3], cosines[3:])
    position = np.array([-11.5, 22.25, -310.0]) + SPACING_MM[0] * number * normal
    pixels = np.full(SHAPE[1:], 24 + number, dtype=np.uint16)
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 100"
    elements = {
        **IDENTIFIERS,
        "SOPClassUID": CT_IMAGE_STORAGE,
        "SOPInstanceUID": slice_uid(number),
        "StudyInstanceUID": STUDY,
        "SeriesInstanceUID": SERIES,
        "FrameOfReferenceUID": FRAME_OF_REFERENCE,
        "SeriesNumber": 3,
        "InstanceNumber": 100 - number,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Rows": SHAPE[1],
        "Columns": SHAPE[2],
        "ImagePositionPatient": [f"{value:.10g}" for value in position],
        "ImageOrientationPatient": [f"{value:.10g}" for value in cosines],
        "PixelSpacing": list(SPACING_MM[1:]),
        "SliceThickness": 3,
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
    with pydicom.config.disable_value_validation():
        for keyword, value in elements.items():
            if value is not None:
                setattr(dataset, keyword, value)
        block = dataset.private_block(0x0009, "SOME MAKER", create=True)
        block.add_new(1, "LO", "private Jane")
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.UID(CT_IMAGE_STORAGE)
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID(elements["SOPInstanceUID"] or slice_uid(number))
    dataset.PixelData = pixels.tobytes()
    path.parent.mkdir(exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, orientation="axial", **changes) -> Path:
    """Write the slices under names whose order is neither that of the positions nor its reverse."""
    for number in range(SHAPE[0]):
        write_slice(folder / f"jane_{(number * 5) % 11:02d}.dcm", number, orientation, **changes)
    return folder


def identifiers_in(content: bytes) -> list[str]:
    """Return the planted identifiers that are in these bytes, in either character set."""
    texts = [
        *(value for value in IDENTIFIERS.values() if len(value) > 1),
        "private Jane",
        "jane_",
        "Jane",
        "SOME MAKER",
    ]
    parts = {part for text in texts for part in (text, *text.split("^"))}
    return sorted(part for part in parts if part.encode("latin-1") in content or part.encode() in content)


def validation_errors(path: Path) -> list[str]:
    """Return what dciodvfy (Debian's dicom3tools) calls an error; skip where that program is not there."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian package dicom3tools) is not on this machine")
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace")
    lines = (done.stdout + done.stderr).splitlines()
    assert any(line.strip() in ("Segmentation", "EnhancedSR") for line in lines), lines
    return [line for line in lines if line.startswith(("Error", "Abort"))]
