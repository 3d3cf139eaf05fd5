"""Reports for the cases of a prepared data set that have none, from their labels and lesion masks: scan by scan, as
rows of CT-RATE's report table.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.phantom_reports import NOT_GIVEN
from data_prep.progress import progress_bar
from data_prep.template_reports import TemplateReport, write_template_report
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.prepared_case import PreparedCaseError, read_prepared_case
from vlm3d_ext.data.scan_reader import UnusableScanError, read_mask
from vlm3d_ext.text.label_set import LabelSet, load_label_set
from vlm3d_ext.text.lesion_locations import LesionLocationInjector

__all__ = ["COLUMNS", "REWRITTEN", "TEMPLATE", "Rewrite", "WrittenReports", "label_set_of", "write_case_reports"]

COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN", "Source")
TEMPLATE, REWRITTEN = "template", "rewritten"
Rewrite = Callable[[TemplateReport], TemplateReport | None]

_DRAWN_LABEL_SET = "vlm3d_18"


@dataclass(frozen=True)
class WrittenReports:
    """What was written.

    Attributes:
        rows: of the table, by `COLUMNS`, in the order of the manifest.
        num_scans: scans with a new report, by source.
        num_with_report: volumes that have a report and were left alone.
        num_unknown: scans of which neither a label nor a mask says anything.
        num_not_kept: rewritings that did not say the same.
        refused: what could not be read, one line each.
    """

    rows: list[dict[str, str]]
    num_scans: dict[str, int]
    num_with_report: int
    num_unknown: int
    num_not_kept: int
    refused: list[str]


def write_case_reports(
    manifest: CaseManifest,
    splits: Sequence[str] = ("training",),
    every_case: bool = False,
    seed: int = 0,
    rewrite_share: float = 0.0,
    rewrite: Rewrite | None = None,
    progress: bool = True,
) -> WrittenReports:
    """Write a report for each scan without one.

    Args:
        manifest: of a prepared data set.
        splits: those whose cases get reports.
        every_case: also for scans that have a report.
        seed: of the wording and of which reports are rewritten; each scan draws for itself, so that other scans do not
            change its report.
        rewrite_share: of the scans, 0 to 1.
        rewrite: says a report in other words, None if it cannot; see `data_prep.report_rewriting.ReportRewriter`.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: if the share is not of [0, 1] or asks for rewriting without `rewrite`, the label set does not fit,
            or no case is in the splits.
    """
    if not 0 <= rewrite_share <= 1:
        raise ValueError(f"the share of rewritten reports must lie between 0 and 1, got {rewrite_share}.")
    if rewrite_share > 0 and rewrite is None:
        raise ValueError(f"{rewrite_share:.0%} of the reports shall be rewritten, which needs a language model.")
    label_set = label_set_of(manifest)
    injector = LesionLocationInjector()
    scans: dict[str, list[dict[str, Any]]] = {}
    num_with_report = 0
    for case in manifest.cases(splits):
        if case.get("report") and not every_case:
            num_with_report += 1
        else:
            scans.setdefault(case.get("scan_id", case["volume_id"]), []).append(case)
    rows, refused = [], []
    counts: Counter[str] = Counter()
    with progress_bar(len(scans), 0, "scan", quiet=not progress) as bar:
        for scan_id, cases in scans.items():
            try:
                report = _template_report(cases, label_set, injector, _draw(seed, "words", scan_id))
            except (PreparedCaseError, UnusableScanError) as error:
                refused.append(" ".join(str(error).split()))
                bar.update()
                continue
            source = TEMPLATE
            if report is not None and rewrite is not None and _draw(seed, "rewrite", scan_id) < rewrite_share * 2**64:
                rewritten = rewrite(report)
                counts["not kept"] += rewritten is None
                source, report = (TEMPLATE, report) if rewritten is None else (REWRITTEN, rewritten)
            counts["unknown" if report is None else source] += 1
            if report is not None:
                rows += [_row(case["volume_id"], report, source) for case in cases]
            bar.update()
    return WrittenReports(
        rows=rows,
        num_scans={source: counts[source] for source in (TEMPLATE, REWRITTEN)},
        num_with_report=num_with_report,
        num_unknown=counts["unknown"],
        num_not_kept=counts["not kept"],
        refused=refused,
    )


def label_set_of(manifest: CaseManifest) -> LabelSet:
    """Return the label set of a manifest.

    Raises:
        ValueError: if the manifest's labels are not those of its set.
    """
    label_set = load_label_set(manifest.content.get("label_set") or _DRAWN_LABEL_SET)
    if manifest.label_names and list(label_set.names) != manifest.label_names:
        raise ValueError(
            f"{manifest.path}: its labels are not those of label set {label_set.name!r} in their order; prepare the "
            f"data set again."
        )
    return label_set


def _template_report(
    cases: Sequence[dict[str, Any]], label_set: LabelSet, injector: LesionLocationInjector, seed: int
) -> TemplateReport | None:
    """Return the report of a scan; of its reconstructions, the one with the most lesion masks is looked at."""
    case = max(cases, key=lambda case: len(case["lesion_masks"]))
    masks = {key: read_mask(path)[0] > 0 for key, path in case["lesion_masks"].items()}
    locations = []
    if any(mask.any() for mask in masks.values()):
        prepared = read_prepared_case(case["image"])
        for key, mask in masks.items():
            if mask.shape != prepared.gts.shape:
                raise UnusableScanError(
                    f"{case['lesion_masks'][key]}: shape {mask.shape}, expected {prepared.gts.shape} as "
                    f"{case['image']}; prepare the scan again."
                )
        regions = prepared.gts if case["has_anatomical_mask"] else None
        locations = injector.locate(masks, prepared.spacing.tolist(), regions)
    # A data set without label names knows nothing of any.
    labels = dict(zip(label_set.keys if case["labels"] else (), case["labels"], strict=True))
    return write_template_report(
        {key: None if math.isnan(value) else int(value) for key, value in labels.items()},
        label_set,
        locations,
        [key for key, mask in masks.items() if not mask.any() and key not in case["lesion_masks_partial"]],
        [seed],
    )


def _draw(seed: int, what: str, scan_id: str) -> int:
    """Return a number of 64 bits that depends on nothing else, least of all on other scans."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{what}:{scan_id}".encode()).digest()[:8], "big")


def _row(volume_id: str, report: TemplateReport, source: str) -> dict[str, str]:
    texts = (f"{volume_id}.nii.gz", NOT_GIVEN, NOT_GIVEN, report.findings, report.impression, source)
    return dict(zip(COLUMNS, texts, strict=True))
