"""Label sets as data: which findings a data set labels, in which order, and what one set says about another.

A set is one JSON file in `label_sets/`; sets can be united. What one set says about another is applied by
`vlm3d_ext.text.label_mapping`. Labels are tri-state: 1 present, 0 absent, and unknown, which is ``NaN`` in
arrays and ``None`` in dictionaries and JSON. Unknown is never negative: losses, class weights and metrics leave it out.
"""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

__all__ = [
    "MAPPING_KINDS",
    "Finding",
    "LabelRule",
    "LabelSet",
    "available_label_sets",
    "load_label_set",
]

MAPPING_KINDS = ("exact", "derived", "approximate", "one_way", "unknown")
_FOLDER = Path(__file__).parent / "label_sets"


@dataclass(frozen=True)
class Finding:
    """One finding of a label set.

    Args:
        name: the exact column name in the data set's CSV, e.g. ``"Ground-glass opacity"``.
        key: snake-case key; the same key in two sets means the same finding.
        synonyms: other words for it in reports, lower case.
        positive_prompts: sentences that say it is present.
        negative_prompts: sentences that say it is absent.
        regions: names of the anatomical regions where it is found (`vlm3d_ext.data.anatomical_regions`); none means
            anywhere in the scan.
    """

    name: str
    key: str
    synonyms: tuple[str, ...]
    positive_prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    regions: tuple[str, ...]


@dataclass(frozen=True)
class LabelRule:
    """How one finding of a target set follows from findings of a source set.

    The value is `when_any_positive` if any source finding is 1, `when_all_negative` if all are 0, and unknown
    otherwise; either of the two may itself be ``None``, unknown.

    Args:
        kind: ``exact`` (the same finding), ``derived`` (a logical combination), ``approximate`` (a near finding),
            ``one_way`` (only one of the two answers follows) or ``unknown`` (nothing follows; no sources).
        sources: names of the source findings.
        when_any_positive: 1, 0 or None.
        when_all_negative: 1, 0 or None.
    """

    kind: str
    sources: tuple[str, ...] = ()
    when_any_positive: int | None = None
    when_all_negative: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in MAPPING_KINDS:
            raise ValueError(f"kind must be one of {MAPPING_KINDS}, got {self.kind!r}.")
        if (self.kind == "unknown") == bool(self.sources):
            raise ValueError(f"a rule of kind {self.kind!r} cannot have the sources {self.sources}.")
        for value in (self.when_any_positive, self.when_all_negative):
            if value not in (0, 1, None):
                raise ValueError(f"a label is 1, 0 or None, got {value!r}.")
        one_sided = (self.when_any_positive is None) != (self.when_all_negative is None)
        if (self.kind == "one_way") != one_sided and self.kind != "unknown":
            raise ValueError(f"kind {self.kind!r} does not agree with which answers follow; 'one_way' has exactly one.")


