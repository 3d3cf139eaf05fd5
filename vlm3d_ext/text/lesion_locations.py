"""Lesion masks as text: what was found, on which side, in which lobe or region, and how large, one line per lesion.

The lines go into a report generator's prompt, such as
``[FINDING] Lung nodule detected in right upper lobe, 7 mm``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vlm3d_ext.data.anatomical_regions import ANATOMICAL_REGIONS, LUNG_REGION_INDICES, region_by_name
from vlm3d_ext.data.chest_map import ChestMap, in_plane_diameter_mm
from vlm3d_ext.data.connected_components import foreground_box
from vlm3d_ext.data.placed_lesions import PlacedLesions

from .disease_set import DiseaseSet, load_disease_set
from .label_set import load_label_set

__all__ = ["GRADE_VOLUMES_ML", "MINIMUM_VOLUME_ML", "LesionLocation", "LesionLocationInjector", "grade_of_volume"]

GRADE_VOLUMES_ML: Mapping[str, tuple[float, float]] = {
    "pericardial_effusion": (150.0, 400.0),
    "pleural_effusion": (500.0, 1000.0),
    "consolidation": (20.0, 100.0),
    "ground_glass_opacity": (50.0, 250.0),
}
"""Volumes in ml from which a lesion is "moderate" and "large"; below, it is "small".

