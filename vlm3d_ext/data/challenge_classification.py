"""The JSON file in which the VLM3D challenge takes classification results.

Source: https://abnclass.vlm3dchallenge.com and the organisers' evaluation, github.com/forithmus/VLM3D-Dockers.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .atomic_files import write_json
from .csv_table import volume_name

__all__ = ["ChallengePredictions", "read_challenge_predictions", "write_challenge_predictions"]

_SHOWN = 3
_NEXT_STEP = "write it with write_challenge_predictions or compare it with what that writes."


@dataclass(frozen=True)
class ChallengePredictions:
    """Probabilities from a challenge file.

    Args:
        volume_ids: in file order, without extension.
        probabilities: (N, L) in [0, 1], in the order of the label names that were asked for.
        warnings: what the challenge would accept without a word but is likely not meant; one line each.
    """

    volume_ids: tuple[str, ...]
    probabilities: np.ndarray
    warnings: tuple[str, ...]


def write_challenge_predictions(
    path: str | os.PathLike,
    names: Sequence[str],
    label_names: Sequence[str],
    probabilities: np.ndarray,
    extension: str = "",
) -> None:
    """Write probabilities as the challenge takes them. It decides at 0.5; see `vlm3d_ext.metrics.rescale_to_half`.

    Args:
        path: the JSON file.
        names: (N,), volume ids or file names of the scans; folders and extensions are dropped.
        label_names: (L,), as the challenge spells them (label set ``ct_rate_18``).
        probabilities: (N, L) in [0, 1].
        extension: put after each volume id in ``input_image_name``. The challenge's description asks for the id with
            its extension stripped, the default; its evaluation strips ``.nii.gz`` itself, so that works too.

    Raises:
        ValueError: if a name occurs twice, the shapes differ, or a probability is not in [0, 1].
        OSError: if the file cannot be written.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if values.shape != (len(names), len(label_names)):
        raise ValueError(
            f"{path}: probabilities must be ({len(names)} names, {len(label_names)} labels), got {values.shape}."
        )
    ids = [_volume_id(name) for name in names]
    for what, given in (("volume", ids), ("label", list(label_names))):
        repeated = sorted({name for name in given if given.count(name) > 1}) if len(set(given)) < len(given) else []
        if repeated:
            raise ValueError(f"{path}: each {what} must be given once, but {repeated[:_SHOWN]} are there twice.")
    wrong = np.argwhere(~((values >= 0) & (values <= 1)))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{path}: the probability of {label_names[column]!r} for {ids[row]} is {values[row, column]}, expected 0 "
            f"to 1; give probabilities, not logits."
        )
    predictions = [
        {
            "input_image_name": volume_id + extension,
            "probabilities": dict(zip(label_names, row.tolist(), strict=True)),
        }
        for volume_id, row in zip(ids, values, strict=True)
    ]
    content = {
        "name": "Generated probabilities",
        "type": "Abnormality Classification",
        "version": {"major": 1, "minor": 0},
        "predictions": predictions,
    }
    write_json(path, content)


def read_challenge_predictions(path: str | os.PathLike, label_names: Sequence[str]) -> ChallengePredictions:
    """Read a challenge file: as it is submitted, or as the platform wraps it for its evaluation
    (``[{"outputs": [{"value": {...}}]}]``).

    Args:
        path: the JSON file.
        label_names: (L,), the labels that are wanted. As in the challenge, one that is missing counts as 0, here with
            a warning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not such JSON, names a label that is not among `label_names`, has a probability
            outside [0, 1], or describes a volume twice; one line that names the place.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected challenge predictions as JSON; check the path.")
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); {_NEXT_STEP}") from None
    entries = _predictions_of(content)
    if entries is None:
        raise ValueError(f"{path}: has no list 'predictions', expected {{'predictions': [...]}}; {_NEXT_STEP}")
    if not entries:
        raise ValueError(f"{path}: 'predictions' is empty, expected one entry for each volume; predict again.")
    names = list(label_names)
    volume_ids: dict[str, int] = {}
    rows, missing = [], []
    for number, entry in enumerate(entries):
        place = f"{path}: prediction {number}"
        volume_id, given = _entry(entry, place)
        if volume_id in volume_ids:
            raise ValueError(f"{place} and prediction {volume_ids[volume_id]} are both of {volume_id}; keep one.")
        volume_ids[volume_id] = number
        rows.append(_row(given, names, f"{place} ({volume_id})"))
        missing += [(volume_id, name) for name in names if name not in given]
    warnings = []
    if missing:
        labels = sorted({name for _, name in missing}, key=names.index)
        volumes = list(dict.fromkeys(volume_id for volume_id, _ in missing))
        more = ", ..." if len(volumes) > _SHOWN else ""
        warnings.append(
            f"{path}: {len(missing)} probabilities are missing and count as 0, of {labels} in {len(volumes)} "
            f"volume(s) ({', '.join(volumes[:_SHOWN])}{more})"
        )
    return ChallengePredictions(tuple(volume_ids), np.array(rows, dtype=np.float64), tuple(warnings))


def _predictions_of(content: Any) -> list[Any] | None:
    if isinstance(content, list):
        try:
            content = content[0]["outputs"][0]["value"]
        except (LookupError, TypeError):
            return None
    predictions = content.get("predictions") if isinstance(content, dict) else None
    return predictions if isinstance(predictions, list) else None


def _entry(entry: Any, place: str) -> tuple[str, dict[str, Any]]:
    for key, kind in (("input_image_name", str), ("probabilities", dict)):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            raise ValueError(f"{place} has no {key!r} ({kind.__name__}), expected both keys of an entry; {_NEXT_STEP}")
    volume_id = _volume_id(entry["input_image_name"])
    if not volume_id:
        raise ValueError(f"{place} has an empty 'input_image_name', expected the volume's id; fill it in.")
    return volume_id, entry["probabilities"]


def _row(given: dict[str, Any], names: Sequence[str], place: str) -> list[float]:
    for label in given:
        if label not in names:
            near = difflib.get_close_matches(label, names, n=1, cutoff=0.5)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ValueError(
                f"{place} has the label {label!r}{hint}, expected only the {len(names)} of the label set; correct the "
                f"name or choose another set."
            )
    for label, value in given.items():
        # bool is an int to Python, but `true` is a decision, not a probability
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(
                f"{place}: the probability of {label!r} is {value!r}, expected a number from 0 to 1; give "
                f"probabilities, not logits."
            )
    return [float(given.get(name, 0.0)) for name in names]


def _volume_id(name: str) -> str:
    bare = volume_name(name)
    return bare[: -len(".mha")] if bare.lower().endswith(".mha") else bare
