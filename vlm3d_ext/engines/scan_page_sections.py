"""The written parts of a scan's page as HTML: report, findings, lesions, origin, notes. All text is escaped here.

They are written by Python rather than by the page's script, so that a reader whose browser runs no script, or cannot
decode the pictures, still has them.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Place", "findings_html", "lesions_html", "lineage_html", "notes_html", "report_html"]

Place = Callable[[Sequence[float], str], tuple[int, ...]]
"""From a position in LPS mm, and of what it is, to the page's slices (k, j, i)."""

_SECTIONS = (("findings", "Findings"), ("impression", "Impression"), ("recommendations", "Recommendations"))
_BETWEEN_WORDS = r"[\s\"“”]+"
_SHORT = 12
# As seen in the page's list of overlays, too.
_SWATCH = '<span class="swatch" style="--colour:{}" aria-hidden="true"></span>'


def report_html(
    report: Mapping[str, Any],
    findings: Sequence[Mapping[str, Any]],
    lesions: Mapping[str, Sequence[Mapping[str, Any]]],
    place: Place,
    middle_x_mm: float,
) -> str:
    """Return the report's sections; a sentence about a finding whose place is known becomes a link.

    A sentence that names one side goes to the most probable lesion of that side, if there is one.

    Args:
        report: of `ReportStore`.
        findings: as in `ScanPageContent`.
        lesions: as in `ScanPageContent`.
        place: from a position to slices.
        middle_x_mm: what lies at larger x is counted as left.
    """
    sections = report.get("sections") or {}
    links = _sentence_links(report, findings, lesions, place, middle_x_mm)
    parts = []
    for key, heading in _SECTIONS:
        text = str(sections.get(key) or "").strip()
        if text:
            parts.append(f'<h3>{heading}</h3>\n<p class="prose">{_with_links(text, links)}</p>')
    if not parts:
        return '<p class="remark">No report was written.</p>'
    return "\n".join(parts + [f'<p class="remark">{_text(remark)}</p>' for remark in _report_remarks(report)])


def findings_html(findings: Sequence[Mapping[str, Any]], colours: Mapping[str, str], place: Place) -> str:
    """Return the findings as a list, the most probable first.

    Args:
        findings: as in `ScanPageContent`.
        colours: disease key -> colour.
        place: from a position to slices.
    """
    if not findings:
        return '<p class="remark">No findings were computed.</p>'
    rows = []
    for finding in sorted(findings, key=lambda finding: -_number(finding["probability"], -1.0)):
        name, probability, threshold = finding["name"], finding["probability"], finding["threshold"]
        positive = bool(finding["prediction"])
        tags = ['<span class="tag strong">present</span>'] if positive else []
        if not finding["trained"]:
            tags.append('<span class="tag warning" title="no training case had a label for it">untrained</span>')
        inside = (
            f'<span class="name">{_swatch(finding.get("disease"), colours)}{_text(name)} {" ".join(tags)}</span>'
            f'<span class="value">{_decimal(probability, 3)}<small> / {_decimal(threshold, 3)}</small></span>'
            f'<span class="bar" aria-hidden="true"><span class="fill" style="width:{_percent(probability)}"></span>'
            f'<span class="mark" style="left:{_percent(threshold)}"></span></span>'
        )
        kind = "finding positive" if positive else "finding"
        if finding.get("position_mm") is None:
            rows.append(f'<li><div class="{kind}">{inside}</div></li>')
            continue
        of = finding.get("position_of") or "region"
        slices = _slices(place(finding["position_mm"], f"finding {name!r}"))
        rows.append(
            f'<li><button type="button" class="{kind}" data-slices="{slices}" title="Show the {_text(of)}">{inside}'
            f'<span class="goto">show {_text(of)}</span></button></li>'
        )
    return f'<ol class="findings">\n{"".join(rows)}\n</ol>'


