"""The JSON file in which the VLM3D challenge takes localisation results.

    [{"outputs": [{"type": "predictions", "value": {"predictions": [
        {"input_image_name": "valid_1_a_1.mha",
         "Pericardial effusion": [], "Consolidation": [], "Ground glass opacity": [], "Lung nodule": [],
         "Pleural effusion": [{"bbox_mm": [xmin, ymin, zmin, dx, dy, dz], "probability": 0.9}]}]}}]}]

Known, from the organisers' example container and evaluation (see Source): the wrapping; that each of the five keys must
be there, if only with an empty list; that `probability` may be missing and is then 1; that the scan's name is compared
without ``.mha``; and **that positions are counted from the volume's own corner**: its lowest x, y and z in LPS, at the
outer edges of the corner voxels. `vlm3d_ext` has absolute LPS positions everywhere else, so the writer subtracts the
corner and what is read here is relative to it.

Assumed: nothing else is in the file. The hidden ground truth is taken to be made as the example makes its boxes (one
for each connected component); which neighbours it connects is not published.

Source: github.com/forithmus/VLM3D-Dockers, ``abnloc_example_docker/process.py`` at commit 1c0f48c and
``deprecated_challenges/abnloc_evaluation`` (README and evaluation.py) at commit a945908.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..text.disease_set import DiseaseSet, load_disease_set
from .atomic_files import write_json
from .csv_table import volume_name
from .lesion_boxes import boxes_of_mask, volume_box_mm

__all__ = [
    "ChallengeBoxes",
    "ScoredBoxes",
    "boxes_of_mask",
    "read_challenge_localization",
    "volume_box_mm",
    "write_challenge_localization",
]

_SHOWN = 3
_NAME = "input_image_name"
_NEXT_STEP = "write it with write_challenge_localization or compare it with what that writes."
_OUTSIDE_MM = 0.01
"""A box may begin this far outside of the volume: rounding."""


@dataclass(frozen=True, eq=False)
class ScoredBoxes:
    """Boxes of one disease in one volume.

    Args:
        bbox_mm: (N, 6), `[xmin, ymin, zmin, dx, dy, dz]`, counted from the volume's corner.
        probabilities: (N,) in [0, 1].
    """

    bbox_mm: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True, eq=False)
class ChallengeBoxes:
    """Boxes from a challenge file.

    Args:
        volumes: volume id (without extension, in file order) -> disease key -> its boxes, possibly none.
        warnings: what the challenge would accept or misread without a word but is likely not meant; one line each.
    """

    volumes: Mapping[str, Mapping[str, ScoredBoxes]]
    warnings: tuple[str, ...]


def write_challenge_localization(
    path: str | os.PathLike,
    lesions: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    corners_mm: Mapping[str, Sequence[float]],
    disease_set: str | os.PathLike | DiseaseSet = "chest_ct_5",
    extension: str = ".mha",
) -> None:
    """Write boxes as the challenge takes them.

    Args:
        path: the JSON file.
        lesions: volume id or file name -> disease key -> entries as `boxes_of_mask` returns them, of which "bbox_mm"
            (LPS) and "probability" are used. Each disease of the set must be there: no box is an empty list.
        corners_mm: the same names -> corner of the volume (x, y, z) in LPS mm, `volume_box_mm(geometry)[:3]`.
        disease_set: name, path or object; its `challenge_name` are the file's keys.
        extension: put after each volume id.

    Raises:
        ValueError: if a volume occurs twice or has no corner, a disease is missing or unknown, or a box or a
            probability is none.
        OSError: if the file cannot be written.
    """
    diseases = load_disease_set(disease_set)
    seen: dict[str, str] = {}
    predictions = []
    for name, of_volume in lesions.items():
        volume_id = _volume_id(name)
        if volume_id in seen:
            raise ValueError(f"{path}: {seen[volume_id]!r} and {name!r} are both of {volume_id}; keep one.")
        seen[volume_id] = name
        wrong = sorted(set(of_volume) ^ set(diseases.keys))
        if wrong:
            state = "is missing" if wrong[0] in diseases.keys else "is unknown"
            raise ValueError(
                f"{path}: the disease {wrong[0]!r} of {volume_id} {state}, expected {list(diseases.keys)}; give an "
                f"empty list where there is no box."
            )
        corner = np.asarray(corners_mm.get(name, ()), dtype=np.float64)
        if corner.shape != (3,) or not np.isfinite(corner).all():
            raise ValueError(
                f"{path}: the corner of {volume_id} is {corners_mm.get(name)}, expected x, y, z in mm; pass "
                f"volume_box_mm(geometry)[:3]."
            )
        scan: dict[str, Any] = {_NAME: volume_id + extension}
        for disease in diseases.diseases:
            place = f"{path}: {volume_id}, {disease.challenge_name}"
            boxes = [_box(entry, f"{place}, box {number}") for number, entry in enumerate(of_volume[disease.key])]
            scan[disease.challenge_name] = [
                {"bbox_mm": [*(np.array(bbox[:3]) - corner).tolist(), *bbox[3:]], "probability": probability}
                for bbox, probability in boxes
            ]
        predictions.append(scan)
    write_json(path, [{"outputs": [{"type": "predictions", "value": {"predictions": predictions}}]}])


def read_challenge_localization(
    path: str | os.PathLike, disease_set: str | os.PathLike | DiseaseSet = "chest_ct_5"
) -> ChallengeBoxes:
    """Read a challenge file, also one that lacks the wrapping (``{"predictions": [...]}``, with a warning).

    Args:
        path: the JSON file.
        disease_set: name, path or object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not such JSON, lacks a disease's key or has an unknown one, describes a volume twice,
            or a box is not six finite numbers with positive sizes or has no probability from 0 to 1; one line that
            names the place.
    """
    path = Path(path)
    diseases = load_disease_set(disease_set)
    entries, wrapped = _predictions_of(path)
    warnings = [] if wrapped else [f"{path}: lacks the wrapping [{{'outputs': ...}}], which the challenge needs"]
    volumes: dict[str, dict[str, ScoredBoxes]] = {}
    numbers: dict[str, int] = {}
    unmatched, outside = [], []
    for number, entry in enumerate(entries):
        place = f"{path}: prediction {number}"
        name = entry.get(_NAME) if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _volume_id(name):
            raise ValueError(f"{place} has the {_NAME!r} {name!r}, expected the volume's name; {_NEXT_STEP}")
        volume_id = _volume_id(name)
        if volume_id in numbers:
            raise ValueError(f"{place} and prediction {numbers[volume_id]} are both of {volume_id}; keep one.")
        numbers[volume_id] = number
        volumes[volume_id] = _boxes_of_entry(entry, diseases, f"{place} ({volume_id})")
        if Path(name).stem.replace(".mha", "") != volume_id:  # how the organisers' evaluation takes the id
            unmatched.append(name)
        if any((boxes.bbox_mm[:, :3] < -_OUTSIDE_MM).any() for boxes in volumes[volume_id].values()):
            outside.append(volume_id)
    if unmatched:
        warnings.append(
            f"{path}: {len(unmatched)} name(s) the challenge would not recognise, such as {unmatched[0]!r}: it takes "
            f"off '.mha' only"
        )
    if outside:
        more = ", ..." if len(outside) > _SHOWN else ""
        warnings.append(
            f"{path}: boxes begin outside of {len(outside)} volume(s) ({', '.join(outside[:_SHOWN])}{more}); positions "
            f"are counted from the volume's corner, not absolute"
        )
    return ChallengeBoxes(volumes, tuple(warnings))


def _predictions_of(path: Path) -> tuple[list[Any], bool]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected challenge boxes as JSON; check the path.")
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); {_NEXT_STEP}") from None
    wrapped = isinstance(content, list)
    if wrapped:
        try:
            content = content[0]["outputs"][0]["value"]
        except (LookupError, TypeError):
            content = None
    entries = content.get("predictions") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: has no list 'predictions', expected {{'predictions': [...]}} in it; {_NEXT_STEP}")
    if not entries:
        raise ValueError(f"{path}: 'predictions' is empty, expected one entry for each volume; predict again.")
    return entries, wrapped


def _boxes_of_entry(entry: dict[str, Any], diseases: DiseaseSet, place: str) -> dict[str, ScoredBoxes]:
    names = [disease.challenge_name for disease in diseases.diseases]
    for key in entry:
        if key != _NAME and key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ValueError(f"{place} has the key {key!r}{hint}, expected {_NAME!r} and {names}; correct it.")
    boxes = {}
    for disease in diseases.diseases:
        name = disease.challenge_name
        given = entry.get(name)
        if not isinstance(given, list):
            state = f"is {given!r}" if name in entry else "is missing"
            raise ValueError(f"{place}: {name!r} {state}, expected a list of boxes; write [] where there is none.")
        checked = [_box(box, f"{place}, {name}, box {number}") for number, box in enumerate(given)]
        boxes[disease.key] = ScoredBoxes(
            np.array([bbox for bbox, _ in checked], dtype=np.float64).reshape(-1, 6),
            np.array([probability for _, probability in checked], dtype=np.float64),
        )
    return boxes


def _box(entry: Any, place: str) -> tuple[list[float], float]:
    """Return (bbox_mm, probability) of an entry, checked."""
    bbox = entry.get("bbox_mm") if isinstance(entry, Mapping) else None
    if isinstance(bbox, np.ndarray):
        bbox = bbox.tolist()
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 6 or not all(_is_number(value) for value in bbox):
        raise ValueError(
            f"{place} has the 'bbox_mm' {bbox!r}, expected [xmin, ymin, zmin, dx, dy, dz] in mm; {_NEXT_STEP}"
        )
    if min(bbox[3:]) <= 0:
        raise ValueError(
            f"{place} has the size {list(bbox[3:])} mm, expected three positive numbers; give corner and size, not two "
            f"corners."
        )
    probability = entry.get("probability", 1.0)
    if not _is_number(probability) or not 0 <= probability <= 1:
        raise ValueError(
            f"{place} has the probability {probability!r}, expected a number from 0 to 1; give probabilities, not "
            f"logits."
        )
    return [float(value) for value in bbox], float(probability)


def _is_number(value: Any) -> bool:
    # bool is an int to Python
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _volume_id(name: str) -> str:
    bare = volume_name(name)
    return bare[: -len(".mha")] if bare.lower().endswith(".mha") else bare
