"""Word n-grams hashed into a fixed number of buckets: a text representation without vocabulary or weights."""

from __future__ import annotations

import hashlib
import re

__all__ = ["hash_ngrams", "words_of"]

_WORD = re.compile(r"[^\W\d_]+|\d+(?:[.,]\d+)*")
_NUMBER = "0"
# A control character cannot occur inside a word, so ("a", "b") and ("a b",) stay different n-grams.
_JOINT = "\x1f"


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words; every number becomes ``"0"``, so that 5 mm and 6 mm share their n-grams.

    Example:
        >>> words_of("Ground-glass nodule, 23x16.5mm.")
        ['ground', 'glass', 'nodule', '0', 'x', '0', 'mm']
    """
    return [_NUMBER if word[0].isdigit() else word for word in _WORD.findall(text.lower())]


def hash_ngrams(text: str, num_buckets: int, max_n: int = 2) -> list[int]:
    """Return the bucket of every word n-gram of a text, for n = 1 to `max_n`.

    The hash is BLAKE2b, the same on every machine and in every process (Python's own `hash` of a string is not).

    Source: bag of word n-grams with hashed buckets as in fastText (Bojanowski et al., "Enriching word vectors with
    subword information", TACL 2017; Joulin et al., "Bag of tricks for efficient text classification", EACL 2017);
    the hashing trick, Weinberger et al., "Feature hashing for large scale multitask learning", ICML 2009.

    Args:
        text: any text; upper and lower case are the same.
        num_buckets: number of buckets, at least 1.
        max_n: longest n-gram in words, at least 1.

    Returns:
        Integers in ``[0, num_buckets)``: first the unigrams in the order of the text, then the bigrams, and so on. A
        text of w words gives w + (w - 1) of them for `max_n` 2; an empty text gives an empty list.

    Raises:
        ValueError: if `num_buckets` or `max_n` is below 1.
    """
    if num_buckets < 1:
        raise ValueError(f"num_buckets must be at least 1, got {num_buckets}.")
    if max_n < 1:
        raise ValueError(f"max_n must be at least 1, got {max_n}.")
    words = words_of(text)
    return [
        _bucket(_JOINT.join(words[start : start + n]), num_buckets)
        for n in range(1, max_n + 1)
        for start in range(len(words) - n + 1)
    ]


def _bucket(ngram: str, num_buckets: int) -> int:
    digest = hashlib.blake2b(ngram.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % num_buckets