def lesions_html(
    lesions: Mapping[str, Sequence[Mapping[str, Any]]],
    diseases: Mapping[str, str],
    colours: Mapping[str, str],
    place: Place,
) -> str:
    """Return the lesions of all diseases as a table, in the order in which they are given.

    Args:
        lesions: as in `ScanPageContent`.
        diseases: disease key -> name, in the order wanted.
        colours: disease key -> colour.
        place: from a position to slices.
    """
    rows = []
    for key, name in diseases.items():
        for number, lesion in enumerate(lesions.get(key, ()), start=1):
            x, y, z = (float(value) for value in lesion["centroid_mm"])
            slices = _slices(place((x, y, z), f"lesion {number} of {key!r}"))
            dx, dy, dz = (float(value) for value in lesion["bbox_mm"][3:])
            rows.append(
                f'<tr><th scope="row"><button type="button" data-slices="{slices}" title="Show the lesion">'
                f"{_swatch(key, colours)}{_text(name)} {number}</button></th>"
                f"<td>{_volume(lesion['volume_ml'])}</td><td>{dx:.0f} × {dy:.0f} × {dz:.0f}</td>"
                f"<td>{_decimal(lesion['probability'], 2)}</td></tr>"
            )
    if not rows:
        return '<p class="remark">No lesion was drawn.</p>'
    head = "<tr><th>Lesion</th><th>Volume, ml</th><th>Box x × y × z, mm</th><th>Probability</th></tr>"
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>\n{"".join(rows)}\n</tbody></table></div>'
    )


def lineage_html(lineage: Mapping[str, Any], checkpoint_sha256: str) -> str:
    """Return a checkpoint's origin as a tree, down to the data; of paths, only the files' names.

    Args:
        lineage: of `vlm3d_ext.lineage.Lineage.state_dict`.
        checkpoint_sha256: of the checkpoint itself.
    """
    versions = lineage.get("package_versions") or {}
    written = ", ".join(f"{name} {version}" for name, version in versions.items())
    packages = f'<p class="remark">Made with {_text(written)}.</p>' if versions else ""
    return f'<ul class="tree">{_node_html("", lineage, checkpoint_sha256, "", True)}</ul>{packages}'


def notes_html(notes: Sequence[str]) -> str:
    """Return remarks on the scan, or nothing."""
    if not notes:
        return ""
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    title = '<h2 id="notes-title">Notes</h2>'
    return f'<section class="notes" aria-labelledby="notes-title">{title}<ul>{items}</ul></section>'


def _sentence_links(
    report: Mapping[str, Any],
    findings: Sequence[Mapping[str, Any]],
    lesions: Mapping[str, Sequence[Mapping[str, Any]]],
    place: Place,
    middle_x_mm: float,
) -> dict[str, tuple[str, str]]:
    """Return sentence -> (slices, what they show)."""
    by_key: dict[str, Mapping[str, Any]] = {}
    for finding in findings:
        if finding.get("position_mm") is not None:
            by_key.setdefault(_snake_case(str(finding["name"])), finding)
            if finding.get("disease"):
                by_key.setdefault(str(finding["disease"]), finding)
    links: dict[str, tuple[str, str]] = {}
    for mention in report.get("findings_list") or ():
        linked = by_key.get(str(mention["key"]))
        # Of a sentence that denies one finding and affirms another, the affirmed one is worth looking at.
        if linked is None or (mention["sentence"] in links and mention.get("status") != "present"):
            continue
        position, of = linked["position_mm"], linked.get("position_of") or "region"
        sides = list(mention.get("sides") or ())
        if len(sides) == 1:
            on_side = [
                lesion["centroid_mm"]
                for lesion in lesions.get(str(linked.get("disease")), ())
                if (float(lesion["centroid_mm"][0]) > middle_x_mm) == (sides[0] == "left")
            ]
            position = on_side[0] if on_side else position
        slices = _slices(place(position, f"finding {linked['name']!r}"))
        links[str(mention["sentence"])] = (slices, f"{linked['name']}: show the {of}")
    return links


