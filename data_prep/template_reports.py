"""Reports for scans that have none: sentences that say no more than labels and lesion masks know.

Where a mask says place and size, the templates of `data_prep.report_sentences` are filled; where only the label is
known, the label set's own prompts say it. An unknown label is not mentioned.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.phantom_reports import NOT_GIVEN
from data_prep.report_sentences import ABSENT, IMPRESSION, ORDER, PRESENT
from vlm3d_ext.data.anatomical_regions import region_by_name
from vlm3d_ext.text.label_set import LabelSet, load_label_set
from vlm3d_ext.text.lesion_locations import LesionLocation

__all__ = ["TemplateReport", "write_template_report"]

_SHARE_OF_ABSENT_MENTIONED = 0.7
_FROM_MASKS: Mapping[str, Sequence[str]] = {
    "pericardial_effusion": (
        "a {grade} pericardial effusion is seen",
        "there is {grade} pericardial effusion",
    ),
    "pleural_effusion": (
        "{grade} pleural effusion is seen {on_side}",
        "there is {grade} pleural effusion {on_side}",
    ),
    "consolidation": ("consolidation is seen in {place}", "there is consolidation in {place}"),
    "lung_nodule": ("pulmonary nodules are seen in {place}", "a pulmonary nodule is seen in {place}"),
}
"""Templates for what a mask knows of these: no thickness, and no bronchi inside."""
_LARGEST_NODULE_MM = 30.0
"""More is called a mass; a coarse mask may measure more."""
_SAID_BY_LABEL = ("{name} is observed", "{name} is noted")
_SAYS_MORE = ("air bronchograms",)
_OPACITIES = {"ground_glass_opacity", "consolidation"}
_ANY_OPACITY = "lung_opacity"
_LOBES_OF_BOTH_LUNGS = 4


@dataclass(frozen=True)
class TemplateReport:
    """The two sections that are written; `impression` is "Not given." where too little is known for one."""

    findings: str
    impression: str


def write_template_report(
    labels: Mapping[str, int | None],
    label_set: LabelSet,
    locations: Sequence[LesionLocation],
    drawn_absent: Collection[str],
    seed: Sequence[int],
) -> TemplateReport | None:
    """Write a report, or return None if nothing is known to write.

    A lesion that is drawn is present, whatever its label says. "No significant pathology" is concluded only if every
    label is known and none is positive.

    Args:
        labels: finding key -> 1, 0 or None (unknown).
        label_set: of the labels.
        locations: of the lesions that are drawn.
        drawn_absent: keys of diseases somebody looked for and drew nothing.
        seed: chooses the wording.
    """
    rng = np.random.default_rng(list(seed))
    located: dict[str, list[LesionLocation]] = {}
    for location in locations:
        located.setdefault(location.disease, []).append(location)
    present = {key for key, value in labels.items() if value == 1} | set(located)
    absent = ({key for key, value in labels.items() if value == 0} | set(drawn_absent)) - present
    if present & _OPACITIES:
        # What is named already is not said again in general words, least of all denied.
        present.discard(_ANY_OPACITY)
        absent.discard(_ANY_OPACITY)
    wording = _Wording(label_set, rng)
    order = [key for key in ORDER if key in present | absent]
    order += [key for key in label_set.keys if key in (present | absent) - set(order)]
    sentences, denials, conclusions = [], [], []
    for key in order:
        if key in present:
            sentences.append(wording.present(key, located.get(key, ())))
            conclusions.append(wording.impression(key, located.get(key, ())))
        else:
            sentence = wording.absent(key)
            denials.append(sentence)
            if rng.random() < _SHARE_OF_ABSENT_MENTIONED:
                sentences.append(sentence)
    if not sentences and not denials:
        return None
    if not conclusions and all(labels.get(key) == 0 for key in label_set.keys):
        conclusions.append(wording.pick(IMPRESSION[""]))
    # Chance may leave out all that is absent, but a report says something.
    return TemplateReport(_join(sentences or denials[:1]), _join(conclusions) if conclusions else NOT_GIVEN)


class _Wording:
    def __init__(self, label_set: LabelSet, rng: np.random.Generator) -> None:
        self._sets = (label_set, load_label_set("vlm3d_18"))
        self._rng = rng

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self._rng.integers(len(options)))]

    def present(self, key: str, locations: Sequence[LesionLocation]) -> str:
        if locations:
            words = _words(locations)
            options = [*PRESENT.get(key, {}).get("", ()), *_FROM_MASKS.get(key, ())]
            fitting = [text for text in options if _fits(text, words) and not any(more in text for more in _SAYS_MORE)]
            if key == "lung_nodule":
                several = sum(location.num_lesions for location in locations) > 1
                fitting = [text for text in fitting if ("nodules" in text) == several]
            if fitting:
                return self.pick(fitting).format(**words)
        finding = self._finding(key)
        said = [text.format(name=finding.name) for text in _SAID_BY_LABEL]
        return self.pick([*finding.positive_prompts, *said])

    def absent(self, key: str) -> str:
        return self.pick([*ABSENT.get(key, ()), *self._finding(key).negative_prompts])

    def impression(self, key: str, locations: Sequence[LesionLocation]) -> str:
        words = _words(locations)
        fitting = [text for text in IMPRESSION.get(key, ()) if _fits(text, words)]
        return self.pick(fitting).format(**words) if fitting else self._finding(key).name

    def _finding(self, key: str):
        for label_set in self._sets:
            finding = label_set.finding_of_key(key)
            if finding is not None:
                return finding
        raise ValueError(f"finding {key!r} is in none of the label sets {[part.name for part in self._sets]}.")


def _fits(template: str, words: Mapping[str, str]) -> bool:
    return all(place in words for _, place, _, _ in string.Formatter().parse(template) if place)


def _words(locations: Sequence[LesionLocation]) -> dict[str, str]:
    """Return the placeholders that the lesions of one disease can fill; the first of them is the largest."""
    if not locations:
        return {}
    words: dict[str, str] = {}
    sides = {location.side for location in locations}
    side = sides.pop() if len(sides) == 1 else "bilateral"
    if side:
        words["side"] = side
        words["on_side"] = "on both sides" if side == "bilateral" else f"on the {side}"
        words["of_lung"] = words["place"] = "both lungs" if side == "bilateral" else f"the {side} lung"
    regions = dict.fromkeys(region for location in locations for region in location.regions)
    lobes = [f"the {region_by_name(name).label}" for name in regions if name.endswith("_lobe")]
    if len(lobes) >= _LOBES_OF_BOTH_LUNGS:
        words["place"] = "both lungs"
    elif lobes:
        words["place"] = lobes[0] if len(lobes) == 1 else ", ".join(lobes[:-1]) + " and " + lobes[-1]
    if locations[0].size_mm is not None and locations[0].size_mm <= _LARGEST_NODULE_MM:
        words["size"] = str(max(1, round(locations[0].size_mm)))
    if locations[0].grade:
        words["grade"] = locations[0].grade
    return words


def _join(sentences: Sequence[str]) -> str:
    return " ".join(sentence[0].upper() + sentence[1:].rstrip(".") + "." for sentence in sentences)
