"""How much a text repeats itself, and a batch of texts one another: what a language model falls into under a reward."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .hashed_ngrams import words_of
from .report_sections import split_sentences

__all__ = ["distinct_share", "repeated_ngram_share", "repeated_sentence_share"]


def repeated_ngram_share(text: str, n: int = 4) -> float:
    """Return the share of word n-grams that stood in the text before; numbers are all alike, case does not matter.

    Args:
        text: any text.
        n: words of an n-gram, at least 1.

    Returns:
        In [0, 1): 0 if each n-gram occurs once, or the text has fewer than n words.

    Raises:
        ValueError: if `n` is below 1.

    Example:
        >>> repeated_ngram_share("No mass. No mass. No mass.", n=2)  # no mass, mass no, no mass, mass no, no mass
        0.6
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    words = words_of(text)
    return _repeated_share([tuple(words[start : start + n]) for start in range(len(words) - n + 1)])


def repeated_sentence_share(text: str) -> float:
    """Return the share of sentences that stood in the text before, in [0, 1); numbers are all alike."""
    return _repeated_share([tuple(words_of(sentence)) for sentence in split_sentences(text)])


def distinct_share(reports: Sequence[str]) -> float:
    """Return the number of different texts divided by the number of texts; 1 / N where all are the same.

    Case, punctuation and the values of numbers make no difference.

    Raises:
        ValueError: if there is no text.
    """
    if not reports:
        raise ValueError("distinct_share needs at least one text, got none.")
    return 1 - _repeated_share([tuple(words_of(report)) for report in reports])


def _repeated_share(items: Sequence[Hashable]) -> float:
    return (len(items) - len(set(items))) / len(items) if items else 0.0
