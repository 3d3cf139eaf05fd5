"""Turn a raw release (CT-RATE v1 or v2), or any folder of scans, into prepared cases and one manifest.

    python -m data_prep.prepare --source RAW --output PREPARED
    python -m data_prep.prepare --source my_scan.nii.gz --output PREPARED --anatomical-masks totalsegmentator
    python -m data_prep.prepare --source RAW --output PREPARED --dask-scheduler tcp://host:8786

What comes out is described in docs/design.md. A run may be interrupted and started again; finished cases are kept. It
ends with 0 if every case is prepared or left out on purpose, 3 if some cases were refused (preparation_log.json says
why), 2 if nothing could be done or the run had to stop (a full disk, a lost cluster), 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.anatomical_masks import MaskCoding
from data_prep.case_preparation import one_line
from data_prep.ct_rate_layout import find_ct_rate_root, read_ct_rate
from data_prep.dask_cluster import run_on_cluster
from data_prep.dry_run import estimate
from data_prep.lesion_mask_sources import LESION_MASK_SOURCES
from data_prep.lesion_masks import FOLDER
from data_prep.memory_need import GIB
from data_prep.preparation_run import MaskSources, RunStopped, plan_cases, run_preparation
from data_prep.preparation_settings import ANATOMICAL_MASK_MODES, PreparationSettings
from data_prep.raw_case import LayoutError, RawDataset
from data_prep.rexgrounding import REXGROUNDINGCT
from data_prep.scan_folder import read_scan_folder
from data_prep.totalsegmentator_command import require_totalsegmentator
from data_prep.totalsegmentator_lesions import LESION_TASKS, TOTALSEGMENTATOR
from data_prep.worker_pool import TaskRunner, run_tasks
from vlm3d_ext.data.depth_policies import DEPTH_POLICIES
from vlm3d_ext.data.intensity_windows import DEFAULT_WINDOW, INTENSITY_WINDOWS
from vlm3d_ext.data.prepared_case import VOLUME_FORMATS
from vlm3d_ext.data.totalsegmentator_classes import TOTALSEGMENTATOR_VERSIONS
from vlm3d_ext.text.label_set import LabelSet, load_label_set

__all__ = ["EXIT_INTERRUPTED", "EXIT_NOTHING_DONE", "EXIT_SOME_REFUSED", "main"]

EXIT_NOTHING_DONE = 2
EXIT_SOME_REFUSED = 3
EXIT_INTERRUPTED = 130

_SHOWN_REFUSALS = 10
_CT_RATE_MASKS = Path("anatomy_segmentation_labels", "ts_seg")
_TEST_FRACTION = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0, 2, 3 or 130, see the module)."""
    options = _parser().parse_args(arguments)
    try:
        return _prepare(options)
    except (ValueError, FileNotFoundError, RunStopped) as error:
        text = str(error) if isinstance(error, RunStopped) else one_line(error, {})
        print(f"error: {text}", file=sys.stderr)
    except OSError as error:
        # A full disk names no file; it can only be the output's.
        place = "" if error.filename else f"--output {options.output}: "
        print(f"error: {place}{one_line(error, {})}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; start the same command again to continue, finished cases are kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_NOTHING_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--source", required=True, type=Path, help="CT-RATE folder, folder of scans, NIfTI file, or DICOM series folder"
    )
    add("--output", required=True, type=Path, help="folder for the prepared data set")
    add("--layout", choices=("auto", "ct_rate", "scan_folder"), default="auto")
    add(
        "--release",
        choices=("auto", "v1", "v2"),
        default="auto",
        help="CT-RATE release; auto takes v2 where it is there",
    )
    add("--spatial-size", nargs=3, type=int, default=(64, 512, 512), metavar=("D", "H", "W"))
    add(
        "--depth-policy", choices=DEPTH_POLICIES, default="resample", help="whole chest, middle, or overlapping windows"
    )
    add(
        "--spacing-mm",
        nargs=3,
        type=float,
        metavar=("Z", "Y", "X"),
        help="voxel size for --depth-policy crop and windows (default 2.0 0.742 0.742)",
    )
    add(
        "--window", nargs="+", choices=sorted(INTENSITY_WINDOWS), default=[DEFAULT_WINDOW], help="several give channels"
    )
    add(
        "--volume-format",
        choices=VOLUME_FORMATS,
        default="npz",
        help="npz, or blosc2: in chunks, larger by a fifth, read six times as fast, and in parts",
    )
    add(
        "--anatomical-masks",
        default="auto",
        metavar="|".join((*ANATOMICAL_MASK_MODES, "DIR")),
        help="auto looks where CT-RATE and TotalSegmentator put them; totalsegmentator makes them",
    )
    add(
        "--anatomical-mask-labels",
        choices=("totalsegmentator", "regions"),
        default="totalsegmentator",
        help="what the numbers mean in masks that do not name their classes",
    )
    add("--totalsegmentator-version", type=int, choices=TOTALSEGMENTATOR_VERSIONS, default=2, help="of those numbers")
    add("--lesion-masks", type=Path, metavar="DIR", help="default: lesion_masks in the source, where it is there")
    add("--rexgrounding", type=Path, metavar="DIR", help="a release of ReXGroundingCT: dataset.json and segmentations/")
    add(
        "--lesion-mask-sources",
        nargs="+",
        choices=LESION_MASK_SOURCES,
        metavar="SOURCE",
        help=f"use only these of {', '.join(LESION_MASK_SOURCES)} (the last being CT-RATE's pseudo-masks); default: "
        f"all that are there, the first that has a volume's disease gives its mask",
    )
    add(
        "--resample-lesion-masks",
        action="store_true",
        help="bring lesion masks on another grid onto their scan's, instead of refusing the case",
    )
    add("--label-set", default="ct_rate_18", help="name of a label set, or a JSON file")
    add("--validation-fraction", type=float, default=0.1, help="share of the training patients")
    add("--reconstructions", choices=("all", "first"), default="all", help="of each scan (CT-RATE)")
    add(
        "--split",
        choices=("by_patient", "training", "validation", "test"),
        help=f"scan folders only: one split for all (default test), or by_patient ({_TEST_FRACTION:.0%}% of the "
        f"patients are test)",
    )
    add("--seed", type=int, default=0, help="of the choice of patients")
    add("--workers", type=int, default=_num_cores(), metavar="N", help="processes; 0 works without a pool")
    add(
        "--dask-scheduler",
        metavar="ADDRESS|FILE",
        help="work on a Dask cluster instead, by its scheduler's address (tcp://host:8786) or scheduler file; its "
        "workers, best started with --nthreads 1, must see source and output at the same paths",
    )
    add("--retries", type=int, default=2, metavar="R", help="of a case whose worker died (default 2)")
    add(
        "--max-memory-gib",
        type=float,
        metavar="G",
        help="refuse cases that would need more memory in a worker, by their headers; --dry-run says how many",
    )
    add("--overwrite", action="store_true", help="prepare everything again")
    add("--no-hu-check", action="store_true", help="accept scans without air at -1000 HU")
    add("--dry-run", action="store_true", help="count; estimate disk, time and memory from five cases; write nothing")
    return parser


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(options: argparse.Namespace) -> int:
    # The folders are resolved, so that relative paths in the manifest hold; a file keeps its name, since a download
    # manager's
    # links point to files that are named by a hash.
    source = (
        options.source.resolve() if options.source.is_dir() else options.source.parent.resolve() / options.source.name
    )
    output = options.output.resolve()
    if not source.exists():
        raise LayoutError(f"--source {options.source}: no such file or folder; check the path.")
    if options.depth_policy == "resample" and options.spacing_mm is not None:
        raise LayoutError(
            f"--spacing-mm {options.spacing_mm} has no effect with --depth-policy resample, which derives it; "
            f"leave it out, or "
            "choose crop or windows."
        )
    if not 0 <= options.validation_fraction < 1:
        raise LayoutError(f"--validation-fraction must be at least 0 and below 1, got {options.validation_fraction}.")
    if options.retries < 0:
        raise LayoutError(f"--retries must be at least 0, got {options.retries}.")
    if options.max_memory_gib is not None and not options.max_memory_gib > 0:
        raise LayoutError(f"--max-memory-gib must be above 0, got {options.max_memory_gib:g}.")
    max_memory_bytes = None if options.max_memory_gib is None else int(options.max_memory_gib * GIB)
    label_set = load_label_set(options.label_set)
    settings = PreparationSettings(
        spatial_size=tuple(options.spatial_size),
        depth_policy=options.depth_policy,
        spacing_mm=tuple(options.spacing_mm or PreparationSettings.spacing_mm),
        windows=tuple(options.window),
        check_hu=not options.no_hu_check,
        mask_coding=MaskCoding(options.anatomical_mask_labels, options.totalsegmentator_version),
        volume_format=options.volume_format,
    )
    dataset = _read_dataset(options, source, output, label_set)
    masks = _mask_sources(options, dataset)
    if options.dry_run:
        plan = plan_cases(dataset, settings, masks, output)
        return 0 if estimate(plan, max(1, options.workers), output, max_memory_bytes) else EXIT_NOTHING_DONE
    result = run_preparation(
        dataset,
        settings,
        masks,
        output,
        run_settings=_run_settings(options, settings, dataset, masks, label_set),
        label_set=label_set,
        # In a scan folder the splits are final already: one for all, or chosen by patient with test.
        validation_fraction=options.validation_fraction if dataset.layout == "ct_rate" else 0.0,
        seed=options.seed,
        run=_task_runner(options, dataset, output),
        max_memory_bytes=max_memory_bytes,
        overwrite=options.overwrite,
    )
    counts = ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in result.summary.items() if number)
    print(f"{counts or 'no case'} ({result.num_kept} were finished before)")
    for remark in result.remarks:
        print(f"note: {remark}")
    for outcome in result.refused[:_SHOWN_REFUSALS]:
        print(f"refused {outcome.volume_id}: {outcome.reason}", file=sys.stderr)
    if len(result.refused) > _SHOWN_REFUSALS:
        print(f"... and {len(result.refused) - _SHOWN_REFUSALS} more, see the log", file=sys.stderr)
    print(f"manifest: {options.output / result.manifest.name}")
    print(f"log:      {options.output / result.log.name}")
    return EXIT_SOME_REFUSED if result.refused else 0


