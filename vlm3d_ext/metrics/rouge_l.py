"""ROUGE-L of whole texts, with the weights of pycocoevalcap."""

from __future__ import annotations

__all__ = ["common_subsequence_length", "rouge_l"]

# Recall weighs more than precision by the square of this.
_BETA = 1.2


def rouge_l(hypothesis: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words, in [0, 1].

    With L its length, P = L / words of the hypothesis and R = L / words of the reference, it is
    (1 + 1.2²) P R / (R + 1.2² P).

    Words are what lies between single spaces, as pycocoevalcap has it: a line break does not part words, and two spaces
    in a row hold an empty word. A hypothesis of white space only scores 0; pycocoevalcap counts its empty words as
    matches where the reference has double spaces, which is the one difference.

    Source: Lin 2004, section 3.1; the figures are those of ``pycocoevalcap.rouge.Rouge`` on raw text.
    """
    if not hypothesis.strip():
        return 0.0
    words, reference_words = hypothesis.split(" "), reference.split(" ")
    common = common_subsequence_length(words, reference_words)
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(reference_words)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def common_subsequence_length(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence of two lists of words.

    One row of the table of the usual dynamic programme is one whole number here, whose zero bits say where the length
    grows by one; a word of `second` costs four operations on that number, whatever the length of `first`.

    Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(first) - row.bit_count()
