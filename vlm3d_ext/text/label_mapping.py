"""What the labels of one set say about the findings of another, as rules and applied to labels.

Unknown is never negative: what no rule gives stays unknown, ``NaN`` in arrays and ``None`` in dictionaries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, overload

import numpy as np

from .label_set import MAPPING_KINDS, Finding, LabelRule, LabelSet, load_label_set

__all__ = ["describe_mapping", "map_labels", "mapping_in_words", "mapping_rules"]


def mapping_rules(source_set: LabelSet | str, target_set: LabelSet | str) -> dict[str, LabelRule]:
    """Return, for every finding of the target set in order, the rule that gives it from the source set.

    A rule written in the target set's file comes first; without one, findings with the same key are the same;
    everything else is unknown. A union of sets is taken apart, on either side: each of its sets that has the finding,
    or that the finding follows from, offers a rule, and the strongest kind in the order of `MAPPING_KINDS` is taken.
    So a union says of its own sets' findings exactly what they say.

    Raises:
        ValueError: if a rule names a finding that the source set does not have.

    Example:
        >>> mapping_rules("ct_rate_18", "ct_rate_18+vlm3d_18")["Fibrosis"].kind
        'approximate'
    """
    source, target = _as_label_set(source_set), _as_label_set(target_set)
    return {finding.name: _rule_for(source, target, finding) for finding in target.findings}


def _rule_for(source: LabelSet, target: LabelSet, finding: Finding) -> LabelRule:
    written = target.rules_from.get(source.name, {}) if source.name != target.name else {}
    if finding.name in written:
        rule = written[finding.name]
        strangers = sorted(set(rule.sources) - set(source.names))
        if strangers:
            raise ValueError(f"{target.name}: {finding.name!r} is mapped from {strangers}, not in {source.name}.")
        return rule
    if target.parts:
        having = ((part, part.finding_of_key(finding.key)) for part in target.parts)
        return _strongest(_rule_for(source, part, own) for part, own in having if own is not None)
    if source.parts:
        return _strongest(_in_names_of(source, part, _rule_for(part, target, finding)) for part in source.parts)
    same = source.finding_of_key(finding.key)
    return LabelRule("unknown") if same is None else LabelRule("exact", (same.name,), 1, 0)


def _strongest(rules: Iterable[LabelRule]) -> LabelRule:
    return min(rules, key=lambda rule: MAPPING_KINDS.index(rule.kind))


def _in_names_of(union: LabelSet, part: LabelSet, rule: LabelRule) -> LabelRule:
    """Return a rule from one part of a union with its sources called as the union calls them."""
    name_of_key = dict(zip(union.keys, union.names, strict=True))
    return replace(rule, sources=tuple(name_of_key[part.finding(name).key] for name in rule.sources))


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


def mapping_in_words(source_set: LabelSet | str, target_set: LabelSet | str) -> str:
    """Say in one line how many of the target set's findings follow from the source set, and name those that do not.

    Example:
        >>> mapping_in_words("ct_rate_18", "rad_chestct_16")
        'labels of ct_rate_18 as rad_chestct_16: 16 of 16 supported (15 exact, 1 derived: Calcification)'
    """
    source, target = _as_label_set(source_set), _as_label_set(target_set)
    rules = mapping_rules(source, target)
    names = {kind: [name for name, rule in rules.items() if rule.kind == kind] for kind in MAPPING_KINDS}
    unknown = names.pop("unknown")
    parts = [
        f"{len(listed)} {kind.replace('_', '-')}" + (f": {', '.join(listed)}" if kind != "exact" else "")
        for kind, listed in names.items()
        if listed
    ]
    described = f"labels of {source.name}" + (f" as {target.name}" if source.name != target.name else "")
    described += f": {target.num_findings - len(unknown)} of {target.num_findings} supported"
    described += f" ({', '.join(parts)})" if parts else ""
    return described + (f", {len(unknown)} unknown: {', '.join(unknown)}" if unknown else "")


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