def _task_runner(options: argparse.Namespace, dataset: RawDataset, output: Path) -> TaskRunner:
    if options.dask_scheduler is None:
        return partial(run_tasks, num_workers=options.workers, num_retries=options.retries)
    scheduler = options.dask_scheduler
    if "://" not in scheduler and not os.path.isfile(scheduler) and ":" in scheduler:
        scheduler = f"tcp://{scheduler}"
    return partial(
        run_on_cluster,
        scheduler=scheduler,
        output=output,
        sources=[dataset.root, *(case.path for case in dataset.cases[:1])],
        num_retries=options.retries,
    )


def _read_dataset(options: argparse.Namespace, source: Path, output: Path, label_set: LabelSet) -> RawDataset:
    root = find_ct_rate_root(source) if source.is_dir() else None
    if options.layout == "ct_rate" or (options.layout == "auto" and root is not None):
        if options.split is not None:
            raise LayoutError(
                f"--split {options.split}: CT-RATE has its official split; leave the option out, or --layout "
                f"scan_folder."
            )
        return read_ct_rate(
            root or source,
            label_set=label_set,
            release=options.release,
            reconstructions=options.reconstructions,
        )
    skip = [output]
    skip += [folder for folder in (options.lesion_masks, options.rexgrounding) if folder]
    skip += [Path(options.anatomical_masks)] if options.anatomical_masks not in ANATOMICAL_MASK_MODES else []
    return read_scan_folder(
        source,
        split=options.split or "test",
        seed=options.seed,
        validation_fraction=options.validation_fraction,
        test_fraction=_TEST_FRACTION,
        num_labels=label_set.num_findings,
        skip=skip,
    )


