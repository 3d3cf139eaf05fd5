"""A prepared data set's manifest with other reports: the same cases, and a fingerprint of what it then holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data_prep.preparation_settings import digest_of
from vlm3d_ext.data.case_manifest import SPLITS, CaseManifest
from vlm3d_ext.data.csv_table import volume_name
from vlm3d_ext.data.prepared_case import read_sidecar

__all__ = ["manifest_with_reports"]


def manifest_with_reports(
    manifest: CaseManifest, reports: Mapping[str, Mapping[str, str]], sources: Mapping[str, str]
) -> dict[str, Any]:
    """Return the content of a manifest in which some cases have another report, and ``report_source`` says whose.

    The fingerprint follows `data_prep.manifest.build_manifest`: it is of settings, labels, reports and the cases'
    bytes, so other reports give another one. That rule is first tried on the manifest as it is, which must give its
    own.

    Args:
        manifest: as `data_prep.prepare` wrote it, with its cases' sidecars beside it.
        reports: volume id -> {"findings", "impression"}.
        sources: volume id -> how the report was written, such as "template".

    Raises:
        ValueError: if the manifest's own fingerprint does not follow from its content: it was made by another version,
            or edited.
        PreparedCaseError: if a sidecar is missing.
    """
    digests = {
        case["volume_id"]: read_sidecar(case["geometry"]).get("content_sha256")
        for split in SPLITS
        if manifest.content[split]
        for case in manifest.cases(split)
    }
    content = {key: value for key, value in manifest.content.items() if key not in SPLITS}
    for split in SPLITS:
        content[split] = [
            {**entry, "report": dict(reports[entry["volume_id"]]), "report_source": sources[entry["volume_id"]]}
            if entry["volume_id"] in reports
            else entry
            for entry in manifest.content[split]
        ]
    for raw_id in (_raw_id, _own_id):
        if _fingerprint(manifest.content, digests, raw_id) == manifest.fingerprint:
            return {**content, "fingerprint": _fingerprint(content, digests, raw_id)}
    raise ValueError(
        f"{manifest.path}: its fingerprint is not that of its content, so it was edited or made by another version; "
        f"prepare the data set again (finished cases are kept), or write no --output-manifest."
    )


def _raw_id(entry: Mapping[str, Any]) -> str:
    return volume_name(str(entry.get("source", entry["volume_id"])))


def _own_id(entry: Mapping[str, Any]) -> str:
    return str(entry["volume_id"])


def _fingerprint(
    content: Mapping[str, Any], digests: Mapping[str, Any], raw_id: Callable[[Mapping[str, Any]], str]
) -> str:
    described = {key: content[key] for key in ("label_set", "label_names", "settings") if key in content}
    entries = [(split, entry) for split in SPLITS for entry in content[split]]
    cases = [
        [split, {k: v for k, v in entry.items() if k != "lesion_masks_empty"}, digests[entry["volume_id"]]]
        for split, entry in sorted(entries, key=lambda item: raw_id(item[1]))
    ]
    return digest_of({**described, "cases": cases})
