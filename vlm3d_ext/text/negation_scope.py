"""Whether a report sentence affirms, denies, doubts or remembers what stands at a place in it.

The cues are the tables at the top; a scope is the stretch of the sentence that a cue speaks of. "No A or B was
detected" denies forward up to the end of its clause, "A was not detected" backward to the beginning of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["STATUSES", "SentenceScopes", "scopes_of_sentence"]

STATUSES = ("present", "absent", "uncertain", "history")
"""What a sentence may say of a finding; "history": it was there before, and is not now."""

_SEEN = (
    r"(?:observed|detected|seen|noted|found|identified|present|visuali[sz]ed|demonstrated|distinguished|encountered|"
    r"determined|shown|appreciated|evident|visible|noticed|selected|monitored|recorded|depicted|apparent)"
)
_BEFORE = r"(?:previous|prior|old|earlier|former)"
_NOW = r"(?:this|the current|current|the present|the actual|the new|today's)"

# Words that look like a denial of a finding and are none; they are blanked before cues are searched.
_NO_DENIAL = re.compile(
    r"\bno(?:t)? (?:a |any )?(?:obvious |significant |clear |notable |marked |dimensional |appreciable )*"
    r"(?:interval |size |further |numerical |dimensional )*"
    r"(?:change|difference|progression|regression|differ\w*|increase in (?:size|number)|decrease in (?:size|number))\b"
    r"|\b(?:did|does|do) not (?:differ|change)\w*|\bnot (?:only|yet|fully|completely resolved)\b"
    r"|\bwithout (?:any |significant )?(?:change|difference|\w+ ?contrast|contrast|iv\b)"
    r"|\bno (?:intravenous |iv )?contrast\b"
    rf"|\bnot (?:been )?(?:clearly )?{_SEEN} (?:clearly )?(?:in|on|at) (?:the |his |her )?{_BEFORE}\b"
)
_DENIES_FORWARD = re.compile(
    r"\b(?:no(?! longer\b)|without|free (?:of|from)|absence of|lack of|negative for|neither|nor|never|devoid of"
    r"|not (?:show|have|contain|demonstrate|reveal|exhibit|suggest\w*|consistent|compatible|accompanied|any)"
    r"|(?:is|are|was|were) not (?:an? |any ))\b"
)
_DENIES_BACKWARD = re.compile(
    r"\b(?:not|never|cannot|can't|isn't|wasn't|weren't) (?:be |been )?"
    r"(?:clearly |definitely |distinctly |significantly )?"
    rf"{_SEEN}\b|\b(?:is|are|was|were) absent\b|: ?(?:none|no|absent|negative)\b"
    r"|\b(?:has|have|had|is|are|was|were) (?:been )?(?:excluded|ruled out)\b"
)
_REMEMBERS_BACKWARD = re.compile(
    rf"\bno longer\b|\b(?:completely |totally |fully )?(?:resolved|disappeared|vanished)\b|\bdisappearance\b"
    rf"|\b(?:complete|total)(?:ly)? (?:regress|resol)\w*|\bregress\w* (?:completely|totally|entirely)\b"
    rf"|\bnot (?:been )?(?:clearly )?{_SEEN} (?:clearly )?(?:in|on|at) {_NOW}\b"
)
_WAS_THERE = re.compile(
    rf"(?<!which )(?<!that )\b(?:was|were|had been) (?:also )?{_SEEN} (?:\w+ )?(?:in|on) (?:the |his |her )?{_BEFORE}\b"
)
_REMEMBERS_FORWARD = re.compile(
    r"\b(?:history of|operated for|treated for|status post|resolution of|disappearance of"
    r"|(?:complete|total) regression of)\b"
)
_DOUBTS_FORWARD = re.compile(
    r"\b(?:(?<!as )possibl[ey]|probabl[ey]|suspicious (?:for|of)|suspected|suspicion of|questionable|question of"
    r"|in terms of|(?:may|might|could) (?:be|represent|indicate|reflect|belong to|correspond to)|differential diagnosis"
    r"|(?:cannot|can not|could not|can't) (?:be )?(?:exclude|rule out)(?!d)|to (?:rule out|exclude))\b"
)
_DOUBTS_BACKWARD = re.compile(
    r"\b(?:cannot|can not|could not|can't|not) (?:be )?(?:completely |definitely |reliably |clearly )?"
    r"(?:excluded|ruled out)\b|\bshould be (?:excluded|considered|ruled out|kept in mind)\b"
    r"|\b(?:is|are) (?:suspected|possible|questionable)\b|\?"
)
# Its contents are what a denial leaves out: "no pathology other than emphysema".
_EXCEPTION = re.compile(
    r"\b(?:apart from|other than|aside from|except(?:ing)?(?: for)?|with the exception of|besides)\b[^,;]*"
)
_CLAUSE_END = re.compile(
    r"[;:]|\b(?:but|however|although|though|whereas|while|yet|only)\b"
    r"|,? (?:and )?there (?:is|are|was|were|has|have)\b|, (?:a|an|in addition|also|which)\b"
)
_VERB = re.compile(r"(?<!which )(?<!that )(?<!who )\b(?:is|are|was|were|has|have|had|shows?|showed|appears?)\b")
_JOINT = re.compile(r",|\band\b")
_THERE_IS = re.compile(r"\bthere (?:is|are|was|were)(?: \w+)? $")


@dataclass(frozen=True)
class SentenceScopes:
    """The scopes of the cues of one sentence, as spans of its characters.

    Args:
        absent: what is denied.
        history: what was there before.
        uncertain: what is doubted.
        excepted: what a denial leaves out.
    """

    absent: tuple[tuple[int, int], ...] = ()
    history: tuple[tuple[int, int], ...] = ()
    uncertain: tuple[tuple[int, int], ...] = ()
    excepted: tuple[tuple[int, int], ...] = ()

    def status(self, start: int, end: int) -> str:
        """Return one of `STATUSES` for the words at `[start, end)`.

        What is denied as well as doubted ("no suspicious nodule") is absent, and what was there before and is denied
        now is history. Only words that lie in a scope with at least their first half are in it.
        """
        middle = (start + end) // 2

        def within(spans: tuple[tuple[int, int], ...]) -> bool:
            return any(first <= middle < last for first, last in spans)

        if within(self.history):
            return "history"
        if within(self.absent) and not within(self.excepted):
            return "absent"
        return "uncertain" if within(self.uncertain) else "present"


def scopes_of_sentence(text: str) -> SentenceScopes:
    """Find what a sentence denies, doubts or remembers.

    Args:
        text: one sentence in lower case with single spaces.

    Example:
        >>> scopes = scopes_of_sentence("pericardial effusion was not observed, mild atelectasis is seen")
        >>> scopes.status(0, 20), scopes.status(44, 55)
        ('absent', 'present')
    """
    masked = _NO_DENIAL.sub(lambda match: "_" * len(match.group()), text)
    absent = [(match.end(), _end_of_clause(masked, match)) for match in _DENIES_FORWARD.finditer(masked)]
    history: list[tuple[int, int]] = []
    remembers = re.search(_BEFORE, text) is not None
    for match in _REMEMBERS_BACKWARD.finditer(masked):
        history.append((_start_of_clause(masked, match.start()), match.start()))
    if not re.search(rf"\b{_NOW}\b|\b(?:also|stable|differ|difference|persist\w*|change)\b", text):
        history += [(_start_of_clause(masked, match.start()), match.start()) for match in _WAS_THERE.finditer(masked)]
    history += [(match.end(), _next_of(masked, match.end(), ",;.)(")) for match in _REMEMBERS_FORWARD.finditer(masked)]
    for match in _DENIES_BACKWARD.finditer(masked):
        span = (_start_of_clause(masked, match.start()), match.start())
        observed_before = remembers and re.search(rf"\b(?:in|on) (?:the |his |her )?{_BEFORE}\b", masked[slice(*span)])
        (history if observed_before else absent).append(span)
    uncertain = [(match.end(), _next_of(masked, match.end(), ",;.)(")) for match in _DOUBTS_FORWARD.finditer(masked)]
    for match in _DOUBTS_BACKWARD.finditer(masked):
        uncertain.append((max(masked.rfind(mark, 0, match.start()) for mark in ",;:(?") + 1, match.start()))
    excepted = [match.span() for match in _EXCEPTION.finditer(masked)]
    return SentenceScopes(tuple(absent), tuple(history), tuple(uncertain), tuple(excepted))


def _end_of_clause(text: str, cue: re.Match[str]) -> int:
    """Return where a denial that begins with `cue` ends."""
    start = cue.end()
    limit = _CLAUSE_END.search(text, start)
    end = limit.start() if limit else len(text)
    verb = _VERB.search(text, start, end)
    if verb is None:
        return end
    if _THERE_IS.search(text[: cue.start()]) or cue.group().startswith(("without", "free", "not", "is", "are")):
        # the clause had its verb before the cue: "there is no A or B, and C is seen" goes on with another at C
        joints = [match.start() for match in _JOINT.finditer(text, start, verb.start())]
        return joints[-1] if joints else end
    joint = _JOINT.search(text, verb.end(), end)
    return joint.start() if joint else end


def _start_of_clause(text: str, cue: int) -> int:
    """Return where the clause begins whose denial stands at `cue`."""
    start = max((match.end() for match in _CLAUSE_END.finditer(text, 0, cue)), default=0)
    # the last verb before the cue is the denial's own auxiliary, unless the cue has none
    verbs = [match.end() for match in _VERB.finditer(text, start, cue)]
    own = bool(verbs) and text[verbs[-1] : cue].strip() in ("", "been", "also")
    earlier = verbs[:-1] if own else verbs
    if not earlier:
        return start
    joint = _JOINT.search(text, earlier[-1], cue)
    return joint.end() if joint else earlier[-1]


def _next_of(text: str, start: int, marks: str) -> int:
    places = [place for place in (text.find(mark, start) for mark in marks) if place >= 0]
    return min(places, default=len(text))
