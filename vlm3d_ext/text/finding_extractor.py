"""Which findings a radiology report affirms, by rules: words, negation, doubt, history, sizes and sides.

No model and no weights, so that it is quick enough for a reward in training and gives the same answer everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .finding_patterns import FindingPatterns, lexicon_patterns, patterns_of_finding
from .label_set import LabelSet, load_label_set
from .negation_scope import SentenceScopes, scopes_of_sentence
from .report_sections import parse_report, split_sentences
from .sentence_regions import regions_of_sentence

__all__ = ["FindingExtractor", "FindingMention"]

_SIZE = re.compile(
    r"(\d+(?:[.,]\d+)?)(?:\s*[x×*]\s*(\d+(?:[.,]\d+)?))?(?:\s*[x×*]\s*(\d+(?:[.,]\d+)?))?\s*-?(mm|cm|millimet|centimet)"
)
# "the coronary arteries show no calcification", "the heart is not enlarged"
_DENIED_WITHIN = re.compile(r" (?:no|not|without) ")
# the size that a finding had before says nothing of today's
_FORMER_SIZE = re.compile(r"^\w*[^.;]{0,12}\bin (?:the |his |her )?(?:previous|prior|old)\b")
_SIDE_WORD = re.compile(r"\b(left|right|both|bilateral(?:ly)?|each)\b")
# sides of other things than lungs and pleura
_NO_SIDE = re.compile(
    r"\b(?:left|right|both)[- ](?:atri|ventric|coronar|main|subclav|jugular|adrenal|kidney|renal|heart|facing|breast|"
    r"axill|pulmonary arter|brachio|aort)\w*"
)
_SIDES_OF_WORD = {"left": ("left",), "right": ("right",)}
_LINK = re.compile(r"[,;.()]|\b(?:in|on|at|of|and|or|with|is|are|was|were|there|side|sides|lungs)\b")
_SIDE_OF_LOBE = ((re.compile(r"\blingul"), "left"), (re.compile(r"\bmiddle lobe"), "right"))
# CT-RATE's impressions are lists whose items are separated by quotation marks or bullets alone
_ITEM_MARK = re.compile(r"\s*(?:[\"“”]+\s+(?=[A-Z•])|[•●▪])\s*")


@dataclass(frozen=True)
class FindingMention:
    """What one sentence says of one finding.

    Args:
        key: the finding's key.
        status: "present", "absent", "uncertain" or "history" (it was there before and is not now).
        sentence: the sentence.
        sides: of "left" and "right" those that the sentence names for it, both for "bilateral" or "both lungs".
        regions: names of anatomical regions (`vlm3d_ext.data.anatomical_regions`) that the sentence speaks of.
        sizes_mm: measurements of it in mm, without those of earlier examinations.
    """

    key: str
    status: str
    sentence: str
    sides: tuple[str, ...]
    regions: tuple[str, ...]
    sizes_mm: tuple[float, ...]


@dataclass(frozen=True)
class _Match:
    key: str
    status: str
    start: int
    end: int
    sizes_mm: tuple[float, ...] = ()


class FindingExtractor:
    """Reads findings, their sides and sizes from a report's findings, impression and recommendations.

    Clinical information and technique are not read: "Clinical information: pleural effusion?" is no finding. The
    words are those of `finding_lexicons/chest_ct.json`, by finding key, whatever set the key belongs to. A finding of
    your own whose key is not there is looked for by its name and synonyms.

    A few conventions follow CT-RATE's labels, which were read from reports too. A finding that decreased or regressed
    is present until it is gone. Reported lymph nodes count unless they are called millimetric, normal or not
    pathological, or measure less than 5 mm on the short axis. A nodule above 30 mm is a mass, a mass below 30 mm a
    nodule.

    Args:
        label_set: the findings, their set's name or path, several joined by "+".
        uncertain_is_present: whether `labels` and `sides` count what is only suspected ("pneumonia?", "cannot be
            excluded").

    Raises:
        ValueError: if the set does not exist, or has a finding without synonyms whose key is not in the lexicon.

    Example:
        >>> extractor = FindingExtractor("ct_rate_18")
        >>> report = "No pericardial effusion. Small left pleural effusion, heart size is normal."
        >>> [name for name, label in zip(extractor.names, extractor.labels(report)) if label]
        ['Pleural effusion']
    """

    def __init__(self, label_set: LabelSet | str = "ct_rate_18", uncertain_is_present: bool = True) -> None:
        self.label_set = label_set if isinstance(label_set, LabelSet) else load_label_set(label_set)
        self.uncertain_is_present = uncertain_is_present
        patterns = dict(lexicon_patterns())
        patterns.update({finding.key: patterns_of_finding(finding) for finding in self.label_set.findings})
        # all of the lexicon is searched, so that a finding reads the same whichever set it is asked for with
        self._searched = tuple(entry for entry in patterns.values() if entry.words)
        self._sources = {key: (key, *patterns[key].follows_from) for key in self.keys}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the findings, in the order of the labels."""
        return self.label_set.names

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the findings, in the same order."""
        return self.label_set.keys

    def mentions(self, report: str) -> list[FindingMention]:
        """Return what the sentences of a report say of the findings, in the order of the text.

        A finding that follows from another (CT-RATE's lung opacity from consolidation) has the mentions of both.
        """
        found: dict[FindingMention, None] = {}
        for sentence, text, matches in self._read(report):
            regions: tuple[str, ...] | None = None
            for key, sources in self._sources.items():
                for match in matches:
                    if match.key in sources:
                        regions = tuple(regions_of_sentence(sentence)) if regions is None else regions
                        sides = _sides_of_match(text, match, matches)
                        mention = FindingMention(key, match.status, sentence, sides, regions, match.sizes_mm)
                        found[mention] = None
        return list(found)

    def labels(self, report: str) -> np.ndarray:
        """Return (L,) labels: 1.0 where any sentence affirms the finding, else 0.0, also where none mentions it."""
        present = {match.key for _, _, matches in self._read(report) for match in matches if self._counts(match.status)}
        return np.array([float(not present.isdisjoint(self._sources[key])) for key in self.keys])

    def sides(self, report: str) -> dict[str, frozenset[str]]:
        """Return the sides ("left", "right") of each finding that is present; an empty set if none is named."""
        named: dict[str, frozenset[str]] = {}
        for _, text, matches in self._read(report):
            for match in matches:
                if self._counts(match.status):
                    sides = frozenset(_sides_of_match(text, match, matches))
                    named[match.key] = named.get(match.key, frozenset()) | sides
        return {
            key: frozenset(side for source in sources for side in named.get(source, ()))
            for key, sources in self._sources.items()
            if not named.keys().isdisjoint(sources)
        }

    def _counts(self, status: str) -> bool:
        return status == "present" or (self.uncertain_is_present and status == "uncertain")

    def _read(self, report: str) -> Iterator[tuple[str, str, list[_Match]]]:
        """Yield each sentence that mentions a finding of the lexicon, as it is and in lower case, with the matches."""
        sections = parse_report(report)
        for section in (sections.findings, sections.impression, sections.recommendations):
            for sentence in split_sentences(_ITEM_MARK.sub("\n", section)):
                text = " ".join(sentence.lower().split())
                matches = self._matches(text)
                if matches:
                    yield sentence, text, matches

    def _matches(self, text: str) -> list[_Match]:
        matches: list[_Match] = []
        scopes: SentenceScopes | None = None
        for entry in self._searched:
            if entry.patterns is None or not any(word in text for word in entry.words):
                continue
            if _is_elsewhere(entry, text):
                continue
            denied = [match.span() for match in entry.normal.finditer(text)] if entry.normal else []
            ignored = [match.span() for match in entry.excluded.finditer(text)] if entry.excluded else []
            matches += [_Match(entry.key, "absent", *span) for span in denied]
            for match in entry.patterns.finditer(text):
                if any(match.start() < last and first < match.end() for first, last in (*denied, *ignored)):
                    continue
                scopes = scopes or scopes_of_sentence(text)
                denied_within = _DENIED_WITHIN.search(match.group())
                status = "absent" if denied_within else scopes.status(match.start(), match.end())
                matches.append(_Match(entry.key, status, match.start(), match.end()))
        return _measured(text, matches) if matches and re.search(r"\d", text) else matches


def _is_elsewhere(entry: FindingPatterns, text: str) -> bool:
    if entry.elsewhere is None or not entry.elsewhere.search(text):
        return False
    return entry.here is None or not entry.here.search(text)


def _measured(text: str, matches: list[_Match]) -> list[_Match]:
    """Give each size to the mention next to it, and apply the size limits of the lexicon."""
    sizes: dict[int, list[tuple[float, ...]]] = {}
    for found in _SIZE.finditer(text):
        if _FORMER_SIZE.search(text[found.end() :]):
            continue
        unit = 10.0 if found.group(4).startswith("c") else 1.0
        axes = tuple(float(axis.replace(",", ".")) * unit for axis in found.groups()[:3] if axis)
        nearest = min(range(len(matches)), key=lambda i: _distance(matches[i], found.start(), found.end()))
        sizes.setdefault(nearest, []).append(axes)
    return [_with_sizes(match, sizes.get(index, [])) for index, match in enumerate(matches)]


def _distance(match: _Match, start: int, end: int) -> int:
    return max(start - match.end, match.start - end, 0)


def _with_sizes(match: _Match, sizes: list[tuple[float, ...]]) -> _Match:
    if not sizes:
        return match
    entry = lexicon_patterns().get(match.key)
    key, status = match.key, match.status
    if entry is not None:
        decisive = max(min(axes) if entry.short_axis else max(axes) for axes in sizes)
        if decisive > entry.largest_mm and entry.larger_is:
            key = entry.larger_is
        elif decisive < entry.smallest_mm:
            key, status = entry.smaller_is or key, status if entry.smaller_is else "absent"
    return _Match(key, status, match.start, match.end, tuple(axis for axes in sizes for axis in axes))


def _sides_of_match(text: str, match: _Match, matches: list[_Match]) -> tuple[str, ...]:
    """Return the sides named for a mention: those next to it if several findings share the sentence, else all."""
    other_things = [found.span() for found in _NO_SIDE.finditer(text)]
    words = [
        found
        for found in _SIDE_WORD.finditer(text)
        if not any(first <= found.start() < last for first, last in other_things)
    ]
    if not words:
        return tuple(side for pattern, side in _SIDE_OF_LOBE if pattern.search(text))
    after = min((other.start for other in matches if other.start >= match.end), default=len(text))
    own = [word for word in words if _is_attribute(text, word, match.start) or match.start <= word.start() < match.end]
    own += [word for word in words if match.end <= word.start() < after and not _is_attribute(text, word, after)]
    if not own:
        before = min((other.start for other in matches), default=0)
        own = [word for word in words if word.start() < before] or words
    sides = {side for word in own for side in _SIDES_OF_WORD.get(word.group(1), ("left", "right"))}
    return tuple(side for side in ("left", "right") if side in sides)


def _is_attribute(text: str, word: re.Match[str], start: int) -> bool:
    """Whether a side belongs to the noun at `start`, as in "left lower lobe atelectasis"."""
    return word.end() <= start and not _LINK.search(text, word.end(), start)
