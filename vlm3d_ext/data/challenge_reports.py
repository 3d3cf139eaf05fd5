"""The VLM3D challenge's file of generated reports.

Source: the challenge's public description; see docs/design.md for what is known of it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from .atomic_files import write_json

__all__ = ["write_challenge_reports"]


def write_challenge_reports(
    path: str | os.PathLike, volume_ids: Sequence[str], reports: Sequence[str], extension: str = ".nii.gz"
) -> None:
    """Write ``{"name": "Generated reports", "type": "Report generation", "generated_reports": [{"input_image_name",
    "report"}, ...], "version": {"major": 1, "minor": 0}}``.

    Args:
        path: the JSON file.
        volume_ids: such as ``train_1000_a_1``; each once.
        reports: as many texts, in the form ``"Findings: ... Impression: ..."``.
        extension: put behind each id.

    Raises:
        ValueError: if a volume is there twice, or the numbers differ.
        OSError: if the file cannot be written.
    """
    if len(volume_ids) != len(reports):
        raise ValueError(f"{path}: {len(volume_ids)} volumes have {len(reports)} reports, expected one for each.")
    repeated = sorted(volume_id for volume_id, count in Counter(volume_ids).items() if count > 1)
    if repeated:
        raise ValueError(f"{path}: each volume must be given once, but {repeated[:4]} are there twice.")
    entries = [
        {"input_image_name": volume_id + extension, "report": report}
        for volume_id, report in zip(volume_ids, reports, strict=True)
    ]
    write_json(
        path,
        {
            "name": "Generated reports",
            "type": "Report generation",
            "generated_reports": entries,
            "version": {"major": 1, "minor": 0},
        },
    )
