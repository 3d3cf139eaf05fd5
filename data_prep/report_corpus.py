"""Prompts and the reports that answer them: of a prepared data set's training cases, and of phantoms that nobody draws.

What a prompt says of a report is true of it: the findings that it names, and the places and sizes of its lesions. What
it leaves out is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.finding_locations import lesion_locations_of_findings
from data_prep.finding_record import CT_RATE_18, DRAWN_LESIONS, FINDING_PREVALENCE, Finding, ct_rate_labels
from data_prep.phantom_body import PatientBody, draw_patient_body
from data_prep.phantom_findings import choose_findings
from data_prep.phantom_reports import NOT_GIVEN, PhantomReport, write_report
from data_prep.report_sentences import ABSENT, NORMAL
from data_prep.synthesis_plan import assign_findings
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.text.report_prompt import ReportPrompt
from vlm3d_ext.text.report_sections import sections_from_columns
from vlm3d_ext.text.report_sections import write_report as write_sections

__all__ = ["ReportExample", "SyntheticExamples", "synthetic_examples", "training_examples"]

# `data_prep.synthesis_plan` numbers its splits 0 and 1 in the seeds of its scans, and draws the seeds of its patients
# below 2**31. With another number, and seeds from there on, no scan here is one of a synthetic data set of any seed.
_SPLIT_NUMBER = 2
_FIRST_PATIENT_SEED = 2**31
_PROMPT_STREAM, _REPORT_STREAM = 51, 41

# Most of what such a report takes is the search for places in the lungs; a second wording costs nothing.
_WORDINGS = 2
_PREVALENCES = (0.18, 0.35)
"""Least share of positive scans: as `data_prep.synthesize` has it, and one that makes for longer lists."""
_LESION_PREVALENCE = 0.5
"""The same for what has a place in the prompt: there is much to learn from it."""

_LINE_LEFT_OUT = 0.25
_NAME_LEFT_OUT = 0.1
_PROBABILITIES = (0.5, 0.99)
_NORMAL_STATEMENTS = {text for texts in (*ABSENT.values(), *NORMAL.values()) for text in texts}
_LUNG_OPACITY, _CONSOLIDATION = "Lung opacity", "Consolidation"


@dataclass(frozen=True)
class ReportExample:
    """A prompt with the marker of the image, and the report that is to be written."""

    prompt: str
    report: str


@dataclass(frozen=True)
class SyntheticExamples:
    """Examples of phantoms.

    Attributes:
        whole: prompts and reports as of a scan.
        easy: of the same phantoms, as far as they have lesions with a place: prompts that name these alone, always with
            their places, and reports that say nothing else. Most of the words of such a report follow from its prompt,
            so that copying from it is learnt sooner.
    """

    whole: list[ReportExample]
    easy: list[ReportExample]


def training_examples(manifest: CaseManifest, seed: int, template: str = "chest_ct_report") -> list[ReportExample]:
    """Return one example for each distinct report of the training cases that has labels; no other split is read.

    Prompts name the positive labels. Where lesions lie is not said: of real scans, only masks know.

    Args:
        manifest: the prepared data set.
        seed: of the probabilities in the prompts.
        template: of `ReportPrompt`.
    """
    prompt = ReportPrompt(template)
    examples: dict[str, ReportExample] = {}
    for number, case in enumerate(manifest.cases("training")):
        sections = case.get("report")
        report = _report_text(sections.get("findings"), sections.get("impression")) if sections else ""
        if not report or report in examples or not case["labels"]:
            continue
        rng = np.random.default_rng([seed, _PROMPT_STREAM, number])
        named = [name for name, label in zip(manifest.label_names, case["labels"], strict=True) if label == 1]
        examples[report] = ReportExample(prompt.text(_with_probabilities(named, rng)), report)
    return list(examples.values())


def synthetic_examples(
    num_reports: int,
    seed: int,
    template: str = "chest_ct_report",
    on_report: Callable[[], Any] = lambda: None,
) -> SyntheticExamples:
    """Write reports of phantoms that no synthetic data set holds, with prompts that say what is in them.

    The phantoms have the findings of the label set ct_rate_18 only, so that the prompt can name all that the report
    says. A line on a lesion is left out of the prompt one time in four; a finding's name, one time in ten where a line
    still says it.

    Args:
        num_reports: how many.
        seed: the same one gives the same reports; they differ from those of `data_prep.synthesize` at any seed.
        template: of `ReportPrompt`.
        on_report: called after each.
    """
    prompt = ReportPrompt(template)
    examples = SyntheticExamples([], [])
    for number, keys in enumerate(_dealt_findings(-(-num_reports // _WORDINGS), seed)):
        scan_seed = (seed, _SPLIT_NUMBER, number)
        patient_seed = _FIRST_PATIENT_SEED + int(np.random.default_rng([*scan_seed, 23]).integers(2**31))
        body = draw_patient_body(patient_seed)
        findings = choose_findings(body, keys, scan_seed)
        rng = np.random.default_rng([*scan_seed, _PROMPT_STREAM])
        lesions = [finding for finding in findings if finding.key in DRAWN_LESIONS]
        for _ in range(min(_WORDINGS, num_reports - len(examples.whole))):
            report = _report_with_impression(findings, body, scan_seed, rng)
            text = _report_text(report.findings, report.impression)
            located = [finding for finding in lesions if rng.random() >= _LINE_LEFT_OUT]
            examples.whole.append(ReportExample(_prompt_of_findings(prompt, findings, located, rng), text))
            if lesions:
                report = _report_with_impression(lesions, body, scan_seed, rng)
                text = _report_text(_without_normal(report.findings), report.impression)
                examples.easy.append(ReportExample(_prompt_of_findings(prompt, lesions, lesions, rng), text))
            on_report()
    return examples


def _dealt_findings(num_scans: int, seed: int) -> Iterator[tuple[str, ...]]:
    known = {name.lower().replace(" ", "_") for name in CT_RATE_18} | {"ground_glass_opacity"}
    prevalence = {key: share for key, share in FINDING_PREVALENCE.items() if key in known}
    prevalence |= {key: max(prevalence[key], _LESION_PREVALENCE) for key in DRAWN_LESIONS}
    first = (num_scans + 1) // 2
    for part, (number, least) in enumerate(zip((first, num_scans - first), _PREVALENCES, strict=True)):
        if number:
            yield from assign_findings(number, (seed, _SPLIT_NUMBER, part), least, prevalence)


def _report_with_impression(
    findings: Sequence[Finding], body: PatientBody, scan_seed: Sequence[int], rng: np.random.Generator
) -> PhantomReport:
    while True:
        report = write_report(findings, body, [*scan_seed, _REPORT_STREAM, int(rng.integers(2**31))])
        if report.impression != NOT_GIVEN:
            return report


def _without_normal(findings: str) -> str:
    kept = [s for s in findings.removesuffix(".").split(". ") if s[0].lower() + s[1:] not in _NORMAL_STATEMENTS]
    return ". ".join(kept) + "." if kept else ""


def _report_text(findings: str | None, impression: str | None) -> str:
    return write_sections(sections_from_columns(findings, impression))


def _prompt_of_findings(
    prompt: ReportPrompt, findings: Sequence[Finding], located: Sequence[Finding], rng: np.random.Generator
) -> str:
    names = [name for name, label in ct_rate_labels(findings).items() if label]
    if _CONSOLIDATION in names and rng.random() < _NAME_LEFT_OUT:
        names.remove(_LUNG_OPACITY)  # any consolidation is one
    said = {name for name, label in ct_rate_labels(located).items() if label}
    names = [name for name in names if name not in said or rng.random() >= _NAME_LEFT_OUT]
    lines = [location.sentence() for location in lesion_locations_of_findings(located)]
    return prompt.text(_with_probabilities(names, rng), lines)


def _with_probabilities(names: Iterable[str], rng: np.random.Generator) -> list[tuple[str, float]]:
    return [(name, float(rng.uniform(*_PROBABILITIES))) for name in names]
