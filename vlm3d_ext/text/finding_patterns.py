"""The words of findings in reports, compiled from `finding_lexicons/chest_ct.json`.

An entry of the lexicon, by finding key, may have

- ``words``: parts of words; a sentence with none of them is not searched any further;
- ``patterns``: regular expressions of the finding, on lower-case text; "not" inside a match denies it;
- ``normal``: expressions that say that the finding is absent ("heart size is normal");
- ``except``: what looks like the finding and is another thing ("subcutaneous emphysema");
- ``elsewhere``, ``here``: a sentence that speaks of a place `elsewhere`, and of none `here`, is about another organ;
- ``smallest_mm``, ``largest_mm``: sizes (of the short axis, with ``short_axis``) for which it is this finding, bounds
  included; ``smaller_is``, ``larger_is``: what it is otherwise, by default nothing abnormal;
- ``follows_from``: findings each of which is one of this kind, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .label_set import Finding

__all__ = ["FindingPatterns", "lexicon_patterns", "patterns_of_finding"]

_LEXICON = Path(__file__).parent / "finding_lexicons" / "chest_ct.json"


@dataclass(frozen=True)
class FindingPatterns:
    """How one finding is recognised; see the module for the meaning of each part.

    Args:
        key: the finding.
        words: at least one of them is in every sentence that can match; none means that nothing matches.
    """

    key: str
    words: tuple[str, ...] = ()
    patterns: re.Pattern[str] | None = None
    normal: re.Pattern[str] | None = None
    excluded: re.Pattern[str] | None = None
    elsewhere: re.Pattern[str] | None = None
    here: re.Pattern[str] | None = None
    short_axis: bool = False
    smallest_mm: float = 0.0
    largest_mm: float = float("inf")
    smaller_is: str | None = None
    larger_is: str | None = None
    follows_from: tuple[str, ...] = ()


@cache
def lexicon_patterns() -> Mapping[str, FindingPatterns]:
    """Return the patterns of the shipped lexicon by finding key."""
    entries = json.loads(_LEXICON.read_text(encoding="utf-8"))["findings"]
    return {key: _compile_entry(key, entry) for key, entry in entries.items()}


def patterns_of_finding(finding: Finding) -> FindingPatterns:
    """Return the lexicon's patterns of a finding, or such as look for its name and synonyms, in singular or plural.

    Raises:
        ValueError: if the lexicon does not have the finding's key and the finding has no synonyms.
    """
    known = lexicon_patterns().get(finding.key)
    if known is not None:
        return known
    if not finding.synonyms:
        raise ValueError(
            f"finding {finding.name!r}: its key {finding.key!r} is not in the lexicon {_LEXICON.name} and it has no "
            "synonyms, expected at least one word that reports use for it; add 'synonyms' to the label set, or use one "
            f"of the keys {sorted(lexicon_patterns())}."
        )
    phrases = [re.findall(r"[^\s-]+", phrase.lower()) for phrase in (finding.name, *finding.synonyms)]
    expressions = [r"[\s-]+".join(re.escape(word) for word in phrase) + "(?:s|es)?" for phrase in phrases if phrase]
    words = {max(phrase, key=len) for phrase in phrases if phrase}
    return FindingPatterns(finding.key, tuple(sorted(words)), _compile(rf"\b{text}\b" for text in expressions))


def _compile_entry(key: str, entry: Mapping[str, Any]) -> FindingPatterns:
    return FindingPatterns(
        key=key,
        words=tuple(entry.get("words", ())),
        patterns=_compile(entry.get("patterns", ())),
        normal=_compile(entry.get("normal", ())),
        excluded=_compile(entry.get("except", ())),
        elsewhere=_compile([entry["elsewhere"]] if "elsewhere" in entry else ()),
        here=_compile([entry["here"]] if "here" in entry else ()),
        short_axis=entry.get("short_axis", False),
        smallest_mm=entry.get("smallest_mm", 0.0),
        largest_mm=entry.get("largest_mm", float("inf")),
        smaller_is=entry.get("smaller_is"),
        larger_is=entry.get("larger_is"),
        follows_from=tuple(entry.get("follows_from", ())),
    )


def _compile(expressions: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(f"(?:{expression})" for expression in expressions)
    return re.compile(joined) if joined else None
