"""What a generated report says, as an entry of a store; and tables of all reports of a run."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping
from typing import Any

from ..data.atomic_files import write_bytes
from ..data.challenge_reports import write_challenge_reports
from ..data.report_store import ReportStore
from ..text.finding_extractor import FindingExtractor
from ..text.report_sections import parse_report

__all__ = ["NOT_FOR_CLINICAL_USE", "report_entry", "write_report_tables"]

logger = logging.getLogger(__name__)

NOT_FOR_CLINICAL_USE = "Written by a research model. Not a medical device, not for clinical use."


def report_entry(
    volume_id: str, text: str, extractor: FindingExtractor, origin_sha256: str, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what `ReportStore.write` takes.

    Args:
        volume_id: whose report it is.
        text: as generated.
        extractor: reads what the text says.
        origin_sha256: of the checkpoint that wrote it, from which with the volume's id the report's id is made.
        metadata: what else is to be kept of its making.
    """
    sections = parse_report(text)
    mentions = extractor.mentions(text)
    name_of = dict(zip(extractor.keys, extractor.names, strict=True))
    labels = extractor.labels(text)
    return {
        "report_id": f"{volume_id}-{origin_sha256[:12]}",
        "volume_id": volume_id,
        "report_text": text,
        "findings_list": [
            {
                "key": mention.key,
                "status": mention.status,
                "sides": list(mention.sides),
                "regions": list(mention.regions),
                "sizes_mm": list(mention.sizes_mm),
                "sentence": mention.sentence,
            }
            for mention in mentions
        ],
        "diseases_mentioned": [name_of[key] for key, label in zip(extractor.keys, labels, strict=True) if label == 1],
        "report_length": len(text.split()),
        "sections": {
            "findings": sections.findings,
            "impression": sections.impression,
            "recommendations": sections.recommendations,
        },
        "metadata": {**metadata, "notice": NOT_FOR_CLINICAL_USE},
    }


def write_report_tables(store: ReportStore) -> None:
    """Write ``tables/reports.csv`` and ``tables/challenge_reports.json`` of a store.

    The CSV has VolumeName, Findings_EN and Impressions_EN, as CT-RATE's, and the findings that are named.

    Raises:
        ResultStoreError: if a volume's file is not readable; nothing is written.
    """
    volume_ids = store.volume_ids()
    if not volume_ids:
        return
    reports = [store.read(volume_id) for volume_id in volume_ids]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["VolumeName", "Findings_EN", "Impressions_EN", "diseases_mentioned", "finished"])
    for report in reports:
        sections = report["sections"]
        named = "; ".join(report["diseases_mentioned"])
        finished = report["metadata"].get("finished")
        writer.writerow([report["volume_id"], sections["findings"], sections["impression"], named, finished])
    tables = store.folder / "tables"
    write_challenge_reports(
        tables / "challenge_reports.json", volume_ids, [report["report_text"] for report in reports]
    )
    write_bytes(tables / "reports.csv", buffer.getvalue().encode())
    logger.info("%d reports in %s, tables in %s.", len(reports), store.folder, tables)
