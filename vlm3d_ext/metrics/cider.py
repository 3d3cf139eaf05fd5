"""CIDEr-D of whole texts, with the parameters of pycocoevalcap."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .bleu import NGRAM_ORDERS, count_ngrams

__all__ = ["DocumentFrequencies", "cider_d"]

# Width of the penalty for a difference in length; short for reports of 200 words: 12 words more cost 86 %.
_SIGMA_WORDS = 6.0
_SCALE = 10.0


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many reference texts each run of one to four words occurs.

    Attributes:
        num_documents: the number of reference texts.
        counts: run of words -> number of reference texts that hold it.
    """

    num_documents: int
    counts: Mapping[tuple[str, ...], int]

    @classmethod
    def from_references(cls, references: Sequence[str]) -> DocumentFrequencies:
        """Count over the texts given; words are what lies between white space.

        Raises:
            ValueError: if there are no texts.
        """
        if not len(references):
            raise ValueError("document frequencies need at least one reference text, got none.")
        counts: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            words = reference.split()
            for order in NGRAM_ORDERS:
                counts.update(count_ngrams(words, order).keys())
        return cls(len(references), counts)

    def rarity(self, ngram: tuple[str, ...]) -> float:
        """Return log(number of texts / number of texts with this run of words); unseen ones count as seen once."""
        return math.log(self.num_documents) - math.log(max(1, self.counts.get(ngram, 0)))


def cider_d(
    hypotheses: Sequence[str], references: Sequence[str], frequencies: DocumentFrequencies | None = None
) -> np.ndarray:
    """Return CIDEr-D of each case, with one reference per case: (N,), in [0, 10].

    For each order n of 1 to 4 a text is the vector of its runs of n words, count times rarity. With h of the hypothesis
    and r of the reference, the similarity is sum min(h, r) r / (|h| |r|), times exp(-d² / (2 · 6²)) where d is the
    difference of their lengths; the score is 10 times the mean over n.

    A run of words that all N references hold weighs nothing. So a single case, whose every word is in all of one
    references, scores 0 whatever it says, and the value of a case depends on which other cases are scored with it. To
    score texts one at a time, or a part of a set, give the frequencies of the whole set.

    Source: Vedantam et al. 2015, equations 1-3 and section 6 (CIDEr-D); the figures are those of
    ``pycocoevalcap.cider.Cider`` on raw text, whose length of a text is its number of word pairs.

    Args:
        hypotheses: N generated texts; an empty one scores 0.
        references: N reference texts.
        frequencies: of the corpus that says what is rare; those of `references` by default.

    Raises:
        ValueError: if the numbers of texts differ, or there are none.
    """
    if len(hypotheses) != len(references) or not len(references):
        raise ValueError(
            f"CIDEr-D needs one reference per hypothesis and at least one of them, got {len(hypotheses)} hypotheses "
            f"and {len(references)} references."
        )
    frequencies = frequencies or DocumentFrequencies.from_references(references)
    pairs = zip(hypotheses, references, strict=True)
    return np.array([_score(hypothesis.split(), reference.split(), frequencies) for hypothesis, reference in pairs])


def _score(words: list[str], reference_words: list[str], frequencies: DocumentFrequencies) -> float:
    # pycocoevalcap's lengths are numbers of word pairs: the same difference, unless one text has no pair
    difference = max(0, len(words) - 1) - max(0, len(reference_words) - 1)
    penalty = math.exp(-(difference**2) / (2 * _SIGMA_WORDS**2))
    similarities = []
    for order in NGRAM_ORDERS:
        found, expected = _weights(words, order, frequencies), _weights(reference_words, order, frequencies)
        common = sum(
            min(weight, expected[ngram]) * expected[ngram] for ngram, weight in found.items() if ngram in expected
        )
        norms = _norm(found) * _norm(expected)
        similarities.append(penalty * common / norms if norms > 0 else 0.0)
    return _SCALE * sum(similarities) / len(similarities)


def _weights(words: list[str], order: int, frequencies: DocumentFrequencies) -> dict[tuple[str, ...], float]:
    return {ngram: count * frequencies.rarity(ngram) for ngram, count in count_ngrams(words, order).items()}


def _norm(weights: Mapping[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(weight * weight for weight in weights.values()))
