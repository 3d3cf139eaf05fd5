"""The tables that the multitask bundle writes for the VLM3D challenge, in the form in which each track takes its own.

Source: github.com/forithmus/VLM3D-Dockers at commit a945908, README section 3.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.atomic_files import write_json
from ..data.csv_table import volume_name

__all__ = ["TASKS", "ChallengeTable", "name_as_input", "read_challenge_table", "write_submission"]

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


@dataclass(frozen=True)
class ChallengeTable:
    """A task's table.

    Args:
        path: where the bundle writes it, below its output.
        key: what its list of entries is called.
        submitted_as: name of the file that the challenge's track takes.
    """

    path: str
    key: str
    submitted_as: str


TASKS = {
    "classification": ChallengeTable(
        "classification/tables/challenge_classification.json", "predictions", "results.json"
    ),
    "localization": ChallengeTable("localization/tables/challenge_localization.json", "predictions", "results.json"),
    "report_generation": ChallengeTable(
        "report_generation/tables/challenge_reports.json", "generated_reports", "predictions.json"
    ),
}
"""Task -> its table."""


def read_challenge_table(path: Path, key: str) -> tuple[Any, list[dict[str, Any]]]:
    """Return a table and the list of entries inside it, whether it is wrapped for the platform or not.

    Raises:
        ValueError: if it is not there, no JSON, or has no such list.
    """
    if not path.is_file():
        raise ValueError(f"{path}: is not there, expected the bundle to write it.")
    content = json.loads(path.read_bytes())
    try:
        inner = content[0]["outputs"][0]["value"] if isinstance(content, list) else content
        entries = inner[key]
        if not all(isinstance(entry["input_image_name"], str) for entry in entries):
            raise TypeError
    except (LookupError, TypeError):
        raise ValueError(f"{path}: is no table of the challenge, expected a list {key!r} of named entries.") from None
    return content, entries


def name_as_input(entries: list[dict[str, Any]], scans: Mapping[str, str], task: str, bare_uuid: bool) -> list[str]:
    """Give entries the scans' own names instead of the ids that the preparation made of them.

    Args:
        entries: of one table, with the id and perhaps an extension as "input_image_name"; changed here.
        scans: id -> file name of the scan, without extension.
        task: for messages.
        bare_uuid: name scans as the report track does, by the last UUID between underscores, without an extension.

    Returns:
        The names of the scans that have no entry.
    """
    seen = set()
    for entry in entries:
        written = entry["input_image_name"]
        scan_id = written if written in scans else _bare(written)
        if scan_id not in scans:
            print(f"warning: {task}: {written} is the name of no scan in the input; left as it is.", file=sys.stderr)
            continue
        seen.add(scan_id)
        name = scans[scan_id]
        entry["input_image_name"] = _submitted_name(name) if bare_uuid else name + written[len(scan_id) :]
    return [name for scan_id, name in scans.items() if scan_id not in seen]


def _bare(written: str) -> str:
    bare = volume_name(written)
    return bare[: -len(".mha")] if bare.lower().endswith(".mha") else bare


def _submitted_name(name: str) -> str:
    """Return what the report track calls a scan: the last UUID between underscores, else the name itself."""
    uuids = [part for part in name.split("_") if _UUID.fullmatch(part)]
    return uuids[-1] if uuids else name


def write_submission(folder: Path, task: str, content: Any, single: bool) -> None:
    """Write a table, whole or not at all.

    Args:
        folder: where to.
        task: one of `TASKS`.
        content: what `read_challenge_table` returned.
        single: under the name and in the form of the track; else as the bundle has it.

    Raises:
        OSError: if the file cannot be written.
    """
    table = TASKS[task]
    if not single:
        write_json(folder / Path(table.path).name, content)
        return
    wrapped = task == "report_generation" and not isinstance(content, list)
    write_json(folder / table.submitted_as, [{"outputs": [{"value": content}]}] if wrapped else content)
