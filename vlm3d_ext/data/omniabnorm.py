"""OmniAbnorm cases: findings with a chain of reasoning, one JSON file each, as supplementary training data.

    python -m vlm3d_ext.data.omniabnorm FOLDER --label-set vlm3d_18 --output omniabnorm.json

A file holds ``image_id``, ``image_path`` (relative to FOLDER), ``findings`` (a list of ``disease``, ``present``,
``confidence``, ``location``), ``reasoning`` and ``summary``. What a file does not mention is unknown, never negative.
Files that cannot be used are listed and left out. Ends with 0, or with 2 if there is no usable case.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..text.label_set import LabelSet, available_label_sets, load_label_set
from .atomic_files import write_json

__all__ = [
    "OmniAbnormCase",
    "OmniAbnormError",
    "OmniAbnormFolder",
    "main",
    "read_omniabnorm_case",
    "read_omniabnorm_folder",
]

DEFAULT_MIN_CONFIDENCE = 0.5
_SHOWN = 10


class OmniAbnormError(ValueError):
    """A file is not a usable case; one line says which file, what was expected, what to do."""


@dataclass(frozen=True)
class OmniAbnormCase:
    """One case.

    Args:
        image_id: as in the file.
        image_path: absolute path of the image; it need not exist, see `has_image`.
        has_image: whether it does.
        labels: 1.0, 0.0 or NaN (unknown) for each finding of the label set, in its order.
        locations: finding's key -> where it is, as the file says, for findings whose label is 1.
        reasoning: chain of reasoning, "" if there is none.
        summary: "" if there is none.
        unknown_diseases: names in the file that the label set does not have.
        num_unsure: findings of the label set left unknown because each mention was below the confidence that is asked.
        num_contradictory: findings of the label set left unknown because one mention says present, another absent.
    """

    image_id: str
    image_path: Path
    has_image: bool
    labels: tuple[float, ...]
    locations: dict[str, tuple[str, ...]]
    reasoning: str
    summary: str
    unknown_diseases: tuple[str, ...]
    num_unsure: int
    num_contradictory: int


@dataclass(frozen=True)
class OmniAbnormFolder:
    """The cases of a folder and what was wrong with the others.

    Args:
        label_set: that the labels follow.
        cases: by path of their file.
        problems: one line for each file that was left out.
        unknown_diseases: name -> number of cases with it; none of them is in the label set.
    """

    label_set: LabelSet
    cases: tuple[OmniAbnormCase, ...]
    problems: tuple[str, ...]
    unknown_diseases: dict[str, int]

    @property
    def missing_images(self) -> tuple[Path, ...]:
        """Paths of images that are not there; their cases are kept, since reasoning and labels need none."""
        return tuple(case.image_path for case in self.cases if not case.has_image)

    def nearest_finding(self, disease: str) -> str | None:
        """Return the key in the label set that is spelt most like `disease`, or None."""
        near = difflib.get_close_matches(_normalised(disease), self.label_set.keys, n=1)
        return near[0] if near else None


def read_omniabnorm_case(
    path: str | os.PathLike,
    label_set: LabelSet | str = "vlm3d_18",
    min_confidence: float = DEFAULT_MIN_CONFIDENCE,
    image_root: str | os.PathLike | None = None,
) -> OmniAbnormCase:
    """Read one case.

    A disease is matched with a finding's key, name or synonym; case, spaces, hyphens and underscores do not matter.
    Links are followed: an image must lie inside the folder, not only its name.

    Args:
        path: the JSON file.
        label_set: whose findings the labels are, or its name.
        min_confidence: mentions below it say nothing, 0 to 1.
        image_root: folder that ``image_path`` is relative to and must not leave; that of the file by default.

    Raises:
        OmniAbnormError: if the file is no such JSON, or its image path leads out of the folder.
        OSError: if the file cannot be read.
    """
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence must lie in [0, 1], got {min_confidence}.")
    path = Path(path)
    findings_of = label_set if isinstance(label_set, LabelSet) else load_label_set(label_set)
    content = _load(path)
    mentions: dict[str, list[tuple[bool, float, str]]] = {}
    strangers: dict[str, None] = {}
    keys = _keys_by_word(findings_of)
    for number, finding in enumerate(content["findings"]):
        disease, mention = _mention(finding, f"{path}: finding {number}")
        key = keys.get(_normalised(disease))
        if key is None:
            strangers[disease] = None
        else:
            mentions.setdefault(key, []).append(mention)
    labels: list[float] = []
    locations: dict[str, tuple[str, ...]] = {}
    num_unsure = num_contradictory = 0
    for key in findings_of.keys:
        sure = [mention for mention in mentions.get(key, []) if mention[1] >= min_confidence]
        said = {present for present, _, _ in sure}
        num_contradictory += len(said) == 2
        labels.append(float(True in said) if len(said) == 1 else math.nan)
        num_unsure += key in mentions and not sure
        if labels[-1] == 1:
            locations[key] = tuple(dict.fromkeys(location for _, _, location in sure if location))
    image_path = _image_path(path, content["image_path"], Path(image_root) if image_root else path.parent)
    return OmniAbnormCase(
        content["image_id"],
        image_path,
        image_path.is_file(),
        tuple(labels),
        {key: places for key, places in locations.items() if places},
        content.get("reasoning") or "",
        content.get("summary") or "",
        tuple(strangers),
        num_unsure,
        num_contradictory,
    )


def read_omniabnorm_folder(
    folder: str | os.PathLike,
    label_set: LabelSet | str = "vlm3d_18",
    min_confidence: float = DEFAULT_MIN_CONFIDENCE,
    exclude: Sequence[Path] = (),
) -> OmniAbnormFolder:
    """Read every ``.json`` file in a folder and below it; bad files are listed and do not stop the rest.

    Args:
        folder: image paths are relative to it.
        label_set: whose findings the labels are, or its name.
        min_confidence: mentions below it say nothing, 0 to 1.
        exclude: files to pass over.

    Raises:
        FileNotFoundError: if there is no such folder, or no JSON file in it.
        ValueError: if the confidence is outside [0, 1], or there is no such label set.
    """
    folder = Path(folder)
    findings_of = label_set if isinstance(label_set, LabelSet) else load_label_set(label_set)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected OmniAbnorm cases; check the path.")
    passed_over = {path.resolve() for path in exclude}
    paths = sorted(path for path in folder.rglob("*.json") if path.resolve() not in passed_over)
    if not paths:
        raise FileNotFoundError(f"{folder}: holds no .json file, expected one for each case; check the path.")
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence must lie in [0, 1], got {min_confidence}.")
    cases: dict[str, OmniAbnormCase] = {}
    first_file: dict[str, Path] = {}
    problems: list[str] = []
    for path in paths:
        try:
            case = read_omniabnorm_case(path, findings_of, min_confidence, folder)
        except (OmniAbnormError, OSError) as error:
            problems.append(str(error))
            continue
        if case.image_id in cases:
            problems.append(
                f"{path}: {case.image_id!r} is in {first_file[case.image_id]} already; keep one of the two."
            )
            continue
        cases[case.image_id], first_file[case.image_id] = case, path
    strangers = Counter(disease for case in cases.values() for disease in case.unknown_diseases)
    return OmniAbnormFolder(findings_of, tuple(cases.values()), tuple(problems), dict(sorted(strangers.items())))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OmniAbnormError(f"{path}: is not JSON ({error}); write it again.") from None
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise OmniAbnormError(
            f"{path}: holds half of a surrogate pair (\\ud800 to \\udfff), which no UTF-8 file can; write it again."
        ) from None
    if not isinstance(content, dict):
        raise OmniAbnormError(f"{path}: is {type(content).__name__}, expected one JSON object a file; split it up.")
    for key, kind in (("image_id", str), ("image_path", str), ("findings", list)):
        if not isinstance(content.get(key), kind) or (kind is str and not content[key].strip()):
            raise OmniAbnormError(f"{path}: {key!r} is {content.get(key)!r}, expected a {kind.__name__}; fill it in.")
    for key in ("reasoning", "summary"):
        if not isinstance(content.get(key), (str, type(None))):
            raise OmniAbnormError(f"{path}: {key!r} is {content[key]!r}, expected text; write it as a string.")
    return content


def _mention(finding: Any, place: str) -> tuple[str, tuple[bool, float, str]]:
    """Return a finding's disease, and whether it is present, how sure that is, and where."""
    if not isinstance(finding, dict):
        raise OmniAbnormError(f"{place} is {finding!r}, expected an object with 'disease' and 'present'; correct it.")
    disease, present = finding.get("disease"), finding.get("present")
    confidence, location = finding.get("confidence"), finding.get("location")
    if not isinstance(disease, str) or not _normalised(disease):
        raise OmniAbnormError(f"{place}: 'disease' is {disease!r}, expected a name; fill it in.")
    if not isinstance(present, bool):
        raise OmniAbnormError(f"{place}: 'present' is {present!r}, expected true or false; correct it.")
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 <= confidence <= 1:
        raise OmniAbnormError(f"{place}: 'confidence' is {confidence!r}, expected a number from 0 to 1; correct it.")
    if not isinstance(location, (str, type(None))):
        raise OmniAbnormError(f"{place}: 'location' is {location!r}, expected text; write it as a string.")
    return disease, (present, float(confidence), (location or "").strip())


