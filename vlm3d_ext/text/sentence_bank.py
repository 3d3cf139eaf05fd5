"""All sentences of the training reports, ready to be drawn as true or untrue statements about a scan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.anatomical_regions import NUM_REGIONS, region_by_name
from .hashed_ngrams import hash_ngrams, words_of
from .report_sections import split_sentences
from .sentence_regions import regions_of_sentence

__all__ = ["Sentence", "SentenceBank", "normalise_sentence"]


def normalise_sentence(sentence: str) -> str:
    """Return the sentence in lower case with one space between words, numbers as "#", and no final stop.

    Two findings that differ in their measurements only are thereby one statement.
    """
    words = sentence.lower().strip().rstrip(".").split()
    return " ".join("#" if any(letter.isdigit() for letter in word) else word for word in words)


@dataclass(frozen=True)
class Sentence:
    """One statement.

    Attributes:
        text: normalised.
        ngram_ids: hashed n-grams, 1 to the bank's num_buckets - 1 (0 is padding), at most as many as the bank keeps.
        regions: 0 / 1 for each of the 20 regions; all 0 if it speaks of the whole chest.
    """

    text: str
    ngram_ids: tuple[int, ...]
    regions: tuple[int, ...]


@dataclass
class SentenceBank:
    """The distinct sentences of a set of reports, in the order of their first appearance.

    Args:
        reports: mappings with "findings" and "impression"; None where a case has no report.
        num_buckets: ids of the hashed n-grams, with the 0 that is padding; at least 2.
        max_ngrams: n-grams kept of a sentence.
    """

    reports: Iterable[Mapping[str, str] | None]
    num_buckets: int = 16384
    max_ngrams: int = 64
    sentences: list[Sentence] = field(init=False)
    _by_text: dict[str, Sentence] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._by_text = {}
        for report in self.reports:
            self.sentences_of(report)
        self.sentences = list(self._by_text.values())
        self.reports = ()

    @classmethod
    def from_cases(cls, cases: Sequence[Mapping[str, Any]], num_buckets: int, max_ngrams: int = 64) -> SentenceBank:
        """Build a bank from manifest cases; give it training cases only."""
        return cls((case.get("report") for case in cases), num_buckets, max_ngrams)

    def sentences_of(self, report: Mapping[str, str] | None) -> list[Sentence]:
        """Return the distinct sentences of one report, which need not belong to the bank."""
        if report is None:
            return []
        found: dict[str, Sentence] = {}
        for section in ("findings", "impression"):
            for raw in split_sentences(report.get(section) or ""):
                text = normalise_sentence(raw)
                if words_of(text) and text not in found:  # a number alone states nothing
                    found[text] = self._by_text.get(text) or self._encode(text, raw)
        if not hasattr(self, "sentences"):
            self._by_text.update(found)
        return list(found.values())

    def _encode(self, text: str, raw: str) -> Sentence:
        regions = [0] * NUM_REGIONS
        for name in regions_of_sentence(raw):
            regions[region_by_name(name).index - 1] = 1
        return Sentence(text, self._ngram_ids(text), tuple(regions))

    def _ngram_ids(self, text: str) -> tuple[int, ...]:
        # id 0 is padding, so that the hashes fill the ids from 1 on
        return tuple(1 + bucket for bucket in hash_ngrams(text, self.num_buckets - 1)[: self.max_ngrams])