@dataclass(frozen=True)
class LabelSet:
    """An ordered set of findings.

    Args:
        name: e.g. ``"ct_rate_18"``.
        description: where it comes from.
        findings: in the order of the label vector.
        rules_from: source set's name -> this set's finding name -> rule, for findings that do not share a key with
            one of the source set.
        parts: the sets that a union is made of; empty for a set of its own.

    Example:
        >>> load_label_set("ct_rate_18").names[0]
        'Medical material'
    """

    name: str
    description: str
    findings: tuple[Finding, ...]
    rules_from: Mapping[str, Mapping[str, LabelRule]]
    parts: tuple[LabelSet, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The findings' names, which are CSV columns, in the order of the label vector."""
        return tuple(finding.name for finding in self.findings)

    @property
    def keys(self) -> tuple[str, ...]:
        """The findings' snake-case keys, in the same order."""
        return tuple(finding.key for finding in self.findings)

    @property
    def num_findings(self) -> int:
        """Length of the label vector."""
        return len(self.findings)

    def finding(self, name_or_key: str) -> Finding:
        """Return the finding with this name or key.

        Raises:
            ValueError: if there is none.
        """
        for finding in self.findings:
            if name_or_key in (finding.name, finding.key):
                return finding
        near = difflib.get_close_matches(name_or_key, self.names + self.keys, n=2)
        raise ValueError(f"label set {self.name!r} has no finding {name_or_key!r}; nearest: {near}.")

    def finding_of_key(self, key: str) -> Finding | None:
        """Return the finding with this key, or None."""
        return next((finding for finding in self.findings if finding.key == key), None)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check that a CSV's columns hold every finding exactly once; other columns are allowed.

        Args:
            columns: the header of a label CSV.

        Raises:
            ValueError: naming each missing column with the nearest one present, or the columns that occur twice.
        """
        present = list(columns)
        missing = [name for name in self.names if name not in present]
        if missing:
            unused = [column for column in present if column not in self.names]
            lowered = {column.lower(): column for column in unused}
            described = []
            for name in missing:
                near = difflib.get_close_matches(name.lower(), lowered, n=1)
                described.append(f"{name!r} (nearest present: {lowered[near[0]]!r})" if near else repr(name))
            raise ValueError(
                f"the columns do not fit label set {self.name!r}: {len(missing)} of {self.num_findings} are "
                f"missing: {', '.join(described)}; rename them or choose another of the sets {available_label_sets()}."
            )
        repeated = sorted(name for name, count in Counter(present).items() if count > 1 and name in self.names)
        if repeated:
            raise ValueError(
                f"the columns {repeated} of label set {self.name!r} occur more than once; keep one of each."
            )


def available_label_sets() -> list[str]:
    """Return the names of the label sets that ship with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load_label_set(name_or_path: str | os.PathLike) -> LabelSet:
    """Load a label set that ships with the package, by name, or one of your own, by the path of its JSON file.

    Sets joined by ``+`` give their union: the findings in the order of the sets, each key once. A finding that several
    sets have is called, prompted and located as in the first of them, and has the synonyms of all.

    Raises:
        ValueError: if a name is not that of a shipped set, a file does not describe a label set, or sets cannot be
            united: one is there twice, or they give one name to different findings.
        FileNotFoundError: if a path is given and does not exist.

    Example:
        >>> load_label_set("ct_rate_18+vlm3d_18").num_findings
        28
    """
    text = os.fspath(name_or_path)
    if text in available_label_sets():
        return _load(_FOLDER / f"{text}.json")
    path = Path(text)
    if "+" in text and not path.is_file():
        return _unite(text, [load_label_set(part) for part in _split_union(text)])
    if path.suffix != ".json":
        near = difflib.get_close_matches(text, available_label_sets(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{text!r} is neither a label set ({available_label_sets()}) nor the path of a .json file.{hint}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"label set file {text} does not exist; the sets that ship are {available_label_sets()}."
        )
    return _parse(path)


def _split_union(text: str) -> list[str]:
    parts = [part.strip() for part in text.split("+")]
    if not all(parts):
        raise ValueError(
            f"{text!r} joins label sets with '+', but one of the places is empty; write it as 'ct_rate_18+vlm3d_18'."
        )
    return parts


def _unite(text: str, parts: list[LabelSet]) -> LabelSet:
    repeated = sorted(name for name, count in Counter(part.name for part in parts).items() if count > 1)
    if repeated:
        raise ValueError(f"{text!r} joins the label set(s) {repeated} more than once; name each once.")
    united: dict[str, Finding] = {}
    for part in parts:
        for finding in part.findings:
            known = united.get(finding.key)
            synonyms = dict.fromkeys((*known.synonyms, *finding.synonyms)) if known else ()
            united[finding.key] = replace(known, synonyms=tuple(synonyms)) if known else finding
    findings = tuple(united.values())
    ambiguous = sorted(name for name, count in Counter(f.name for f in findings).items() if count > 1)
    if ambiguous:
        raise ValueError(
            f"{text!r}: the sets give the name(s) {ambiguous} to findings of different keys; give them one key, or "
            "rename one."
        )
    return LabelSet(
        name="+".join(part.name for part in parts),
        description="Union of " + ", ".join(part.name for part in parts) + ".",
        findings=findings,
        rules_from={},
        parts=tuple(parts),
    )


@cache
def _load(path: Path) -> LabelSet:
    return _parse(path)


def _parse(path: Path) -> LabelSet:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        findings = tuple(
            Finding(
                name=item["name"],
                key=item["key"],
                synonyms=tuple(item["synonyms"]),
                positive_prompts=tuple(item["prompts"]["positive"]),
                negative_prompts=tuple(item["prompts"]["negative"]),
                regions=tuple(item["regions"]),
            )
            for item in content["findings"]
        )
        rules = {
            source: {name: LabelRule(**(rule | {"sources": tuple(rule["sources"])})) for name, rule in table.items()}
            for source, table in content.get("from", {}).items()
        }
        label_set = LabelSet(content["name"], content["description"], findings, rules)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a label set file ({type(error).__name__}: {error}); "
            f"compare it with {_FOLDER / 'ct_rate_18.json'}."
        ) from error
    for what, values in (("name", label_set.names), ("key", label_set.keys)):
        repeated = sorted(value for value, count in Counter(values).items() if count > 1)
        if repeated:
            raise ValueError(f"{path}: each finding's {what} must be its own, but {repeated} occur more than once.")
    strangers = sorted({name for table in rules.values() for name in table} - set(label_set.names))
    if strangers:
        raise ValueError(f"{path}: there are rules for {strangers}, which are not findings of the set.")
    return label_set
