"""Preparing a whole data set: what is there already, what is left to do, the pool, and the two files at the end.

A run may be killed at any moment and started again. A case is finished when its sidecar exists; the sidecar holds a
digest of the settings (other settings stop the run, so that no data set is half of each) and a digest of its inputs
(other inputs make the case again). One bad file or dead process costs its case only; a full disk or a lost cluster
would cost every case to come, and stops the run.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.anatomical_masks import find_anatomical_mask
from data_prep.case_preparation import (
    CaseOutcome,
    CaseTask,
    one_line,
    prepare_case,
    read_finished_sidecars,
    remove_prepared_files,
)
from data_prep.dask_cluster import ClusterLost
from data_prep.lesion_labels import EMPTY, contradiction_remarks, contradictions, disease_labels
from data_prep.lesion_mask_sources import find_all_lesion_masks
from data_prep.manifest import build_log, build_manifest, label_remarks
from data_prep.memory_need import memory_refusal
from data_prep.preparation_settings import PreparationSettings, digest_of
from data_prep.progress import progress_bar
from data_prep.raw_case import LayoutError, RawCase, RawDataset
from data_prep.worker_pool import TaskRunner, WorkerDied, run_tasks
from vlm3d_ext.data.atomic_files import TEMPORARY_SUFFIX, write_json
from vlm3d_ext.data.patient_split import choose_held_out_patients
from vlm3d_ext.data.prepared_case import PreparedCaseError, read_sidecar
from vlm3d_ext.data.scan import Scan, UnusableScanError
from vlm3d_ext.text.label_set import LabelSet

__all__ = ["MaskSources", "PreparationResult", "RunStopped", "plan_cases", "run_preparation"]

LOG_NAME = "preparation_log.json"
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class MaskSources:
    """Where masks come from.

    Args:
        anatomical_folders: folders to look in.
        beside_scans: look for ``segmentations/`` beside each scan, too.
        run_totalsegmentator: make them instead.
        lesion_folder: folder of the user's own lesion masks, or None.
        rexgrounding_folder: release of ReXGroundingCT, or None.
        totalsegmentator_lesions: CT-RATE's folder of pseudo-masks, or None.
        resample_lesion_masks: bring lesion masks on another grid onto their scan's, instead of refusing the case.
    """

    anatomical_folders: tuple[Path, ...] = ()
    beside_scans: bool = False
    run_totalsegmentator: bool = False
    lesion_folder: Path | None = None
    rexgrounding_folder: Path | None = None
    totalsegmentator_lesions: Path | None = None
    resample_lesion_masks: bool = False


class RunStopped(RuntimeError):
    """The run cannot go on, and can be taken up again; one line says why, how far it came, and what to do."""


@dataclass(frozen=True)
class PreparationResult:
    """What a run came to.

    Args:
        summary: the log's summary.
        remarks: the log's remarks.
        outcomes: what became of each raw scan, sorted by volume id.
        refused: those of refused cases.
        manifest: path of manifest.json.
        log: path of preparation_log.json.
        num_kept: cases that were finished before this run.
    """

    summary: Mapping[str, int]
    remarks: Sequence[str]
    outcomes: Sequence[CaseOutcome]
    refused: Sequence[CaseOutcome]
    manifest: Path
    log: Path
    num_kept: int


@dataclass
class CasePlan:
    """What is to be done: `tasks`, and the `outcomes` that are known without opening a volume."""

    tasks: list[CaseTask] = field(default_factory=list)
    outcomes: list[CaseOutcome] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def plan_cases(
    dataset: RawDataset,
    settings: PreparationSettings,
    masks: MaskSources,
    output: Path,
    inspect_scan: Callable[[Path, Scan], Sequence[str]] | None = None,
) -> CasePlan:
    """Sort out excluded and refused cases and find the masks of the others; opens no volume and writes nothing."""
    hidden = {str(dataset.root): "", str(output): ""}
    for folder in (*masks.anatomical_folders, masks.lesion_folder, masks.rexgrounding_folder):
        if folder is not None:
            hidden.setdefault(str(folder), f"{folder.name}/")
    lesions = find_all_lesion_masks(masks.lesion_folder, masks.rexgrounding_folder, masks.totalsegmentator_lesions)
    plan = CasePlan(remarks=list(dataset.remarks))
    for case in dataset.cases:
        if lesions.rexgrounding:
            case = lesions.rexgrounding.exclude_held_out(case)
        if case.exclusion or case.refusal:
            # Exclusion comes first: what is left out on purpose needs no repair.
            status, reason = ("excluded", case.exclusion) if case.exclusion else ("refused", case.refusal)
            plan.outcomes.append(CaseOutcome(case.volume_id, status, reason or "", case.notes))
            continue
        try:
            anatomical = find_anatomical_mask(case, masks.anatomical_folders, masks.beside_scans)
            lesion_masks, notes = lesions.masks_of(case)
        except (UnusableScanError, OSError) as error:
            plan.outcomes.append(CaseOutcome(case.volume_id, "refused", one_line(error, hidden), case.notes))
            continue
        task = CaseTask(
            case=case.noted(*notes),
            settings=settings,
            output=output,
            anatomical_mask=anatomical,
            run_totalsegmentator=masks.run_totalsegmentator,
            lesion_masks=lesion_masks,
            resample_lesion_masks=masks.resample_lesion_masks,
            hidden_paths=hidden,
            inspect_scan=inspect_scan,
        )
        plan.tasks.append(replace(task, input_digest=_input_digest(task)))
    plan.remarks += lesions.remarks({case.volume_id for case in dataset.cases})
    if masks.anatomical_folders and plan.tasks and not any(task.anatomical_mask for task in plan.tasks):
        folders = [folder.name for folder in masks.anatomical_folders]
        plan.remarks.append(f"anatomical masks: none of the scans has a mask in {folders}")
    return plan


def _input_digest(task: CaseTask) -> str:
    """Digest of names and sizes of the files that a case is made from, and of what the tables say of its voxels.

    Sizes, not contents: hashing every scan again at each start would cost as much as preparing it. Whoever replaces a
    file by another of exactly its size uses --overwrite.
    """
    case = task.case
    files = {"scan": _files_below(case.path)}
    if task.anatomical_mask:
        files["anatomical_mask"] = _files_below(task.anatomical_mask)
    for disease, mask in task.lesion_masks.items():
        files[disease] = _files_below(mask.path)
    # What a case lacks adds no key, so that cases prepared before there was one stay finished.
    further = {"series_number": case.series_number, "content_sha256": case.content_sha256}
    return digest_of(
        {
            **{name: value for name, value in further.items() if value is not None},
            "files": files,
            "values": [case.stored_values, case.spacing_mm],
            "totalsegmentator": task.run_totalsegmentator,
            "lesions": {disease: mask.selection() for disease, mask in task.lesion_masks.items()},
            # Without a lesion mask there is nothing that the option could change.
            "resample_lesion_masks": task.resample_lesion_masks and bool(task.lesion_masks),
        }
    )


def _files_below(path: Path) -> list[list[str | int]]:
    paths = sorted(child for child in path.iterdir() if child.is_file()) if path.is_dir() else [path]
    return [[child.name, child.stat().st_size if child.exists() else -1] for child in paths]


def run_preparation(
    dataset: RawDataset,
    settings: PreparationSettings,
    masks: MaskSources,
    output: Path,
    *,
    run_settings: Mapping[str, Any],
    label_set: LabelSet,
    validation_fraction: float = 0.0,
    seed: int = 0,
    num_workers: int = 1,
    run: TaskRunner | None = None,
    max_memory_bytes: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    inspect_scan: Callable[[Path, Scan], Sequence[str]] | None = None,
) -> PreparationResult:
    """Prepare what is not prepared yet, then write manifest and log.

    Args:
        dataset: the raw data.
        settings: what decides the bytes of a case.
        masks: where masks come from.
        output: folder of the prepared data set; made if need be.
        run_settings: all settings, as manifest and log shall show them.
        label_set: what the labels of the cases mean.
        validation_fraction: share of the training patients that become validation patients; 0 leaves the splits as
            they are.
        seed: of that choice.
        num_workers: processes; 0 works in this one.
        run: works on the cases, in place of such processes; called when the output folder is there.
        max_memory_bytes: refuse a case that would need more memory than this (`data_prep.memory_need`), unread.
        overwrite: forget what was prepared before.
        quiet: no progress bar.
        inspect_scan: a picklable function of a scan's path and the scan that returns notes on it, or raises
            `UnusableScanError` to refuse it; not asked about finished cases, nor about those that come prepared.

    Raises:
        LayoutError: if the output holds cases of other settings (without `overwrite`), is the raw data's own folder,
            or another run is busy in it.
        RunStopped: if the cluster that works on the cases is lost.
        OSError: if the output cannot be written, or its disk is full; cases that are finished stay.
    """
    if output.resolve() == dataset.root.resolve():
        raise LayoutError(
            f"--output {output}: is the folder of the raw data; choose another, so that nothing raw is touched."
        )
    output.mkdir(parents=True, exist_ok=True)
    with _only_run_in(output):
        _check_writable(output)
        _remove_leftovers(output)
        if overwrite:
            _forget_prepared_cases(output)
        plan = plan_cases(dataset, settings, masks, output, inspect_scan)
        unfinished = _unfinished_tasks(plan.tasks, settings, output)
        if run is None:
            run = partial(run_tasks, num_workers=min(num_workers, len(unfinished)))
        fresh = _run(run, unfinished, len(plan.tasks), max_memory_bytes, quiet)
        _remove_leftovers(output)  # of workers that were killed
        outcomes = list(plan.outcomes)
        prepared: list[RawCase] = []
        sidecars = {}
        labels = disease_labels([task.case for task in plan.tasks], label_set)
        disagreeing = {}
        for task in plan.tasks:
            case = task.case
            outcome = fresh.get(case.volume_id) or CaseOutcome(case.volume_id, "prepared")
            if outcome.status == "prepared":
                sidecars[case.volume_id] = read_finished_sidecars(output, case, settings.depth_policy) or []
                prepared.append(case)
                voxels = sidecars[case.volume_id][0]["lesion_voxels_in_scan"]
                disagreeing[case.volume_id] = contradictions(labels[case.volume_id], voxels)
                notes = [f"{disease}: {what}" for disease, what in disagreeing[case.volume_id].items()]
                outcome = replace(outcome, notes=(*_sidecar_notes(sidecars[case.volume_id]), *notes))
            outcomes.append(replace(outcome, notes=case.notes + outcome.notes))
        prepared = _with_validation(prepared, validation_fraction, seed)
        manifest = build_manifest(
            name=dataset.layout if dataset.release is None else f"{dataset.layout}_{dataset.release}",
            label_set=label_set.name,
            label_names=label_set.names,
            settings=run_settings,
            source_root=Path(os.path.relpath(dataset.root, output)).as_posix(),
            cases=prepared,
            sidecars=sidecars,
            not_annotated={
                volume_id: [disease for disease, what in found.items() if what == EMPTY]
                for volume_id, found in disagreeing.items()
            },
        )
        remarks = [*plan.remarks, *contradiction_remarks(disagreeing), *label_remarks(manifest["class_counts"])]
        log = build_log(settings=run_settings, dataset=dataset, outcomes=outcomes, remarks=remarks)
        write_json(output / MANIFEST_NAME, manifest)
        write_json(output / LOG_NAME, log)
    outcomes.sort(key=lambda outcome: outcome.volume_id)
    return PreparationResult(
        summary=log["summary"],
        remarks=remarks,
        outcomes=outcomes,
        refused=[outcome for outcome in outcomes if outcome.status == "refused"],
        manifest=output / MANIFEST_NAME,
        log=output / LOG_NAME,
        num_kept=len(plan.tasks) - len(unfinished),
    )


def _sidecar_notes(sidecars: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for sidecar in sidecars for note in sidecar["notes"]))


@contextlib.contextmanager
def _only_run_in(output: Path) -> Iterator[None]:
    """Hold a lock on the folder itself, which leaves no file behind and ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; the rename of whole files still protects each case
        yield
        return
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LayoutError(
                f"--output {output}: another preparation is running there; wait for it, or choose another."
            ) from None
        except OSError:
            pass  # a network file system without locks on folders
        yield
    finally:
        os.close(descriptor)


