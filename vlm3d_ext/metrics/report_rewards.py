"""The reward of a generated report: what it gets right, times what it is marked down for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..text.hashed_ngrams import words_of
from ..text.repetition import distinct_share, repeated_ngram_share, repeated_sentence_share
from ..text.report_sections import parse_report
from . import model_based_text_scores
from .bleu import sentence_bleu
from .report_agreement import finding_f1, side_agreement
from .rouge_l import rouge_l

if TYPE_CHECKING:
    from ..text.finding_extractor import FindingExtractor

__all__ = [
    "DEFAULT_PENALTIES",
    "DEFAULT_WEIGHTS",
    "ReportReward",
    "RewardBreakdown",
    "format_score",
]

PARTS = ("clinical", "laterality", "bleu", "rouge_l", "bert_score", "format")
CLINICAL_PARTS = ("clinical", "laterality")
LEXICAL_PARTS = ("bleu", "rouge_l", "bert_score")
MIN_CLINICAL_SHARE = 0.5
MAX_LEXICAL_SHARE = 0.2

# What is said decides. Words alike only keep the wording near: rewarded for more than a fifth, a model writes fluent
# findings that are not there. The format is learnt within a few steps and needs little to stay. BERTScore is slow.
DEFAULT_WEIGHTS: Mapping[str, float] = {
    "clinical": 0.65,
    "laterality": 0.1,
    "bleu": 0.05,
    "rouge_l": 0.1,
    "bert_score": 0.0,
    "format": 0.1,
}
# A report of all findings has an F1 of .36 where 4 of 18 are there, and a normal one has 0; the reward of inventions
# must fall by more than that, or the longest list wins. Length and repetition only have to outweigh what they gain.
DEFAULT_PENALTIES: Mapping[str, float] = {"unsupported": 0.9, "repetition": 0.8, "length": 0.5}


@dataclass(frozen=True)
class RewardBreakdown:
    """The reward of N reports, and what it is made of; each array is (N,) float64.

    Args:
        total: in [0, 1]; 0 for a text that is empty or unfinished; NaN where no part could be computed.
        parts: each part of weight above 0, in [0, 1], higher is better, and each penalty as ``"..._penalty"``, in
            [0, 1], higher is worse. NaN where it could not be computed.
        watched: what is not in the reward, but shows it being gamed: ``"num_positives"`` named (reports of CT-RATE
            have 3.47 on average), ``"num_words"``, ``"finished"``, ``"empty"`` (0 / 1), ``"distinct_share"`` of the
            whole batch (the same value N times) and each cheap part of weight 0.
        num_nan: name in `parts` -> number of reports for which it was left out.
        without_reward: indices of the reports whose total is NaN; leave their groups out.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    watched: dict[str, np.ndarray]
    num_nan: dict[str, int]
    without_reward: tuple[int, ...]