Ours, in round figures. Published grades of effusions go by depth, which a volume follows only roughly. Of the
pericardium they are 10 and 20 mm (guidelines of the European Society of Cardiology, 2015): around a heart of usual
size, with the fluid thickest behind, about these volumes. Of the pleura they are quarters of the chest's depth (Moy et
al., Chest 2013); the volume is that of the larger side."""

MINIMUM_VOLUME_ML: Mapping[str, float] = {
    "pericardial_effusion": 1.0,
    "pleural_effusion": 1.0,
    "consolidation": 0.2,
    "ground_glass_opacity": 0.2,
    "lung_nodule": 0.01,
}
"""Below, a mask is taken for specks; ours. A ball of 0.01 ml has a diameter of 2.7 mm."""

_OTHER_GRADES_ML = (20.0, 100.0)
_OTHER_MINIMUM_ML = 0.1
_LOBES = {ANATOMICAL_REGIONS[index - 1].name for index in LUNG_REGION_INDICES}
_PAIRED = _LOBES | {"pleura", "ribs_left", "ribs_right", "shoulder_girdle"}
_LOBES_OF_BOTH_LUNGS = 4


@dataclass(frozen=True)
class LesionLocation:
    """What there is to say of a lesion, or of all lesions of a disease.

    Args:
        disease: key, such as "pleural_effusion".
        name: as in a text, such as "Pleural effusion".
        side: "left", "right", "bilateral", or "" where sides do not apply.
        regions: names of the anatomical regions that it lies in, the largest part first; lobes for lesions of the lung,
            which are empty where no anatomical mask says them.
        position: of ("upper" | "middle" | "lower", "anterior" | "posterior") what holds for most of it.
        size_mm: largest diameter in an axial slice, for nodules; None for the others.
        grade: "small", "moderate" or "large"; "" for nodules, and where nobody knows.
        volume_ml: None where it was not measured.
        num_lesions: connected parts that this stands for. Nodules stand each for itself, but the last that is listed
            stands for the smaller ones too.
        probability: highest in it, 0 to 1; None where unknown.
    """

    disease: str
    name: str
    side: str
    regions: tuple[str, ...]
    position: tuple[str, ...]
    size_mm: float | None
    grade: str
    volume_ml: float | None
    num_lesions: int
    probability: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LesionLocation:
        """Return what `to_json` wrote.

        Raises:
            ValueError: if a key is missing or unknown.
        """
        try:
            return cls(**{**content, "regions": tuple(content["regions"]), "position": tuple(content["position"])})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{dict(content)!r} is no lesion location ({error}); expected what to_json wrote."
            ) from None

    def sentence(self) -> str:
        """Return one line, without a full stop.

        Example:
            >>> place = ("right_upper_lobe",)
            >>> LesionLocation("lung_nodule", "Lung nodule", "right", place, (), 7.2, "", 0.2, 1).sentence()
            '[FINDING] Lung nodule detected in right upper lobe, 7 mm'
        """
        text = " ".join(["[FINDING]", self.name, "detected", *self._place()])
        if self.size_mm is not None:
            text += f", {max(1, round(self.size_mm))} mm"
            if self.num_lesions > 1:
                text += f", and {self.num_lesions - 1} more"
        return text + (f", {self.grade}" if self.grade else "")

    def _place(self) -> list[str]:
        labels = [region_by_name(name).label for name in self.regions]
        lobes = [label for name, label in zip(self.regions, labels, strict=True) if name in _LOBES]
        if len(lobes) >= _LOBES_OF_BOTH_LUNGS:
            return ["in both lungs"]
        if lobes:
            return ["in", lobes[0] if len(lobes) == 1 else ", ".join(lobes[:-1]) + " and " + lobes[-1]]
        if self.side:
            if not self.position:
                return ["on both sides" if self.side == "bilateral" else f"on the {self.side}"]
            return ["in", self.side, *self.position, "regions" if self.side == "bilateral" else "region"]
        return [f"in {labels[0]} region"] if labels else []


def grade_of_volume(volume_ml: float, thresholds_ml: tuple[float, float]) -> str:
    """Return "small", "moderate" or "large"; each threshold is the least volume of the next grade."""
    return ("small", "moderate", "large")[int(volume_ml >= thresholds_ml[0]) + int(volume_ml >= thresholds_ml[1])]


class LesionLocationInjector:
    """Says where lesion masks are, and how large, in words for a prompt.

    Nodules come one by one, the largest first. Of every other disease there is one entry, whose side is "bilateral" if
    both sides have their share. Which regions a disease can be in, and whether it has a side, is read from its label
    set: lobes are chosen by overlap (`vlm3d_ext.data.chest_map.ChestMap`, which also decides sides), another single
    region, such as the pleura, is the place by definition.

    Args:
        disease_set: the diseases that masks are of; name, path or set.
        max_lesions_per_disease: most nodules that are listed.
        minimum_volume_ml: specks below it are left out, a nodule by its own volume, another disease by that of all; one
            number, or disease key -> number for diseases that shall differ from `MINIMUM_VOLUME_ML`.
        grade_volumes_ml: disease key -> least volumes of "moderate" and "large" in ml, for those that shall differ from
            `GRADE_VOLUMES_ML`.
        diseases_in_mm: keys of the diseases that are measured in mm, lesion by lesion.

    Raises:
        ValueError: if a limit is not positive, a volume negative, thresholds do not rise, or a key is unknown.
    """

    def __init__(
        self,
        disease_set: DiseaseSet | str = "chest_ct_5",
        max_lesions_per_disease: int = 4,
        minimum_volume_ml: float | Mapping[str, float] | None = None,
        grade_volumes_ml: Mapping[str, tuple[float, float]] | None = None,
        diseases_in_mm: Sequence[str] = ("lung_nodule",),
    ) -> None:
        self.disease_set = load_disease_set(disease_set)
        if max_lesions_per_disease < 1:
            raise ValueError(f"max_lesions_per_disease must be at least 1, got {max_lesions_per_disease}.")
        self.max_lesions_per_disease = max_lesions_per_disease
        self.diseases_in_mm = tuple(diseases_in_mm)
        keys = self.disease_set.keys
        if isinstance(minimum_volume_ml, (int, float)):
            minimum_volume_ml = dict.fromkeys(keys, float(minimum_volume_ml))
        for key in (*(minimum_volume_ml or ()), *(grade_volumes_ml or ())):
            self.disease_set.index(key)
        self.minimum_volume_ml = {
            key: {**MINIMUM_VOLUME_ML, **(minimum_volume_ml or {})}.get(key, _OTHER_MINIMUM_ML) for key in keys
        }
        grades = {**GRADE_VOLUMES_ML, **(grade_volumes_ml or {})}
        self.grade_volumes_ml = {key: grades.get(key, _OTHER_GRADES_ML) for key in keys}
        for key in keys:
            if not self.minimum_volume_ml[key] >= 0:
                raise ValueError(f"minimum_volume_ml of {key} must be at least 0, got {self.minimum_volume_ml[key]}.")
            if not 0 < self.grade_volumes_ml[key][0] < self.grade_volumes_ml[key][1]:
                raise ValueError(f"grade_volumes_ml of {key} must rise from above 0, got {self.grade_volumes_ml[key]}.")
        label_set = load_label_set(self.disease_set.label_set)
        self._places = {disease.key: label_set.finding(disease.name).regions for disease in self.disease_set.diseases}

    def locate(
        self,
        masks: Mapping[str, np.ndarray],
        spacing_mm: Sequence[float],
        regions: np.ndarray | None = None,
        probabilities: Mapping[str, np.ndarray] | None = None,
    ) -> list[LesionLocation]:
        """Return what the masks of one volume show, in the order of the disease set.

        Args:
            masks: disease key -> (D, H, W), non-zero is lesion; LPS canonical: k up, j to the back, i to the left.
            spacing_mm: [z, y, x].
            regions: (D, H, W) anatomical mask, 0 to 20; None where there is none.
            probabilities: disease key -> (D, H, W), 0 to 1, of any of the diseases.

        Raises:
            ValueError: if a key is unknown, shapes differ, or the spacing is not three positive numbers.
        """
        shape = self._check(masks, spacing_mm, regions, probabilities or {})
        chest: ChestMap | None = None
        found: list[LesionLocation] = []
        for key in self.disease_set.keys:
            box = foreground_box(masks[key]) if key in masks else None
            if box is None:
                continue
            chest = chest or ChestMap(shape, spacing_mm, regions)
            lesions = PlacedLesions(masks[key], box, chest, spacing_mm)
            probability = (probabilities or {}).get(key)
            found += (self._one_by_one if key in self.diseases_in_mm else self._together)(key, lesions, probability)
        return found

    def inject(self, locations: Sequence[LesionLocation]) -> str:
        """Return one line per location; "" for none."""
        return "\n".join(location.sentence() for location in locations)

    def _check(
        self,
        masks: Mapping[str, np.ndarray],
        spacing_mm: Sequence[float],
        regions: np.ndarray | None,
        probabilities: Mapping[str, np.ndarray],
    ) -> tuple[int, ...]:
        steps = np.asarray(spacing_mm, dtype=float)
        if steps.shape != (3,) or not (np.isfinite(steps) & (steps > 0)).all():
            raise ValueError(f"spacing_mm must be three positive numbers [z, y, x], got {steps.tolist()}.")
        named = {} if regions is None else {"regions": regions}
        for what, arrays in (("mask", masks), ("probabilities", probabilities)):
            for key, array in arrays.items():
                self.disease_set.index(key)
                named[f"{what} of {key}"] = array
        first = next(iter(named), "")
        for name, array in named.items():
            if array.ndim != 3 or array.shape != named[first].shape:
                raise ValueError(
                    f"{name}: shape {array.shape}, expected (D, H, W), as {first} has {named[first].shape}; bring all "
                    f"to the volume's grid."
                )
        return named[first].shape if named else ()

    def _one_by_one(self, key: str, lesions: PlacedLesions, probability: np.ndarray | None) -> list[LesionLocation]:
        kept = [n for n in lesions.by_volume() if lesions.volume_ml(n) >= self.minimum_volume_ml[key]]
        locations = [
            self._location(key, lesions, number, probability) for number in kept[: self.max_lesions_per_disease]
        ]
        unlisted = len(kept) - len(locations)
        if unlisted:
            locations[-1] = replace(locations[-1], num_lesions=1 + unlisted)
        return locations

    def _together(self, key: str, lesions: PlacedLesions, probability: np.ndarray | None) -> list[LesionLocation]:
        enough = lesions.volume_ml() >= self.minimum_volume_ml[key]
        return [self._location(key, lesions, 0, probability)] if enough else []

    def _location(
        self, key: str, lesions: PlacedLesions, number: int, probability: np.ndarray | None
    ) -> LesionLocation:
        places, in_mm = self._places[key], key in self.diseases_in_mm
        sided = not places or bool(_PAIRED.intersection(places))
        # No side has enough of a nodule to make it bilateral: it lies where most of it is.
        least_ml = math.inf if in_mm else self.minimum_volume_ml[key]
        side = lesions.side(number, least_ml) if sided else ""
        mask, box = lesions.mask(number)
        if _LOBES.intersection(places):
            regions = tuple(ANATOMICAL_REGIONS[lobe - 1].name for lobe in lesions.lobes(number, side))
        else:
            regions = tuple(places) if len(places) == 1 else ()
        volume_ml = lesions.volume_ml(number)
        # A reader grades the fluid of each side by itself.
        graded_ml = max(lesions.side_volumes_ml(number).values()) if "pleura" in places else volume_ml
        return LesionLocation(
            disease=key,
            name=self.disease_set.names[self.disease_set.index(key)],
            side=side,
            regions=regions,
            position=lesions.chest.position(mask, box) if sided else (),
            size_mm=in_plane_diameter_mm(mask, lesions.spacing_mm) if in_mm else None,
            grade="" if in_mm else grade_of_volume(graded_ml, self.grade_volumes_ml[key]),
            volume_ml=volume_ml,
            num_lesions=1 if in_mm else lesions.count,
            probability=None if probability is None else float(probability[box][mask].max()),
        )
