"""A label set made of prompts alone, to score findings that no data set labels."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.anatomical_regions import ANATOMICAL_REGIONS
from .label_set import Finding, LabelSet

__all__ = ["PROMPT_LABEL_SET", "label_set_of_prompts"]

PROMPT_LABEL_SET = "prompts"
_PARTS = ("positive", "negative", "regions")


def label_set_of_prompts(prompts: Mapping[str, str | Sequence[str] | Mapping[str, Any]]) -> LabelSet:
    """Return the label set ``"prompts"`` with one finding for each entry, in order.

    Args:
        prompts: name of a finding -> one sentence that says it is present, or several, or a dictionary with
            ``"positive"``, and optionally ``"negative"`` (sentences that say it is absent) and ``"regions"`` (names of
            anatomical regions; none means anywhere in the scan). The name in snake case becomes the key.

    Raises:
        ValueError: if there is no prompt, a name or text is empty or no text, a region does not exist, or two names
            give one key.

    Example:
        >>> label_set_of_prompts({"Cavitation": "A cavitary lesion is seen in the lung."}).findings[0].key
        'cavitation'
    """
    if not isinstance(prompts, Mapping) or not prompts:
        raise ValueError(f'prompts must be a dictionary such as {{"Cyst": "A cyst is seen."}}, got {prompts!r}.')
    findings: dict[str, Finding] = {}
    for name, given in prompts.items():
        finding = _finding_of(name, given)
        if finding.key in findings:
            raise ValueError(
                f"prompts: {findings[finding.key].name!r} and {name!r} are both the key {finding.key!r}; rename one."
            )
        findings[finding.key] = finding
    return LabelSet(PROMPT_LABEL_SET, "Findings described by prompts.", tuple(findings.values()), rules_from={})


def _finding_of(name: Any, given: Any) -> Finding:
    key = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") if isinstance(name, str) else ""
    if not key:
        raise ValueError(f"prompts: {name!r} is no name of a finding, expected words such as 'Lung cyst'.")
    parts = dict(given) if isinstance(given, Mapping) else {"positive": given}
    strangers = [part for part in parts if part not in _PARTS]
    if strangers or "positive" not in parts:
        raise ValueError(
            f"prompts: {name!r} has {list(parts)}, expected 'positive' and optionally 'negative' and 'regions'."
        )
    return Finding(
        name=name.strip(),
        key=key,
        synonyms=(),
        positive_prompts=_texts(name, "positive", parts["positive"], fewest=1),
        negative_prompts=_texts(name, "negative", parts.get("negative", ())),
        regions=tuple(_region(name, region) for region in _texts(name, "regions", parts.get("regions", ()))),
    )


def _texts(name: str, part: str, given: Any, fewest: int = 0) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"prompts: {part!r} of {name!r} is {given!r}, expected a text that is not empty, or a list.")
    if len(texts) < fewest:
        raise ValueError(f"prompts: {part!r} of {name!r} is empty, expected at least one sentence.")
    return tuple(text.strip() for text in texts)


def _region(name: str, region: str) -> str:
    regions = [known.name for known in ANATOMICAL_REGIONS]
    if region in regions:
        return region
    near = difflib.get_close_matches(region.lower().replace(" ", "_"), regions, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the regions are {regions}."
    raise ValueError(f"prompts: {name!r} is to be found in {region!r}, which is no anatomical region; {hint}")