class ReportReward:
    """Weighted mean of the parts, times 1 - strength x penalty for each penalty.

    Penalties multiply, so that a bad report still earns more than an empty one, and two bad ones are still told apart.

    Parts, in [0, 1]:

    - ``clinical``: `finding_f1` of the findings named against the labels.
    - ``laterality``: `side_agreement` with the reference report.
    - ``bleu`` (mean of BLEU-1 to BLEU-4), ``rouge_l``, ``bert_score`` (F1): likeness to the reference report.
    - ``format``: `format_score`.

    Penalties, in [0, 1]:

    - ``unsupported``: findings named that the labels deny; complete at `unsupported_share` of the label set. They are
      counted, not related to the findings named: else one false guess would cost as much as a list of all findings.
    - ``repetition``: the larger of `repeated_ngram_share` (of four words) and `repeated_sentence_share`; begins at the
      first value of `repetition_share`, complete at the second.
    - ``length``: begins where words / words of the reference leave `length_ratio`; complete at 0 and at twice the
      upper limit.

    A part that cannot be computed (no label known, no reference, no side to compare) is left out for that report, the
    weights of the others are scaled up, and it is counted in `RewardBreakdown.num_nan`.

    Args:
        extractor: finds what a report names.
        weights: part -> weight; what is not named has weight 0. None means `DEFAULT_WEIGHTS`.
        penalties: penalty -> strength in [0, 1]; what is not named has strength 0. None means `DEFAULT_PENALTIES`.
        length_ratio: lower and upper limit without penalty.
        repetition_share: none of the 399 different reports of a CT-RATE validation sample (the first 400 rows)
            repeats more than .193 of its n-grams, or .154 of its sentences; a report said twice repeats about .5.
        unsupported_share: in (0, 1]; .4 of 18 is 7, twice the findings of an average report.
        allow_lexical: take weights whose clinical parts are less than half, or lexical parts more than a fifth.

    Raises:
        ValueError: if a name is unknown, a number out of range, the weights break the two limits above, or
            ``bert_score`` has a weight and cannot run here (`vlm3d_ext.metrics.model_based_text_scores`).
    """

    def __init__(
        self,
        extractor: FindingExtractor,
        weights: Mapping[str, float] | None = None,
        penalties: Mapping[str, float] | None = None,
        length_ratio: Sequence[float] = (0.6, 1.5),
        repetition_share: Sequence[float] = (0.2, 0.6),
        unsupported_share: float = 0.4,
        allow_lexical: bool = False,
    ) -> None:
        self.extractor = extractor
        self.weights = _named_numbers("weights", DEFAULT_WEIGHTS if weights is None else weights, PARTS, math.inf)
        self.penalties = _named_numbers(
            "penalties", DEFAULT_PENALTIES if penalties is None else penalties, tuple(DEFAULT_PENALTIES), 1
        )
        _check_weights(self.weights, allow_lexical)
        if self.weights["bert_score"] > 0:
            _check_that_bert_score_runs(self.weights["bert_score"])
        self.length_ratio = _limits("length_ratio", length_ratio, math.inf)
        self.repetition_share = _limits("repetition_share", repetition_share, 1)
        if not 0 < unsupported_share <= 1:
            raise ValueError(f"unsupported_share must be in (0, 1], got {unsupported_share}.")
        self.unsupported_share = unsupported_share

    def __call__(
        self, reports: Sequence[str], finished: Sequence[bool], references: Sequence[str], labels: np.ndarray
    ) -> RewardBreakdown:
        """Return the rewards of N generated reports.

        Args:
            reports: generated texts, with their headings.
            finished: whether each ended with the end-of-text token, and was not cut at the longest length.
            references: the true reports in the same form; an empty one is unknown.
            labels: (N, L) of 1, 0 and NaN (unknown), in the order of the extractor's label set.

        Raises:
            ValueError: if there is no report, the numbers of reports differ, or `labels` are of another shape or value.
        """
        labels = np.asarray(labels, dtype=np.float64)
        if not reports or not len(reports) == len(finished) == len(references) == len(labels):
            raise ValueError(
                f"got {len(reports)} reports, {len(finished)} finished, {len(references)} references and "
                f"{len(labels)} rows of labels; expected the same number, at least 1."
            )
        rows = [self._score(*case) for case in zip(reports, references, labels, strict=True)]
        scores = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
        if self.weights["bert_score"] > 0:
            scores["bert_score"] = _bert_scores(reports, references)
        ended = np.array([bool(value) for value in finished])
        empty = np.array([not words_of(report) for report in reports])
        for name in PARTS:
            if name in scores:
                scores[name] = np.where(empty, 0.0, scores[name])  # a text that says nothing is right about nothing

        parts = {name: scores[name] for name in PARTS if self.weights[name] > 0}
        total = _mean_of_known(parts, self.weights)
        for name, strength in self.penalties.items():
            penalty = scores[f"{name}_penalty"]
            parts[f"{name}_penalty"] = penalty
            total = total * (1 - strength * np.where(np.isnan(penalty), 0.0, penalty))
        total = np.where(ended & ~empty, total, 0.0)
        watched = {name: scores[name] for name in scores if name not in parts}
        watched |= {"finished": ended.astype(np.float64), "empty": empty.astype(np.float64)}
        watched["distinct_share"] = np.full(len(reports), distinct_share(reports))
        return RewardBreakdown(
            total=total,
            parts=parts,
            watched=watched,
            num_nan={name: int(np.isnan(values).sum()) for name, values in parts.items()},
            without_reward=tuple(int(index) for index in np.flatnonzero(np.isnan(total))),
        )

    def _score(self, report: str, reference: str, label: np.ndarray) -> dict[str, float]:
        named = np.asarray(self.extractor.labels(report), dtype=np.float64)
        num_words, num_reference_words = len(words_of(report)), len(words_of(reference))
        scores = {"clinical": finding_f1(named, label), "format": format_score(report)}
        scores |= dict.fromkeys(("laterality", "bleu", "rouge_l", "length_penalty"), math.nan)
        if num_reference_words:
            keys = {key for key, value in zip(self.extractor.keys, named, strict=True) if value == 1}
            scores["laterality"] = side_agreement(keys, self.extractor.sides(report), self.extractor.sides(reference))
            texts = (" ".join(report.split()), " ".join(reference.split()))  # a line break is no error of wording
            scores["bleu"] = float(np.mean(sentence_bleu(*texts)))
            scores["rouge_l"] = rouge_l(*texts)
            scores["length_penalty"] = self._length_penalty(num_words / num_reference_words)
        first, last = self.repetition_share
        repeated = max(repeated_ngram_share(report), repeated_sentence_share(report))
        scores["repetition_penalty"] = min(max((repeated - first) / (last - first), 0.0), 1.0)
        num_unsupported = float(((named == 1) & (label == 0)).sum())
        known = not np.isnan(label).all()
        scores["unsupported_penalty"] = (
            min(num_unsupported / (self.unsupported_share * len(label)), 1.0) if known else math.nan
        )
        return scores | {"num_positives": float(named.sum()), "num_words": float(num_words)}

    def _length_penalty(self, ratio: float) -> float:
        lower, upper = self.length_ratio
        return max((lower - ratio) / lower, min((ratio - upper) / upper, 1.0), 0.0)