def _check_writable(output: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        # The file's own random name would help nobody.
        raise OSError(error.errno, error.strerror, str(output)) from None


def _remove_leftovers(output: Path) -> None:
    masks = [folder for name in ("lesion_masks", "lesion_masks_original_grid") for folder in (output / name).glob("*")]
    for folder in (output, output / "volumes", output / "anatomical_masks", *masks):
        for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)


def _forget_prepared_cases(output: Path) -> None:
    """Remove the files of earlier cases, and only those: what no sidecar of ours names is not ours to remove."""
    for path in sorted((output / "volumes").glob("*.json")):
        with contextlib.suppress(PreparedCaseError):
            if "settings_digest" in read_sidecar(path):
                remove_prepared_files(output, path.stem)


def _unfinished_tasks(tasks: Sequence[CaseTask], settings: PreparationSettings, output: Path) -> list[CaseTask]:
    unfinished = []
    for task in tasks:
        try:
            sidecars = read_finished_sidecars(output, task.case, settings.depth_policy)
        except PreparedCaseError:
            sidecars = None
        if sidecars and any(sidecar.get("settings_digest") != settings.digest for sidecar in sidecars):
            raise LayoutError(
                f"volumes/{sidecars[0]['volume_id']}.json: was prepared with other settings than asked for now; "
                "choose another --output, or --overwrite to prepare everything again."
            )
        if not sidecars or any(sidecar.get("input_digest") != task.input_digest for sidecar in sidecars):
            unfinished.append(task)
    return unfinished


