"""Make a synthetic CT-RATE: thorax phantoms in the raw release's own layout, with labels, masks and reports that are
true of them.

    python -m data_prep.synthesize --output DIR --num-train-patients 40 --num-valid-patients 16 --seed 0

Phantoms only resemble patients. Use them to try and to test the software, never to judge how well a model reads real
scans.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.finding_record import CT_RATE_18, VLM3D_18
from data_prep.progress import progress_bar
from data_prep.synthesis_adversity import add_adversity
from data_prep.synthesis_plan import SynthesisSettings, plan_data_set
from data_prep.synthesis_tables import (
    LABEL_COLUMNS,
    METADATA_COLUMNS,
    REPORT_COLUMNS,
    VLM3D_LABEL_COLUMNS,
    csv_bytes,
    table_paths,
)
from data_prep.synthetic_scan import RECORD_FOLDER, ScanTask, finished_record, write_scan
from data_prep.worker_pool import run_tasks
from vlm3d_ext.data.atomic_files import TEMPORARY_SUFFIX, write_bytes, write_json

__all__ = ["SETTINGS_FILE", "main", "synthesize"]

SETTINGS_FILE = "synthesis_settings.json"
_OWN_FOLDERS = (
    "train",
    "valid",
    "train_fixed",
    "valid_fixed",
    "metadata",
    "multi_abnormality_labels",
    "multi_abnormality_labels_vlm3d_18",
    "radiology_text_reports",
    "anatomy_segmentation_labels",
    "lesion_masks",
    RECORD_FOLDER,
)


def synthesize(
    output: Path | str,
    settings: SynthesisSettings,
    num_workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a data set; scans that are already whole are left as they are.

    Args:
        output: folder of the data set.
        settings: what to make; the same settings give the same bytes, whatever the number of workers.
        num_workers: number of processes; 1 works in this one.
        overwrite: replace a data set made with other settings.
        progress: show a progress bar on stderr.

    Returns:
        the summary: numbers of patients, scans, volumes, masks, and the share of positive scans per label of both sets.

    Raises:
        FileExistsError: if `output` holds a data set made with other settings, or files of another origin.
    """
    output = Path(output)
    _claim(output, settings, overwrite)
    plans = plan_data_set(settings)
    records = {plan.scan_id: finished_record(output, plan) for plan in plans}
    missing = [plan for plan in plans if records[plan.scan_id] is None]
    tasks = [ScanTask(output, settings.release, plan) for plan in missing]
    with progress_bar(len(plans), len(plans) - len(missing), "scan", quiet=not progress) as bar:
        for index, result in run_tasks(write_scan, tasks, num_workers if num_workers > 1 else 0):
            if isinstance(result, Exception):
                raise result
            records[missing[index].scan_id] = result
            bar.update()
    whole = [record for plan in plans if (record := records[plan.scan_id]) is not None]
    for split in ("train", "valid"):
        _write_tables(output, split, [record for record in whole if record["split"] == split])
    findings = {
        record["scan_id"]: {name: record[name] for name in ("patient_id", "split", "volumes", "findings")}
        for record in whole
    }
    write_json(output / "findings.json", findings)
    summary = _summarise(whole, num_new=len(missing))
    if settings.adversity:
        summary["adversity"] = add_adversity(output, settings.release, settings.seed)
    return summary


def _claim(output: Path, settings: SynthesisSettings, overwrite: bool) -> None:
    """Make sure that the folder is ours to write these settings into."""
    path = output / SETTINGS_FILE
    wanted = settings.to_json()
    if path.is_file():
        found = json.loads(path.read_text())
        if found == wanted:
            for leftover in output.rglob(f".*{TEMPORARY_SUFFIX}"):
                leftover.unlink(missing_ok=True)  # of a run that was killed while it wrote
            return
        differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        changes = ", ".join(f"{key} is {found.get(key)!r}, not {wanted.get(key)!r}" for key in differing)
        if not overwrite:
            raise FileExistsError(
                f"{path}: the data set there was made with other settings ({changes}); choose another --output, "
                "or replace it with --overwrite."
            )
        # The old settings stay until all is gone: killed in between, the folder is still known as ours.
        for name in _OWN_FOLDERS:
            if (output / name).is_dir():
                shutil.rmtree(output / name)
        for name in ("findings.json", "adversity.json"):
            (output / name).unlink(missing_ok=True)
    elif output.is_dir() and any(output.iterdir()):
        raise FileExistsError(
            f"{output}: holds files but no {SETTINGS_FILE}, so it is no synthetic data set; choose an empty folder."
        )
    write_json(path, wanted)