def format_score(report: str) -> float:
    """Return the share of the two sections, findings and impression, that have a heading and a word: 0, .5 or 1."""
    # `parse_report` takes what stands before the first heading for findings; under a heading of its own it is not
    sections = parse_report("Technique: " + report)
    return ((1 if words_of(sections.findings) else 0) + (1 if words_of(sections.impression) else 0)) / 2


def _check_that_bert_score_runs(weight: float) -> None:

    reason = model_based_text_scores.available_model_based_scores()["bertscore"]
    if reason:
        raise ValueError(f"weights: 'bert_score' is {weight}, but {reason} Or set its weight to 0.")


def _bert_scores(reports: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return BERTScore's F1 (N,), in [0, 1], NaN where there is no reference."""
    scores = np.full(len(reports), math.nan)
    known = [index for index, reference in enumerate(references) if words_of(reference)]
    if known:
        texts = ([reports[index] for index in known], [references[index] for index in known])
        # F1 of cosines: it could be below 0, although no two texts are that unlike
        scores[known] = (
            model_based_text_scores.model_based_scores(["bertscore"], *texts)["bertscore"]
            .per_case["bertscore_f1"]
            .clip(0, 1)
        )
    return scores


def _mean_of_known(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Return the weighted mean over the parts that are not NaN, or NaN if there is none; all (N,)."""
    values = np.stack(list(parts.values()))
    weight = np.array([weights[name] for name in parts])[:, None] * ~np.isnan(values)
    sum_of_weights = weight.sum(0)
    weighted = (np.nan_to_num(values) * weight).sum(0)
    return np.where(sum_of_weights > 0, weighted / np.where(sum_of_weights > 0, sum_of_weights, 1), math.nan)


def _named_numbers(what: str, given: Mapping[str, float], names: Sequence[str], largest: float) -> dict[str, float]:
    strangers = sorted(set(given) - set(names))
    if strangers:
        raise ValueError(f"{what}: {strangers} are unknown, expected of {list(names)}.")
    for name, value in given.items():
        if not (math.isfinite(value) and 0 <= value <= largest):
            raise ValueError(f"{what}: {name!r} must be finite, at least 0 and at most {largest}, got {value}.")
    return {name: float(given.get(name, 0)) for name in names}


def _limits(what: str, given: Sequence[float], largest: float) -> tuple[float, float]:
    if len(given) != 2 or not 0 < given[0] < given[1] <= largest:
        raise ValueError(f"{what} must be two rising numbers above 0 and at most {largest}, got {list(given)}.")
    return float(given[0]), float(given[1])


def _check_weights(weights: Mapping[str, float], allow_lexical: bool) -> None:
    total = sum(weights.values())
    if total <= 0:
        raise ValueError(f"weights: at least one must be above 0, got {dict(weights)}.")
    clinical = sum(weights[name] for name in CLINICAL_PARTS) / total
    lexical = sum(weights[name] for name in LEXICAL_PARTS) / total
    rounding = 1e-9
    if not allow_lexical and (clinical < MIN_CLINICAL_SHARE - rounding or lexical > MAX_LEXICAL_SHARE + rounding):
        raise ValueError(
            f"weights: the clinical parts {CLINICAL_PARTS} have {clinical:.3f} of the total, expected at least "
            f"{MIN_CLINICAL_SHARE}, the lexical parts {LEXICAL_PARTS} {lexical:.3f}, expected at most "
            f"{MAX_LEXICAL_SHARE}: rewarded for wording, a model learns to invent. Change the weights, or set "
            "allow_lexical=True."
        )