def _mask_sources(options: argparse.Namespace, dataset: RawDataset) -> MaskSources:
    lesions = _lesion_sources(options, dataset)
    mode = options.anatomical_masks
    if mode == "none":
        return lesions
    if mode == "totalsegmentator":
        require_totalsegmentator()
        return replace(lesions, run_totalsegmentator=True)
    if mode == "auto":
        usual = (dataset.root / _CT_RATE_MASKS / "ts_total", dataset.root / "anatomical_masks")
        return replace(
            lesions,
            anatomical_folders=tuple(folder for folder in usual if folder.is_dir()),
            beside_scans=dataset.layout == "scan_folder",
        )
    folder = Path(mode).resolve()
    if not folder.is_dir():
        raise LayoutError(
            f"--anatomical-masks {mode}: no such folder, expected a folder or one of "
            f"{list(ANATOMICAL_MASK_MODES)}; check it."
        )
    return replace(lesions, anatomical_folders=(folder,))


def _lesion_sources(options: argparse.Namespace, dataset: RawDataset) -> MaskSources:
    """The sources of lesion masks that are there and wanted; one that is asked for and not there is an error."""
    wanted = options.lesion_mask_sources or LESION_MASK_SOURCES
    folders: dict[str, Path] = {}
    for source, option, given in (
        (FOLDER, "--lesion-masks", options.lesion_masks),
        (REXGROUNDINGCT, "--rexgrounding", options.rexgrounding),
    ):
        if given is not None and not given.is_dir():
            raise LayoutError(f"{option} {given}: no such folder; check the path.")
        if given is not None and source not in wanted:
            raise LayoutError(
                f"{option} {given} has no effect with --lesion-mask-sources {' '.join(wanted)}; leave one of them out."
            )
        if given is not None:
            folders[source] = given.resolve()
    usual = dataset.root / "lesion_masks"
    if FOLDER not in folders and usual.is_dir():
        folders[FOLDER] = usual
    pseudo_masks = dataset.root / _CT_RATE_MASKS
    if any((pseudo_masks / task.folder).is_dir() for task in LESION_TASKS.values()):
        folders[TOTALSEGMENTATOR] = pseudo_masks
    absent = [source for source in options.lesion_mask_sources or () if source not in folders]
    if absent:
        raise LayoutError(
            f"--lesion-mask-sources {absent[0]}: there are none, expected a folder of --lesion-masks, --rexgrounding, "
            f"or {_CT_RATE_MASKS.as_posix()} with {' or '.join(task.folder for task in LESION_TASKS.values())} in the "
            f"source; check the paths."
        )
    return MaskSources(
        lesion_folder=folders.get(FOLDER) if FOLDER in wanted else None,
        rexgrounding_folder=folders.get(REXGROUNDINGCT),
        totalsegmentator_lesions=folders.get(TOTALSEGMENTATOR) if TOTALSEGMENTATOR in wanted else None,
        resample_lesion_masks=options.resample_lesion_masks,
    )


def _run_settings(
    options: argparse.Namespace,
    settings: PreparationSettings,
    dataset: RawDataset,
    masks: MaskSources,
    label_set: LabelSet,
) -> dict[str, Any]:
    def relative(folder: Path | None) -> str | None:
        return None if folder is None else Path(os.path.relpath(folder, dataset.root)).as_posix()

    mode = options.anatomical_masks
    described = {
        **settings.to_dict(),
        "layout": dataset.layout,
        "release": dataset.release,
        "anatomical_masks": mode if mode in ANATOMICAL_MASK_MODES else relative(masks.anatomical_folders[0]),
        "lesion_masks": relative(masks.lesion_folder),
        "rexgrounding": relative(masks.rexgrounding_folder),
        "totalsegmentator_lesions": relative(masks.totalsegmentator_lesions),
        "resample_lesion_masks": masks.resample_lesion_masks,
        "label_set": label_set.name,
        "validation_fraction": options.validation_fraction,
        "seed": options.seed,
    }
    if dataset.layout == "ct_rate":
        described["reconstructions"] = options.reconstructions
    else:
        described["split"] = options.split or "test"
    return described


if __name__ == "__main__":
    sys.exit(main())
