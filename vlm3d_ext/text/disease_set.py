"""The diseases that are drawn as masks: their keys, names and anatomical descriptions, as data.

A set is a JSON file, so that a sibling system (brain tumours, lumbar discs) brings its own without any code:
``{"name", "description", "label_set", "diseases": [{"key", "name", "challenge_name", "description"}]}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from .label_set import Finding

__all__ = ["Disease", "DiseaseRecord", "DiseaseSet", "load_disease_set"]

_PACKAGE = "vlm3d_ext.text.disease_sets"
_KEYS = ("key", "name", "challenge_name", "description")


@dataclass(frozen=True)
class Disease:
    """One drawn disease.

    Args:
        key: snake case; names folders, files and table columns.
        name: as in the label set that says whether it is present.
        challenge_name: as the VLM3D challenge's localisation file spells it.
        description: what it looks like and where it lies; the text that guides the drawing.
    """

    key: str
    name: str
    challenge_name: str
    description: str


@dataclass(frozen=True)
class DiseaseSet:
    """Diseases in a fixed order, which is the order of mask channels.

    Args:
        name: of the set.
        diseases: at least one.
        label_set: the label set in which `Disease.name` is a finding.
        description: one sentence.
    """

    name: str
    diseases: tuple[Disease, ...]
    label_set: str
    description: str = ""

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Disease keys in channel order."""
        return tuple(disease.key for disease in self.diseases)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Disease names in channel order."""
        return tuple(disease.name for disease in self.diseases)

    @property
    def num_diseases(self) -> int:
        """Number of mask channels."""
        return len(self.diseases)

    def index(self, key: str) -> int:
        """Return the channel of a disease.

        Raises:
            ValueError: if the set has no such disease.
        """
        if key not in self.keys:
            raise ValueError(f"disease {key!r} is none of the set {self.name}: {list(self.keys)}.")
        return self.keys.index(key)

    def findings(self) -> list[Finding]:
        """Return each disease as a finding whose only prompt is its description, for a text encoder."""
        return [
            Finding(
                name=d.name, key=d.key, synonyms=(), positive_prompts=(d.description,), negative_prompts=(), regions=()
            )
            for d in self.diseases
        ]


def load_disease_set(name_or_path: str | os.PathLike | DiseaseSet = "chest_ct_5") -> DiseaseSet:
    """Load a set that ships with the package by its name, or any by the path of its JSON file.

    Raises:
        FileNotFoundError: if there is no such set.
        ValueError: if the file is not such a set: a missing key, an empty text, a key twice or not in snake case.
    """
    if isinstance(name_or_path, DiseaseSet):
        return name_or_path
    shipped = sorted(item.name[:-5] for item in files(_PACKAGE).iterdir() if item.name.endswith(".json"))
    if str(name_or_path) in shipped:
        source: Any = files(_PACKAGE) / f"{name_or_path}.json"
    else:
        source = Path(name_or_path)
        if not source.is_file():
            raise FileNotFoundError(
                f"disease set {str(name_or_path)!r}: no such file, and not one of the sets that ship: {shipped}."
            )
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: not JSON ({error}), expected a disease set; see chest_ct_5.json.") from None
    entries = content.get("diseases") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'{source}: no disease set, expected {{"diseases": [{{...}}, ...]}}; see chest_ct_5.json.')
    diseases = [Disease(**{key: _text(source, entry, key) for key in _KEYS}) for entry in entries]
    _check(source, diseases)
    return DiseaseSet(
        _text(source, content, "name"),
        tuple(diseases),
        _text(source, content, "label_set"),
        str(content.get("description", "")),
    )


def _text(source: Any, content: Mapping[str, Any], key: str) -> str:
    value = content.get(key)
    if not isinstance(value, str):
        where = content.get("key", content.get("name", "a disease"))
        raise ValueError(f"{source}: {key!r} of {where!r} is {value!r}, expected a text; write it.")
    return value.strip()


def _check(source: Any, diseases: Sequence[Disease]) -> None:
    if not diseases:
        raise ValueError(f"{source}: the set has no disease; give at least one.")
    keys = [disease.key for disease in diseases]
    for disease in diseases:
        empty = [key for key in _KEYS if not getattr(disease, key)]
        if empty:
            raise ValueError(f"{source}: disease {disease.key!r} has an empty {empty[0]!r}; write it.")
        if not disease.key.isidentifier() or disease.key != disease.key.lower():
            raise ValueError(f"{source}: disease key {disease.key!r} must be snake case, such as 'lung_nodule'.")
        if keys.count(disease.key) > 1:
            raise ValueError(f"{source}: disease {disease.key!r} is there twice; remove one.")


class DiseaseRecord:
    """The diseases of a checkpoint's mask channels, compared when it is loaded: as many others would fit its shapes.

    Args:
        disease_set: name or path, see `load_disease_set`.
    """

    def __init__(self, disease_set: str | os.PathLike | DiseaseSet = "chest_ct_5") -> None:
        self.disease_set = load_disease_set(disease_set)

    def state_dict(self) -> dict[str, Any]:
        """Return plain types for a checkpoint."""
        return {"disease_set": self.disease_set.name, "disease_keys": list(self.disease_set.keys)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a checkpoint draws the same diseases in the same order; nothing is changed.

        Raises:
            ValueError: if it does not.
        """
        theirs, ours = list(state_dict.get("disease_keys", [])), list(self.disease_set.keys)
        if theirs != ours:
            raise ValueError(
                f"the checkpoint draws {theirs} (disease set {state_dict.get('disease_set')}), this run {ours} "
                f"({self.disease_set.name}); choose --disease_set {state_dict.get('disease_set')}, or another "
                f"checkpoint."
            )
