"""All word-overlap scores of generated reports at once: BLEU, ROUGE-L, CIDEr-D and the two METEORs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bleu import NGRAM_ORDERS, corpus_bleu
from .cider import cider_d
from .meteor import meteor_1_5, meteor_1_5_absent, meteor_exact_stem, meteor_exact_stem_absent
from .rouge_l import rouge_l

__all__ = ["TextScores", "score_texts"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextScores:
    """Word-overlap scores of generated texts against reference texts.

    Attributes:
        case_ids: the N cases that are scored, in the order of the arrays.
        per_case: ``"bleu_1"`` to ``"bleu_4"``, ``"rouge_l"``, ``"cider"``, ``"meteor_exact_stem"`` and
            ``"meteor_1_5"``, each (N,); a metric that is absent has no entry.
        mean: ``"bleu_1_corpus"`` to ``"bleu_4_corpus"`` and ``"meteor_1_5_corpus"``, which pool the counts of all cases
            and are not means of cases, and the mean of the cases for the others; these are the figures that
            pycocoevalcap gives.
        absent: metric -> why it has no value.
        left_out: the cases without a reference text, which no score counts.
    """

    case_ids: list[str]
    per_case: dict[str, np.ndarray]
    mean: dict[str, float]
    absent: dict[str, str]
    left_out: list[str]


def score_texts(
    hypotheses: Sequence[str], references: Sequence[str], case_ids: Sequence[str], *, with_meteor_1_5: bool = False
) -> TextScores:
    """Score generated texts with one reference each, on raw text: nothing is lower-cased or stripped of punctuation.

    An empty hypothesis scores 0. A case whose reference is empty is left out of all metrics, also of the document
    frequencies of CIDEr-D, and is named in the result and in the log.

    Args:
        hypotheses: generated texts.
        references: reference texts, in the same order.
        case_ids: names of the cases, in the same order.
        with_meteor_1_5: also run METEOR 1.5, the challenge's, in Java; takes some 10 s to start.

    Raises:
        ValueError: if the lengths differ, a name occurs twice, or no reference holds any text.
        TypeError: if a text is not a string, such as the NaN that pandas reads from an empty cell.
    """
    _check(hypotheses, references, case_ids)
    kept = [index for index, reference in enumerate(references) if reference.strip()]
    left_out = [case_ids[index] for index in sorted(set(range(len(case_ids))) - set(kept))]
    if not kept:
        raise ValueError(
            f"all {len(references)} reference texts are empty, so there is nothing to score against; check which "
            "column or section of the reports the references come from."
        )
    if left_out:
        _logger.warning("%d of %d cases have no reference text: %s", len(left_out), len(case_ids), ", ".join(left_out))
    hypotheses, references = [hypotheses[index] for index in kept], [references[index] for index in kept]
    pairs = list(zip(hypotheses, references, strict=True))

    corpus, bleu = corpus_bleu(hypotheses, references)
    per_case = {f"bleu_{order}": bleu[:, column] for column, order in enumerate(NGRAM_ORDERS)}
    mean = {f"bleu_{order}_corpus": float(value) for order, value in zip(NGRAM_ORDERS, corpus, strict=True)}
    absent: dict[str, str] = {}

    per_case["rouge_l"] = np.array([rouge_l(*pair) for pair in pairs])
    if len(pairs) > 1:
        per_case["cider"] = cider_d(hypotheses, references)
    else:
        absent["cider"] = (
            "CIDEr-D weighs words by how few of the references hold them: of a single case it is 0 whatever the text "
            "says; score two cases or more, or call cider_d with the document frequencies of a larger set."
        )
    if reason := meteor_exact_stem_absent():
        absent["meteor_exact_stem"] = reason
    else:
        per_case["meteor_exact_stem"] = np.array([meteor_exact_stem(*pair) for pair in pairs])
    mean.update({name: float(per_case[name].mean()) for name in per_case if not name.startswith("bleu")})

    if not with_meteor_1_5:
        absent["meteor_1_5"] = "not asked for (with_meteor_1_5=False)"
    elif reason := meteor_1_5_absent():
        absent["meteor_1_5"] = reason
    else:
        try:
            mean["meteor_1_5_corpus"], per_case["meteor_1_5"] = meteor_1_5(hypotheses, references)
        except (TimeoutError, RuntimeError) as error:
            # the other scores stand, and an evaluation of hours is not lost with this one
            absent["meteor_1_5"] = str(error)
    if with_meteor_1_5 and "meteor_1_5" in absent:
        _logger.warning("METEOR 1.5 is absent: %s", absent["meteor_1_5"])
    return TextScores([case_ids[index] for index in kept], per_case, mean, absent, left_out)


def _check(hypotheses: Sequence[str], references: Sequence[str], case_ids: Sequence[str]) -> None:
    if not len(hypotheses) == len(references) == len(case_ids):
        raise ValueError(
            f"expected one hypothesis and one reference for each case, got {len(hypotheses)} hypotheses, "
            f"{len(references)} references and {len(case_ids)} case ids."
        )
    if not len(case_ids):
        raise ValueError("there are no cases to score; give at least one hypothesis with its reference.")
    repeated = [case_id for case_id, count in Counter(case_ids).items() if count > 1]
    if repeated:
        raise ValueError(f"each case is scored once, but these occur more than once: {', '.join(repeated[:5])}.")
    for what, texts in (("hypothesis", hypotheses), ("reference", references)):
        for case_id, text in zip(case_ids, texts, strict=True):
            if not isinstance(text, str):
                raise TypeError(f"case {case_id}: the {what} is {text!r}, expected a str; give '' where there is none.")
