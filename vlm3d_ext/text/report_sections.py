"""A radiology report as sections, and a section as sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["NOT_GIVEN", "ReportSections", "parse_report", "sections_from_columns", "split_sentences", "write_report"]

NOT_GIVEN = "Not given."  # what CT-RATE writes into an empty column


@dataclass(frozen=True)
class ReportSections:
    """The sections of one report; an empty string is a section that is not there.

    Args:
        findings: what is seen.
        impression: what it means.
        recommendations: what to do next; CT-RATE's reports have none.
        clinical_information: why the scan was made.
        technique: how the scan was made.
    """

    findings: str = ""
    impression: str = ""
    recommendations: str = ""
    clinical_information: str = ""
    technique: str = ""


_HEADINGS = {
    "findings": r"findings?",
    "impression": r"impressions?|conclusions?|opinion",
    "recommendations": r"recommendations?",
    "clinical_information": r"clinical (?:information|history|indication|data)|indications?",
    "technique": r"techniques?|procedure",
}
_WRITTEN_AS = {
    "clinical_information": "Clinical information",
    "technique": "Technique",
    "findings": "Findings",
    "impression": "Impression",
    "recommendations": "Recommendations",
}
# Findings that end without a point are common, so a heading may follow any space; its capital tells it from "the
# described findings: ...".
_HEADING = re.compile(
    r"(?:^|(?<=[\s.!?\"”;)]))[*#]*[ \t]*(?=[A-Z])(?:"
    + "|".join(f"(?P<{section}>(?i:{words}))" for section, words in _HEADINGS.items())
    + r")[ \t*]*:[ \t*]*"
)


def parse_report(text: str) -> ReportSections:
    """Split a report such as ``"Findings: ... Impression: ..."`` into its sections.

    Headings may be in capitals, in the plural, on lines of their own or between sentences; a section that occurs
    twice is joined. Text before the first heading, and a text without headings, counts as findings.

    Args:
        text: the whole report.

    Returns:
        The sections, stripped; CT-RATE's ``"Not given."`` becomes an empty section.
    """
    text = text.strip()
    parts: dict[str, list[str]] = {section: [] for section in _HEADINGS}
    section, start = "findings", 0
    for match in _HEADING.finditer(text):
        parts[section].append(text[start : match.start()])
        section, start = str(match.lastgroup), match.end()
    parts[section].append(text[start:])
    return ReportSections(**{name: _join(pieces) for name, pieces in parts.items()})


def sections_from_columns(
    findings: str | None, impression: str | None, clinical_information: str | None = None, technique: str | None = None
) -> ReportSections:
    """Make sections of CT-RATE's columns ``Findings_EN``, ``Impressions_EN`` and, if wanted, the two others.

    A missing value and ``"Not given."`` both become an empty section.
    """
    return ReportSections(
        findings=_join([findings or ""]),
        impression=_join([impression or ""]),
        clinical_information=_join([clinical_information or ""]),
        technique=_join([technique or ""]),
    )


def write_report(sections: ReportSections, separator: str = " ") -> str:
    """Write sections as one text, each with its heading; what is empty is left out.

    With findings and impression this is the form the challenge's ground truth has, ``"Findings: ... Impression:
    ..."``, and `parse_report` reads it back, as long as no section contains a heading itself.

    Args:
        sections: what to write.
        separator: between sections; ``"\\n"`` for reading by people.
    """
    written = []
    for name, heading in _WRITTEN_AS.items():
        text = getattr(sections, name)
        if text:
            written.append(f"{heading}: {text}")
    return separator.join(written)


def _join(pieces: list[str]) -> str:
    kept = [piece.strip() for piece in pieces]
    return " ".join(piece for piece in kept if piece and piece.rstrip(".").lower() != NOT_GIVEN.rstrip(".").lower())


_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|cf|vs|ca|approx|fig|no|nr|st|dr|prof|min|max|diam|resp|incl|lat|ant|post|sup|inf|bilat|seg|segm)"
    r"|\b[A-Z])\.$",
    re.IGNORECASE,
)
_LIST_NUMBER = re.compile(r"(?:^|[\s\"(])\d{1,2}\.$")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
# Some reports run sentences together ("... in both lungs.No nodule ..."); a decimal or a date never has a capital
# after the point.
_RUN_TOGETHER = re.compile(r"(?<=[a-z)\]])\.(?=[A-Z][a-z])")
# A line that goes on in lower case was only wrapped.
_LINE_BREAK = re.compile(r"\s*\n\s*(?=[^a-z\s])|(?<=[a-z)?])\s{2,}(?=[A-Z])")
# "When examined in the lung parenchyma window; ..." is the beginning of the statement that follows, not an item of a
# list.
_PREAMBLE = re.compile(r"^(?:when|while|as far|if|where)\b", re.IGNORECASE)
_PHRASE = re.compile(r"^(?:in|on|at|within|during|including|apart|according|for|with)\b", re.IGNORECASE)
_VERB = re.compile(r"\b(?:is|are|was|were|has|have|had|shows?|there|seen|noted)\b", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """Split report text into sentences.

    A point in a decimal (1.5 mm, 23x16.5mm), a date (03.02.2020), an abbreviation (e.g.), an ordinal or list number
    (2. rib) ends nothing, nor does a question mark of doubt in the middle of a sentence ("cyst?, hemangioma?") or
    anything inside brackets. Semicolons separate the items of a list, unless the part before is only an introduction
    ("When examined in the lung parenchyma window;"). New lines, and two or more spaces before a capital, separate as
    well. Quotation marks around sentences are dropped.

    Args:
        text: a section or a whole report.

    Returns:
        The sentences with single spaces, none of them empty.
    """
    sentences: list[str] = []
    for line in _LINE_BREAK.split(text.replace("\r", "\n")):
        line = _RUN_TOGETHER.sub(". ", re.sub(r"[\"“”]", " ", line))
        for sentence in _split_at_points(" ".join(line.split())):
            sentences.extend(_split_at_semicolons(sentence))
    return [sentence for sentence in sentences if re.search(r"\w", sentence)]


def _split_at_points(line: str) -> list[str]:
    pieces, start = [], 0
    for match in _SENTENCE_END.finditer(line):
        before, after = line[start : match.end()], line[match.end() :].lstrip()
        if after and before.count("(") > before.count(")"):
            continue
        unfinished = match.group().startswith(("?", "!")) or match.group().endswith((")", "]"))
        if after and unfinished and not after[0].isupper():
            continue
        if after and match.group().startswith("."):
            if _ABBREVIATION.search(before) and not _ends_like_a_word(before, after):
                continue
            if _LIST_NUMBER.search(before) and (after[0].islower() or _LIST_NUMBER.fullmatch(before.strip())):
                continue
        pieces.append(before.strip())
        start = match.end()
    pieces.append(line[start:].strip())
    return [piece for piece in pieces if piece]


def _ends_like_a_word(before: str, after: str) -> bool:
    """Whether an abbreviation that is also a plain word, or "etc.", closes the sentence because a capital follows."""
    return bool(re.search(r"\b(?:etc|no|min|max|post)\.$", before, re.IGNORECASE)) and after[0].isupper()


def _split_at_semicolons(sentence: str) -> list[str]:
    pieces, pending = [], ""
    for item in re.split(r"(?<=;)\s+", sentence):
        pending = f"{pending} {item}".strip()
        introduces = _PREAMBLE.match(pending) or (_PHRASE.match(pending) and not _VERB.search(pending))
        if item.endswith(";") and introduces and pending.count(";") == 1:
            continue
        pieces.append(pending.rstrip(";").strip())
        pending = ""
    if pending:
        pieces.append(pending.rstrip(";").strip())
    return [piece for piece in pieces if piece]