def _run(
    run: TaskRunner, tasks: Sequence[CaseTask], total: int, max_memory_bytes: int | None, quiet: bool
) -> dict[str, CaseOutcome]:
    outcomes: dict[str, CaseOutcome] = {}
    function: Callable[[CaseTask], CaseOutcome] = prepare_case
    if max_memory_bytes is not None:
        function = partial(_prepare_within, function, max_memory_bytes)
    with progress_bar(total, total - len(tasks), "case", quiet) as progress:
        try:
            for index, result in run(function, tasks):
                task = tasks[index]
                if isinstance(result, Exception):
                    result = CaseOutcome(task.case.volume_id, "refused", _worker_failure(task, result))
                    with contextlib.suppress(OSError):
                        remove_prepared_files(task.output, task.case.volume_id)
                if result.disk_full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                outcomes[task.case.volume_id] = result
                progress.update()
        except ClusterLost as error:
            num_done = total - len(tasks) + sum(outcome.status == "prepared" for outcome in outcomes.values())
            raise RunStopped(
                f"{error}; {num_done} of {total} cases are done and kept; start the same command again to go on."
            ) from None
    return outcomes


def _prepare_within(prepare: Callable[[CaseTask], CaseOutcome], max_memory_bytes: int, task: CaseTask) -> CaseOutcome:
    reason = memory_refusal(task, max_memory_bytes)
    return prepare(task) if reason is None else CaseOutcome(task.case.volume_id, "refused", reason)


def _worker_failure(task: CaseTask, error: Exception) -> str:
    if isinstance(error, WorkerDied):
        return (
            f"{task.case.source}: the process that worked on it ended with {error} (out of memory?); start again with "
            "fewer --workers."
        )
    return one_line(error, task.hidden_paths)


def _with_validation(cases: Sequence[RawCase], fraction: float, seed: int) -> list[RawCase]:
    training = {case.patient_id for case in cases if case.split == "training"}
    held_out = choose_held_out_patients(training, fraction, seed)
    return [replace(case, split="validation") if case.patient_id in held_out else case for case in cases]