def _write_tables(output: Path, split: str, records: Sequence[dict[str, Any]]) -> None:
    paths = table_paths(split)
    labels, vlm3d_labels, metadata, reports = [], [], [], []
    for record in records:
        for volume_id, row in zip(record["volumes"], record["metadata"], strict=True):
            name = {"VolumeName": f"{volume_id}.nii.gz"}
            labels.append({**name, **record["labels"]})
            vlm3d_labels.append({**name, **record["vlm3d_labels"]})
            reports.append({**name, **dict(zip(REPORT_COLUMNS[1:], record["report"], strict=True))})
            metadata.append(row)
    write_bytes(output / paths["labels"], csv_bytes(LABEL_COLUMNS, labels))
    write_bytes(output / paths["vlm3d_labels"], csv_bytes(VLM3D_LABEL_COLUMNS, vlm3d_labels))
    write_bytes(output / paths["metadata"], csv_bytes(METADATA_COLUMNS, metadata))
    write_bytes(output / paths["reports"], csv_bytes(REPORT_COLUMNS, reports))
    write_bytes(output / paths["no_chest"], b"")


def _summarise(records: Sequence[dict[str, Any]], num_new: int) -> dict[str, Any]:
    def prevalence(names: Sequence[str], key: str) -> dict[str, float]:
        return {name: round(sum(record[key][name] for record in records) / len(records), 3) for name in names}

    return {
        "patients": len({record["patient_id"] for record in records}),
        "scans": len(records),
        "scans_made_now": num_new,
        "volumes": sum(len(record["volumes"]) for record in records),
        "lesion_masks": sum(path.startswith("lesion_masks/") for record in records for path in record["files"]),
        "ct_rate_18": prevalence(CT_RATE_18, "labels"),
        "vlm3d_18": prevalence(VLM3D_18, "vlm3d_labels"),
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = SynthesisSettings()
    parser = argparse.ArgumentParser(prog="python -m data_prep.synthesize", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR")
    add("--num-train-patients", type=int, default=defaults.num_train_patients, metavar="N")
    add("--num-valid-patients", type=int, default=defaults.num_valid_patients, metavar="N")
    add("--seed", type=int, default=defaults.seed)
    add("--release", choices=("v2", "v1"), default=defaults.release, help="v1: blank headers, HU through the metadata")
    add("--size", type=int, nargs=3, default=defaults.size, metavar=("D", "H", "W"))
    add("--field-of-view-mm", type=float, nargs=3, default=defaults.field_of_view_mm, metavar=("Z", "Y", "X"))
    add(
        "--minimum-prevalence",
        type=float,
        default=defaults.minimum_prevalence,
        help="least share of positive scans per finding; rarer ones are raised to it, others keep CT-RATE's share",
    )
    add("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes; the result does not depend on it")
    add(
        "--adversity",
        action="store_true",
        help="add the real data set's quirks: missing files, bad rows, a head CT ...",
    )
    add("--overwrite", action="store_true", help="replace a data set made with other settings")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse(arguments)
    try:
        settings = SynthesisSettings(
            num_train_patients=options.num_train_patients,
            num_valid_patients=options.num_valid_patients,
            seed=options.seed,
            release=options.release,
            size=tuple(options.size),
            field_of_view_mm=tuple(options.field_of_view_mm),
            minimum_prevalence=options.minimum_prevalence,
            adversity=options.adversity,
        )
        summary = synthesize(options.output, settings, options.workers, options.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.output}: {summary['patients']} patients, "
        f"{summary['scans']} scans ({summary['scans_made_now']} made now), "
        f"{summary['volumes']} volumes, {summary['lesion_masks']} lesion masks"
    )
    width = max(len(name) for name in (*CT_RATE_18, *VLM3D_18))
    for label_set in ("ct_rate_18", "vlm3d_18"):
        print(f"share of positive scans, {label_set}:")
        for name, share in summary[label_set].items():
            print(f"  {name:<{width}} {share:5.1%}")
    for volume_id, quirk in summary.get("adversity", {}).items():
        print(f"adversity: {volume_id}: {quirk}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
