"""What generated reports are worth, beside what needs no scan, what copies a report, and what another scan gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics.case_resampling import percentile_interval, resampling_weights
from ..metrics.crg import crg_from_counts
from ..metrics.decisions import DecisionCounts, count_decisions
from ..metrics.label_arrays import mean_over_defined
from ..metrics.report_agreement import finding_f1
from ..metrics.text_scores import score_texts
from ..text.finding_extractor import FindingExtractor
from ..text.label_set import LabelSet
from ..text.repetition import distinct_share

__all__ = [
    "CLINICAL_FIGURES",
    "ReportEvaluation",
    "ReportSystem",
    "evaluate_reports",
    "format_reports",
    "nearest_reports",
    "normal_report",
    "random_reports",
]

CLINICAL_FIGURES = ("clinical_f1", "clinical_precision", "clinical_recall", "crg", "laterality")
_WITH_INTERVAL = CLINICAL_FIGURES


@dataclass(frozen=True)
class ReportSystem:
    """Figures of one way to make reports.

    Attributes:
        name: such as "generated" or "nearest neighbour".
        figures: `CLINICAL_FIGURES`, those of `vlm3d_ext.metrics.text_scores.TextScores.mean`, ``num_words`` and
            ``num_positives`` (findings named), means over reports, and ``distinct_share``; the clinical ones have
            intervals, ``..._low`` and ``..._high``. NaN where undefined.
        per_case: one row per case.
        per_label: one row per finding.
        absent: text metric -> why it has no value.
    """

    name: str
    figures: dict[str, float]
    per_case: tuple[dict[str, Any], ...]
    per_label: tuple[dict[str, Any], ...]
    absent: dict[str, str]


@dataclass(frozen=True)
class ReportEvaluation:
    """All systems on the same cases.

    Attributes:
        systems: the generated reports first.
        num_cases: cases.
        num_resamples: bootstrap resamples.
        left_out: cases without a reference report, which text metrics and laterality leave out.
    """

    systems: tuple[ReportSystem, ...]
    num_cases: int
    num_resamples: int
    left_out: tuple[str, ...]

    def system(self, name: str) -> ReportSystem:
        """Return a system by its name.

        Raises:
            KeyError: if there is none.
        """
        return {system.name: system for system in self.systems}[name]


def normal_report(label_set: LabelSet) -> str:
    """Return a report that denies every finding of a label set: right for a healthy scan, written without looking."""
    denied = " ".join(finding.negative_prompts[0] for finding in label_set.findings if finding.negative_prompts)
    return f"Findings: {denied} Impression: No significant abnormality of the thorax."


def random_reports(num_cases: int, training_reports: Sequence[str], seed: int = 0) -> list[str]:
    """Return training reports drawn at random.

    Raises:
        ValueError: if there is none to draw from.
    """
    if not training_reports:
        raise ValueError("there is no training report to draw from; evaluate with the manifest of the training.")
    drawn = np.random.default_rng(seed).integers(0, len(training_reports), num_cases)
    return [training_reports[index] for index in drawn]


def nearest_reports(features: np.ndarray, training_features: np.ndarray, training_reports: Sequence[str]) -> list[str]:
    """Return for each case the report of the training case whose features are nearest, by the cosine.

    Features are centred by the training mean first: those of all chests point the same way.

    Args:
        features: (N, V).
        training_features: (M, V).
        training_reports: (M,).
    """
    mean = training_features.mean(0)

    def direction(values: np.ndarray) -> np.ndarray:
        centred = values - mean
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)

    nearest = (direction(features) @ direction(training_features).T).argmax(1)
    return [training_reports[index] for index in nearest]


def evaluate_reports(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    labels: np.ndarray,
    case_ids: Sequence[str],
    extractor: FindingExtractor,
    num_resamples: int = 200,
    seed: int = 0,
    groups: Sequence[str] | None = None,
    with_meteor_1_5: bool = False,
) -> ReportEvaluation:
    """Measure several ways to make reports on the same cases.

    - clinical precision, recall and F1: findings that the text says are present against the labels, the mean over
      findings with a known positive; CRG pools them.
    - laterality: of the findings that are there, that the report names, and for which the reference names a side, the
      share whose sides are the reference's.
    - text metrics: see `score_texts`.

    Args:
        systems: name -> N texts.
        references: N reference reports; "" where there is none.
        labels: (N, L) of 1, 0 or NaN, in the order of the extractor's findings.
        case_ids: (N,).
        extractor: reads findings out of texts.
        num_resamples: bootstrap resamples.
        seed: of the resampling.
        groups: (N,), patients, to resample whole patients.
        with_meteor_1_5: also METEOR 1.5, in Java.

    Raises:
        ValueError: if numbers differ, or no case has a reference.
    """
    for name, texts in systems.items():
        if len(texts) != len(references):
            raise ValueError(f"{name}: {len(texts)} reports for {len(references)} cases; expected one for each.")
    weights = resampling_weights(len(references), num_resamples, seed, groups)
    true_sides = [extractor.sides(reference) for reference in references]
    evaluated: list[ReportSystem] = []
    left_out: tuple[str, ...] = ()
    for name, texts in systems.items():
        decisions = np.array([extractor.labels(text) == 1 for text in texts])
        counts = count_decisions(labels, decisions)
        sides_right, sides_judged = _sides(extractor, texts, true_sides, labels)
        right, judged = sides_right.sum(1), sides_judged.sum(1)
        point = _clinical(counts, right.sum(), judged.sum())
        drawn = _clinical(count_decisions(labels, decisions, weights), weights @ right, weights @ judged)
        scores = score_texts(texts, references, case_ids, with_meteor_1_5=with_meteor_1_5)
        left_out = tuple(scores.left_out)
        figures = {figure: float(point[figure]) for figure in CLINICAL_FIGURES}
        for figure in _WITH_INTERVAL:
            low, high = percentile_interval(drawn[figure])
            figures |= {f"{figure}_low": float(low), f"{figure}_high": float(high)}
        figures |= scores.mean
        figures["num_words"] = float(np.mean([len(text.split()) for text in texts]))
        figures["num_positives"] = float(decisions.sum(1).mean())
        figures["distinct_share"] = distinct_share(texts)
        evaluated.append(
            ReportSystem(
                name,
                figures,
                _case_rows(case_ids, texts, decisions, labels, right, judged, scores.case_ids, scores.per_case),
                _label_rows(extractor.names, counts, sides_right.sum(0), sides_judged.sum(0)),
                dict(scores.absent),
            )
        )
    return ReportEvaluation(tuple(evaluated), len(references), num_resamples, left_out)


def _sides(
    extractor: FindingExtractor,
    texts: Sequence[str],
    true_sides: Sequence[Mapping[str, frozenset[str]]],
    labels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return whether the sides of each case's findings are right, and whether they are judged; (N, L), 0 or 1."""
    right, judged = np.zeros(labels.shape), np.zeros(labels.shape)
    for case, (text, truth) in enumerate(zip(texts, true_sides, strict=True)):
        named = extractor.sides(text)
        for column, key in enumerate(extractor.keys):
            if labels[case, column] == 1 and key in named and truth.get(key):
                judged[case, column] = 1
                right[case, column] = named[key] == truth[key]
    return right, judged


