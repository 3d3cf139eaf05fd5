"""BLEU-1 to BLEU-4 of whole texts, with the constants of pycocoevalcap."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["NGRAM_ORDERS", "corpus_bleu", "count_ngrams", "sentence_bleu"]

NGRAM_ORDERS = (1, 2, 3, 4)

# pycocoevalcap's own: no matching n-gram gives a score that is nearly 0 instead of 0, and no n-gram at all (a text of
# fewer than n words) a precision of 1e-6. Other values would not give the challenge's figures.
_TINY = 1e-15
_SMALL = 1e-9


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return BLEU of a corpus, and of each of its cases alone, with one reference per case.

    Words are what lies between white space: "effusion." and "effusion" differ, and so do "No" and "no". BLEU-k is the
    brevity penalty times the geometric mean of the clipped precisions of 1 to k words. The corpus value pools the
    counts of all cases before it divides; it is not the mean of the values of the cases.

    Source: Papineni et al. 2002, section 2.3; the figures are those of ``pycocoevalcap.bleu.Bleu(4)`` on raw text.

    Args:
        hypotheses: N generated texts; an empty one scores 0.
        references: N reference texts.

    Returns:
        BLEU-1 to BLEU-4 of the corpus (4,), and of each case (N, 4), in [0, 1].

    Raises:
        ValueError: if the numbers of texts differ, or there are none.
    """
    if len(hypotheses) != len(references) or not len(references):
        raise ValueError(
            f"BLEU needs one reference per hypothesis and at least one of them, got {len(hypotheses)} hypotheses and "
            f"{len(references)} references."
        )
    counts = [_count(hypothesis, reference) for hypothesis, reference in zip(hypotheses, references, strict=True)]
    per_case = np.array([_score(*case) for case in counts])
    total = [np.sum(column, axis=0).tolist() for column in zip(*counts, strict=True)]
    return np.array(_score(*total)), per_case


def sentence_bleu(hypothesis: str, reference: str) -> tuple[float, float, float, float]:
    """Return BLEU-1 to BLEU-4 of one text, as `corpus_bleu` gives them for a case.

    Without a common run of four words BLEU-4 is not 0 but tiny (1e-4 or less), and an exact copy of fewer than four
    words does not reach 1: "no effusion seen" against itself has a BLEU-4 of 1e-6 ** (1/4) = 0.03.
    """
    return _score(*_count(hypothesis, reference))


def count_ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Return how often each run of `order` words occurs."""
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _count(hypothesis: str, reference: str) -> tuple[list[int], list[int], int, int]:
    """Return the matching and all n-grams of the hypothesis for each order, and both lengths in words."""
    words, reference_words = hypothesis.split(), reference.split()
    matching = []
    for order in NGRAM_ORDERS:
        in_reference = count_ngrams(reference_words, order)
        found = count_ngrams(words, order)
        matching.append(sum(min(count, in_reference[ngram]) for ngram, count in found.items() if ngram in in_reference))
    possible = [max(0, len(words) - order + 1) for order in NGRAM_ORDERS]
    return matching, possible, len(words), len(reference_words)


def _score(
    matching: Sequence[int], possible: Sequence[int], length: int, reference_length: int
) -> tuple[float, float, float, float]:
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity_penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for order, matches, total in zip(NGRAM_ORDERS, matching, possible, strict=True):
        product *= (matches + _TINY) / (total + _SMALL)
        scores.append(product ** (1 / order) * brevity_penalty)
    return scores[0], scores[1], scores[2], scores[3]
