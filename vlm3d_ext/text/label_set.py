"""Label sets as data: which findings a data set labels, in which order, and what one set says about another.

A set is one JSON file in `label_sets/`. Labels are tri-state: 1 present, 0 absent, and unknown, which is ``NaN`` in
arrays and ``None`` in dictionaries and JSON. Unknown is never negative: losses, class weights and metrics leave it out.
"""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np

__all__ = [
    "MAPPING_KINDS",
    "Finding",
    "LabelRule",
    "LabelSet",
    "available_label_sets",
    "describe_mapping",
    "load_label_set",
    "map_labels",
    "mapping_rules",
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
        regions: names of the anatomical regions where it is found (`vlm3d_ext.data.anatomical_regions`).
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

    Example:
        >>> load_label_set("ct_rate_18").names[0]
        'Medical material'
    """

    name: str
    description: str
    findings: tuple[Finding, ...]
    rules_from: Mapping[str, Mapping[str, LabelRule]]

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

    Raises:
        ValueError: if the name is not that of a shipped set, or the file does not describe a label set.
        FileNotFoundError: if a path is given and does not exist.
    """
    text = os.fspath(name_or_path)
    if text in available_label_sets():
        return _load(_FOLDER / f"{text}.json")
    path = Path(text)
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


def mapping_rules(source_set: LabelSet | str, target_set: LabelSet | str) -> dict[str, LabelRule]:
    """Return, for every finding of the target set in order, the rule that gives it from the source set.

    A rule written in the target set's file comes first; without one, findings with the same key are the same;
    everything else is unknown.

    Raises:
        ValueError: if a rule names a finding that the source set does not have.
    """
    source, target = _as_label_set(source_set), _as_label_set(target_set)
    source_names = {finding.key: finding.name for finding in source.findings}
    written = target.rules_from.get(source.name, {}) if source.name != target.name else {}
    rules: dict[str, LabelRule] = {}
    for finding in target.findings:
        if finding.name in written:
            rule = written[finding.name]
            strangers = sorted(set(rule.sources) - set(source.names))
            if strangers:
                raise ValueError(f"{target.name}: {finding.name!r} is mapped from {strangers}, not in {source.name}.")
        elif finding.key in source_names:
            rule = LabelRule("exact", (source_names[finding.key],), 1, 0)
        else:
            rule = LabelRule("unknown")
        rules[finding.name] = rule
    return rules


@overload
def map_labels(
    labels: Mapping[str, Any], source_set: LabelSet | str, target_set: LabelSet | str
) -> dict[str, int | None]: ...
@overload
def map_labels(labels: np.ndarray, source_set: LabelSet | str, target_set: LabelSet | str) -> np.ndarray: ...
def map_labels(
    labels: Mapping[str, Any] | np.ndarray, source_set: LabelSet | str, target_set: LabelSet | str
) -> dict[str, int | None] | np.ndarray:
    """Say in the target set's findings what is known in the source set's.

    Args:
        labels: either a dictionary finding name -> 1, 0 or None / NaN (a missing name is unknown), or an array
            `(..., num source findings)` of 1, 0 and NaN in the order of the source set.
        source_set: the set that `labels` is in, or its name.
        target_set: the set that is wanted, or its name.

    Returns:
        A dictionary with 1, 0 or None for every target finding, or a float32 array `(..., num target findings)` of
        1, 0 and NaN.

    Raises:
        ValueError: if a label is neither 1, 0 nor unknown, a name is not in the source set, or the last axis has
            another length.

    Example:
        >>> map_labels({"Lung opacity": 0, "Lymphadenopathy": 1}, "ct_rate_18", "vlm3d_18")["Ground-glass opacity"]
        0
    """
    source, target = _as_label_set(source_set), _as_label_set(target_set)
    if isinstance(labels, Mapping):
        strangers = sorted(set(labels) - set(source.names))
        if strangers:
            raise ValueError(f"{strangers} are not findings of label set {source.name!r}.")
        row = np.array([_as_number(name, labels.get(name)) for name in source.names])
        return {
            name: _as_label(value) for name, value in zip(target.names, map_labels(row, source, target), strict=True)
        }
    values = np.asarray(labels, dtype=np.float32)
    if values.ndim == 0 or values.shape[-1] != source.num_findings:
        raise ValueError(
            f"labels of set {source.name!r} must have the shape (..., {source.num_findings}), got {values.shape}."
        )
    known = ~np.isnan(values)
    wrong = values[known & (values != 0) & (values != 1)]
    if wrong.size:
        raise ValueError(f"labels must be 1, 0 or NaN (unknown), got {sorted(set(wrong.tolist()))[:3]}.")
    mapped = np.full((*values.shape[:-1], target.num_findings), np.nan, dtype=np.float32)
    for column, rule in enumerate(mapping_rules(source, target).values()):
        if not rule.sources:
            continue
        taken = values[..., [source.names.index(name) for name in rule.sources]]
        if rule.when_any_positive is not None:
            mapped[..., column][(taken == 1).any(axis=-1)] = rule.when_any_positive
        if rule.when_all_negative is not None:
            mapped[..., column][(taken == 0).all(axis=-1)] = rule.when_all_negative
    return mapped


def describe_mapping(source_set: LabelSet | str, target_set: LabelSet | str) -> dict[str, int]:
    """Count the target set's findings by how they follow from the source set.

    Returns:
        ``{"exact", "derived", "approximate", "one_way", "unknown"}`` -> count, and ``"supported"``: all that are not
        unknown.
    """
    counts = Counter(rule.kind for rule in mapping_rules(source_set, target_set).values())
    described = {kind: counts[kind] for kind in MAPPING_KINDS}
    return {"supported": sum(counts.values()) - counts["unknown"], **described}


def _as_label_set(label_set: LabelSet | str) -> LabelSet:
    return label_set if isinstance(label_set, LabelSet) else load_label_set(label_set)


def _as_number(name: str, value: Any) -> float:
    if value is None:
        return np.nan
    if isinstance(value, (bool, int, float, np.generic)):
        return float(value)
    raise ValueError(f"the label of {name!r} must be 1, 0 or None (unknown), got {value!r}.")


def _as_label(value: float) -> int | None:
    return None if np.isnan(value) else int(value)
