"""A generated report as a DICOM structured report (Enhanced SR) that refers to the slices of its CT series.

Its tree is that of a basic imaging report (TID 2000 of DICOM PS3.16):

    CT Chest Report
        Language: English
        Observer: a device, VLM3D and its version
        Comment: not for clinical use
        Findings / Impressions / Recommendations: one text each, where the report has that section
        Summary: one text for each finding that was classified
"""

from __future__ import annotations

import datetime
import json
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from vlm3d_ext.data.dicom_source_slices import (
    SourceSeries,
    check_long_string,
    derived_uid,
    read_source_series,
    write_dicom_object,
)

__all__ = ["NOT_FOR_CLINICAL_USE", "write_dicom_report"]

NOT_FOR_CLINICAL_USE = "Written by research software. Not a medical device, not for clinical use; read by no physician."

_PRODUCT = "VLM3D"
_SERIES_NUMBER = 9002
_ENGLISH = hd.sr.CodedConcept("en", "RFC5646", "English")
# Section of `ReportStore` -> its heading (CID 7001) and what its text is (CID 7002).
_SECTIONS = {
    "findings": (codes.DCM.Findings, codes.DCM.Finding),
    "impression": (codes.DCM.Impressions, codes.DCM.Impression),
    "recommendations": (codes.DCM.Recommendations, codes.DCM.Recommendation),
}
_KEPT_CONTROLS = "\n\t"


def write_dicom_report(
    path: str | os.PathLike,
    series_files: Sequence[Path],
    report: Mapping[str, Any],
    findings: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    algorithm_version: str,
    copy_patient_module: bool = False,
    created: datetime.datetime | None = None,
) -> Path:
    """Write a report as an SR document that is partial, preliminary and verified by nobody.

    Names, numbers and dates of the patient and the study are left empty unless `copy_patient_module` is set; the UIDs
    of study, series and slices stay in either case. An archive that files by PatientID needs them set, and the file is
    then as confidential as the scan. The texts are written as they are: nothing is removed from them, apart from
    control characters, which DICOM does not take and which become spaces.

    UIDs follow from the series, the texts and the version, so writing again gives the same document, not a second one.
    The bytes are the same, too, where `created` is; highdicom names its version in them.

    Args:
        path: the file.
        series_files: (D,) the files of the slices along k, `DicomSeries.files`; the document's evidence.
        report: "sections" with "findings", "impression" and "recommendations", as `ReportStore` has it; a section that
            is empty or absent is left out.
        findings: name -> "probability", "threshold" and "prediction", as `PredictionStore` has them; None for none.
        algorithm_version: of what wrote it; at most 64 characters.
        copy_patient_module: copy what identifies the patient and the study from the series.
        created: date that the file gives as its own; None is now.

    Returns:
        `path`.

    Raises:
        UnusableScanError: if the slices cannot be referred to.
        ValueError: if no section has a text, or a finding is not as described.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    check_long_string(path, "algorithm_version", algorithm_version)
    texts = _section_texts(path, report)
    summary = [_finding_text(path, name, values) for name, values in (findings or {}).items()]
    source = read_source_series(path, series_files, copy_patient_module)
    content = (
        source.series_uid,
        *source.instance_uids,
        json.dumps(texts),
        json.dumps(summary),
        algorithm_version,
        str(copy_patient_module),
    )
    dataset = _document(source, _content_tree(texts, summary, algorithm_version), algorithm_version, content)
    write_dicom_object(path, dataset, source, created or datetime.datetime.now())
    return path


def _section_texts(path: Path, report: Mapping[str, Any]) -> dict[str, str]:
    sections = report.get("sections")
    if not isinstance(sections, Mapping):
        raise ValueError(
            f"{path}: the report has the keys {sorted(report)}, expected 'sections'; pass a report as read."
        )
    texts = {name: _clean(str(sections.get(name) or "")) for name in _SECTIONS}
    if not any(texts.values()):
        raise ValueError(
            f"{path}: the report has no text in {', '.join(_SECTIONS)}, expected it in at least one; write no document "
            "for it."
        )
    return {name: text for name, text in texts.items() if text}


def _finding_text(path: Path, name: str, values: Mapping[str, Any]) -> str:
    missing = sorted({"probability", "threshold", "prediction"} - set(values))
    if missing:
        raise ValueError(
            f"{path}: the finding {name!r} has no {', '.join(missing)}, expected all three; predict again."
        )
    probability, threshold = float(values["probability"]), float(values["threshold"])
    if not 0 <= probability <= 1 or not math.isfinite(threshold):
        raise ValueError(
            f"{path}: the finding {name!r} has probability {probability:g} and threshold {threshold:g}, expected a "
            "probability from 0 to 1 and a number; predict again."
        )
    state = "predicted" if values["prediction"] else "not predicted"
    untrained = "" if values.get("trained", True) else "; scored by its prompt alone, never trained"
    return _clean(f"{name}: {state} (probability {probability:.3f}, threshold {threshold:.3f}{untrained})")


def _clean(text: str) -> str:
    return "".join(
        " " if unicodedata.category(one) in ("Cc", "Cs") and one not in _KEPT_CONTROLS else one for one in text
    ).strip()


def _content_tree(
    texts: Mapping[str, str], summary: Sequence[str], algorithm_version: str
) -> hd.sr.ContainerContentItem:
    contains = hd.sr.RelationshipTypeValues.CONTAINS
    root = hd.sr.ContainerContentItem(name=codes.LN.CTChestReport, template_id="2000")
    observer = hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=derived_uid("device", algorithm_version),
            name=_PRODUCT,
            manufacturer_name=_PRODUCT,
            model_name=f"{_PRODUCT} {algorithm_version}",
        ),
    )
    items = hd.sr.ContentSequence()
    items.extend(hd.sr.LanguageOfContentItemAndDescendants(_ENGLISH))
    items.extend(observer)
    items.append(hd.sr.TextContentItem(codes.DCM.Comment, NOT_FOR_CLINICAL_USE, contains))
    chapters = [(*_SECTIONS[name], [text]) for name, text in texts.items()]
    if summary:
        chapters.append((codes.DCM.Summary, codes.DCM.Finding, list(summary)))
    for heading, kind, paragraphs in chapters:
        chapter = hd.sr.ContainerContentItem(name=heading, relationship_type=contains)
        chapter.ContentSequence = hd.sr.ContentSequence(
            [hd.sr.TextContentItem(kind, paragraph, contains) for paragraph in paragraphs]
        )
        items.append(chapter)
    root.ContentSequence = items
    return root


def _document(
    source: SourceSeries, tree: hd.sr.ContainerContentItem, algorithm_version: str, content: tuple[str, ...]
) -> Dataset:
    return hd.sr.EnhancedSR(
        evidence=source.slices,
        content=tree,
        series_instance_uid=derived_uid("report series", *content),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=derived_uid("report", *content),
        instance_number=1,
        manufacturer=_PRODUCT,
        manufacturer_model_name=_PRODUCT,
        software_versions=algorithm_version,
        series_description=f"{_PRODUCT} report, not for clinical use",
        is_complete=False,
        is_final=False,
        is_verified=False,
    )
