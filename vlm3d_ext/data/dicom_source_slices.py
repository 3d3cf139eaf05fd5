"""What a DICOM object of ours takes from the CT series it is about, and how it is written.

Only attributes that are named here are read from the slices. Those that say who the patient is, when the study was and
who asked for it are left empty in what we write, unless the caller asks for them; the UIDs of study, series, slices and
frame of reference always stay, because without them a reference refers to nothing. UIDs are no names, but whoever has
the archive can look the patient up by them.
"""

from __future__ import annotations

import datetime
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import config, dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import generate_uid

from vlm3d_ext.data.atomic_files import write_bytes
from vlm3d_ext.data.scan import UnusableScanError

__all__ = ["SourceSeries", "check_long_string", "derived_uid", "read_source_series", "write_dicom_object"]

# It names the instances that it copies from, one line for each slice and module, and a log may go where the archive's
# UIDs must not.
logging.getLogger("highdicom").setLevel(logging.WARNING)

_NEEDED = ("SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_TECHNICAL = (
    *_NEEDED,
    "SOPInstanceUID",
    "Modality",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
# The first nine must be there in every object, if only empty (type 2).
_IDENTIFYING = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "IssuerOfPatientID",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "StudyDescription",
)
_NUM_REQUIRED = 9
_UTF_8 = "ISO_IR 192"
_LONGEST_LONG_STRING = 64


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """The slices that a derived object refers to.

    Args:
        slices: in the order of the files, each with technical attributes and UIDs, and with empty identifying ones.
        identity: what identifies the patient and the study; empty values unless they were asked for.
    """

    slices: tuple[Dataset, ...]
    identity: Dataset

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID."""
        return str(self.slices[0].SeriesInstanceUID)

    @property
    def instance_uids(self) -> tuple[str, ...]:
        """SOPInstanceUID of each slice."""
        return tuple(str(one.SOPInstanceUID) for one in self.slices)


def read_source_series(path: Path, series_files: Sequence[Path], copy_patient_module: bool) -> SourceSeries:
    """Read the headers of a series, no more than is listed in this file.

    Args:
        path: the object that will be written, for messages; file names of slices can hold identifiers.
        series_files: one for each slice, `DicomSeries.files`.
        copy_patient_module: take what identifies patient and study, too, from the first slice.

    Raises:
        UnusableScanError: if there is no slice, one cannot be read, lacks a UID that references need, has the UID of
            another, or belongs to another series.
    """
    if not series_files:
        raise UnusableScanError(f"{path}: no slices given, expected those of one series; pass DicomSeries.files.")
    keywords = [*_TECHNICAL, *(_IDENTIFYING if copy_patient_module else ())]
    # pydicom's checks quote the values they doubt, which can be a patient's.
    with config.disable_value_validation():
        headers = [
            _read_header(file, f"{path}: slice {number} of {len(series_files)}", keywords)
            for number, file in enumerate(series_files, start=1)
        ]
        identity = _identity(headers[0] if copy_patient_module else Dataset())
        slices = tuple(_technical(header) for header in headers)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        num_values = len({one[keyword].value for one in slices})
        if num_values > 1:
            raise UnusableScanError(
                f"{path}: the {len(slices)} slices have {num_values} values of {keyword}, expected one; pass the files "
                "of one series."
            )
    num_instances = len({one.SOPInstanceUID for one in slices})
    if num_instances < len(slices):
        raise UnusableScanError(
            f"{path}: the {len(slices)} slices have {num_instances} SOP instance UIDs, expected one each; references "
            "to them would be ambiguous; export the series again."
        )
    return SourceSeries(slices, identity)


def _read_header(file: Path, place: str, keywords: Sequence[str]) -> Dataset:
    try:
        header = dcmread(file, stop_before_pixels=True, specific_tags=[*keywords, "SpecificCharacterSet"])
    except (OSError, InvalidDicomError, EOFError):
        raise UnusableScanError(f"{place} cannot be read, expected a DICOM file; copy the series again.") from None
    # The file's own header repeats class and instance (PS3.10 section 7.1); some tools that remove identifiers empty
    # only the others.
    for keyword, of_file in (
        ("SOPInstanceUID", "MediaStorageSOPInstanceUID"),
        ("SOPClassUID", "MediaStorageSOPClassUID"),
    ):
        if not header.get(keyword) and header.file_meta.get(of_file):
            setattr(header, keyword, header.file_meta[of_file].value)
    missing = [keyword for keyword in (*_NEEDED, "SOPInstanceUID") if not header.get(keyword)]
    if missing:
        raise UnusableScanError(
            f"{place} has no {', '.join(missing)}, expected all UIDs, because what is derived refers to its source by "
            "them; give the series as its archive has it, or one whose UIDs were replaced and not removed."
        )
    return header


def _technical(header: Dataset) -> Dataset:
    """Return a copy that the library may take over as a whole: nothing else is in it."""
    taken = Dataset()
    taken.SpecificCharacterSet = _UTF_8
    for keyword in _TECHNICAL:
        if keyword in header:
            setattr(taken, keyword, header[keyword].value)
    for keyword in _IDENTIFYING[:_NUM_REQUIRED]:
        setattr(taken, keyword, None)
    return taken


def _identity(header: Dataset) -> Dataset:
    identity = Dataset()
    for number, keyword in enumerate(_IDENTIFYING):
        value = header.get(keyword)
        if value is not None or number < _NUM_REQUIRED:
            # As text, values leave the source's character set behind.
            setattr(identity, keyword, None if value is None else str(value))
    return identity


def derived_uid(purpose: str, *parts: str) -> str:
    """Return the UID that follows from its parts: the same parts give the same UID, on any machine."""
    return str(generate_uid(entropy_srcs=[f"VLM3D {purpose}", *(f"{len(part)}:{part}" for part in parts)]))


def check_long_string(path: Path, what: str, text: str) -> None:
    """Check a text that DICOM keeps in an attribute of type LO.

    Raises:
        ValueError: if it is empty, longer than 64 characters, or has a backslash or a control character.
    """
    if not 0 < len(text) <= _LONGEST_LONG_STRING or "\\" in text or not text.isprintable():
        raise ValueError(
            f"{path}: {what} is {text!r}, expected 1 to {_LONGEST_LONG_STRING} printable characters without a "
            "backslash; shorten it."
        )


def write_dicom_object(
    path: str | os.PathLike, dataset: Dataset, source: SourceSeries, created: datetime.datetime
) -> None:
    """Write a finished object: whole or not at all, with its identity and one date throughout.

    Args:
        path: the file.
        dataset: the object, complete but for `source.identity`; changed here.
        source: where it was derived from.
        created: the date of everything in it that has one of its own.

    Raises:
        OSError: if the file cannot be written.
    """
    # Before highdicom 0.28, the library does not take it from the slices.
    dataset.SpecificCharacterSet = _UTF_8
    with config.disable_value_validation():
        dataset.update(source.identity)
    dataset.InstanceCreationDate = dataset.ContentDate = created.strftime("%Y%m%d")
    dataset.InstanceCreationTime = dataset.ContentTime = created.strftime("%H%M%S")
    for item in dataset.get("ContributingEquipmentSequence", []):
        item.ContributionDateTime = created.strftime("%Y%m%d%H%M%S")
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    write_bytes(path, buffer.getvalue())