def _with_links(text: str, links: Mapping[str, tuple[str, str]]) -> str:
    """Return the text, escaped, with its links, found whatever the spaces between their words."""
    spans: list[tuple[int, int, str]] = []
    for sentence in links:
        words = [re.escape(word) for word in re.split(_BETWEEN_WORDS, sentence) if word]
        for match in re.finditer(_BETWEEN_WORDS.join(words), text) if words else ():
            if all(match.end() <= start or match.start() >= end for start, end, _ in spans):
                spans.append((match.start(), match.end(), sentence))
    parts, at = [], 0
    for start, end, sentence in sorted(spans):
        slices, title = links[sentence]
        parts.append(_text(text[at:start]))
        parts.append(
            f'<a href="#viewer" class="sentence" data-slices="{slices}" title="{_text(title)}">'
            f"{_text(text[start:end])}</a>"
        )
        at = end
    return "".join(parts) + _text(text[at:])


def _report_remarks(report: Mapping[str, Any]) -> list[str]:
    metadata = report.get("metadata") or {}
    remarks = []
    if metadata.get("finished") is False:
        remarks.append("The text was cut off at its length limit.")
    if metadata.get("num_lesions_left_out"):
        remarks.append(f"{metadata['num_lesions_left_out']} lesions did not fit into the prompt.")
    if metadata.get("evidence_of") not in (None, report.get("volume_id")):
        remarks.append(f"A control: written from the evidence of {metadata['evidence_of']}, not of this scan.")
    if metadata.get("notice"):
        remarks.append(str(metadata["notice"]))
    return remarks


def _node_html(name: str, record: Mapping[str, Any] | None, sha256: str | None, path: str, is_open: bool) -> str:
    record = record or {}
    title = " ".join(str(record[key]) for key in ("bundle", "version") if record.get(key)) or "no lineage"
    phase = f", {record['phase']}" if record.get("phase") else ""
    role = f"{_text(name)}: " if name and name != record.get("bundle") else ""
    details = [("file", _file_name(path))] if path else []
    details.append(("sha256", str(sha256) if sha256 else "not known"))
    manifest = record.get("manifest")
    children = []
    for upstream, entry in (record.get("upstream") or {}).items():
        if entry is None:
            children.append(f"<li>{_text(upstream)}: none, from random weights</li>")
        else:
            children.append(
                _node_html(upstream, entry.get("lineage"), entry.get("sha256"), str(entry.get("path") or ""), False)
            )
    if manifest:
        children.append(_manifest_html(manifest))
    below = f'<ul class="tree">{"".join(children)}</ul>' if children else ""
    return (
        f"<li><details{' open' if is_open else ''}><summary>{role}<strong>{_text(title)}</strong>{_text(phase)} "
        f"<code>{_text(str(sha256 or '')[:_SHORT])}</code></summary>{_details_html(details)}{below}</details></li>"
    )


def _manifest_html(manifest: Mapping[str, Any]) -> str:
    details = [
        ("file", _file_name(str(manifest.get("path") or ""))),
        ("data", manifest.get("name")),
        ("labels", manifest.get("label_set")),
        ("sha256", manifest.get("sha256")),
        ("fingerprint", manifest.get("fingerprint")),
    ]
    short = _text(str(manifest.get("sha256") or "")[:_SHORT])
    return (
        f"<li><details><summary><strong>data manifest</strong> <code>{short}</code></summary>"
        f"{_details_html(details)}</details></li>"
    )


def _details_html(details: Sequence[tuple[str, object]]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in details if value)
    return f"<dl>{rows}</dl>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _swatch(disease: object, colours: Mapping[str, str]) -> str:
    return _SWATCH.format(_text(colours[str(disease)])) if disease in colours else ""


def _slices(slices: Sequence[int]) -> str:
    return ",".join(str(int(index)) for index in slices)


def _file_name(path: str) -> str:
    """Return the last part of a path of any system: folders say who ran it and where, which is nobody's business."""
    return re.split(r"[\\/]", path)[-1]


def _snake_case(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _number(value: Any, otherwise: float) -> float:
    return otherwise if value is None or math.isnan(float(value)) else float(value)


def _decimal(value: Any, digits: int) -> str:
    return "–" if math.isnan(_number(value, math.nan)) else f"{float(value):.{digits}f}"


def _volume(value: Any) -> str:
    number = _number(value, math.nan)
    return "–" if math.isnan(number) else f"{number:.0f}" if number >= 100 else f"{number:.2g}"


def _percent(value: Any) -> str:
    return f"{100 * min(max(_number(value, 0.0), 0.0), 1.0):.1f}%"