def _image_path(path: Path, written: str, root: Path) -> Path:
    root = root.resolve()
    try:
        image_path = (root / written.replace("\\", "/")).resolve()
    except (ValueError, RuntimeError, OSError) as error:  # a null byte, a circle of links, a name too long
        raise OmniAbnormError(f"{path}: 'image_path' {written[:80]!r} is no path ({error}); correct it.") from None
    if not image_path.is_relative_to(root):
        raise OmniAbnormError(
            f"{path}: 'image_path' {written!r} leads out of {root}, expected a path inside; correct it."
        )
    return image_path


def _keys_by_word(label_set: LabelSet) -> dict[str, str]:
    """Return normalised words -> key; a synonym that two findings share names neither."""
    owners: dict[str, set[str]] = {}
    for finding in label_set.findings:
        for synonym in finding.synonyms:
            owners.setdefault(_normalised(synonym), set()).add(finding.key)
    words = {word: next(iter(keys)) for word, keys in owners.items() if len(keys) == 1}
    for finding in label_set.findings:
        words[_normalised(finding.name)] = words[_normalised(finding.key)] = finding.key
    return words


def _normalised(text: str) -> str:
    return re.sub(r"[\s_-]+", "_", text.strip().lower())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 0 or 2."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm3d_ext.data.omniabnorm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder with one JSON file for each case, and the images")
    parser.add_argument("--label-set", default="vlm3d_18", help=f"one of {available_label_sets()}, or a file")
    parser.add_argument(
        "--min-confidence", type=float, default=DEFAULT_MIN_CONFIDENCE, help="below it a mention says nothing"
    )
    parser.add_argument("--output", type=Path, help="write the cases as one JSON file")
    options = parser.parse_args(arguments)
    try:
        exclude = [options.output] if options.output else []
        read = read_omniabnorm_folder(options.folder, options.label_set, options.min_confidence, exclude)
        print(_summary(read))
        if not read.cases:
            raise ValueError(f"{options.folder}: none of its {len(read.problems)} files can be used; see above.")
        if options.output:
            write_json(options.output, _as_manifest(read, options.folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _as_manifest(read: OmniAbnormFolder, folder: Path) -> dict[str, Any]:
    root = folder.resolve()
    cases = [
        {
            "image_id": case.image_id,
            "image_path": case.image_path.relative_to(root).as_posix(),
            "has_image": case.has_image,
            "labels": [None if math.isnan(value) else int(value) for value in case.labels],
            "reasoning": case.reasoning,
            "summary": case.summary,
            "locations": {key: list(places) for key, places in case.locations.items()},
        }
        for case in read.cases
    ]
    return {"label_set": read.label_set.name, "label_names": list(read.label_set.names), "cases": cases}


def _summary(read: OmniAbnormFolder) -> str:
    width = max(len(name) for name in read.label_set.names) + 2
    lines = [
        f"{len(read.cases)} cases, {len(read.problems)} files left out, {len(read.missing_images)} images missing; "
        f"unknown: {sum(case.num_unsure for case in read.cases)} findings mentioned without enough confidence, "
        f"{sum(case.num_contradictory for case in read.cases)} contradictory",
        f"{'label':{width}}{'positive':>10}{'negative':>10}{'unknown':>10}",
    ]
    for column, name in enumerate(read.label_set.names):
        values = [case.labels[column] for case in read.cases]
        positive, negative = values.count(1.0), values.count(0.0)
        lines.append(f"{name:{width}}{positive:>10}{negative:>10}{len(values) - positive - negative:>10}")
    for disease, count in read.unknown_diseases.items():
        near = read.nearest_finding(disease)
        hint = f" (nearest: {near})" if near else ""
        lines.append(f"not in {read.label_set.name}: {disease!r}{hint}, in {count} case(s)")
    for title, items in (("left out", read.problems), ("no image", [str(path) for path in read.missing_images])):
        lines += [f"{title}: {item}" for item in items[:_SHOWN]]
        if len(items) > _SHOWN:
            lines.append(f"{title}: and {len(items) - _SHOWN} more")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