def _clinical(counts: DecisionCounts, right: Any, judged: Any) -> dict[str, np.ndarray]:
    judged = np.asarray(judged, dtype=np.float64)
    return {
        "clinical_f1": np.asarray(mean_over_defined(counts.f1)),
        "clinical_precision": np.asarray(mean_over_defined(counts.precision)),
        "clinical_recall": np.asarray(mean_over_defined(counts.recall)),
        "crg": crg_from_counts(counts),
        "laterality": np.where(judged > 0, right / np.maximum(judged, 1), np.nan),
    }


def _label_rows(
    names: Sequence[str], counts: DecisionCounts, sides_right: np.ndarray, sides_judged: np.ndarray
) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "label": name,
            "positives": int(counts.positives[column]),
            "named": int(counts.true_positives[column] + counts.false_positives[column]),
            "precision": float(counts.precision[column]),
            "recall": float(counts.recall[column]),
            "f1": float(counts.f1[column]),
            "sides_right": int(sides_right[column]),
            "sides_judged": int(sides_judged[column]),
        }
        for column, name in enumerate(names)
    )


def _case_rows(
    case_ids: Sequence[str],
    texts: Sequence[str],
    decisions: np.ndarray,
    labels: np.ndarray,
    right: np.ndarray,
    judged: np.ndarray,
    scored_ids: Sequence[str],
    scores: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], ...]:
    row_of = {case_id: row for row, case_id in enumerate(scored_ids)}
    rows = []
    for case, case_id in enumerate(case_ids):
        true = labels[case] == 1
        found = decisions[case] & ~np.isnan(labels[case])
        row: dict[str, Any] = {
            "volume_id": case_id,
            "clinical_f1": finding_f1(decisions[case], labels[case]),
            "true_findings": int(true.sum()),
            "named_findings": int(found.sum()),
            "found_findings": int((true & found).sum()),
            "sides_right": int(right[case]),
            "sides_judged": int(judged[case]),
            "num_words": len(texts[case].split()),
        }
        for metric, values in scores.items():
            row[metric] = float(values[row_of[case_id]]) if case_id in row_of else math.nan
        rows.append(row)
    return tuple(rows)


_SHOWN = (
    ("clinical_f1", "clinical F1"),
    ("clinical_precision", "precision"),
    ("clinical_recall", "recall"),
    ("crg", "CRG"),
    ("laterality", "laterality"),
    ("bleu_1_corpus", "BLEU-1"),
    ("bleu_4_corpus", "BLEU-4"),
    ("rouge_l", "ROUGE-L"),
    ("cider", "CIDEr-D"),
    ("meteor_exact_stem", "METEOR*"),
    ("num_positives", "named"),
    ("num_words", "words"),
    ("distinct_share", "distinct"),
)


def format_reports(systems: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return a table of figures: a row per system. Takes `ReportSystem.figures`, or the same read from JSON."""
    shown = [(key, title) for key, title in _SHOWN if any(figures.get(key) is not None for figures in systems.values())]
    widths = [max(len(title), 6) + 2 for _, title in shown]
    lines = [f"{'':28}" + "".join(f"{title:>{width}}" for (_, title), width in zip(shown, widths, strict=True))
             + "   95 % interval of clinical F1"]  # fmt: skip
    for name, figures in systems.items():
        cells = "".join(f"{_number(figures.get(key), key):>{w}}" for (key, _), w in zip(shown, widths, strict=True))
        interval = f"   [{_number(figures.get('clinical_f1_low'))}, {_number(figures.get('clinical_f1_high'))}]"
        lines.append(f"{name:28}{cells}{interval}")
    if any(key == "meteor_exact_stem" for key, _ in shown):
        lines.append("METEOR*: exact and stem matches only, not comparable with METEOR 1.5")
    return "\n".join(lines)


def _number(value: float | None, key: str = "") -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.1f}" if key in ("num_words", "num_positives") else f"{value:.3f}"
